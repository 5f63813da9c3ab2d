"""Renders to measure a model on, whose backgrounds and seed are those that training holds out, and which of
their objects a detection is meant for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from smope.data.items import Batch
from smope.geometry.boxes import paired_iou
from smope.model import SMOPE
from smope.poses import Poses
from smope.scenes import SceneAssets, SceneConfig
from smope.train.recipe import RunConfig
from smope.train.sources import scene_source

_BATCH = 4  # images rendered together
MIN_IOU = 0.5


def held_out_renders(
    model: SMOPE, assets: SceneAssets, scenes: int, config: SceneConfig | None = None
) -> Sequence[Batch]:
    """`scenes` of the model's objects, on the CPU; a few more where batches of four do not end there."""
    stored = {mesh.name: mesh for mesh in assets.targets}
    ordered = replace(assets, targets=tuple(stored[name] for name in model.objects))
    run = RunConfig(batch_size=min(_BATCH, scenes), eval_images=scenes, workers=0)
    objects = list(model.objects.values())
    cpu = torch.device("cpu")
    return scene_source(objects, ordered, config or SceneConfig(), run, cpu, rank=0).held_out


def assigned(poses: Poses, names: Sequence[str], batch: Batch, row: int) -> list[tuple[int, int | None]]:
    """Each detection, best first, and the slot that it takes: the free instance of its name that it overlaps
    most, if by half at least."""
    free = set(batch.present[row].nonzero()[:, 0].tolist())
    pairs: list[tuple[int, int | None]] = []
    for index in poses.scores.argsort(descending=True).tolist():
        boxes = batch.boxes_xyxy[row]
        overlap = paired_iou(poses.boxes_xyxy[index].expand_as(boxes), boxes)[0].tolist()
        own = [slot for slot in free if names[int(batch.labels[row, slot])] == poses.names[index]]
        best = max(own, key=overlap.__getitem__, default=None)
        if best is not None and overlap[best] < MIN_IOU:
            best = None
        free -= {best}
        pairs.append((index, best))
    return pairs
