"""How well a street is read, beyond KITTI's own numbers: at two overlaps, with sizes of errors and intervals.

One form serves real frames, LabelImg3D's and renders: labels that are there, labels that were found, and the
camera. Few frames say little, so the main numbers come with intervals from frames drawn anew with replacement
(Efron's bootstrap, percentiles 5 and 95).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from smope.data.kitti import KittiLabel, importer_name, pose_of_label, projected_box
from smope.data.reading import FloatArray
from smope.evaluate.kitti import DIFFICULTIES, METRICS, Difficulty, Frame, Resampled, precision_of, prepare

OVERLAPS = {"50": 0.5, "70": 0.7}
THRESHOLD = 0.3  # of the score, for all but the precisions: what `predict` shows by default
MODERATE = DIFFICULTIES[1]
LOW = (20.0, 30.0)  # px: boxes of objects far away
_SAME_BOX = 0.5
_DRAWS, _PERCENTILES = 200, (5.0, 95.0)
_NOTHING = "(nothing)"


@dataclass(frozen=True, eq=False)
class StreetFrame:
    """One image."""

    key: str
    frame: Frame
    P2: FloatArray  # [3, 4] camera of the labels


@dataclass(frozen=True)
class Match:
    """An object, and the best scored detection over its box, of whatever class."""

    truth: KittiLabel
    found: KittiLabel | None
    depth_error: float = float("nan")  # relative
    yaw_error: float = float("nan")  # degrees
    corner_iou: float = float("nan")  # of the projected 3D box found with the 2D label


def street_scores(
    frames: Sequence[StreetFrame], classes: Sequence[str], draws: int = _DRAWS, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """By class: AP_<metric>_<overlap>_<difficulty>, AOS_<overlap>_<difficulty>, recall, recall_low,
    depth_error, yaw_error_deg, corner_iou (medians, of moderate objects found) and intervals of the main
    ones; NaN where nothing is to be found."""
    return {name: _class_scores(frames, name, draws, seed) for name in classes}


def _class_scores(frames: Sequence[StreetFrame], name: str, draws: int, seed: int) -> dict[str, Any]:
    row: dict[str, Any] = {}
    moderate: dict[str, Resampled] = {}
    for metric in METRICS:
        for label, overlap in OVERLAPS.items():
            for difficulty in DIFFICULTIES:
                ready = [prepare(f.frame, name, metric, difficulty, overlap) for f in frames]
                ap, aos = precision_of(ready, overlap)
                row[f"AP_{metric}_{label}_{difficulty.name}"] = ap
                if metric == "2d":
                    row[f"AOS_{label}_{difficulty.name}"] = aos
                if difficulty is MODERATE and draws:
                    moderate[f"{metric}_{label}"] = Resampled(ready, overlap)
    matches = [[m for m in matches_of(f) if m.truth.type == name] for f in frames]
    rng = np.random.default_rng(seed)
    everything = np.arange(len(frames))
    row |= _errors(matches, everything)
    row["objects"] = sum(counts(m.truth, MODERATE) for group in matches for m in group)
    if row["objects"] and draws:
        drawn = [
            _resampled(moderate, matches, rng.integers(0, len(frames), len(frames))) for _ in range(draws)
        ]
        row["intervals"] = {
            key: [float(x) for x in np.nanpercentile([d[key] for d in drawn], _PERCENTILES)]
            for key in drawn[0]
            if not np.isnan([d[key] for d in drawn]).all()
        }
    return row


def _resampled(
    moderate: Mapping[str, Resampled], matches: Sequence[Sequence[Match]], chosen: np.ndarray
) -> dict[str, float]:
    out = {}
    times = np.bincount(chosen, minlength=len(matches)).astype(np.float64)
    for key, frames in moderate.items():
        ap, aos = frames.precision(times)
        out[f"AP_{key}_moderate"] = ap
        if key == "2d_50":
            out["AOS_50_moderate"] = aos
    return out | _errors(matches, chosen)


def _errors(matches: Sequence[Sequence[Match]], chosen: np.ndarray) -> dict[str, float]:
    wanted = [m for k in chosen for m in matches[k] if counts(m.truth, MODERATE)]
    low = [m for k in chosen for m in matches[k] if LOW[0] <= height(m.truth) < LOW[1] and _whole(m.truth)]
    right = [m for m in wanted if m.found is not None and m.found.type == m.truth.type]
    return {
        "recall": _share(wanted),
        "recall_low": _share(low),
        "depth_error": _median([m.depth_error for m in right]),
        "yaw_error_deg": _median([m.yaw_error for m in right]),
        "corner_iou": _median([m.corner_iou for m in right]),
    }


def confusion(frames: Sequence[StreetFrame], classes: Sequence[str]) -> dict[str, dict[str, int]]:
    """{true class: {class found: objects}} of moderate objects, "(nothing)" for those missed; by KITTI-3D's
    names, which call cyclists pedestrians."""
    table = {name: dict.fromkeys((*classes, _NOTHING), 0) for name in classes}
    for frame in frames:
        for match in matches_of(frame):
            name = importer_name(match.truth)
            if name in table and counts(match.truth, MODERATE):
                found = _NOTHING if match.found is None else match.found.type
                table[name][found] = table[name].get(found, 0) + 1
    return table


def matches_of(frame: StreetFrame) -> list[Match]:
    """Every object of the frame with the best scored detection that covers its box by half, each once."""
    shown = [f for f in frame.frame.found if (f.score or 0.0) >= THRESHOLD]
    shown.sort(key=lambda f: -(f.score or 0.0))
    truth = [t for t in frame.frame.truth if t.type != "DontCare"]
    taken: dict[int, KittiLabel] = {}
    for found in shown:
        overlaps = [0.0 if k in taken else box_iou(t.bbox, found.bbox) for k, t in enumerate(truth)]
        best = int(np.argmax(overlaps)) if overlaps else 0
        if overlaps and overlaps[best] > _SAME_BOX:
            taken[best] = found
    return [_match(t, taken.get(k), frame.P2) for k, t in enumerate(truth)]


def _match(truth: KittiLabel, found: KittiLabel | None, P2: FloatArray) -> Match:
    if found is None:
        return Match(truth, None)
    turn = np.rad2deg(found.rotation_y - truth.rotation_y)
    height_, width, length = found.dimensions
    corners = projected_box(pose_of_label(found, P2), (width, length, height_), P2[:, :3])
    # Of an object that the image's edge cuts, the corners lie elsewhere than its label ends.
    whole = corners is not None and truth.truncated <= 0
    return Match(
        truth,
        found,
        depth_error=abs(found.location[2] / truth.location[2] - 1),
        yaw_error=float(abs((turn + 180) % 360 - 180)),
        corner_iou=box_iou(truth.bbox, corners.tolist()) if whole and corners is not None else float("nan"),
    )


def counts(label: KittiLabel, difficulty: Difficulty) -> bool:
    return (
        label.occluded <= difficulty.occluded
        and label.truncated <= difficulty.truncated
        and height(label) > difficulty.height
    )


def height(label: KittiLabel) -> float:
    return label.bbox[3] - label.bbox[1]


def _whole(label: KittiLabel) -> bool:
    return label.occluded <= MODERATE.occluded and label.truncated <= MODERATE.truncated


def box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    tall = min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0.0) * max(tall, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common
    return common / union if union > 0 else 0.0


def _share(matches: Sequence[Match]) -> float:
    if not matches:
        return float("nan")
    return float(np.mean([m.found is not None and m.found.type == m.truth.type for m in matches]))


def _median(values: Sequence[float]) -> float:
    known = [v for v in values if not np.isnan(v)]
    return float(np.median(known)) if known else float("nan")
