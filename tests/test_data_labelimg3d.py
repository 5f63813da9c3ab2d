"""LabelImg3D: the convention proved on the annotated frames, and files written from made-up poses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import trimesh
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.spatial.transform import Rotation

from smope.data import labelimg3d
from smope.data.labelimg3d import LabelImg3DScene
from smope.data.reading import DataError
from smope.data.records import Annotation

SIZE = (200, 100)
MESHES = {"Car": trimesh.creation.box([1.8, 4.4, 1.6]), "Tram": trimesh.creation.box([2.6, 16.8, 3.6])}
for _mesh in MESHES.values():
    _mesh.apply_translation([0, 0, _mesh.extents[2] / 2])  # origin at the bottom
MODELS = {"Car": ("models\\car_001.obj", 2), "Tram": ("models\\tram_001.obj", 1)}


def _pose(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    T = np.eye(4)
    T[:3, :3] = Rotation.random(rng=rng).as_matrix()
    T[:3, 3] = rng.uniform([-5, -2, 15], [5, 2, 40])
    return T


ANNOTATIONS = [
    Annotation("Car", _pose(0), score=0.9),
    Annotation("Tram", _pose(1), score=0.5, scale=np.array([1.1, 0.8, 1.3])),
    Annotation("Car", _pose(2), score=0.25),
]


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """Two images, the first with the objects above, the second empty."""
    root = tmp_path / "kitti"
    for folder in ("images/s1", "models"):
        (root / folder).mkdir(parents=True)
    for name, mesh in MESHES.items():
        mesh.export(root / "models" / MODELS[name][0].split("\\")[1])
    classes = {MODELS[n][0].split("\\")[1]: {"class_name": n, "class_index": MODELS[n][1]} for n in MESHES}
    (root / "models" / "models.json").write_text(json.dumps(classes))
    for number, objects in ((7, ANNOTATIONS), (12, [])):
        Image.new("RGB", SIZE).save(root / f"images/s1/{number:06d}.png")
        document = labelimg3d.make_document(f"images\\s1\\{number:06d}.png", SIZE, objects, MODELS, MESHES)
        labelimg3d.write_document(root / f"annotations/s1/{number:06d}.json", document)
    return root


def test_poses_come_back(scene: Path) -> None:
    read = LabelImg3DScene(scene)
    assert {i: len(r.annotations) for i, r in read.records.items()} == {7: 3, 12: 0}
    np.testing.assert_allclose(read.records[7].K, [[104, 0, 100], [0, 104, 50], [0, 0, 1]])
    for found, given_ in zip(read.records[7].annotations, ANNOTATIONS, strict=True):
        assert (found.name, found.score) == (given_.name, given_.score)
        assert found.object_id == MODELS[given_.name][1]
        np.testing.assert_allclose(found.T_CO, given_.T_CO, atol=1e-12)
        np.testing.assert_allclose(found.scale, given_.scale, atol=1e-12)


def test_what_is_written_is_what_vtk_draws(scene: Path) -> None:
    """The stored corners are the mesh's box moved by `matrix`. A pinhole at (0, 0, 0.52) looking along -z
    sees them on the plane z = 0, of width 1, at the stored pixels."""
    document = json.loads((scene / "annotations/s1/000007.json").read_text())
    for n, annotation in enumerate(ANNOTATIONS):
        item = document["model"][str(n)]
        world = np.array(item["3d_bbox_w"])
        moved = trimesh.transform_points(MESHES[annotation.name].vertices, np.reshape(item["matrix"], (4, 4)))
        apart = np.linalg.norm(world[:, None] - moved[None], axis=2)
        assert apart.min(axis=0).max() < 1e-9
        assert apart.min(axis=1).max() < 1e-9
        on_plane = world[:, :2] * (0.52 / (0.52 - world[:, 2:]))  # similar triangles
        pixels = np.stack([SIZE[0] / 2 + on_plane[:, 0] * SIZE[0], SIZE[1] / 2 - on_plane[:, 1] * SIZE[0]], 1)
        np.testing.assert_allclose(item["2d_bbox"], [*pixels.min(axis=0), *pixels.max(axis=0)], atol=1e-9)
        np.testing.assert_allclose(item["3d_bbox"], pixels, atol=1)
        assert item["size"] == pytest.approx(list(MESHES[annotation.name].extents * annotation.scale))
        # The tool's own fields: rotation as in OpenCV, depth a centimetre short.
        assert item["R_matrix_c2o"] == pytest.approx(annotation.T_CO[:3, :3].reshape(-1).tolist())
        assert item["T_matrix_c2o"] == pytest.approx((annotation.T_CO[:3, 3] - [0, 0, 0.01]).tolist())


@given(st.tuples(*(st.floats(-3, 3),) * 3), st.tuples(*(st.floats(-50, 50),) * 3), st.floats(0.1, 3))
def test_the_two_frames_are_inverse(r: tuple[float, ...], t: tuple[float, ...], distance: float) -> None:
    T = np.eye(4)
    T[:3, :3] = Rotation.from_rotvec(r).as_matrix()
    T[:3, 3] = t
    world = labelimg3d.vtk_from_opencv(T, distance)
    np.testing.assert_allclose(labelimg3d.opencv_from_vtk(world, distance), T, atol=1e-12)
    # A point the camera sees at (x, y, z) is right by x, up by -y, and z before (0, 0, distance).
    x, y, z = T[:3, :3] @ [1, 2, 3] + T[:3, 3]
    np.testing.assert_allclose(world[:3, :3] @ [1, 2, 3] + world[:3, 3], [x, -y, distance - z], atol=1e-9)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(document=st.dictionaries(st.text(), json_values, max_size=5))
def test_documents_come_back_with_keys_order_and_integers(
    tmp_path_factory: pytest.TempPathFactory, document: dict[str, object]
) -> None:
    file = tmp_path_factory.getbasetemp() / "document.json"
    labelimg3d.write_document(file, document)
    again = labelimg3d.read_document(file)
    assert json.dumps(again) == json.dumps(document)  # tells 1 from 1.0, and the order of keys


def test_split_trees_are_read(scene: Path) -> None:
    """`root/train/{images,annotations}`, meshes in `root/model_<root>`: what the authors' script makes."""
    (scene / "models").rename(scene / "model_kitti")
    (scene / "model_kitti/models.json").unlink()
    for kind, suffix in (("images", "png"), ("annotations", "json")):
        (scene / "train" / kind).mkdir(parents=True)
        (scene / kind / f"s1/000007.{suffix}").rename(scene / "train" / kind / f"000007.{suffix}")
    (record,) = LabelImg3DScene(scene, "train")
    assert record.image_path == scene / "train/images/000007.png"
    np.testing.assert_allclose(record.annotations[2].T_CO, ANNOTATIONS[2].T_CO, atol=1e-12)


