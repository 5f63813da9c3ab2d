"""Weights from before the region reader fitted poses."""

from __future__ import annotations

import torch
from small_model import small_model

from smope.networks.earlier import brought_up
from smope.networks.smope_s import SmopeS


def earlier_weights(network: SmopeS) -> dict[str, torch.Tensor]:
    """As they were: two blocks, and convolutions that halve the grid for one summary."""
    hidden = network.region_reader.trust.in_features
    new = ("region_reader.blocks.2.", *(f"region_reader.{part}." for part in ("trust", "summary", "prior")))
    weights = {k: v.clone() for k, v in network.state_dict().items() if not k.startswith(new)}
    weights["region_reader.halve.0.weight"] = torch.randn(hidden, hidden + 4, 3, 3)
    weights["region_reader.narrow.bias"] = torch.randn(hidden // 2)
    weights["region_reader.summary.weight"] = torch.randn(256, 8 * hidden)
    return weights


def test_they_fit_today_and_their_direct_poses_stay_almost() -> None:
    torch.manual_seed(0)
    model = small_model()
    network = model.network
    assert isinstance(network, SmopeS)
    earlier = earlier_weights(network)
    network.load_state_dict(brought_up(earlier, network), strict=True)
    for name, tensor in earlier.items():
        if name in network.state_dict():
            assert torch.equal(network.state_dict()[name], tensor), name
    image, K = torch.rand(1, 3, 64, 96), torch.tensor([[[90.0, 0, 47.5], [0, 90.0, 31.5], [0, 0, 1]]])
    assert model._tokens is not None
    with torch.no_grad():
        found = network(image, K, model._tokens, top_k=8)  # type: ignore[arg-type]
    direct, fitted = found.pairs.poses[:2]
    assert (direct.rotation - fitted.rotation).abs().max() < 0.02
    assert (fitted.translation / direct.translation - 1).abs().max() < 0.05


def test_weights_of_today_are_left_alone_and_others_still_refused() -> None:
    network = small_model().network
    today = network.state_dict()
    same = brought_up(today, network)
    assert same.keys() == today.keys()
    assert all(same[name] is today[name] for name in today)
