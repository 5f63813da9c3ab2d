"""tools/loss_shares.py: which rows there are, and whose gradients stand in which column."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

TOOL = runpy.run_path(str(Path(__file__).resolve().parent.parent / "tools" / "loss_shares.py"))


@pytest.mark.parametrize(
    ("part", "row"),
    [
        ("label", "class"),
        ("l1", "boxes"),
        ("giou", "boxes"),
        ("giou/denoising", "denoising"),
        ("depth/direct", "direct"),
        ("regions/where", "regions: where"),
        ("mesh/scale", "mesh: scale"),
        ("offsets", "offsets"),
    ],
)
def test_parts_of_one_kind_share_a_row(part: str, row: str) -> None:
    assert TOOL["group_of"](part) == row


class Parts:
    """Stands for the objective"""

    def __init__(self) -> None:
        self.config = SimpleNamespace(weight={"l1": 2.0, "giou": 1.0, "sigma": 10.0}.__getitem__)

    def parts(self, network: SimpleNamespace, batch: None) -> dict[str, torch.Tensor]:
        seen = network.backbone(torch.tensor([3.0, 4.0]))[0]
        return {"l1": seen, "giou": seen, "sigma": network.decoder(torch.tensor([0.0, 1.0]))[0]}


def test_norms_are_of_the_weighted_gradients_of_each_module() -> None:
    network = SimpleNamespace(**{name: nn.Linear(2, 1, bias=False) for name in TOOL["MODULES"]})
    rows = TOOL["pulls"](network, Parts(), None)
    backbone, decoder = (1 + TOOL["MODULES"].index(name) for name in ("backbone", "decoder"))
    assert rows["boxes"][backbone] == pytest.approx(15.0)  # (2 + 1) |(3, 4)|
    assert sum(rows["boxes"][1:]) == rows["boxes"][backbone]
    assert rows["sigma"][decoder] == pytest.approx(10.0)
