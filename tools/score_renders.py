"""A model's scores on held-out renders, as it is and with other values in its network's configuration.

python tools/score_renders.py MODEL ASSETS [--images N] [--network KEY=VALUE ...]

MODEL is a bundled name or a folder, ASSETS the file of scene assets. Each KEY=VALUE (`refine_steps=3`) gives
a row of its own, with the same weights on the same renders; a key that says which weights there are is
refused. What can be chosen without training is chosen here, never on the photos. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from smope.data.items import Batch
from smope.evaluate.report import markdown_table
from smope.model import SMOPE
from smope.networks.smope_s import SmopeS
from smope.scenes import SceneAssets
from smope.tools.renders import held_out_renders
from smope.train.held_out import HeldOut

SHOWN = ("AR_MSSD", "AR_MSPD", "box_IoU", "found", "depth_error")


def table(model: SMOPE, renders: Sequence[Batch], variants: Sequence[str]) -> str:
    network = model.network
    if not isinstance(network, SmopeS):
        raise SystemExit(f'{type(network).__name__} given; a network of architecture "smope-s" expected')
    judge = HeldOut(list(model.objects.values()), renders)
    rows = []
    for variant in ("", *variants):
        other = SmopeS(replace(network.config, **tomllib.loads(variant))).eval()
        other.load_state_dict(network.state_dict())
        with torch.no_grad():
            scores = judge.scores(other)
        rows.append([variant or "as it is", *(f"{scores[name]:.4f}" for name in SHOWN)])
    return markdown_table(["", *SHOWN], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("assets", type=Path)
    parser.add_argument("--images", type=int, default=240)
    parser.add_argument("--network", nargs="*", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    model = SMOPE.from_pretrained(options.model, device="cpu")
    renders = held_out_renders(model, SceneAssets.load(options.assets), options.images)
    print(table(model, renders, options.network))


if __name__ == "__main__":
    main()
