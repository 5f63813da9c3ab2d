"""Whether several instances of one object are found as surely as one alone, on held-out renders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from smope.data.items import Batch
from smope.defaults import LOWEST_SCORE
from smope.model import SMOPE
from smope.poses import Poses
from smope.scenes import SceneAssets, SceneConfig
from smope.tools.renders import assigned, held_out_renders

MIN_VISIBILITY = 0.5


def instances(poses: Poses, names: Sequence[str], batch: Batch, row: int) -> list[tuple[bool, bool]]:
    """Of each well visible instance: whether the image holds others of its kind, and whether it is found."""
    found = {slot for _, slot in assigned(poses, names, batch, row)}
    labels = batch.labels[row].tolist()
    return [
        (labels.count(labels[slot]) > 1, slot in found)
        for slot in batch.present[row].nonzero()[:, 0].tolist()
        if batch.visibility[row, slot] >= MIN_VISIBILITY
    ]


def find_several(model: SMOPE, assets: SceneAssets, scenes: int) -> dict[str, Any]:
    """How many instances alone of their kind, and among others of it, there are, and the share that
    `predict` finds at its own threshold."""
    names = list(model.objects)
    crowded = replace(SceneConfig(), repeat_probability=1.0)
    every: list[tuple[bool, bool]] = []
    for batch in held_out_renders(model, assets, scenes, crowded):
        predicted = model.predict([image.float() for image in batch.images], K=list(batch.K))
        every += [i for row, poses in enumerate(predicted) for i in instances(poses, names, batch, row)]
    result: dict[str, Any] = {"scenes": scenes, "threshold": LOWEST_SCORE, "min_visibility": MIN_VISIBILITY}
    for name, wanted in (("alone", False), ("several", True)):
        found = [one for several, one in every if several is wanted]
        result[name] = {"instances": len(found), "found": sum(found) / len(found) if found else None}
    return result
