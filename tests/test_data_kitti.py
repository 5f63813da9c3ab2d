"""KITTI labels as poses of class meshes and back, and LabelImg3D's annotation of the same frames."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.spatial.transform import Rotation

from smope.data import kitti
from smope.data.corners import corner_box, with_corner_boxes
from smope.data.kitti import KittiDataset, KittiLabel
from smope.data.labelimg3d import LabelImg3DScene
from smope.data.reading import DataError
from smope.geometry.boxes import paired_iou
from smope.objects import ObjectModel

P2 = np.array([[700.0, 0, 100, 45], [0, 700, 50, 0.2], [0, 0, 1, 0.003]])
SIZE = (200, 100)
LINES = [
    "Car 0.00 0 -1.57 60.00 40.00 120.00 80.00 1.50 1.60 4.00 0.50 1.60 20.00 -1.50",
    "Cyclist 0.10 1 0.10 10.00 20.00 30.00 60.00 1.70 0.60 1.80 -3.00 1.50 15.00 3.00",
    "Van 0.90 0 0.00 0.00 0.00 50.00 99.00 2.10 1.90 5.00 -4.00 1.60 6.00 0.20",
    "Misc 0.00 0 0.00 5.00 5.00 10.00 10.00 1.00 1.00 1.00 2.00 1.60 30.00 0.00",
    "DontCare -1 -1 -10 150.00 30.00 170.00 40.00 -1 -1 -1 -1000 -1000 -1000 -10",
    "Car 0.00 2 0.00 90.00 40.00 110.00 60.00 1.50 1.60 4.00 2.00 1.60 40.00 0.00",
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    base = tmp_path / "kitti"
    for folder in ("training/image_2", "training/label_2", "training/calib", "ImageSets"):
        (base / folder).mkdir(parents=True)
    Image.new("RGB", SIZE).save(base / "training/image_2/000003.png")
    (base / "training/label_2/000003.txt").write_text("\n".join(LINES) + "\n")
    rows = " ".join(f"{x:.12e}" for x in P2.reshape(-1))
    (base / "training/calib/000003.txt").write_text(f"P0: 0 0\nP2: {rows}\n\n")
    (base / "ImageSets/val.txt").write_text("000003\n")
    return base


def test_objects_are_chosen_and_named_as_in_kitti_3d(root: Path) -> None:
    (record,) = KittiDataset(root, "val")
    assert [a.name for a in record.annotations] == ["Car", "Pedestrian"]
    (record,) = KittiDataset(root, everything=True)
    assert [a.name for a in record.annotations] == ["Car", "Cyclist", "Van", "Misc", "Car"]
    assert [a.visibility for a in record.annotations] == pytest.approx([1, 0.675, 0.1, 1, 0.25])


def test_a_mesh_point_lands_where_kittis_own_projection_puts_the_boxs(root: Path) -> None:
    """P2 [Ry corner + location] of KITTI's development kit against K [T_CO mesh point]."""
    extents = {"Car": (1.9, 4.5, 1.6), "Pedestrian": (0.9, 0.3, 1.8)}
    (record,) = KittiDataset(root, "val", extents)
    for line, a in zip(LINES[:2], record.annotations, strict=True):
        h, w, length, *location, ry = map(float, line.split()[8:])
        pixels = []
        # The kit's corners: x along the length, y down from the bottom, z along the width.
        for forward, left, up in np.ndindex(2, 2, 2):
            corner = np.array([length * (0.5 - forward), -h * up, w * (0.5 - left)])
            turn = Rotation.from_euler("y", ry).as_matrix()
            in_camera_0 = np.append(turn @ corner + location, 1)
            expected = P2 @ in_camera_0
            # On the mesh: front along -y, left along +x, z up.
            on_mesh = np.array([0.5 - left, forward - 0.5, up]) * extents[a.name] * a.scale
            seen = record.K @ (a.T_CO[:3, :3] @ on_mesh + a.T_CO[:3, 3])
            np.testing.assert_allclose(seen / seen[2], expected / expected[2], atol=1e-9)
            pixels.append(seen[:2] / seen[2])
        box = kitti.projected_box(a.T_CO, (w, length, h), record.K)
        np.testing.assert_allclose(box, [*np.min(pixels, axis=0), *np.max(pixels, axis=0)], atol=1e-9)
        # The first label lies whole in the image and keeps its own box, the second is cut.
        own = [float(x) for x in line.split()[4:8]]
        np.testing.assert_allclose(a.box_xyxy, box if line.startswith("Cyclist") else own, atol=1e-9)


