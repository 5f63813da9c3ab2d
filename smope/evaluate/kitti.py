"""KITTI's average precision: 2D boxes, bird's-eye view, 3D boxes, and orientation, at 40 recall positions.

The matching is that of KITTI's development kit (Geiger et al., CVPR 2012): objects beyond a difficulty's
bounds, of a class easily confused, or in DontCare areas neither count nor harm. AP is the mean over recalls
1/40 .. 40/40 of the best precision at that recall or beyond (Simonelli et al., "Disentangling Monocular 3D
Object Detection", ICCV 2019). The kit itself takes at most one position an object found, so there a perfect
result on fewer than 40 objects stays below 1; here it is 1. Average orientation similarity weighs a hit by
(1 + cos(difference of alpha)) / 2. Scores in 0..1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from smope.data.kitti import KittiLabel

FloatArray = NDArray[np.float64]
Metric = Literal["2d", "bev", "3d"]

METRICS: tuple[Metric, ...] = ("2d", "bev", "3d")
MIN_OVERLAP = {"Car": 0.7, "Van": 0.7, "Truck": 0.7, "Tram": 0.7, "Pedestrian": 0.5, "Cyclist": 0.5}
_ALIKE = {"Car": "Van", "Pedestrian": "Person_sitting"}  # finding one in place of the other does no harm
_POSITIONS = 40


@dataclass(frozen=True)
class Difficulty:
    """Which objects count: 2D height in pixels above, occlusion and truncation up to."""

    name: str
    height: float
    occluded: int
    truncated: float


DIFFICULTIES = (
    Difficulty("easy", 40, 0, 0.15),
    Difficulty("moderate", 25, 1, 0.30),
    Difficulty("hard", 25, 2, 0.50),
)


@dataclass(frozen=True)
class Frame:
    """One image: its labels, DontCare among them, and what was found."""

    truth: Sequence[KittiLabel]
    found: Sequence[KittiLabel]


@dataclass(frozen=True, eq=False)
class Prepared:
    """One image for one class, metric and difficulty."""

    overlaps: FloatArray  # [G, P]
    dont_care: NDArray[np.bool_]  # [P] in a DontCare area
    counts: NDArray[np.bool_]  # [G] to be found; the others are ignored
    small: NDArray[np.bool_]  # [P] ignored for its height
    scores: FloatArray  # [P]
    similarity: FloatArray  # [G, P] of orientation


def kitti_scores(frames: Sequence[Frame], classes: Sequence[str]) -> dict[str, dict[str, float]]:
    """By class: AP_<metric>_<difficulty> and AOS_<difficulty>; NaN where nothing is to be found."""
    table: dict[str, dict[str, float]] = {}
    for name in classes:
        row = table.setdefault(name, {})
        for metric in METRICS:
            for difficulty in DIFFICULTIES:
                ap, aos = average_precision(frames, name, metric, difficulty)
                row[f"AP_{metric}_{difficulty.name}"] = ap
                if metric == "2d":
                    row[f"AOS_{difficulty.name}"] = aos
    return table


def average_precision(
    frames: Sequence[Frame],
    name: str,
    metric: Metric,
    difficulty: Difficulty,
    minimum: float | None = None,
) -> tuple[float, float]:
    """(AP, average orientation similarity) of one class, by its own overlap or by `minimum`."""
    minimum = MIN_OVERLAP[name] if minimum is None else minimum
    return precision_of([prepare(frame, name, metric, difficulty, minimum) for frame in frames], minimum)


def precision_of(prepared: Sequence[Prepared], minimum: float) -> tuple[float, float]:
    """`average_precision` of frames that are prepared once and counted often, as for resampling."""
    total = sum(int(p.counts.sum()) for p in prepared)
    if total == 0:
        return float("nan"), float("nan")

    hit_scores = [score for p in prepared for score in _hit_scores(p, minimum)]
    precision, similarity = np.zeros((2, _POSITIONS))
    for threshold, positions in _score_thresholds(hit_scores, total).items():
        hits, wrong, alike = np.sum([_count(p, minimum, threshold) for p in prepared], axis=0)
        if hits + wrong > 0:
            precision[positions] = hits / (hits + wrong)
            similarity[positions] = alike / (hits + wrong)
    ap, aos = (float(np.maximum.accumulate(v[::-1]).mean()) for v in (precision, similarity))
    return ap, aos


class Resampled:
    """`precision_of` for many draws of the same frames: each is counted once at every score that matters."""

    def __init__(self, prepared: Sequence[Prepared], minimum: float) -> None:
        hits = [_hit_scores(p, minimum) for p in prepared]
        scores = sorted({score for group in hits for score in group}, reverse=True)
        place = {score: k for k, score in enumerate(scores)}
        self.objects = np.array([p.counts.sum() for p in prepared], np.float64)  # [F]
        self.hits = np.zeros((len(prepared), len(scores)))  # [F, S] hits that have the score
        for row, group in zip(self.hits, hits, strict=True):
            for score in group:
                row[place[score]] += 1
        counted = [[_count(p, minimum, score) for score in scores] for p in prepared]
        self.counted = np.array(counted, np.float64).reshape(len(prepared), len(scores), 3)

    def precision(self, times: FloatArray) -> tuple[float, float]:
        """(AP, average orientation similarity) where each frame is there so many `times` [F]."""
        total = float(times @ self.objects)
        if total == 0:
            return float("nan"), float("nan")
        reached = np.cumsum(times @ self.hits)
        hits, wrong, alike = np.tensordot(times, self.counted, 1).T if len(reached) else np.zeros((3, 0))
        precision, similarity = np.zeros((2, _POSITIONS))
        for position in range(_POSITIONS):
            needed = np.ceil((position + 1) * total / _POSITIONS - 1e-9)
            if len(reached) and reached[-1] >= needed:
                k = int(np.argmax(reached >= needed))
                if hits[k] + wrong[k] > 0:
                    precision[position] = hits[k] / (hits[k] + wrong[k])
                    similarity[position] = alike[k] / (hits[k] + wrong[k])
        ap, aos = (float(np.maximum.accumulate(v[::-1]).mean()) for v in (precision, similarity))
        return ap, aos


def bev_and_3d_overlaps(a: Sequence[KittiLabel], b: Sequence[KittiLabel]) -> tuple[FloatArray, FloatArray]:
    """[A, B] intersection over union of the ground rectangles, and of the boxes."""
    bev, solid = np.zeros((2, len(a), len(b)))
    corners_a, corners_b = [ground_corners(x) for x in a], [ground_corners(x) for x in b]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            reach = (np.hypot(*x.dimensions[1:]) + np.hypot(*y.dimensions[1:])) / 2
            if np.hypot(x.location[0] - y.location[0], x.location[2] - y.location[2]) >= reach:
                continue
            shared = polygon_area(clip_polygon(corners_a[i], corners_b[j]))
            area_x, area_y = (z.dimensions[1] * z.dimensions[2] for z in (x, y))
            bev[i, j] = shared / (area_x + area_y - shared)
            # y points down, and a box stands on its location.
            top = max(x.location[1] - x.dimensions[0], y.location[1] - y.dimensions[0])
            volume = shared * max(min(x.location[1], y.location[1]) - top, 0.0)
            both = area_x * x.dimensions[0] + area_y * y.dimensions[0]
            solid[i, j] = volume / (both - volume)
    return bev, solid


def ground_corners(label: KittiLabel) -> FloatArray:
    """[4, 2] x and z of the box's corners, counter-clockwise."""
    _, width, length = label.dimensions
    c, s = np.cos(label.rotation_y), np.sin(label.rotation_y)
    forward, left = np.array([c, -s]) * length / 2, np.array([s, c]) * width / 2
    centre = np.array([label.location[0], label.location[2]])
    return np.stack(
        [centre + forward + left, centre - forward + left, centre - forward - left, centre + forward - left]
    )


