"""smope.tools.threshold: what counts as found, by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_model import SIZE, K, small_model

from smope.camera import Camera
from smope.data.items import Batch
from smope.poses import Poses
from smope.tools.several import instances
from smope.tools.threshold import THRESHOLDS, hits, table


def detections(names: list[str], scores: list[float], boxes: list[list[float]]) -> Poses:
    count = len(names)
    model = small_model()
    return Poses(
        names=tuple(names),
        labels=torch.tensor([list(model.objects).index(n) for n in names]),
        scores=torch.tensor(scores),
        boxes_xyxy=torch.tensor(boxes, dtype=torch.float32),
        T_CO=torch.eye(4).repeat(count, 1, 1),
        scale=torch.ones(count, 3),
        visibility=torch.ones(count),
        sigma=torch.ones(count, 2),
        camera=Camera(torch.tensor(K), SIZE),
        objects=model.objects,
    )


def truth() -> Batch:
    """Two balls and a brick; the brick hides almost."""
    return Batch(
        images=torch.zeros(1, 3, 64, 96),
        K=torch.tensor(K)[None],
        labels=torch.tensor([[0, 0, 1]]),
        T_CO=torch.eye(4).repeat(1, 3, 1, 1),
        boxes_xyxy=torch.tensor([[[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]]]),
        visibility=torch.tensor([[1.0, 0.5, 0.05]]),
    )


def test_each_instance_is_found_once_and_what_hides_counts_neither_way() -> None:
    poses = detections(
        ["ball", "ball", "ball", "brick", "brick"],
        [0.9, 0.8, 0.7, 0.6, 0.5],
        [[1, 0, 11, 10], [0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [70, 0, 80, 10]],
    )
    scores, right, wanted = hits(poses, ["ball", "brick"], truth(), 0)
    # The second ball finds its place taken; the hidden brick is left out, the one elsewhere is a fault.
    assert np.allclose(scores, [0.9, 0.8, 0.7, 0.5])
    assert right.tolist() == [True, False, True, False]
    assert wanted == 2


def test_instances_beside_others_of_their_kind_and_whether_they_are_found() -> None:
    names, batch = ["ball", "brick"], replace(truth(), visibility=torch.tensor([[1.0, 0.5, 0.6]]))
    first = [0.0, 0, 10, 10]
    poses = detections(["ball", "ball", "brick"], [0.9, 0.8, 0.7], [first, first, [40, 0, 50, 10]])
    assert instances(poses, names, batch, 0) == [(True, True), (True, False), (False, True)]
    hidden = replace(batch, visibility=torch.tensor([[0.4, 1.0, 0.0]]))
    assert instances(poses, names, hidden, 0) == [(True, False)]


def test_table_by_hand() -> None:
    rows = {
        row["threshold"]: row
        for row in table(np.array([0.9, 0.6, 0.52, 0.3]), np.array([True, False, True, False]), 4)
    }
    assert set(rows) == set(THRESHOLDS)
    assert rows[0.5] == pytest.approx({"threshold": 0.5, "precision": 2 / 3, "recall": 0.5, "f1": 4 / 7})
    assert rows[0.95] == {"threshold": 0.95, "precision": 1.0, "recall": 0.0, "f1": 0.0}


def test_a_detection_that_overlaps_too_little_is_a_fault() -> None:
    poses = detections(["ball"], [0.9], [[6, 0, 16, 10]])
    _, right, _ = hits(poses, ["ball", "brick"], replace(truth()), 0)
    assert right.tolist() == [False]
