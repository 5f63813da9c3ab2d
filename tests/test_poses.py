"""The result type: shapes are checked, indexing agrees with numpy, JSON loses nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smope.atomic import atomic_path
from smope.camera import Camera
from smope.poses import Poses, PosesError

CAMERA = Camera(K=[[572.4114, 0, 325.2611], [0, 573.57043, 242.04899], [0, 0, 1]], size=(640, 480))
COUNTED = ("labels", "scores", "boxes_xyxy", "T_CO", "scale", "visibility", "sigma")


def some_poses(count: int, seed: int = 0, camera: Camera = CAMERA) -> Poses:
    rng = np.random.default_rng(seed)

    def values(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=(count, *shape)).astype(np.float32))

    return Poses(
        names=tuple(f"object {i}" for i in range(count)),
        labels=torch.arange(count),
        scores=values(),
        boxes_xyxy=values(4),
        T_CO=values(4, 4),
        scale=values(3),
        visibility=values(),
        sigma=values(2),
        camera=camera,
    )


def arguments(count: int = 3) -> dict[str, object]:
    poses = some_poses(count)
    return {name: getattr(poses, name) for name in ("names", *COUNTED, "camera")}


@pytest.mark.parametrize("name", COUNTED)
def test_a_wrong_shape_is_named_with_what_was_given_and_expected(name: str) -> None:
    wrong = arguments()
    tensor = wrong[name]
    assert isinstance(tensor, torch.Tensor)
    wrong[name] = torch.cat([tensor, tensor])
    with pytest.raises(PosesError) as caught:
        Poses(**wrong)  # type: ignore[arg-type]
    message = str(caught.value)
    assert f"Poses.{name}" in message
    assert str(tuple(tensor.shape)) in message
    assert str((6, *tensor.shape[1:])) in message


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("scores", torch.zeros(3, dtype=torch.float64), "torch.float64 given, torch.float32 expected"),
        ("labels", torch.zeros(3), "torch.float32 given, torch.int64 expected"),
        ("T_CO", np.zeros((3, 4, 4)), "ndarray given"),
        ("names", "ape", "'ape' given"),
    ],
)
def test_a_wrong_type_is_named(name: str, value: object, said: str) -> None:
    with pytest.raises(PosesError, match=said):
        Poses(**{**arguments(), name: value})  # type: ignore[arg-type]


def index_cases() -> list[object]:
    mask = np.array([True, False, True, False, True])
    return [
        slice(1, 4), slice(None, None, -2), slice(0, 0), mask, torch.from_numpy(mask), mask.tolist(),
        np.array([3, 0, 0]), torch.tensor([-1, 2]), [4, 1], [], np.zeros(5, dtype=bool),
    ]  # fmt: skip


@pytest.mark.parametrize("index", index_cases(), ids=repr)
def test_indexing_picks_the_same_rows_as_numpy(index: object) -> None:
    poses = some_poses(5)
    rows = np.arange(5)[index if not isinstance(index, list) or index else slice(0, 0)]  # type: ignore[call-overload]
    picked = poses[index]  # type: ignore[index]
    assert picked.names == tuple(poses.names[i] for i in rows)
    assert len(picked) == len(rows)
    for name in COUNTED:
        np.testing.assert_array_equal(picked.numpy()[name], poses.numpy()[name][rows])


def test_single_indices_and_iteration_give_poses_of_length_one() -> None:
    poses = some_poses(3)
    assert [one.names for one in poses] == [("object 0",), ("object 1",), ("object 2",)]
    assert poses[-1].names == poses[np.int64(2)].names == poses[torch.tensor(2)].names == ("object 2",)
    assert poses[1].T_CO.shape == (1, 4, 4)


@pytest.mark.parametrize("index", [3, -4, [0, 3], np.zeros(2, dtype=bool), 1.5, True, [[0, 1]]])
def test_an_index_that_fits_nothing_is_refused(index: object) -> None:
    with pytest.raises(IndexError, match="given"):
        some_poses(3)[index]  # type: ignore[index]


def test_json_keeps_every_float32(tmp_path: Path) -> None:
    dist = torch.tensor([-0.1, 0.02, 1e-3, -1e-3, 0.3])
    before = some_poses(4, camera=Camera(K=CAMERA.K, size=CAMERA.size, dist=dist))
    before.save(tmp_path / "new folder" / "poses.json")
    after = Poses.load(tmp_path / "new folder" / "poses.json")
    assert after.names == before.names
    for name in COUNTED:
        assert torch.equal(getattr(after, name), getattr(before, name)), name
    assert torch.equal(after.camera.K, before.camera.K)
    assert after.camera.size == before.camera.size
    assert after.camera.dist is not None
    assert torch.equal(after.camera.dist, dist)
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["poses.json"]


@settings(max_examples=50)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=16, max_size=16))
def test_json_keeps_extreme_float32(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    path = tmp_path_factory.mktemp("json") / "poses.json"
    before = Poses(**{**arguments(1), "T_CO": torch.tensor(values, dtype=torch.float32).reshape(1, 4, 4)})  # type: ignore[arg-type]
    before.save(path)
    assert Poses.load(path).T_CO.numpy().tobytes() == before.T_CO.numpy().tobytes()


def test_no_object_found_is_a_result_too(tmp_path: Path) -> None:
    empty = some_poses(0)
    empty.save(tmp_path / "empty.json")
    again = Poses.load(tmp_path / "empty.json")
    assert len(again) == 0
    assert again.T_CO.shape == (0, 4, 4)
    assert "0 objects" in repr(again)


def test_a_value_that_json_lacks_is_refused_and_no_file_is_left(tmp_path: Path) -> None:
    poses = Poses(**{**arguments(1), "scores": torch.tensor([float("nan")])})  # type: ignore[arg-type]
    with pytest.raises(PosesError, match=r"Poses\.scores holds a value that is not finite"):
        poses.save(tmp_path / "poses.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["poses"][0].pop("T_CO"), "'T_CO' is missing"),
        (lambda d: d.pop("camera"), "'camera' is missing"),
        (lambda d: d["poses"][0].update(score="high"), "malformed"),
        (lambda d: d["poses"][0].update(box_xyxy=[1, 2, 3]), "malformed"),
        (lambda d: d.update(poses=None), "malformed"),
        (lambda d: d["camera"].update(K=[[1]]), "malformed"),
        (lambda d: d.update(format="else"), "no key"),
    ],
)
def test_a_malformed_file_is_named_with_its_fault(tmp_path: Path, change: object, said: str) -> None:
    path = tmp_path / "poses.json"
    some_poses(2).save(path)
    document = json.loads(path.read_text())
    change(document)  # type: ignore[operator]
    path.write_text(json.dumps(document))
    with pytest.raises(PosesError, match=said) as caught:
        Poses.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[]"])
def test_what_is_no_json_of_ours_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "poses.json"
    path.write_bytes(content)
    with pytest.raises(PosesError, match=r"what Poses\.save wrote"):
        Poses.load(path)


def test_the_repr_tells_name_place_and_expected_error() -> None:
    poses = Poses(
        names=("duck",),
        labels=torch.tensor([4]),
        scores=torch.tensor([0.97]),
        boxes_xyxy=torch.zeros(1, 4),
        T_CO=torch.tensor([[[1, 0, 0, 0.0121], [0, 1, 0, -0.0302], [0, 0, 1, 0.8123], [0, 0, 0, 1]]]),
        scale=torch.ones(1, 3),
        visibility=torch.tensor([0.931]),
        sigma=torch.tensor([[3.14, 0.0081]]),
        camera=CAMERA,
    )
    first, second = repr(poses).splitlines()
    assert first == "Poses(1 object, image 640 x 480)"
    for part in ("duck", "0.97", "(12.1, -30.2, 812.3) mm", "93 %", "3.1 deg, 8.1 mm"):
        assert part in second


def test_moving_keeps_values_and_type() -> None:
    poses = some_poses(2)
    moved = poses.to("meta")
    assert moved.T_CO.device.type == moved.camera.K.device.type == "meta"
    assert torch.equal(poses.to("cpu").T_CO, poses.T_CO)


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, fault: type[BaseException]) -> None:
    path = tmp_path / "result.txt"
    path.write_text("old")

    def write() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half of the n")
            raise fault

    with pytest.raises(fault):
        write()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["result.txt"]