@given(
    ry=st.floats(-3.14, 3.14),
    location=st.tuples(st.floats(-20, 20), st.floats(0, 3), st.floats(5, 60)),
    dimensions=st.tuples(*(st.floats(0.5, 5),) * 3),
    score=st.floats(0, 1),
)
def test_label_to_pose_to_label(
    ry: float, location: tuple[float, float, float], dimensions: tuple[float, float, float], score: float
) -> None:
    alpha = ry - np.arctan2(location[0], location[2])
    label = KittiLabel("Car", 0, 0, alpha, (0, 0, 1, 1), dimensions, location, ry)
    h, w, length = dimensions
    annotation = kitti.Annotation(
        "Car", kitti.pose_of_label(label, P2), scale=np.array([w, length, h]) / [1.9, 4.5, 1.6], score=score
    )
    back = kitti.label_of_pose(annotation, [1.9, 4.5, 1.6], P2, SIZE)
    assert back.rotation_y == pytest.approx(ry, abs=1e-9)
    assert back.location == pytest.approx(location, abs=1e-9)
    assert back.dimensions == pytest.approx(dimensions)
    assert np.cos(back.alpha - alpha) == pytest.approx(1)
    assert -np.pi <= back.alpha <= np.pi
    assert back.score == score
    x0, y0, x1, y1 = back.bbox
    assert 0 <= x0 <= x1 <= SIZE[0] - 1
    assert 0 <= y0 <= y1 <= SIZE[1] - 1


def test_a_tilted_pose_keeps_its_turn_about_the_vertical() -> None:
    label = KittiLabel("Car", 0, 0, 0, (0, 0, 1, 1), (1.5, 1.6, 4.0), (1.0, 1.5, 20.0), 0.7)
    T = kitti.pose_of_label(label, P2)
    T[:3, :3] = Rotation.from_euler("x", 3, degrees=True).as_matrix() @ T[:3, :3]
    back = kitti.label_of_pose(kitti.Annotation("Car", T), [1.6, 4.0, 1.5], P2, SIZE)
    assert back.rotation_y == pytest.approx(0.7, abs=0.01)


def test_files_come_back(root: Path, tmp_path: Path) -> None:
    labels = [label for _, label in kitti.read_labels(root / "training/label_2/000003.txt")]
    kitti.write_labels(tmp_path / "again.txt", labels)
    assert [label for _, label in kitti.read_labels(tmp_path / "again.txt")] == labels
    assert all(len(line.split()) == 15 for line in (tmp_path / "again.txt").read_text().splitlines())
    found = KittiLabel(
        "Tram", -1.0, -1, 0.5, (1.0, 2.0, 3.0, 4.0), (3.5, 2.5, 15.0), (1.0, 2.0, 30.0), 1.25, 0.5
    )
    kitti.write_labels(tmp_path / "found.txt", [found])
    assert (tmp_path / "found.txt").read_text() == (
        "Tram -1.00 -1 0.500000 1.000000 2.000000 3.000000 4.000000 3.500000 2.500000 15.000000 "
        "1.000000 2.000000 30.000000 1.250000 0.500000\n"
    )
    assert kitti.read_labels(tmp_path / "found.txt") == [(1, found)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Car 0.00 0", "line 2: 15 columns expected, 16 in a result file; 3 given"),
        (LINES[1].replace("Cyclist", "Horse"), "line 2: class 'Horse' is unknown"),
        (LINES[1].replace("1.80", "nan"), "line 2: finite numbers expected"),
        (LINES[1].replace("1.80", "long"), "line 2: 14 numbers expected"),
        (LINES[1].replace(" 1 ", " 7 "), "line 2: occluded: -1 to 3 expected, 7 given"),
    ],
)
def test_a_malformed_line_is_named(root: Path, line: str, message: str) -> None:
    file = root / "training/label_2/000003.txt"
    file.write_text("\n".join([LINES[0], line]))
    with pytest.raises(DataError, match=rf"000003\.txt, {message}"):
        KittiDataset(root)
    lenient = KittiDataset(root, strict=False)
    assert len(lenient.problems.errors) == 1
    assert [a.name for a in lenient.records["000003"].annotations] == ["Car"]


def test_a_class_without_a_mesh_is_named(root: Path) -> None:
    with pytest.raises(
        DataError, match=r"000003\.txt, line 2: no mesh of class Pedestrian; there are \['Car'\]"
    ):
        KittiDataset(root, extents={"Car": (1, 1, 1)})
    lenient = KittiDataset(root, extents={"Car": (1, 1, 1)}, strict=False)
    assert [a.name for a in lenient.records["000003"].annotations] == ["Car"]


def test_missing_files_are_named(root: Path) -> None:
    calib = root / "training/calib/000003.txt"
    calib.write_text("P0: 1 2 3\n")
    with pytest.raises(DataError, match=r"calib.000003\.txt: no line starts with P2:"):
        KittiDataset(root)
    calib.write_text("P0: 1\nP2: 1 2 3\n")
    with pytest.raises(DataError, match=r"calib.000003\.txt, line 2: 12 numbers expected, 3 given"):
        KittiDataset(root)
    calib.unlink()
    with pytest.raises(DataError, match=r"calib.000003\.txt: file is missing"):
        KittiDataset(root)
    with pytest.raises(DataError, match=r"ImageSets.test\.txt: file is missing"):
        KittiDataset(root, "test")


