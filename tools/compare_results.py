"""Files of results beside one another: what all of them find hard, and which way all of them err.

python tools/compare_results.py DATASET CSV [CSV ...]

DATASET is in BOP's form, a CSV in BOP'19's. Where methods that share nothing misjudge the depth of an object
by the same share, its annotated poses or its scan are off, not the methods. Markdown tables are printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from smope.evaluate.bop import Pairing, bop_scores
from smope.evaluate.report import markdown_table
from smope.evaluate.sets import PoseSet, load_pose_set

VISIBLE = (0.0, 0.3, 0.6, 0.8, 0.95, 1.01)  # shares
SEEN = 0.6  # visible share from which a depth says something of the object, not of what hides it
NEAR = 0.15  # relative error of depth beyond which something else was found
Methods = dict[str, list[Pairing]]


def depth_errors(pose_set: PoseSet, pairings: Sequence[Pairing]) -> list[float]:
    """Relative, of the middles of the bounding boxes, of targets that are seen well and found"""
    errors = []
    for pairing in pairings:
        points = pose_set.geometry(pairing.target.obj_id).points
        middle = np.append((points.min(0) + points.max(0)) / 2, 1.0)
        for estimate, truth in zip(pairing.estimates, pairing.truths, strict=False):
            error = (estimate.T_CO @ middle)[2] / (truth.T_CO @ middle)[2] - 1
            if truth.visibility >= SEEN and abs(error) < NEAR:
                errors.append(float(error))
    return errors


def table(
    title: str,
    methods: Methods,
    groups: dict[str, Callable[[Pairing], bool]],
    cell: Callable[[list[Pairing]], str],
) -> str:
    """One row a group, one column a method"""
    rows = []
    for name, belongs in groups.items():
        chosen = [[p for p in pairings if belongs(p)] for pairings in methods.values()]
        count = sum(p.target.inst_count for p in chosen[0])
        if count:
            rows.append([name, str(count), *(cell(pairings) for pairings in chosen)])
    return f"{title}:\n\n{markdown_table(['', 'targets', *methods], rows)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", type=Path)
    parser.add_argument("results", type=Path, nargs="+")
    options = parser.parse_args()
    pose_set = load_pose_set(options.dataset, "bop")
    methods = {f.stem.split("_")[0]: pose_set.pairings(pose_set.read_results(f)) for f in options.results}

    def recalls(pairings: list[Pairing]) -> str:
        scores = bop_scores(pairings)
        return " / ".join(f"{scores[name]:.3f}" for name in ("AR_MSSD", "AR_MSPD"))

    def depth(pairings: list[Pairing]) -> str:
        errors = np.array(depth_errors(pose_set, pairings))
        return f"{np.median(errors):+.1%}, {np.median(np.abs(errors)):.1%}" if len(errors) else ""

    everything = {"all": lambda p: True}
    shares = {
        f"{low:g}-{high:.2g}": lambda p, low=low, high=high: low <= p.truths[0].visibility < high
        for low, high in pairwise(VISIBLE)
    }
    objects = {
        name: lambda p, obj_id=obj_id: p.target.obj_id == obj_id for obj_id, name in pose_set.names.items()
    }
    print(table("AR_MSSD / AR_MSPD by visible share", methods, shares | everything, recalls))
    print(table("Depth, found over true: median, median of its size", methods, objects | everything, depth))


if __name__ == "__main__":
    main()
