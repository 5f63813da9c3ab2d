"""Refinement inside the network: which layer each step takes."""

from __future__ import annotations

from dataclasses import replace

import torch
from small_model import small_model

from smope.network_inputs import mesh_inputs
from smope.networks.smope_s import SmopeS


def test_steps_past_the_layers_are_the_last_layer_again() -> None:
    model = small_model()
    network = model.network
    assert isinstance(network, SmopeS)
    layers = len(network.refiners)
    again = SmopeS(replace(network.config, refine_steps=layers + 2))
    again.load_state_dict(network.state_dict())
    apart = SmopeS(replace(network.config, refine_layers=layers + 2, refine_steps=layers + 2))
    apart.load_state_dict(
        {
            key.replace(f"refiners.{layers - 1}.", f"refiners.{layers - 1 + further}."): value
            for key, value in network.state_dict().items()
            for further in range(3)
        }
    )
    image, K = torch.rand(1, 3, 64, 96), torch.tensor([[[90.0, 0, 47.5], [0, 90.0, 31.5], [0, 0, 1]]])
    inputs = mesh_inputs(list(model.objects.values()), network.config.surface_points, network.config.anchors)
    with torch.no_grad():
        shared, own = (
            each.eval()(image, K, each.encode_meshes(inputs), top_k=4).pairs.poses for each in (again, apart)
        )
    assert len(shared) == len(own) == 2 + layers + 2
    for one, other in zip(shared, own, strict=True):
        assert torch.equal(one.translation, other.translation)
        assert torch.equal(one.rotation, other.rotation)
    assert not torch.equal(shared[-1].translation, shared[-2].translation)
