"""Average precision of 2D boxes as COCO has it: IoU 0.50 to 0.95, 101 recall points, 100 boxes an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

IOU_THRESHOLDS = np.arange(10) * 0.05 + 0.5
_RECALL_POINTS = np.linspace(0, 1, 101)
_MAX_BOXES = 100  # of one class in one image


@dataclass(frozen=True, eq=False)
class ImageBoxes:
    """One class in one image: true boxes (some of which do not count) and scored predictions."""

    truth: FloatArray  # [G, 4] xyxy pixels
    predicted: FloatArray  # [P, 4]
    scores: FloatArray  # [P]
    ignore: NDArray[np.bool_] | None = None  # [G] finding such a box is neither right nor wrong


def iou_matrix(a: FloatArray, b: FloatArray) -> FloatArray:
    """[A, B] intersection over union of xyxy boxes."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = (high - low).clip(min=0).prod(axis=2)
    area_a, area_b = ((x[:, 2:] - x[:, :2]).clip(min=0).prod(axis=1) for x in (a, b))
    either = area_a[:, None] + area_b[None, :] - shared
    return np.divide(shared, either, out=np.zeros_like(shared), where=either > 0)


def average_precision(images: Sequence[ImageBoxes], threshold: float) -> float:
    """AP of one class at one IoU; NaN where nothing is to be found."""
    scores, right, counted, total = [], [], [], 0
    for image in images:
        ignore = np.zeros(len(image.truth), bool) if image.ignore is None else image.ignore
        order = np.argsort(-image.scores, kind="stable")[:_MAX_BOXES]
        hit, drop = _match(iou_matrix(image.predicted[order], image.truth), ignore, threshold)
        scores.append(image.scores[order])
        right.append(hit)
        counted.append(~drop)
        total += int((~ignore).sum())
    if total == 0:
        return float("nan")

    counts = np.concatenate(counted)
    order = np.argsort(-np.concatenate(scores)[counts], kind="stable")
    hits = np.concatenate(right)[counts][order]
    reached = np.cumsum(hits) / total
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]  # the best at this recall or beyond
    at = np.searchsorted(reached, _RECALL_POINTS, side="left")
    return float(np.append(precision, 0.0)[at].mean())


def box_ap(classes: Mapping[str, Sequence[ImageBoxes]]) -> dict[str, dict[str, float]]:
    """AP (over all IoU thresholds), AP50 and AP75 for each class, and under "all" their means."""
    table = {}
    for name, images in classes.items():
        values = np.array([average_precision(images, t) for t in IOU_THRESHOLDS])
        table[name] = {"AP": float(values.mean()), "AP50": float(values[0]), "AP75": float(values[5])}
    present = [row for row in table.values() if not np.isnan(row["AP"])]
    table["all"] = {
        key: float(np.mean([row[key] for row in present])) if present else float("nan")
        for key in ("AP", "AP50", "AP75")
    }
    return table


def _match(
    overlaps: FloatArray, ignore: NDArray[np.bool_], threshold: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """[P] found a box that counts, [P] found one that does not; predictions best first, each box once."""
    hit, drop = (np.zeros(len(overlaps), bool) for _ in range(2))
    free = np.ones(len(ignore), bool)
    for p, row in enumerate(overlaps):
        # A box that counts is preferred to an ignored one, however much nearer the latter.
        for kind, found in ((~ignore, hit), (ignore, drop)):
            candidates = np.flatnonzero(free & kind & (row >= threshold))
            if len(candidates):
                free[candidates[row[candidates].argmax()]] = False
                found[p] = True
                break
    return hit, drop
