"""Precision, recall and F1 of a model's detections over the score threshold, on held-out renders.

    python -m smope.tools.threshold MODEL [--scenes N] [--assets FILE] [--write]

Prints a table and names the threshold of the best F1: what `predict` uses by default should be near it.
Photos behind the scenes and their seed are those that training holds out. `--write` puts the table into the
model's scores.json under "parts".
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from smope import hub
from smope.data.items import Batch
from smope.model import SMOPE
from smope.scenes import SceneAssets, SceneConfig
from smope.tools.measure_parts import add_to_scores
from smope.tools.renders import assigned, held_out_renders

if TYPE_CHECKING:
    from smope.poses import Poses

THRESHOLDS = tuple(round(0.05 * k, 2) for k in range(1, 20))
MIN_VISIBILITY = 0.1  # an object that is less visible is asked of nobody, and finding it is no fault
Array = NDArray[Any]


def hits(poses: Poses, names: Sequence[str], batch: Batch, row: int) -> tuple[Array, Array, int]:
    """Scores [P] of the detections that count, whether each is a hit [P], and how many there were to find."""
    seen = batch.present[row] & (batch.visibility[row] >= MIN_VISIBILITY)
    counted = [pair for pair in assigned(poses, names, batch, row) if pair[1] is None or seen[pair[1]]]
    scores = np.array([float(poses.scores[index]) for index, _ in counted])
    right = np.array([slot is not None for _, slot in counted], dtype=bool)
    return scores, right, int(seen.sum())


def table(scores: Array, right: Array, wanted: int) -> list[dict[str, float]]:
    """Precision, recall and F1 at each threshold, of all images together."""
    rows = []
    for threshold in THRESHOLDS:
        kept = scores >= threshold
        true = float((kept & right).sum())
        precision = true / kept.sum() if kept.any() else 1.0
        recall = true / wanted if wanted else 1.0
        f1 = 2 * precision * recall / (precision + recall) if true else 0.0
        rows.append(
            {"threshold": threshold, "precision": float(precision), "recall": recall, "f1": float(f1)}
        )
    return rows


def measure(
    model: SMOPE, assets: SceneAssets, scenes: int, config: SceneConfig | None = None
) -> dict[str, Any]:
    """The table on `scenes` renders that no training saw."""
    names = list(model.objects)
    every = []
    for batch in held_out_renders(model, assets, scenes, config):
        images = [image.float().cpu() for image in batch.images]
        found = model.predict(images, K=list(batch.K), threshold=THRESHOLDS[0], top_k=100)
        every += [hits(poses, names, batch, row) for row, poses in enumerate(found)]
    rows = table(
        np.concatenate([e[0] for e in every]), np.concatenate([e[1] for e in every]), sum(e[2] for e in every)
    )
    best = max(rows, key=lambda row: row["f1"])
    return {"renders": len(every), "best": best["threshold"], "rows": rows}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="smope.tools.threshold", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--scenes", type=int, default=120)
    parser.add_argument("--assets", type=Path, default=Path("runs/lmo_assets.npz"), help="scene assets")
    parser.add_argument("--write", action="store_true", help="put the table into scores.json")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    result = measure(SMOPE.from_pretrained(options.model), SceneAssets.load(options.assets), options.scenes)
    for row in result["rows"]:
        sys.stdout.write("  ".join(f"{name} {value:.3f}" for name, value in row.items()) + "\n")
    sys.stdout.write(json.dumps({"best": result["best"], "renders": result["renders"]}) + "\n")
    if options.write:
        add_to_scores(hub.resolve(options.model) / "scores.json", {"threshold": result})
    return 0


if __name__ == "__main__":
    sys.exit(main())
