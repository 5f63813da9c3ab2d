"""What a run begins with: weights of the same network, of a shallower one, or of another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_model import small_model

from smope.config import ConfigError
from smope.networks.smope_s import SmopeS
from smope.train.checkpoint import save_small
from smope.train.start import begin


def started(network: SmopeS, init: Path) -> None:
    """Give `network` the weights of the small checkpoint, as a training loop does."""
    loop = SimpleNamespace(model=network, start_from=lambda weights, spent: network.load_state_dict(weights))
    begin(loop, init, backbone=None, resume=False, continue_schedule=False)  # type: ignore[arg-type]


@pytest.fixture
def trained(tmp_path: Path) -> tuple[SmopeS, Path]:
    network = small_model().network
    assert isinstance(network, SmopeS)
    network.half().float()  # a small checkpoint is in fp16
    save_small(tmp_path / "small.safetensors", network.state_dict())
    return network, tmp_path / "small.safetensors"


def test_a_deeper_network_begins_with_a_shallower_ones_weights(
    trained: tuple[SmopeS, Path], caplog: pytest.LogCaptureFixture
) -> None:
    network, small = trained
    count = network.config.region_blocks
    deeper = SmopeS(replace(network.config, region_blocks=count + 1))
    with caplog.at_level("INFO"):
        started(deeper, small)
    assert f"region_reader.blocks.{count}.conv.weight" in caplog.text
    for key, value in network.state_dict().items():
        assert torch.equal(deeper.state_dict()[key], value), key
    assert not deeper.region_reader.blocks[count].conv.weight.any()


def test_weights_of_another_network_are_refused(trained: tuple[SmopeS, Path]) -> None:
    network, small = trained
    with pytest.raises(ConfigError, match="another network than the recipe's"):
        started(SmopeS(replace(network.config, encoder_layers=2)), small)
    with pytest.raises(ConfigError, match="another network than the recipe's"):  # what it knows would be lost
        started(SmopeS(replace(network.config, region_blocks=network.config.region_blocks - 1)), small)
