"""A small random network of two known meshes: quick, and good enough for what does not depend on weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import trimesh
from torch import nn

from smope import SMOPE, ObjectModel
from smope.config import ModelConfig
from smope.networks import backbone, paper_detector
from smope.networks.backbone import EfficientNetLite2
from smope.networks.resnet import FrozenBatchNorm2d, ResNet50
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


# Sections [network] of recipes: each network as small as it goes, for tests that train.
TINY_S = {
    "width": 32,
    "heads": 4,
    "encoder_layers": 1,
    "encoder_hidden": 32,
    "decoder_layers": 2,
    "decoder_hidden": 32,
    "queries": 12,
    "mesh_tokens": 4,
    "surface_points": 64,
    "anchors": 16,
    "refine_layers": 1,
    "rebuilt_points": 32,
    "denoising_groups": 1,
    "rescore": True,
}
TINY_PAPER = {
    "width": 64,
    "hidden": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "queries": 8,
    "surface_points": 50,
    "template_vertices": 42,
}
TINY = {"smope-s": TINY_S, "smope-paper": TINY_PAPER}


class ThinResNet(ResNet50):
    """A block a stage, a sixteenth of the channels; strides, frozen parts and names as in the whole one."""

    channels = (32, 64, 128)

    def __init__(self, dilated: bool = False) -> None:
        nn.Module.__init__(self)
        self.conv1 = nn.Conv2d(3, 4, 7, 2, 3, bias=False)
        self.bn1 = FrozenBatchNorm2d(4)
        self.layer1 = self._stage(4, 4, 1, 1)
        self.layer2 = self._stage(16, 8, 1, 2)
        self.layer3 = self._stage(32, 16, 1, 2)
        self.layer4 = self._stage(64, 32, 1, 1 if dilated else 2, 2 if dilated else 1)


class ThinLite(EfficientNetLite2):
    """A block a stage, none of which expands; strides, channels, taps and fixed parts as in the whole one."""

    stages = tuple(
        (kernel, stride, 1, outputs, 1) for kernel, stride, _, outputs, _ in EfficientNetLite2.stages
    )  # type: ignore[assignment]  # as many, which no type checker counts


def thin_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both networks with little in front of their transformers: a whole backbone takes seconds to build, to
    store, to run and to train."""
    monkeypatch.setattr(paper_detector, "ResNet50", ThinResNet)
    monkeypatch.setattr(backbone, "EfficientNetLite2", ThinLite)


def quick_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what does not depend on them: thin backbones, and no picture of the curves."""
    from smope.train.curves import Curves

    thin_backbone(monkeypatch)
    monkeypatch.setattr(Curves, "draw", lambda curves, title="": None)


def few_textures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scenes with a tenth of the procedural textures, which every stream makes anew."""
    from smope.scenes import compose, stream

    for module in (compose, stream):
        monkeypatch.setattr(module, "SHEETS", 5)
        monkeypatch.setattr(module, "BOARDS", 2)
