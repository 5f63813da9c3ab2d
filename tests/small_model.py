"""A small random network of two known meshes: quick, and good enough for what does not depend on weights."""

from __future__ import annotations

from dataclasses import replace

import torch
import trimesh

from smope import SMOPE, ObjectModel
from smope.config import ModelConfig
from smope.networks.smope_s import SmopeS, SmopeSConfig

SIZE = (96, 64)
K = ((90.0, 0.0, 47.5), (0.0, 90.0, 31.5), (0.0, 0.0, 1.0))


def small_model(seed: int = 2) -> SMOPE:
    """Weights are random, also in the last layers that start at zero, so that every part matters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = SmopeSConfig(width=32, heads=2, encoder_layers=1, decoder_layers=2, queries=12)
        network = SmopeS(config)
        for parameter in network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    ball = trimesh.creation.icosphere(subdivisions=2, radius=0.05)
    brick = trimesh.creation.box((0.12, 0.07, 0.05)).apply_translation((0.3, 0.0, 0.1))
    objects = {
        "ball": ObjectModel.from_mesh("ball", ball, "m", {"symmetries_continuous": [{"axis": [0, 0, 1]}]}),
        "brick": ObjectModel.from_mesh("brick", brick, "m"),
    }
    objects = {name: replace(model, trained=True) for name, model in objects.items()}
    return SMOPE(
        network,
        ModelConfig(
            architecture="smope-s",
            network=config,
            objects=tuple(objects),
            image_size=SIZE,
            K=K,
            diameters=(0.1, 0.15),
        ),
        objects,
        card="# Small\n",
    )


def noise(seed: int, width: int = SIZE[0], height: int = SIZE[1]) -> torch.Tensor:
    """uint8 [3, height, width]"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
