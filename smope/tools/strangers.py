"""How often meshes that the weights never saw are "found" in pictures that do not hold them.

    python -m smope.tools.strangers MODEL PHOTOS MESHES [--count N] [--unlike ASSETS] [--write]

PHOTOS is a folder of images, all of the model's own camera; MESHES a folder of PLY files in metres, none of
which stands in the photos. `count` of them, spread over the folder, are registered beside the model's own
objects; those that a file of scene assets holds (`--unlike`) may have been seen in training and are left out.
`--write` puts the figures into the model's scores.json under "parts".
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smope import hub
from smope.model import SMOPE
from smope.scenes import SceneAssets
from smope.tools.measure_parts import add_to_scores

LEVELS = (0.3, 0.5, 0.7)
_PICTURES = {".jpg", ".jpeg", ".png"}


def choose(meshes: Sequence[Path], seen: set[str], count: int) -> list[Path]:
    """`count` files spread evenly over those whose stem is not in `seen`."""
    fresh = [path for path in sorted(meshes) if path.stem not in seen]
    if len(fresh) < count:
        raise ValueError(f"{count} meshes asked for, {len(fresh)} of {len(meshes)} are left to choose from")
    return [fresh[(2 * k + 1) * len(fresh) // (2 * count)] for k in range(count)]


def measure(model: SMOPE, photos: Sequence[Path], strangers: Sequence[Path]) -> dict[str, Any]:
    """Of every photo and stranger: the best score of a detection by the stranger's name."""
    names = [f"stranger_{k}" for k in range(len(strangers))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they were not trained is what this is about
        model.register_meshes(dict(zip(names, strangers, strict=True)), units="m", add=True)
    best = np.zeros((len(photos), len(names)))
    for row, photo in enumerate(photos):
        poses = model.predict(photo, threshold=0.0, top_k=100)
        for name, score in zip(poses.names, poses.scores.tolist(), strict=True):
            if name in names:
                column = names.index(name)
                best[row, column] = max(best[row, column], score)
    return {
        "photos": len(photos),
        "strangers": [path.stem for path in strangers],
        # Share of all (photo, stranger) with a false hit, and false hits a photo, above each threshold.
        "share_found": {f"{level:g}": float((best >= level).mean()) for level in LEVELS},
        "found_a_photo": {f"{level:g}": float((best >= level).sum(1).mean()) for level in LEVELS},
        "highest_score": float(best.max()),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="smope.tools.strangers", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("photos", type=Path)
    parser.add_argument("meshes", type=Path)
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--unlike", type=Path, help="scene assets whose meshes are left out")
    parser.add_argument("--write", action="store_true", help="put the figures into scores.json")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    seen = set() if options.unlike is None else {m.name for m in SceneAssets.load(options.unlike).clutter}
    strangers = choose(list(options.meshes.rglob("*.ply")), seen, options.count)
    photos = sorted(path for path in options.photos.rglob("*") if path.suffix.lower() in _PICTURES)
    result = measure(SMOPE.from_pretrained(options.model), photos, strangers)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    if options.write:
        add_to_scores(hub.resolve(options.model) / "scores.json", {"strangers": result})
    return 0


if __name__ == "__main__":
    sys.exit(main())
