"""Which rows of the network's table become poses: against plain loops over the rule in docs/deploy.md."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import trimesh
from hypothesis import given
from hypothesis import strategies as st

from smope import Camera, ObjectModel
from smope.results import read_table

CAMERA = Camera(torch.tensor([[500.0, 0.0, 320.0], [0.0, 500.0, 240.0], [0.0, 0.0, 1.0]]), (640, 480))
OBJECTS = {
    name: ObjectModel.from_mesh(name, trimesh.creation.box((0.1, 0.2, 0.3)), "m") for name in ("a", "b", "c")
}


def iou(a: list[float], b: list[float]) -> float:
    width, height = (min(a[k + 2], b[k + 2]) - max(a[k], b[k]) for k in (0, 1))
    common = max(width, 0.0) * max(height, 0.0)
    return common / (sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - common)


# Few places and sizes, so that boxes often nearly coincide.
BOXES = st.tuples(st.sampled_from([100, 104, 130]), st.sampled_from([80, 90]), st.sampled_from([60, 64, 80]))
ROWS = st.lists(st.tuples(st.floats(0.0625, 1.0, width=32), st.integers(0, 2), BOXES), max_size=8)


@given(ROWS, st.floats(0.0625, 0.875, width=32))
def test_an_object_comes_once_and_under_one_name(
    rows: list[tuple[float, int, tuple[int, int, int]]], threshold: float
) -> None:
    rows = sorted(rows, key=lambda row: -row[0])
    table = torch.zeros(1, len(rows), 24)
    boxes = [[float(x), float(y), float(x + side), float(y + side)] for _, _, (x, y, side) in rows]
    for i, (score, label, _) in enumerate(rows):
        table[0, i, :2] = torch.tensor([score, label])
        table[0, i, 2:6] = torch.tensor(boxes[i])
        table[0, i, 6:15], table[0, i, 15:18] = torch.eye(3).flatten(), torch.tensor([0.0, 0.0, 1.0])
        table[0, i, 21:24] = 1.0
    kept: list[int] = []
    for i, (score, label, _) in enumerate(rows):
        better = [(j, 0.7 if rows[j][1] == label else 0.9) for j in kept]
        if score >= threshold and all(iou(boxes[i], boxes[j]) <= most for j, most in better):
            kept.append(i)
    [poses] = read_table(table, [CAMERA], [CAMERA], OBJECTS, threshold)
    assert [list(OBJECTS).index(name) for name in poses.names] == [rows[i][1] for i in kept]
    np.testing.assert_allclose(poses.boxes_xyxy.numpy(), np.array([boxes[i] for i in kept]).reshape(-1, 4))
    np.testing.assert_allclose(poses.scores.numpy(), np.array([rows[i][0] for i in kept]))


def test_images_of_a_batch_are_read_as_each_alone() -> None:
    """Also where they have unlike numbers of rows above the threshold, none among them"""
    rng = np.random.default_rng(0)
    table = torch.from_numpy(rng.normal(size=(5, 9, 24)).astype(np.float32))
    scores = -np.sort(-rng.random((5, 9))) * np.array([1, 0.2, 1, 0.6, 0.9])[:, None]
    table[..., 0] = torch.from_numpy(scores)
    table[..., 1] = torch.from_numpy(rng.integers(0, 3, (5, 9)))
    corner = torch.from_numpy(rng.integers(0, 3, (5, 9, 2)))
    table[..., 2:4], table[..., 4:6], table[..., 21:24] = corner, corner + 40, table[..., 21:24].exp()
    cameras = [CAMERA, CAMERA, CAMERA.resize((1280, 960)), CAMERA, CAMERA]
    together = read_table(table, [CAMERA] * 5, cameras, OBJECTS, 0.4)
    counts = []
    for i, poses in enumerate(together):
        [alone] = read_table(table[i : i + 1], [CAMERA], cameras[i : i + 1], OBJECTS, 0.4)
        assert poses.names == alone.names
        assert poses.camera is cameras[i]
        for name, column in poses.numpy().items():
            np.testing.assert_array_equal(column, alone.numpy()[name])
        replace(poses)  # which looks at every array
        counts.append(len(poses))
    assert counts[1] == 0
    assert len(set(counts)) > 2
