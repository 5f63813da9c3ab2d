"""What users get wrong in `predict`, `register_meshes` and `from_pretrained`: it works, or one error tells.

The parts have tests of their own with more cases; here is the way that a user goes.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from safetensors.torch import save_file
from small_model import SIZE, K, noise, small_model

from smope import SMOPE, Poses, hub
from smope.camera import CameraError
from smope.config import ConfigError
from smope.hub import WeightsError, WeightsNotFoundError
from smope.images import ImageError
from smope.meshes import MeshError
from smope.objects import SymmetryError


@pytest.fixture(scope="module")
def shared() -> SMOPE:
    return small_model()


def everything(model: SMOPE, image: object, **options: object) -> Poses:
    """All detections; whatever the image, every number of them is finite."""
    found = model.predict(image, threshold=0.0, **options)
    assert isinstance(found, Poses)
    for column in ("scores", "boxes_xyxy", "T_CO", "scale", "visibility", "sigma"):
        assert getattr(found, column).isfinite().all(), column
    return found


# Images


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (2000, 40), (60, 200), (3000, 1), (33, 31), (640, 480)])
def test_any_size_of_image_gives_finite_poses(shared: SMOPE, size: tuple[int, int]) -> None:
    found = everything(shared, noise(0, *size), fov=50.0)
    assert found.camera.size == size
    assert len(found) > 0


def test_forms_of_one_picture_give_the_same_poses(shared: SMOPE, tmp_path: Path) -> None:
    grey = noise(0)[:1].expand(3, -1, -1).contiguous()
    array = grey[0].numpy()
    picture = Image.fromarray(array)
    expected = everything(shared, grey)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter to the right
    picture.save(tmp_path / "grey.png")
    Image.fromarray(np.rot90(array).copy()).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(array.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    opaque = picture.convert("RGBA")
    palette = picture.convert("P")
    files = [tmp_path / f"{name}.png" for name in ("grey", "turned", "deep")]
    for source in (*files, str(files[0]), picture, opaque, palette, array, array[..., None].repeat(3, 2)):
        assert torch.equal(everything(shared, source).T_CO, expected.T_CO)
    assert torch.equal(everything(shared, grey.float() / 255).T_CO, expected.T_CO)


def test_an_upright_photo_wants_the_camera_of_the_upright_photo(shared: SMOPE, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(0).permute(1, 2, 0).numpy()).save(tmp_path / "a.jpg", exif=exif)
    with pytest.raises(ValueError, match=f"no camera given for an image of {SIZE[1]}x{SIZE[0]}"):
        shared.predict(tmp_path / "a.jpg")
    assert everything(shared, tmp_path / "a.jpg", fov=40).camera.size == (SIZE[1], SIZE[0])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.full((3, 64, 96), torch.nan), "18432 pixel values are NaN"),
        (torch.full((3, 64, 96), 7.0), "divide by 255"),
        (torch.zeros(2, 3, 64, 96), "pass a batch as a list"),
        (np.zeros((0, 96, 3), np.uint8), "empty image"),
        ("no.png", "no image file 'no.png'"),
        (None, "NoneType given; a path"),
        ([noise(0), torch.full((3, 64, 96), torch.inf)], "18432 pixel values are NaN or infinite"),
        ([[noise(0)]], "list given; a path"),
    ],
)
def test_what_is_no_image_is_one_error(shared: SMOPE, image: object, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        shared.predict(image)


# Cameras


def altered(**entries: float) -> list[list[float]]:
    matrix = [list(row) for row in K]
    for name, value in entries.items():
        row, column = {"fx": (0, 0), "fy": (1, 1), "cx": (0, 2), "cy": (1, 2), "last": (2, 2)}[name]
        matrix[row][column] = value
    return matrix


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.eye(4), r"shape \(4, 4\) given, \[3, 3\] expected"),
        ([90.0, 90.0, 47.5, 31.5], r"shape \(4,\) given"),
        (altered(fx=float("nan")), "not finite"),
        (np.array(K).T, "looks transposed"),
        (altered(last=2.0), "last row"),
        (altered(fx=-90.0), "above 0"),
        (altered(fx=300.0), "fx / fy"),
        (altered(fx=9.0, fy=5.0), "field of view"),
        (altered(fx=9000.0, fy=9000.0), "field of view"),
        (altered(cx=325.0, cy=242.0), r"principal point.* outside .*resize"),
    ],
)
def test_a_wrong_K_is_one_error(shared: SMOPE, matrix: object, message: str) -> None:
    with pytest.raises(CameraError, match=message):
        shared.predict(noise(0), K=matrix)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"K": K, "fov": 50.0}, "both K and fov given"),
        ({"K": [K, K]}, r"K: 2 given for 1 image"),
        ({"K": "K"}, "K: numbers expected"),
        ({"K": K, "top_k": 1.5}, "a whole number expected"),
        ({"K": [[1.0], [2.0, 3.0]]}, r"K: 2 given for 1 image"),
        ({"fov": [50.0, 60.0]}, r"fov: 2 given for 1 image"),
        ({"fov": "wide"}, "fov: numbers expected"),
        ({"fov": 1.05}, "5 to 150 degrees expected"),
        ({"fov": float("nan")}, "5 to 150 degrees expected"),
        ({"dist": [0.1, 0.0]}, "dist of 2 coefficients given, 4, 5 or 8 expected"),
        ({"dist": [0.1, 0.0, 0.0, float("inf")]}, "dist holds a value that is not finite"),
        ({"dist": np.zeros((2, 5))}, r"dist: 2 given for 1 image"),
        ({"threshold": 1.5}, "threshold 1.5"),
        ({"threshold": float("nan")}, "threshold nan"),
        ({"top_k": 0}, "top_k 0"),
    ],
)
def test_wrong_options_are_one_error(shared: SMOPE, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shared.predict(noise(0), **options)


def test_forms_of_one_camera_are_the_same(shared: SMOPE) -> None:
    expected = everything(shared, noise(0))
    rows = [np.array(row) for row in K]
    for matrix in (K, rows, np.array(K), torch.tensor(K), torch.tensor(K)[None], [K]):
        assert torch.equal(everything(shared, noise(0), K=matrix).T_CO, expected.T_CO)
    lens = [0.1, 0.01, 0.0, 0.0, 0.0]
    expected = everything(shared, noise(0), dist=lens)
    column, numbers = np.array(lens)[:, None], [np.float64(one) for one in lens]
    for dist in (lens[:4], np.array(lens), column, numbers, [np.array(lens)], lens + [0.0] * 3):
        assert torch.equal(everything(shared, noise(0), dist=dist).T_CO, expected.T_CO)
    both = shared.predict([noise(0), noise(0)], threshold=0.0, dist=[None, lens])
    assert both[0].camera.dist is None
    assert torch.allclose(both[1].T_CO, expected.T_CO, atol=1e-4)


# Meshes

BOX = trimesh.creation.box((0.1, 0.1, 0.1))
CORNERS, FACES = np.array(BOX.vertices), np.array(BOX.faces)
FLAT = np.array([[0.0, 0, 0], [0.1, 0, 0], [0.2, 0, 0]])


@pytest.mark.parametrize(
    ("mesh", "units", "message"),
    [
        ((np.zeros((0, 3)), np.zeros((0, 3), int)), "m", "no faces found"),
        (trimesh.Trimesh(), "m", "no faces found"),
        ((FLAT, np.array([[0, 1, 2]])), "m", "degenerate"),
        ((np.where(CORNERS > 0, np.nan, CORNERS), FACES), "m", "7 of 8 vertices are not finite"),
        ((CORNERS, FACES + 3), "m", "faces name vertices 3 to 10"),
        (BOX, "mm", "0.173 mm across with units='mm'.*with units='m' it would be"),
        ((CORNERS * 1000, FACES), "m", "173.2 m across with units='m'.*with units='mm' it would be"),
        (BOX, "km", "units='km' given"),
        (BOX, None, "needs its units"),
        ("nowhere.ply", "m", "no file 'nowhere.ply'"),
        (None, "m", "NoneType given"),
    ],
)
def test_a_wrong_mesh_is_one_error(shared: SMOPE, mesh: object, units: str | None, message: str) -> None:
    before = dict(shared.objects)
    with pytest.raises(ValueError, match=f"thing: .*{message}") as caught:
        shared.register_meshes({"thing": mesh}, units)
    assert units is None or isinstance(caught.value, MeshError)
    assert shared.objects == before


@pytest.mark.parametrize("ending", ["ply", "stl", "glb", "obj"])
def test_a_damaged_mesh_file_is_one_error(shared: SMOPE, tmp_path: Path, ending: str) -> None:
    BOX.export(tmp_path / f"whole.{ending}")
    content = (tmp_path / f"whole.{ending}").read_bytes()
    (tmp_path / f"cut.{ending}").write_bytes(content[: len(content) // 3])
    (tmp_path / f"empty.{ending}").write_bytes(b"")
    for name in ("cut", "empty"):
        with pytest.raises(MeshError, match=r"thing: .*(cannot be read as a mesh|no faces found)"):
            shared.register_meshes({"thing": tmp_path / f"{name}.{ending}"}, "m")


def test_open_flat_and_partly_degenerate_meshes_are_taken(shared: SMOPE) -> None:
    model = copy.deepcopy(shared)
    meshes = {
        "open": (CORNERS, FACES[:7]),
        "sheet": (CORNERS[:3], np.array([[0, 1, 2]])),
        "slivers": (CORNERS, np.vstack([FACES, [[0, 0, 0], [1, 1, 2]]])),
    }
    model.register_meshes(meshes, "m")
    everything(model, noise(0))
    assert list(model.objects) == list(meshes)


@pytest.mark.parametrize(
    ("meshes", "message"),
    [
        ({}, "no meshes given"),
        ([], "no meshes given"),
        ("ball", r"meshes='ball' given; a dict of name: mesh"),
        (["ball", "dog"], "'dog' given without a mesh, but the weights know only ball, brick"),
        (["box.ply"], "'box.ply' given without a mesh"),
        (BOX, "a dict of name: mesh"),
        ({1: BOX}, "name 1 given; a text that is not empty expected"),
    ],
)
def test_a_wrong_set_of_meshes_is_one_error(shared: SMOPE, meshes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shared.register_meshes(meshes, "m")


def test_a_wrong_symmetry_is_one_error(shared: SMOPE) -> None:
    with pytest.raises(SymmetryError, match='"auto" or the BOP form expected'):
        shared.register_meshes({"thing": BOX}, "m", symmetries="yes")
    with pytest.raises(ValueError, match="symmetries given for 'other', which is not among the meshes"):
        shared.register_meshes({"thing": BOX}, "m", symmetries={"other": {}})
    for entry in ({"symmetries_discrete": [[1.0, 0.0]]}, {"symmetries_continuous": [{"axis": [0, 0, 0]}]}):
        with pytest.raises(SymmetryError, match="symmetries_"):
            shared.register_meshes({"thing": BOX}, "m", symmetries={"thing": entry})


# Checkpoints


@pytest.fixture(scope="module")
def saved(shared: SMOPE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    shared.save_pretrained(folder, dtype=torch.float16)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def test_files_of_a_saved_model_can_be_read_as_others_can(saved: Path) -> None:
    modes = {path.name: path.stat().st_mode for path in saved.iterdir()}
    assert set(modes) == set(hub.MODEL_FILES)
    assert len(set(modes.values())) == 1


@pytest.mark.parametrize("share", [0.0, 1e-6, 0.001, 0.5, 0.999999])
def test_truncated_weights_are_one_error(folder: Path, share: float) -> None:
    path = folder / hub.WEIGHTS_FILE
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(WeightsError, match="damaged or cut short: fetch or copy it again"):
        SMOPE.from_pretrained(folder)


def test_overwritten_weights_are_one_error(folder: Path) -> None:
    path = folder / hub.WEIGHTS_FILE
    content = bytearray(path.read_bytes())
    content[-100_000:-50_000] = bytes(50_000)
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="damaged"):
        SMOPE.from_pretrained(folder)


class Trap:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_posing_as_weights_is_not_opened(folder: Path, tmp_path: Path) -> None:
    trap, path = Trap(tmp_path / "sprung"), folder / hub.WEIGHTS_FILE
    writers: list[Callable[[], object]] = [
        lambda: path.write_bytes(pickle.dumps(trap)),
        lambda: torch.save({"weight": trap}, path),
        lambda: torch.save({"weight": trap}, path, _use_new_zipfile_serialization=False),
    ]
    for write in writers:
        write()
        with pytest.raises(WeightsError, match="not a safetensors file; it was not opened"):
            SMOPE.from_pretrained(folder)
    assert not (tmp_path / "sprung").exists()


def test_weights_that_do_not_fit_are_one_error(folder: Path) -> None:
    tensors = hub.load_weights(folder)
    changes: dict[str, tuple[dict[str, torch.Tensor], str]] = {
        "level_embed": ({}, "level_embed"),
        "objects.ball.points": ({}, r"lack objects\.ball\.points"),
        "objects.brick.embedding": ({}, r"lack objects\.brick\.embedding"),
        "": ({"more": torch.zeros(1)}, "more"),
        "pose_head": ({"level_embed": torch.zeros(3, 31)}, "level_embed"),
    }
    for left_out, (added, message) in changes.items():
        kept = {name: tensor for name, tensor in tensors.items() if name != left_out}
        save_file({**kept, **added}, folder / hub.WEIGHTS_FILE)
        with pytest.raises(WeightsError, match=message):
            SMOPE.from_pretrained(folder)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("objects", ..., "objects: missing"),
        ("K", ..., "K: missing"),
        ("architecture", ..., "architecture None given"),
        ("architecture", "vit", "architecture 'vit' given"),
        ("colour", 1, "colour: unknown key"),
        ("network.widht", 32, r"network\.widht: unknown key; did you mean 'width'"),
        ("network.width", "32", r"network\.width: a whole number expected"),
        ("format", 99, "format 99 given, 1 expected"),
        ("image_size", [0, 480], "image_size"),
    ],
)
def test_a_wrong_config_is_one_error(folder: Path, place: str, value: Any, message: str) -> None:
    path = folder / hub.CONFIG_FILE
    data = json.loads(path.read_text())
    *parents, key = place.split(".")
    inner = data
    for parent in parents:
        inner = inner[parent]
    if value is ...:
        del inner[key]
    else:
        inner[key] = value
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=message) as caught:
        SMOPE.from_pretrained(folder)
    assert str(path) in str(caught.value)


def test_a_config_of_other_sizes_does_not_fit_the_weights(folder: Path) -> None:
    path = folder / hub.CONFIG_FILE
    path.write_text(path.read_text().replace('"width": 32', '"width": 64'))
    with pytest.raises(WeightsError, match=r"the weights do not fit config\.json"):
        SMOPE.from_pretrained(folder)


@pytest.mark.parametrize("name", [hub.CONFIG_FILE, hub.WEIGHTS_FILE])
def test_a_missing_file_is_one_error(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(WeightsNotFoundError, match=f"no {name} in it, so it holds no smope model"):
        SMOPE.from_pretrained(folder)
