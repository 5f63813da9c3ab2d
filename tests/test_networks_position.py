"""Sine embeddings against sines and cosines in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from smope.inference.record import record
from smope.inference.simplify import launches
from smope.networks.position import box_embedding, sine_embedding


def exact_embedding(coordinates: Tensor, width: int) -> Tensor:
    """[..., D] -> [..., D * width]: place 2 k is sin(2 pi x / 10000 ** (2 k / width)), 2 k + 1 its cosine"""
    waves = []
    for k in range(width // 2):
        angles = coordinates.double() * 2 * math.pi / 10000 ** (2 * k / width)
        waves += [angles.sin(), angles.cos()]
    return torch.stack(waves, -1).flatten(-2)


@pytest.mark.parametrize("embed", [sine_embedding, box_embedding])
@pytest.mark.parametrize("width", [6, 128])
def test_embeddings_are_sines_and_cosines_in_turn(embed: Callable[[Tensor, int], Tensor], width: int) -> None:
    torch.manual_seed(0)
    boxes = torch.cat([torch.rand(50, 4), torch.zeros(1, 4), torch.ones(1, 4)])
    found = embed(boxes, width)
    assert found.dtype == torch.float32
    assert (found - exact_embedding(boxes, width)).abs().max() < 1e-6


def test_embeddings_of_boxes_are_three_steps_of_one_shape() -> None:
    """Which a recorded pass runs as one kernel; frequencies and phases are constants."""
    boxes = torch.rand(1, 5, 4)
    with torch.no_grad():
        graph = record(lambda x: box_embedding(x, 8), (boxes,))
    assert launches(graph) == 3
    assert torch.equal(graph(boxes), box_embedding(boxes, 8))
