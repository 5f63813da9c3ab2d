"""Plausible calls that came to grief: what programs, NumPy or OpenCV hand over, and near misses."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from small_model import K, noise, small_model, thin_backbone

from smope import SMOPE, Camera, Poses
from smope.camera import CameraError
from smope.devices import DeviceError
from smope.draw import DrawError
from smope.images import ImageError, load_image
from smope.meshes import MeshError
from smope.objects import SymmetryError

BOX = trimesh.creation.box((0.1, 0.1, 0.1))


@pytest.fixture(scope="module", autouse=True)
def thin() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        thin_backbone(patch)
        yield


@pytest.fixture(scope="module")
def shared(thin: None) -> SMOPE:
    return small_model()


# What the caller's program has set


@contextmanager
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def elsewhere() -> Iterator[None]:
    torch.set_default_device("meta")  # as "cuda" is to tensors of the CPU: nothing mixes with it
    try:
        yield
    finally:
        torch.set_default_device(None)


SETTINGS: list[Callable[[], AbstractContextManager[object]]] = [
    float64,
    elsewhere,
    torch.inference_mode,
    lambda: torch.autocast("cpu", torch.bfloat16),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=["float64", "device", "inference", "autocast"])
def test_settings_of_pytorch_change_no_pose(
    shared: SMOPE, tmp_path: Path, setting: Callable[[], AbstractContextManager[object]]
) -> None:
    shared.save_pretrained(tmp_path)
    picture = noise(0)

    def found(model: SMOPE) -> torch.Tensor:
        poses = model.predict(picture, K=K, dist=[0.1, 0.0, 0.0, 0.0], threshold=0.0)
        poses.save(tmp_path / "poses.json")
        return Poses.load(tmp_path / "poses.json").T_CO

    def made() -> SMOPE:
        model = SMOPE.from_pretrained(tmp_path, device="cpu")
        model.register_meshes({"box": BOX}, "m", add=True)
        return model

    plain = made()
    expected = found(plain)
    with setting():
        same, own = found(plain), made()
        inside = found(own)
    # Beside a default device PyTorch's attention takes another of its paths, which rounds otherwise.
    assert torch.allclose(same, expected, atol=1e-3)
    assert torch.allclose(inside, expected, atol=1e-3)
    if setting is torch.inference_mode:
        own.fast = True  # which looks whether weights have changed
        assert torch.allclose(found(own), expected, atol=1e-2)


def test_a_network_that_was_set_to_train_predicts_all_the_same(shared: SMOPE) -> None:
    model = copy.deepcopy(shared)
    model.network.train()
    for _ in range(2):
        poses = model.predict(noise(0), threshold=0.0)
        assert torch.equal(poses.T_CO, shared.predict(noise(0), threshold=0.0).T_CO)
    assert model.network.training  # somebody's training may go on after a look


def test_a_network_in_another_type_is_one_error(shared: SMOPE) -> None:
    model = copy.deepcopy(shared)
    model.network.half()
    with pytest.raises(ValueError, match=r"torch\.float16 given, torch\.float32 expected.*network\.float"):
        model.predict(noise(0))


@pytest.mark.parametrize("device", ["gpu", "cuda:99", torch.float16, "cpu,cpu"])
def test_a_device_that_is_not_there_is_one_error(shared: SMOPE, device: Any) -> None:
    with pytest.raises(DeviceError, match="given"):
        shared.to(device)
    with pytest.raises(DeviceError, match="given"):
        SMOPE.from_pretrained("lmo", device=device)
    assert next(shared.network.parameters()).dtype == torch.float32


def test_a_model_says_what_it_looks_for(shared: SMOPE) -> None:
    assert repr(shared) == "SMOPE(smope-s for 96 x 64 pixels on cpu, looks for ball, brick)"


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, "float16"])
def test_weights_are_not_saved_in_a_type_that_ruins_them(shared: SMOPE, tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"dtype=.* given; torch\.float16"):
        shared.save_pretrained(tmp_path / "model", dtype=dtype)
    assert not (tmp_path / "model").exists()


def test_saving_knows_the_home_folder(shared: SMOPE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shared.save_pretrained("~/model")
    assert list(SMOPE.from_pretrained("~/model", device="cpu").objects) == ["ball", "brick"]


# Options


def test_numbers_of_numpy_and_pytorch_are_numbers(shared: SMOPE) -> None:
    for most in (3, np.int64(3), torch.tensor(3)):
        for lowest in (0.0, np.float32(0), torch.tensor(0.0), np.array(0.0)):
            assert len(shared.predict(noise(0), threshold=lowest, top_k=most)) <= 3
    for options in ({"top_k": True}, {"threshold": True}, {"threshold": "0.5"}, {"top_k": None}):
        with pytest.raises(ValueError, match="a whole number expected"):
            shared.predict(noise(0), **options)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ((noise(i) for i in range(2)), r"generator given.*call list\(\) on it, or model\.stream"),
        (io.BytesIO(b"x"), r"BytesIO given.*PIL\.Image\.open"),
        (b"x", r"bytes given.*PIL\.Image\.open"),
        (np.zeros((2, 64, 96, 3), np.uint8), "pass a batch as a list of images"),
        (Path(__file__).parent, "the folder .* given; a file expected"),
        ("https://host/a.png", "no image file 'https://host/a.png'"),
        (torch.full((3, 64, 96), 1.2), r"from 1\.2 to 1\.2 given.*clamp"),
    ],
)
def test_what_is_nearly_an_image_is_told_what_to_do(shared: SMOPE, image: object, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        shared.predict(image, fov=50)


def test_a_video_is_told_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    with pytest.raises(ImageError, match="take the frames out of a video first"):
        load_image(tmp_path / "a.mp4")


def test_rounding_beyond_one_is_cut() -> None:
    picture = torch.rand(3, 8, 8)
    picture[0, 0, :2] = torch.tensor([1.0001, -0.0001])
    assert torch.equal(load_image(picture), (picture.clamp(0, 1) * 255).round().to(torch.uint8))


def test_a_picture_that_lost_its_values_is_told(caplog: pytest.LogCaptureFixture) -> None:
    values = np.linspace(0, 1, 48).reshape(4, 4, 3)
    load_image((255 * values).astype(np.uint8))
    assert not caplog.records
    load_image(values.astype(np.uint8))
    assert "which is black: was it in 0..1?" in caplog.text


# Lenses


def test_opencvs_longer_lists_serve_where_their_ends_are_0(shared: SMOPE) -> None:
    eight = [0.1, 0.01, 1e-3, -1e-3, 0.002, 0.01, 0.0, 0.001]
    expected = shared.predict(noise(0), K=K, dist=eight, threshold=0.0)
    for count in (4, 6):
        found = shared.predict(noise(0), K=K, dist=eight + [0.0] * count, threshold=0.0)
        assert torch.equal(found.T_CO, expected.T_CO)
        with pytest.raises(CameraError, match=f"dist of {8 + count} coefficients given, some after k6 not 0"):
            shared.predict(noise(0), K=K, dist=[*eight, *[0.0] * (count - 1), 0.01])


@pytest.mark.parametrize("dist", [[-5.0, 0, 0, 0], [0, 0, 4.0, 0], [1e38] * 5, [0.1, 0, 0, 0, 0, -30, 0, 0]])
def test_a_lens_that_folds_the_photo_is_one_error(dist: list[float]) -> None:
    with pytest.raises(CameraError, match="folds back into itself"):
        Camera(torch.tensor(K), (96, 64), torch.tensor(dist))


@pytest.mark.parametrize(
    ("focal", "size", "dist"),
    [  # published calibrations: EuRoC cam0, TUM freiburg1, KITTI raw (2011_09_26, cam 2)
        (458.654, (752, 480), [-0.28340811, 0.07395907, 0.00019359, 1.76187114e-05]),
        (517.3, (640, 480), [0.2624, -0.9531, -0.0054, 0.0026, 1.1633]),
        (959.791, (1392, 512), [-0.3691481, 0.1968681, 0.001353473, 0.0005677587, -0.06770705]),
    ],
)
def test_lenses_of_real_cameras_are_taken(focal: float, size: tuple[int, int], dist: list[float]) -> None:
    middle = ((size[0] - 1) / 2, (size[1] - 1) / 2)
    matrix = torch.tensor([[focal, 0, middle[0]], [0, focal, middle[1]], [0, 0, 1.0]])
    assert Camera(matrix, size, torch.tensor(dist)).dist is not None


# Meshes


@pytest.mark.parametrize("name", ["a\nb", "\0", " ", "\t"])
def test_a_name_that_breaks_a_line_is_refused(shared: SMOPE, name: str) -> None:
    with pytest.raises(ValueError, match=r"name .* given"):
        shared.register_meshes({name: BOX}, "m")


def test_a_mesh_of_tensors_that_want_gradients_is_taken(shared: SMOPE) -> None:
    model = copy.deepcopy(shared)
    vertices = torch.tensor(np.array(BOX.vertices)).requires_grad_()
    model.register_meshes({"box": (vertices, torch.tensor(np.array(BOX.faces)))}, "m")
    assert model.objects["box"].diameter == pytest.approx(0.1 * 3**0.5)


def test_what_is_nearly_a_mesh_is_told_what_to_do(shared: SMOPE, tmp_path: Path) -> None:
    (tmp_path / "part.step").write_text("ISO-10303-21;")
    (tmp_path / "part.txt").write_text("a part")
    (tmp_path / "part").write_text("a part")
    (tmp_path / "part.ply").write_text("a part")
    for source, message in [
        (tmp_path, "the folder .* given, a mesh file expected"),
        (tmp_path / "part.step", "save it as OBJ, PLY, STL or GLB"),
        (tmp_path / "part.txt", "save it as OBJ, PLY, STL or GLB"),
        (tmp_path / "part", "save it as OBJ, PLY, STL or GLB"),
        (tmp_path / "part.ply", "cannot be read as a mesh: (?!.*save it as)"),  # it is a PLY already
        (([["a", "b", "c"]], [[0, 0, 0]]), "vertices and faces of numbers expected"),
    ]:
        with pytest.raises(MeshError, match=f"thing: .*{message}"):
            shared.register_meshes({"thing": source}, "m")
    with pytest.raises(MeshError, match=r"units=\['m'\] given"):
        shared.register_meshes({"thing": BOX}, ["m"])  # type: ignore[arg-type]


# Symmetries

AXIS = {"axis": [0, 0, 1], "offset": [0, 0, 0]}


@pytest.mark.parametrize(
    "given",
    [
        True,
        5,
        [],
        np.eye(4),
        [np.eye(4)],
        AXIS,
        {"axis": [0, 0, 1]},
        {"symmetries_discrete": None},
        {"symmetries_discrete": 5},
        {"symmetries_discrete": np.array(5.0)},
        {"symmetries_continuous": torch.tensor(5.0)},
        {"symmetries_discrete": [["a"] * 16]},
        {"symmetries_continuous": AXIS},
        {"symmetries_continuous": [[0, 0, 1]]},
        {"symmetries_continuous": [{"axis": "z"}]},
        {"symmetries_continuous": [{"axes": [0, 0, 1]}]},
        {"symetries_continuous": [AXIS]},
        {"continuous": [AXIS], "diameter": 100.0},
    ],
    ids=repr,
)
def test_malformed_symmetries_are_neither_lost_nor_a_crash(shared: SMOPE, given: Any) -> None:
    with pytest.raises(SymmetryError, match=r"thing: .*expected"):
        shared.register_meshes({"thing": BOX}, "m", symmetries={"thing": given})


def test_symmetries_of_trained_names_are_not_lost_in_silence(shared: SMOPE) -> None:
    with pytest.raises(ValueError, match="given without meshes: trained objects keep those"):
        shared.register_meshes(["ball"], symmetries={"ball": {"symmetries_continuous": [AXIS]}})


def test_a_trained_name_keeps_its_symmetries_where_its_mesh_stands_as_before(shared: SMOPE) -> None:
    ball = trimesh.creation.icosphere(subdivisions=3, radius=0.05)
    elsewhere = ball.copy().apply_translation((0.02, 0, 0))
    model = copy.deepcopy(shared)
    for mesh, symmetries, expected in [(ball, None, 1), (ball, {"ball": {}}, 0), (elsewhere, None, 0)]:
        model.register_meshes({"ball": mesh}, "m", symmetries=symmetries)
        assert len(model.objects["ball"].symmetries.continuous) == expected


# Drawing


@pytest.mark.parametrize("opacity", [5, -0.1, float("nan")])
def test_an_opacity_that_there_is_not_is_one_error(shared: SMOPE, opacity: float) -> None:
    picture = Image.fromarray(noise(0).permute(1, 2, 0).numpy())
    with pytest.raises(DrawError, match="0 to 1 expected"):
        shared.predict(picture, threshold=0.0).draw(picture, opacity=opacity)
