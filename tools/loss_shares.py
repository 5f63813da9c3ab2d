"""How hard each part of the loss pulls at each part of the network: the norms of their gradients.

python tools/loss_shares.py RECIPE --init MODEL [--assets FILE] [--images N] [--loss KEY=VALUE ...]

AdamW divides by the size of what it has seen, so a part of the loss whose gradient is large steers, and one
whose gradient is small hardly counts, whatever the two add to the loss. Set the weights of the parts, [loss],
by this table. Norms are of the weighted losses of single images, in the mean; for architecture = "smope-s",
on the CPU, a few seconds an image. A Markdown table is printed.
"""

from __future__ import annotations

import argparse
import tomllib
from collections import defaultdict
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from smope.data.items import Batch
from smope.evaluate.report import markdown_table
from smope.model import SMOPE
from smope.networks.smope_s import SmopeS
from smope.train.choice import make_objective
from smope.train.distributed import joined
from smope.train.fit import objects_of, source_of
from smope.train.objective import Objective
from smope.train.recipe import load_recipe

# Modules that share one way through the network; the first two hold what all parts of the loss share.
MODULES = ("backbone", "encoder", "decoder", "pose_maps", "region_reader", "refiners")
GROUPS = {"label": "class", "l1": "boxes", "giou": "boxes"}


def group_of(part: str) -> str:
    """The row that a part of the loss is summed into: "depth/direct" and "points/direct" into "direct"."""
    measured, _, poses = part.partition("/")
    if measured in ("regions", "mesh"):
        return f"{measured}: {poses}"
    return poses or GROUPS.get(part, part)


def pulls(network: SmopeS, objective: Objective, batch: Batch) -> dict[str, list[float]]:
    """Of each row: the weighted loss, then the norm of its gradient in each of MODULES."""
    losses: dict[str, torch.Tensor] = {}
    for name, value in objective.parts(network, batch).items():
        row, weighted = group_of(name), objective.config.weight(name) * value
        losses[row] = losses[row] + weighted if row in losses else weighted
    weights = [[p for p in getattr(network, m).parameters() if p.requires_grad] for m in MODULES]
    flat = [p for group in weights for p in group]
    rows = {}
    for row, loss in losses.items():
        gradients = iter(torch.autograd.grad(loss, flat, retain_graph=True, allow_unused=True))
        squares = [
            sum(float(g.square().sum()) for g in islice(gradients, len(group)) if g is not None)
            for group in weights
        ]
        rows[row] = [float(loss.detach()), *(value**0.5 for value in squares)]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--init", required=True, help="weights to look at: a bundled name or a folder")
    parser.add_argument("--assets", type=Path, help="scene assets, in place of the recipe's")
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--loss", nargs="*", default=[], metavar="KEY=VALUE", help="in place of the recipe's")
    options = parser.parse_args()
    plan = load_recipe(options.recipe)
    loss = {**plan.loss, **tomllib.loads("\n".join(options.loss))}
    plan = replace(plan, loss=loss, run=replace(plan.run, batch_size=1, eval_images=0, workers=0))
    network = SMOPE.from_pretrained(options.init, device="cpu").network
    if not isinstance(network, SmopeS):
        raise SystemExit(f'{options.init}: of another architecture; "smope-s" expected')
    with joined("cpu") as ranks:
        objects = objects_of(None, None, None, plan.data)
        source, _ = source_of(objects, None, None, options.assets, plan, ranks)
        objective = make_objective(plan, objects, network.config, source.clutter)
        assert isinstance(objective, Objective)
        torch.manual_seed(plan.run.seed)
        network.train().requires_grad_(True)
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0] * (1 + len(MODULES)))
        for batch in islice(source.stream(0), options.images):
            pulled = pulls(network, objective, replace(batch, images=batch.images.float()))
            for row, values in pulled.items():
                sums[row] = [a + b / options.images for a, b in zip(sums[row], values, strict=True)]
    rows = [[row, *(f"{value:.2f}" for value in values)] for row, values in sums.items()]
    print(markdown_table(["", "loss", *MODULES], rows))


if __name__ == "__main__":
    main()
