"""Meshes that are registered in training and nowhere to be found."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import trimesh
from test_train_objective import TINY, box_object, make_batch

from smope.networks.smope_s import SmopeS
from smope.scenes.meshes import prepare_mesh
from smope.train.objective import LossConfig, Objective
from smope.train.strangers import SCALE, Strangers


@pytest.fixture(scope="module")
def strangers() -> Strangers:
    ball = trimesh.creation.icosphere(subdivisions=3, radius=0.05)
    rod = trimesh.creation.box((0.02, 0.03, 0.3))
    rod.visual.vertex_colors = np.tile(np.array([255, 0, 102, 255], dtype=np.uint8), (8, 1))
    return Strangers.of([prepare_mesh("ball", ball), prepare_mesh("rod", rod)], points=2048)


def test_their_surfaces_are_those_of_their_meshes(strangers: Strangers) -> None:
    ball, rod = strangers.surfaces.double()
    # The icosphere's vertices lie on the ball, its faces up to 1 % within.
    assert strangers.diameters[0].item() == pytest.approx(0.1, rel=1e-2)
    assert strangers.diameters[1].item() == pytest.approx(
        float(np.hypot(np.hypot(0.02, 0.03), 0.3)), rel=1e-3
    )
    assert ball[:, :3].norm(dim=1) == pytest.approx(torch.full((2048,), 0.5), rel=2e-2)
    assert (torch.nn.functional.cosine_similarity(ball[:, :3], ball[:, 3:6]) > 0.98).all()
    half = torch.tensor([0.01, 0.015, 0.15]).double() / strangers.diameters[1].double()
    assert (rod[:, :3].abs() / half).amax(1) == pytest.approx(torch.ones(2048), abs=1e-3)
    # As many points on each side as its area says; of 2 x 0.03 x 0.3, 2 x 0.02 x 0.3 and 2 x 0.02 x 0.03.
    ends = ((rod[:, 2].abs() / half[2]) > 0.999).double().mean().item()
    assert ends == pytest.approx(0.0012 / (0.018 + 0.012 + 0.0012), abs=0.02)
    assert torch.allclose(rod[:, 6:], torch.tensor([1.0, 0.0, 0.4, 1.0]).double().expand(2048, 4), atol=1e-6)


def test_each_is_drawn_once_at_a_size_of_chance(strangers: Strangers) -> None:
    torch.manual_seed(0)
    factors = []
    for _ in range(200):
        surfaces, sizes = strangers.draw(2)
        first = 0 if torch.equal(surfaces[0], strangers.surfaces[0]) else 1
        assert torch.equal(surfaces, strangers.surfaces[[first, 1 - first]])
        factors.append(sizes / strangers.diameters[[first, 1 - first]])
    drawn = torch.stack(factors)
    assert SCALE[0] <= drawn.min() < SCALE[0] * 1.1
    assert SCALE[1] / 1.1 < drawn.max() <= SCALE[1] * (1 + 1e-6)


def test_they_lower_their_own_similarity_and_leave_the_other_losses(strangers: Strangers) -> None:
    objects = [box_object("long", (0.2, 0.1, 0.05)), box_object("flat", (0.1, 0.12, 0.02))]
    torch.manual_seed(0)
    network = SmopeS(replace(TINY, denoising_groups=0))
    batch = make_batch()
    alone = Objective(objects, LossConfig(colour_dropout=0.0))
    beside = Objective(objects, LossConfig(colour_dropout=0.0, strangers=2), strangers)
    views = beside.mesh_views(128, 16)
    assert len(views.surface) == len(views.diameters) == len(views.anchors) == 4
    parts = []
    for objective in (alone, beside):
        torch.manual_seed(1)
        parts.append(objective(network, batch)[1])
    assert parts[1]["label"] > parts[0]["label"]  # two more names to be refused for every query
    for name in ("l1", "giou", "mesh/scale"):
        assert parts[1][name].item() == pytest.approx(parts[0][name].item(), rel=0.05), name

    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3)
    before = _similarity(network, beside, batch)
    for _ in range(6):
        optimiser.zero_grad()
        beside(network, batch)[0].backward()
        optimiser.step()
    assert _similarity(network, beside, batch) < before


def test_without_meshes_to_take_them_from_they_are_refused() -> None:
    with pytest.raises(ValueError, match="clutter"):
        Objective([box_object("long", (0.2, 0.1, 0.05))], LossConfig(strangers=2))


def _similarity(network: SmopeS, objective: Objective, batch: object) -> float:
    torch.manual_seed(2)
    with torch.no_grad():
        tokens = network.encode_meshes(objective.mesh_views(128, 16))
        found = network.detect(network.encode_image(batch.images), tokens)  # type: ignore[attr-defined]
    return float(found.logits[-1, ..., 2:].mean())