def test_real_frames_agree_with_labelimg3d(data_root: Path) -> None:
    """The same objects annotated in LabelImg3D: depth to 1e-3 m, rotations to one constant half degree."""
    annotated = {r.key.split("/")[-1]: r for r in LabelImg3DScene(data_root / "kitti/labelimg3d")}
    seen = 0
    for record in KittiDataset(data_root / "kitti", "labelimg3d"):
        others = annotated[record.key].annotations
        for a in record.annotations:
            depths = [abs(o.T_CO[2, 3] - a.T_CO[2, 3]) if o.name == a.name else np.inf for o in others]
            if not depths or min(depths) > 1e-3:
                continue
            other = others[int(np.argmin(depths))]
            turn = Rotation.from_matrix(a.T_CO[:3, :3].T @ other.T_CO[:3, :3])
            assert np.degrees(turn.magnitude()) == pytest.approx(0.46, abs=0.1)
            seen += 1
    assert seen >= 20


def test_projected_corners_are_kittis_boxes_of_fully_visible_cars(data_root: Path) -> None:
    overlaps = []
    dataset = KittiDataset(data_root / "kitti", "train")
    for record in dataset:
        for a in record.annotations:
            label: KittiLabel = a.extra["label"]
            if label.type != "Car" or label.occluded or label.truncated:
                continue
            h, w, length = label.dimensions
            box = kitti.projected_box(a.T_CO, (w, length, h), record.K)
            assert box is not None
            shared = np.minimum(label.bbox[2:], box[2:]) - np.maximum(label.bbox[:2], box[:2])
            areas = [np.prod(np.subtract(b[2:], b[:2])) for b in (label.bbox, box)]
            overlaps.append(np.prod(shared) / (sum(areas) - np.prod(shared)))
    assert len(overlaps) > 50
    assert np.mean(overlaps) > 0.95


def test_all_real_labels_are_read(data_root: Path) -> None:
    dataset = KittiDataset(data_root / "kitti")
    assert len(dataset) == 115
    counted = Counter(label.type for labels in dataset.labels.values() for label in labels)
    assert counted["Car"] == 457
    assert counted["DontCare"] == 334
    assert counted["Tram"] == 5


def test_what_is_left_out_is_an_ignored_area(root: Path) -> None:
    (record,) = KittiDataset(root, "val")
    boxes = [tuple(float(x) for x in LINES[i].split()[4:8]) for i in (2, 3, 4, 5)]
    assert list(record.ignored) == boxes
    (record,) = KittiDataset(root, everything=True)
    assert list(record.ignored) == boxes[2:3]  # DontCare


@given(
    ry=st.floats(-3.14, 3.14),
    x=st.floats(-8, 8),
    z=st.floats(-1, 30),
    scale=st.tuples(*[st.floats(0.5, 2)] * 3),
)
def test_corner_boxes_enclose_the_box_that_is_seen(
    ry: float, x: float, z: float, scale: tuple[float, float, float]
) -> None:
    """Against points filled into the box, those before the lens; a box all behind it has none."""
    label = KittiLabel("Car", 0, 0, 0, (0, 0, 0, 0), (1.5, 1.6, 4), (x, 1.6, z), ry)
    T, low, high = kitti.pose_of_label(label, P2), np.array([-1, -2, 0.0]), np.array([1, 2, 1.5])
    box = corner_box(T, low, high, np.array(scale), P2[:, :3])
    steps = np.stack(np.meshgrid(*[np.linspace(0, 1, 41)] * 3, indexing="ij"), -1).reshape(-1, 3)
    points = (low + steps * (high - low)) * scale @ T[:3, :3].T + T[:3, 3]
    points = points[points[:, 2] >= 0.1]
    if box is None:
        assert len(points) == 0
        return
    pixels = points @ P2[:, :3].T
    pixels = pixels[:, :2] / pixels[:, 2:]
    if len(pixels):
        assert (pixels.min(axis=0) >= box[:2] - 1e-6).all()
        assert (pixels.max(axis=0) <= box[2:] + 1e-6).all()
    if len(points) == len(steps):  # the corners are among the points
        np.testing.assert_allclose(box, [*pixels.min(axis=0), *pixels.max(axis=0)], rtol=1e-9)


def test_labels_of_whole_cars_are_the_corners_boxes(data_root: Path) -> None:
    """FACTS: IoU 0.975; and the sizes of the labels come back as scales of the meshes."""
    meshes = {"Car": data_root / "kitti/labelimg3d/models/car_001.obj"}
    car = ObjectModel.from_mesh("Car", meshes["Car"], "m")
    extents = dict.fromkeys(("Car", "Van", "Truck", "Tram", "Pedestrian"), car.extents.tolist())
    records = list(KittiDataset(data_root / "kitti", "train", extents))[:20]
    found = []
    for own, record in zip(records, with_corner_boxes(records, [car]), strict=True):
        for a, b in zip(own.annotations, record.annotations, strict=True):
            label = a.extra["label"]
            if label.type == "Car" and label.truncated == 0 and label.occluded == 0:
                pair = [torch.tensor(x.box_xyxy) for x in (a, b)]
                found.append(paired_iou(*pair)[0].item())
                size = np.array([label.dimensions[k] for k in (1, 2, 0)])
                np.testing.assert_allclose(a.scale * car.extents.double().numpy(), size, rtol=1e-6)
    assert len(found) > 10
    assert np.median(found) > 0.95
