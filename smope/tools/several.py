"""Whether several instances of one object are found as surely as one alone, on held-out renders.

    python -m smope.tools.several MODEL [--scenes N] [--assets FILE] [--write]

Every scene may hold several instances of an object. Counted are those at least half visible, at `predict`'s
own threshold. `--write` puts the shares into the model's scores.json under "parts".
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from smope import hub
from smope.data.items import Batch
from smope.defaults import LOWEST_SCORE
from smope.model import SMOPE
from smope.poses import Poses
from smope.scenes import SceneAssets, SceneConfig
from smope.tools.measure_parts import add_to_scores
from smope.tools.renders import held_out_renders
from smope.tools.threshold import assigned

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


def measure(
    model: SMOPE, assets: SceneAssets, scenes: int, config: SceneConfig | None = None
) -> dict[str, Any]:
    """How many instances alone of their kind, and among others of it, there are, and the share found."""
    names = list(model.objects)
    crowded = replace(config or SceneConfig(), repeat_probability=1.0)
    every: list[tuple[bool, bool]] = []
    for batch in held_out_renders(model, assets, scenes, crowded):
        images = [image.float().cpu() for image in batch.images]
        predicted = model.predict(images, K=list(batch.K))
        every += [i for row, poses in enumerate(predicted) for i in instances(poses, names, batch, row)]
    result: dict[str, Any] = {"scenes": scenes, "threshold": LOWEST_SCORE, "min_visibility": MIN_VISIBILITY}
    for name, wanted in (("alone", False), ("several", True)):
        found = [one for several, one in every if several is wanted]
        result[name] = {"instances": len(found), "found": sum(found) / len(found) if found else None}
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="smope.tools.several", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--scenes", type=int, default=120)
    parser.add_argument("--assets", type=Path, default=Path("runs/lmo_assets.npz"), help="scene assets")
    parser.add_argument("--write", action="store_true", help="put the shares into scores.json")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    result = measure(SMOPE.from_pretrained(options.model), SceneAssets.load(options.assets), options.scenes)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    if options.write:
        add_to_scores(hub.resolve(options.model) / "scores.json", {"several": result})
    return 0


if __name__ == "__main__":
    sys.exit(main())