def clip_polygon(subject: FloatArray, window: FloatArray) -> FloatArray:
    """[N, 2] the part of a convex polygon inside another, both counter-clockwise (Sutherland, Hodgman)."""
    for start, end in zip(window, np.roll(window, -1, axis=0), strict=True):
        if len(subject) == 0:
            break
        edge = end - start
        side = edge[0] * (subject[:, 1] - start[1]) - edge[1] * (subject[:, 0] - start[0])
        kept = []
        for k in range(len(subject)):
            following = (k + 1) % len(subject)
            if side[k] >= 0:
                kept.append(subject[k])
            if side[k] * side[following] < 0:
                share = side[k] / (side[k] - side[following])
                kept.append(subject[k] + share * (subject[following] - subject[k]))
        subject = np.array(kept).reshape(-1, 2)
    return subject


def polygon_area(polygon: FloatArray) -> float:
    """Shoelace formula."""
    if len(polygon) < 3:
        return 0.0
    x, y = (polygon - polygon[0]).T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def prepare(frame: Frame, name: str, metric: Metric, difficulty: Difficulty, minimum: float) -> Prepared:
    truth = [t for t in frame.truth if t.type in (name, _ALIKE.get(name))]
    # Found boxes too low for the difficulty are ignored whatever their class, like the objects they may show.
    small_all = [int(abs(f.bbox[3] - f.bbox[1])) < difficulty.height for f in frame.found]
    kept = [(f, s) for f, s in zip(frame.found, small_all, strict=True) if s or f.type == name]
    found = [f for f, _ in kept]

    boxes = np.array([f.bbox for f in found], np.float64).reshape(-1, 4)
    if metric == "2d":
        overlaps = _box_overlaps(np.array([t.bbox for t in truth], np.float64).reshape(-1, 4), boxes)
        areas = np.array([t.bbox for t in frame.truth if t.type == "DontCare"], np.float64).reshape(-1, 4)
        dont_care = np.any(_box_overlaps(areas, boxes, of_second=True) > minimum, axis=0)
    else:
        bev, solid = bev_and_3d_overlaps(truth, found)
        overlaps = bev if metric == "bev" else solid
        dont_care = np.zeros(len(found), bool)  # DontCare areas have no place on the ground

    counts = [
        t.type == name
        and t.occluded <= difficulty.occluded
        and t.truncated <= difficulty.truncated
        and t.bbox[3] - t.bbox[1] > difficulty.height
        for t in truth
    ]
    alpha_t, alpha_f = (np.array([x.alpha for x in labels], np.float64) for labels in (truth, found))
    return Prepared(
        overlaps=overlaps,
        dont_care=np.asarray(dont_care, bool),
        counts=np.array(counts, bool),
        small=np.array([s for _, s in kept], bool),
        scores=np.array([1.0 if f.score is None else f.score for f in found], np.float64),
        similarity=(1 + np.cos(alpha_t[:, None] - alpha_f[None, :])) / 2,
    )


