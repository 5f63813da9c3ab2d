"""Measures of streets against values worked out by hand, and resampling against counting anew."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smope.data.kitti import KittiLabel, pose_of_label, projected_box
from smope.evaluate.kitti import DIFFICULTIES, Frame, Resampled, precision_of, prepare
from smope.evaluate.street import StreetFrame, confusion, street_scores

P2 = np.array([[700.0, 0, 600, 0], [0, 700, 180, 0], [0, 0, 1, 0]])


def car(x: float, z: float, score: float | None = None, kind: str = "Car", yaw: float = 0.3) -> KittiLabel:
    label = KittiLabel(kind, 0.0, 0, 0.0, (0, 0, 0, 0), (1.5, 1.6, 4.0), (x, 1.6, z), yaw, score)
    box = projected_box(pose_of_label(label, P2), (1.6, 4.0, 1.5), P2[:, :3])
    assert box is not None
    return replace(label, bbox=tuple(box.tolist()), alpha=yaw - np.arctan2(x, z))


def test_a_hit_a_miss_and_a_wrong_class() -> None:
    truth = [car(-6, 12), car(0, 14), car(6, 16), car(0, 45)]  # the last one is 23 px high
    near = replace(car(-6, 12, 0.9), location=(-6, 1.6, 12.6), rotation_y=0.3 + np.deg2rad(10))
    found = [near, replace(car(0, 14, 0.8), type="Van"), car(0, 45, 0.7)]
    frames = [StreetFrame("a", Frame(truth, found), P2)]
    row = street_scores(frames, ["Car"], draws=20)["Car"]
    assert row["objects"] == 3
    assert row["recall"] == pytest.approx(1 / 3)
    assert row["recall_low"] == 1.0
    assert row["depth_error"] == pytest.approx(0.05)
    assert row["yaw_error_deg"] == pytest.approx(10)
    assert 0.5 < row["corner_iou"] < 1  # the box itself was found exactly, the pose was not
    assert row["intervals"]["recall"] == [pytest.approx(1 / 3)] * 2  # one frame is always drawn
    assert confusion(frames, ["Car", "Van"]) == {
        "Car": {"Car": 1, "Van": 1, "(nothing)": 1},
        "Van": {"Car": 0, "Van": 0, "(nothing)": 0},
    }


def test_a_detection_serves_one_object_and_faint_ones_none() -> None:
    frames = [StreetFrame("a", Frame([car(0, 14), car(0.1, 14)], [car(0, 14, 0.9), car(0.1, 14, 0.1)]), P2)]
    assert street_scores(frames, ["Car"], draws=0)["Car"]["recall"] == 0.5


@given(st.integers(0, 10_000), st.lists(st.integers(0, 4), min_size=5, max_size=5))
def test_drawing_frames_anew_is_counting_the_drawn_frames(seed: int, chosen: list[int]) -> None:
    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(5):
        truth = [car(float(x), float(rng.uniform(10, 30))) for x in rng.permutation([-8, -2, 4, 10])[:2]]
        found = [
            car(
                t.location[0] + rng.normal(0, 0.3),
                t.location[2],
                round(float(rng.random()), 1),
                "Car",
                rng.normal(),
            )
            for t in truth
            if rng.random() < 0.8
        ]
        found += [car(float(rng.uniform(-8, 8)), 20.0, float(rng.random()))] * int(rng.integers(0, 2))
        frames.append(Frame(truth, found))
    ready = [prepare(frame, "Car", "2d", DIFFICULTIES[1], 0.5) for frame in frames]
    drawn = Resampled(ready, 0.5).precision(np.bincount(chosen, minlength=5).astype(float))
    assert drawn == pytest.approx(precision_of([ready[k] for k in chosen], 0.5))