def test_split_by_ratio() -> None:
    keys = [f"{i:06d}" for i in range(18)]
    split = labelimg3d.split_by_ratio(keys)
    assert {name: len(part) for name, part in split.items()} == {"train": 10, "val": 3, "test": 5}
    assert sorted([*split["train"], *split["val"], *split["test"]]) == keys
    assert split == labelimg3d.split_by_ratio(keys[::-1])  # the order of a folder's listing does not matter
    assert split != labelimg3d.split_by_ratio(keys, seed=1)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("model", "1", "matrix"), [1.0] * 15, r"line \d+, at model / 1 / matrix: 16 numbers expected, 15"),
        (("model", "1", "matrix"), [float("nan")] * 16, r"line \d+, at model / 1 / matrix: finite"),
        (("model", "1", "model_file"), "models\\bus.obj", r"at model / 1 / model_file: the mesh .*bus\.obj"),
        (("model", "1", "2d_bbox"), "wide", r"at model / 1 / 2d_bbox: 4 numbers expected"),
        (("model", "1"), {"model_file": "models\\car_001.obj"}, r"at model / 1: key 'matrix' is missing"),
        (("model", "num"), 4, r"at model: key '3' is missing"),
        (("camera", "distance"), 0, r"at camera / distance: a positive distance"),
    ],
)
def test_what_is_wrong_is_named(scene: Path, keys: tuple[str, ...], value: object, message: str) -> None:
    file = scene / "annotations/s1/000007.json"
    document = item = json.loads(file.read_text())
    for key in keys[:-1]:
        item = item[key]
    item[keys[-1]] = value
    file.write_text(json.dumps(document, indent=4))
    with pytest.raises(DataError, match=rf"000007\.json, .*{message}") as caught:
        LabelImg3DScene(scene)
    assert caught.value.line is not None
    lines = file.read_text().splitlines()
    shown = keys if keys[-1] in ("matrix", "model_file", "2d_bbox", "distance") else keys[:1]
    assert any(f'"{key}"' in lines[caught.value.line - 1] for key in (*shown, keys[-1]))
    lenient = LabelImg3DScene(scene, strict=False)
    assert len(lenient.problems.errors) == 1