def _hit_scores(p: Prepared, minimum: float) -> list[float]:
    """Scores of the hits where every box found is taken: each object with the best scored box over it."""
    free = np.ones(len(p.scores), bool)
    scores = []
    for g in range(len(p.counts)):
        over = np.flatnonzero(free & (p.overlaps[g] > minimum))
        if len(over):
            best = over[p.scores[over].argmax()]
            free[best] = False
            if p.counts[g] and not p.small[best]:
                scores.append(float(p.scores[best]))
    return scores


def _score_thresholds(scores: Sequence[float], total: int) -> dict[float, list[int]]:
    """{score: positions}: the highest score by which recall reaches each of 1/40 .. 40/40, where it does."""
    ranked = sorted(scores, reverse=True)
    thresholds: dict[float, list[int]] = {}
    for position in range(_POSITIONS):
        needed = -(-(position + 1) * total // _POSITIONS)  # hits, rounded up
        if needed <= len(ranked):
            thresholds.setdefault(ranked[needed - 1], []).append(position)
    return thresholds


def _count(p: Prepared, minimum: float, threshold: float) -> tuple[float, float, float]:
    """(hits, false ones, sum of the hits' orientation similarity) of the boxes at or above a score."""
    free = p.scores >= threshold
    hits = alike = 0.0
    for g in range(len(p.counts)):
        over = free & (p.overlaps[g] > minimum)
        # The nearest box of the right height, else the first that is too low.
        proper = np.flatnonzero(over & ~p.small)
        if len(proper):
            best = proper[p.overlaps[g, proper].argmax()]
        elif over.any():
            best = np.flatnonzero(over)[0]
        else:
            continue
        free[best] = False
        if p.counts[g] and not p.small[best]:
            hits += 1
            alike += p.similarity[g, best]
    wrong = float((free & ~p.small & ~p.dont_care).sum())
    return hits, wrong, alike


def _box_overlaps(a: FloatArray, b: FloatArray, of_second: bool = False) -> FloatArray:
    """[A, B] shared area over that of the union, or over that of the second box."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = (high - low).clip(min=0).prod(axis=2)
    area_a, area_b = ((x[:, 2:] - x[:, :2]).clip(min=0).prod(axis=1) for x in (a, b))
    whole = np.broadcast_to(area_b[None], shared.shape) if of_second else area_a[:, None] + area_b - shared
    return np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0)
