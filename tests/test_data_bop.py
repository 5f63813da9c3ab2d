"""The BOP reader against a data set written from known poses, and its errors against spoilt files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import made_up_bop
import numpy as np
import pytest
import trimesh
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.spatial.transform import Rotation

from smope.data.bop import BopDataset, BopScene, Estimate, read_bop_csv, write_bop_csv, write_bop_scene
from smope.data.reading import DataError
from smope.data.records import to_batch

NAMES = ["obj_000001", "obj_000004"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up_bop.write(tmp_path_factory.mktemp("bop") / "madeup")


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    """A data set of its own for each test that damages it: its scene folder."""
    return made_up_bop.write(tmp_path / "madeup") / "test" / "000005"


def test_poses_are_metres_and_boxes_hold_the_projected_mesh(root: Path) -> None:
    dataset = BopDataset(root)
    assert [t.inst_count for t in dataset.targets if t.im_id == 7] == [2, 1]
    (scene,) = dataset.scenes()
    assert list(scene.records) == [2, 7, 31]
    for im_id, objects in made_up_bop.poses().items():
        record = scene.records[im_id]
        assert record.size == made_up_bop.SIZE
        for annotation, (obj_id, T) in zip(record.annotations, objects, strict=True):
            assert annotation.name == f"obj_{obj_id:06d}"
            expected = np.array(T)
            expected[:3, 3] /= 1000
            np.testing.assert_allclose(annotation.T_CO, expected, atol=1e-15)
            points, _ = dataset.mesh(obj_id)
            pixels = (points @ expected[:3, :3].T + expected[:3, 3]) @ made_up_bop.K.T
            pixels = pixels[:, :2] / pixels[:, 2:]
            # The pictures were cast through whole-numbered pixel centres, half a pixel off BOP's own raster.
            inside = np.concatenate([pixels.min(0), pixels.max(0)]).clip(0, [96, 64, 96, 64])
            np.testing.assert_allclose(annotation.box_xyxy, inside, atol=1.5)


def test_batch_holds_images_masks_and_depth(root: Path) -> None:
    scene = BopDataset(root).scene(5)
    batch = scene.batch([2, 7], NAMES, masks=True)
    assert batch.labels.tolist() == [[0, 1, -1], [0, 1, 0]]
    np.testing.assert_allclose(batch.images.amax((1, 2, 3)).numpy(), np.array([2, 7]) / 255, rtol=1e-6)
    np.testing.assert_allclose(batch.K[0].numpy(), made_up_bop.K)
    assert batch.instance is not None
    assert batch.depth is not None
    assert batch.full_masks is not None
    for b, im_id in enumerate([2, 7]):
        depths = made_up_bop.depths(im_id)
        nearest = np.min([np.where(d > 0, d, np.inf) for d in depths], axis=0)
        shown = np.where(np.isfinite(nearest), nearest, 0) / 1000
        np.testing.assert_allclose(batch.depth[b].numpy(), shown, atol=6e-5)
        for n, depth in enumerate(depths):
            seen = (batch.instance[b] == n + 1).numpy()
            assert (seen == ((depth > 0) & (depth == nearest))).all()
            share = batch.visibility[b, n].item()
            assert share == pytest.approx(seen.sum() / (depth > 0).sum())
            x0, y0, x1, y1 = batch.boxes_xyxy[b, n].tolist()
            area = (x1 - x0) * (y1 - y0)
            covered = batch.full_masks[b, n].float().mean().item() * area
            assert covered == pytest.approx((depth > 0).sum(), rel=0.05)


def test_batch_without_a_named_object_leaves_it_out(root: Path) -> None:
    scene = BopDataset(root).scene(5)
    assert scene.batch([7], ["obj_000004"]).labels.tolist() == [[0]]
    assert to_batch([scene.records[31]], ["obj_000001"]).labels.shape == (1, 0)


def test_a_written_scene_comes_back(root: Path, tmp_path: Path) -> None:
    records = list(BopDataset(root).scene(5))
    hidden = replace(records[0].annotations[0], box_xyxy=None)
    records[0] = replace(records[0], annotations=(hidden, *records[0].annotations[1:]))
    write_bop_scene(tmp_path / "000005", records)
    (tmp_path / "000005/rgb").symlink_to(root / "test/000005/rgb")
    for record, expected in zip(BopScene(tmp_path / "000005"), records, strict=True):
        np.testing.assert_array_equal(record.K, expected.K)
        assert record.depth_scale == expected.depth_scale
        for a, b in zip(record.annotations, expected.annotations, strict=True):
            assert (a.object_id, a.visibility) == (b.object_id, b.visibility)
            np.testing.assert_allclose(a.T_CO, b.T_CO, rtol=1e-14)
            np.testing.assert_array_equal(a.box_xyxy, b.box_xyxy)
    # One line an image, as BOP's own files have it.
    assert len((tmp_path / "000005/scene_gt.json").read_text().splitlines()) == len(records) + 2


def test_a_scene_without_annotations_still_has_images(spoilt: Path) -> None:
    (spoilt / "scene_gt.json").unlink()
    assert [record.annotations for record in BopScene(spoilt)] == [(), (), ()]


def test_an_object_outside_the_frame_has_no_box(spoilt: Path) -> None:
    infos = json.loads((spoilt / "scene_gt_info.json").read_text())
    infos["31"][0]["bbox_obj"] = [-1, -1, -1, -1]
    (spoilt / "scene_gt_info.json").write_text(json.dumps(infos))
    assert BopScene(spoilt).records[31].annotations[0].box_xyxy is None


def test_jpeg_and_gray_images_are_found(spoilt: Path) -> None:
    (spoilt / "gray").mkdir()
    Image.new("L", made_up_bop.SIZE, 9).save(spoilt / "gray" / "000002.png")
    (spoilt / "rgb" / "000002.png").unlink()
    Image.new("RGB", made_up_bop.SIZE).save(spoilt / "rgb" / "000007.jpg")
    (spoilt / "rgb" / "000007.png").unlink()
    records = BopScene(spoilt).records
    assert records[2].image_path.parent.name == "gray"
    assert records[7].image_path.suffix == ".jpg"
    batch = to_batch([records[2]], NAMES)
    np.testing.assert_allclose(batch.images.numpy(), 9 / 255, rtol=1e-6)


def _edit(file: Path, *keys: str | int, value: object) -> None:
    content = json.loads(file.read_text())
    item = content
    for key in keys[:-1]:
        item = item[key]
    item[keys[-1]] = value
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "keys", "value", "message"),
    [
        (
            "scene_gt.json",
            ("7", 1, "cam_t_m2c"),
            [1, 2],
            "line 1, at 7 / 1: 3 numbers expected, 2 given",
        ),
        ("scene_gt.json", ("7", 1, "cam_t_m2c"), [1, 2, float("nan")], "at 7 / 1: finite numbers"),
        ("scene_gt.json", ("7", 1, "cam_R_m2c"), [2, 0, 0, 0, 2, 0, 0, 0, 2], "at 7 / 1: not a rotation"),
        ("scene_gt.json", ("7", 1, "cam_R_m2c"), [1, 0, 0, 0, 1, 0, 0, 0, -1], "at 7 / 1: not a rotation"),
        ("scene_gt.json", ("7", 1, "obj_id"), 9, "at 7 / 1 / obj_id: object 9 is unknown"),
        ("scene_gt.json", ("7", 1), {"obj_id": 1}, "at 7 / 1: key 'cam_R_m2c' is missing"),
        ("scene_gt_info.json", ("7",), [], "at 7: 3 entries expected"),
        ("scene_gt_info.json", ("7", 0, "visib_fract"), "much", "at 7 / 0 / visib_fract: a finite number"),
        ("scene_camera.json", ("7", "cam_K"), [0] * 9, "at 7 / cam_K: camera matrix"),
        ("scene_camera.json", ("7",), {}, "at 7: key 'cam_K' is missing"),
    ],
)
def test_what_is_wrong_is_named(
    spoilt: Path, name: str, keys: tuple[str | int, ...], value: object, message: str
) -> None:
    _edit(spoilt / name, *keys, value=value)
    names = {1: "one", 4: "four"}
    with pytest.raises(DataError, match=f"{name}.*{message}"):
        BopScene(spoilt, names)
    lenient = BopScene(spoilt, names, strict=False)
    assert len(lenient.problems.errors) == 1
    whole = sum(len(objects) for objects in made_up_bop.poses().values())
    assert sum(len(record.annotations) for record in lenient) < whole


def test_broken_json_names_its_line(spoilt: Path) -> None:
    (spoilt / "scene_gt.json").write_text('{\n "2": [],\n "7": [}\n')
    with pytest.raises(DataError, match=r"scene_gt.json, line 3: not valid JSON"):
        BopScene(spoilt)


@pytest.mark.parametrize(
    ("name", "message"),
    [("scene_camera.json", r"scene_camera\.json: file is missing"), ("rgb/000002.png", r"rgb.000002\.\*")],
)
def test_a_missing_file_is_named(spoilt: Path, name: str, message: str) -> None:
    (spoilt / name).unlink()
    with pytest.raises(DataError, match=message):
        BopScene(spoilt)


def test_a_missing_mesh_or_info_is_named(spoilt: Path) -> None:
    dataset = BopDataset(spoilt.parents[1])
    (dataset.models_folder / "obj_000004.ply").unlink()
    with pytest.raises(DataError, match=r"obj_000004\.ply: the mesh of object 4 is missing"):
        dataset.mesh(4)
    (dataset.models_folder / "models_info.json").unlink()
    with pytest.raises(DataError, match=r"models_info\.json: file is missing"):
        _ = dataset.models_info


def test_names_come_from_the_folder_or_from_names_json(tmp_path: Path) -> None:
    root = made_up_bop.write(tmp_path / "lmo")
    assert BopDataset(root).names == {1: "ape", 4: "cam"}
    (root / "models_eval" / "names.json").write_text('{"1": "brick", "4": "post"}')
    assert BopDataset(root).names == {1: "brick", 4: "post"}
    assert BopDataset(root).scene(5).records[31].annotations[0].name == "post"


numbers = st.floats(-10, 10, allow_nan=False)


@given(
    ids=st.tuples(*(st.integers(0, 10**6),) * 3),
    score=st.floats(0, 1),
    vector=st.tuples(numbers, numbers, numbers),
    t=st.tuples(numbers, numbers, numbers),
    time=st.floats(-1, 1e3),
)
def test_csv_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    ids: tuple[int, int, int],
    score: float,
    vector: tuple[float, float, float],
    t: tuple[float, float, float],
    time: float,
) -> None:
    T = np.eye(4)
    T[:3, :3] = Rotation.from_rotvec(vector).as_matrix()
    T[:3, 3] = t
    file = tmp_path_factory.getbasetemp() / "comes_back.csv"
    write_bop_csv(file, [Estimate(*ids, score, T, time=time)])
    (back,) = read_bop_csv(file)
    assert (back.scene_id, back.im_id, back.obj_id, back.score, back.time) == (*ids, score, time)
    np.testing.assert_array_equal(back.T_CO[:3, :3], T[:3, :3])
    np.testing.assert_allclose(back.T_CO, T, rtol=1e-15)


def test_csv_is_the_bop19_form(tmp_path: Path) -> None:
    T = np.eye(4)
    T[:3, :3] = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    T[:3, 3] = 0.001, -0.25, 1.5
    write_bop_csv(tmp_path / "r.csv", [Estimate(2, 3, 8, 0.5, T, time=0.125)])
    assert (tmp_path / "r.csv").read_text() == (
        "scene_id,im_id,obj_id,score,R,t,time\n"
        "2,3,8,0.5,0.0 -1.0 0.0 1.0 0.0 0.0 0.0 0.0 1.0,1.0 -250.0 1500.0,0.125\n"
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("2,3,8,0.5,1 0 0 0 1 0 0 0 1,0 0 1", "7 columns expected"),
        ("2,3,8,0.5,1 0 0 0 1 0 0 0,0 0 1,1", "9 numbers expected, 8 given"),
        ("2,3,8,0.5,1 0 0 0 1 0 0 0 1,0 nan 1,1", "finite numbers expected"),
        ("2,3.5,8,0.5,1 0 0 0 1 0 0 0 1,0 0 1,1", "a whole number expected"),
        ("2,3,8,high,1 0 0 0 1 0 0 0 1,0 0 1,1", "a finite number expected"),
    ],
)
def test_a_malformed_row_is_named(tmp_path: Path, row: str, message: str) -> None:
    good = "2,3,8,0.5,1 0 0 0 1 0 0 0 1,0 0 1000,-1"
    file = tmp_path / "r.csv"
    file.write_text(f"scene_id,im_id,obj_id,score,R,t,time\n{good}\n{row}\n")
    with pytest.raises(DataError, match=rf"r\.csv, line 3: {message}"):
        read_bop_csv(file)
    assert len(read_bop_csv(file, strict=False)) == 1


def test_lmo_boxes_are_the_projected_meshes(data_root: Path) -> None:
    dataset = BopDataset(data_root / "lmo")
    assert dataset.names == {
        1: "ape", 5: "can", 6: "cat", 8: "driller", 9: "duck", 10: "eggbox", 11: "glue", 12: "holepuncher",
    }  # fmt: skip
    points = {
        i: trimesh.load_mesh(data_root / f"lmo/models/obj_{i:06d}.ply", process=False).vertices / 1000
        for i in dataset.names
    }
    edges = []
    for record in list(dataset.scene(2))[::4]:
        assert record.size == (640, 480)
        for a in record.annotations:
            if a.box_xyxy is None or a.box_xyxy[:2].min() <= 0 or (a.box_xyxy[2:] >= [640, 480]).any():
                continue
            assert a.object_id is not None
            pixels = (points[a.object_id] @ a.T_CO[:3, :3].T + a.T_CO[:3, 3]) @ record.K.T
            pixels = pixels[:, :2] / pixels[:, 2:]
            edges.append(np.concatenate([pixels.min(0), pixels.max(0)]) - a.box_xyxy)
    assert len(edges) > 100
    assert np.abs(np.mean(edges, axis=0)).max() < 0.1
    assert np.abs(edges).max() < 1