def test_an_unknown_class_is_named(scene: Path) -> None:
    classes = json.loads((scene / "models/models.json").read_text())
    del classes["tram_001.obj"]
    (scene / "models/models.json").write_text(json.dumps(classes))
    with pytest.raises(DataError, match=r"at model / 1 / model_file: tram_001\.obj is not in models\.json"):
        LabelImg3DScene(scene)


def test_missing_files_are_named(scene: Path, tmp_path: Path) -> None:
    (scene / "images/s1/000012.png").unlink()
    with pytest.raises(DataError, match=r"000012\.\*: no such image"):
        LabelImg3DScene(scene)
    (tmp_path / "empty/annotations").mkdir(parents=True)
    with pytest.raises(DataError, match="no annotation"):
        LabelImg3DScene(tmp_path / "empty")
    with pytest.raises(DataError, match="folder is missing"):
        LabelImg3DScene(tmp_path / "nowhere")


def test_the_convention_holds_on_all_annotated_frames(data_root: Path) -> None:
    """Stored 3D boxes to 1e-3 m and 2D boxes to 0.05 px, by the pose as stored: rounded, off orthonormal."""
    scene = LabelImg3DScene(data_root / "kitti/labelimg3d")
    bounds = {f.name: trimesh.load_mesh(f, process=False).bounds for f in scene.models_folder.glob("*.obj")}
    seen = 0
    for record in scene:
        for a in record.annotations:
            low, high = bounds[scene.mesh_path(a.extra["model_file"]).name]
            corners = np.array([[(low, high)[i][0], (low, high)[j][1], (low, high)[k][2]]
                                for k in (0, 1) for i in (0, 1) for j in (0, 1)])  # fmt: skip
            matrix = np.reshape(a.extra["matrix"], (4, 4))
            world = corners @ matrix[:3, :3].T + matrix[:3, 3]
            np.testing.assert_allclose(world, a.extra["3d_bbox_w"], atol=1e-3)
            stored = labelimg3d.opencv_from_vtk(matrix)
            pixels = (corners @ stored[:3, :3].T + stored[:3, 3]) @ record.K.T
            pixels = pixels[:, :2] / pixels[:, 2:]
            assert a.box_xyxy is not None
            np.testing.assert_allclose([*pixels.min(0), *pixels.max(0)], a.box_xyxy, atol=0.05)
            np.testing.assert_allclose(a.T_CO[:3, :3] @ a.T_CO[:3, :3].T, np.eye(3), atol=1e-12)
            np.testing.assert_allclose(a.T_CO, stored, atol=2e-3)
            np.testing.assert_allclose(a.extra["R_matrix_c2o"], stored[:3, :3].reshape(-1), atol=1e-9)
            seen += 1
    assert (len(scene), seen) == (6, 24)


def test_annotated_files_come_back(data_root: Path, tmp_path: Path) -> None:
    for file in sorted((data_root / "kitti/labelimg3d/annotations").rglob("*.json")):
        document = labelimg3d.read_document(file)
        labelimg3d.write_document(tmp_path / file.name, document)
        assert json.dumps(labelimg3d.read_document(tmp_path / file.name)) == json.dumps(document)
