"""Renders to measure a model on: their backgrounds and their seed are those that training holds out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from smope.data.items import Batch
from smope.model import SMOPE
from smope.scenes import SceneAssets, SceneConfig
from smope.train.recipe import RunConfig
from smope.train.sources import scene_source

_BATCH = 4  # images rendered together


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
