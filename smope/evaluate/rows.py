"""The scores of one object, or of all: poses, boxes, and how well the model judges itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smope.data.bop import Estimate
from smope.evaluate import report
from smope.evaluate.bop import Pairing, bop_scores, nearest_pairs
from smope.evaluate.boxes import ImageBoxes, box_ap


def score_row(pairings: Sequence[Pairing], boxes: Mapping[str, float] | None) -> dict[str, Any]:
    """Everything about these targets; `boxes` are their average precisions where there are any."""
    pairs = [(p, e, g) for p in pairings for e, g in nearest_pairs(p)]
    row: dict[str, Any] = {
        "targets": sum(p.target.inst_count for p in pairings),
        **bop_scores(pairings),
        "rotation_deg_median": median(p.errors["rotation_deg"][e, g] for p, e, g in pairs),
        "translation_mm_median": median(1000 * p.errors["translation_m"][e, g] for p, e, g in pairs),
    }
    if boxes is not None:
        row |= {f"box_{key}": value for key, value in boxes.items()}
    return row | _self_assessment(pairs)


def box_scores(
    pairings: Sequence[Pairing], estimates: Iterable[Estimate], names: Mapping[int, str]
) -> dict[str, dict[str, float]]:
    """Box AP by object name. Annotated instances that are no targets neither count nor harm."""
    predicted: dict[tuple[int, int, int], list[Estimate]] = {}
    for e in estimates:
        predicted.setdefault((e.scene_id, e.im_id, e.obj_id), []).append(e)
    targets = {(p.target.scene_id, p.target.im_id, p.target.obj_id): p for p in pairings}
    records = {(p.target.scene_id, p.target.im_id): p.record for p in pairings}

    classes: dict[str, list[ImageBoxes]] = {}
    for obj_id in sorted({p.target.obj_id for p in pairings}):
        images = classes.setdefault(names[obj_id], [])
        for (scene_id, im_id), record in records.items():
            key = (scene_id, im_id, obj_id)
            annotated = [a for a in record.annotations if a.object_id == obj_id]
            wanted = targets[key].truths if key in targets else []
            boxed = [a for a in annotated if a.box_xyxy is not None]
            if annotated and not any(a in wanted for a in boxed):
                continue  # here but no target, or outside the frame: its true box is not to be relied on
            found = predicted.get(key, [])
            images.append(
                ImageBoxes(
                    truth=_stack([a.box_xyxy for a in boxed]),
                    predicted=_stack([e.box_xyxy for e in found]),
                    scores=np.array([e.score for e in found], np.float64),
                    ignore=np.array([a not in wanted for a in boxed], bool),
                )
            )
    return box_ap(classes)


def median(values: Iterable[float]) -> float:
    """NaN of nothing."""
    listed = list(values)
    return float(np.median(listed)) if listed else float("nan")


def _self_assessment(pairs: Sequence[tuple[Pairing, int, int]]) -> dict[str, float]:
    """How right the model is about what it sees of an object and about its own errors; all found targets."""
    scores: dict[str, float] = {}
    seen = [(p.estimates[e].visibility, p.truths[g].visibility) for p, e, g in pairs]
    if seen and all(said is not None for said, _ in seen):
        said, true = np.array(seen, np.float64).T
        scores["visibility_mae"] = float(np.abs(said - true).mean())
        scores["visibility_spearman"] = report.spearman(said, true)
    sigmas = [p.estimates[e].sigma for p, e, _ in pairs]
    if sigmas and all(sigma is not None for sigma in sigmas):
        expected = np.array(sigmas, np.float64)
        for column, name in enumerate(("rotation_deg", "translation_m")):
            errors = [float(p.errors[name][e, g]) for p, e, g in pairs]
            scores[f"sigma_{name.split('_')[0]}_spearman"] = report.spearman(expected[:, column], errors)
    return scores


def _stack(boxes: Sequence[Any]) -> NDArray[np.float64]:
    return np.array(boxes, np.float64).reshape(-1, 4)
