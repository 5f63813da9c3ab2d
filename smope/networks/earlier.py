"""Weights of smope-s from before its region reader fitted poses.

Their reader summed the region up in a vector that hardly changed a pose. What they share with the present one
is taken; its new layers begin so that the direct pose stays all but as it was, and can learn from there.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_READER = "region_reader."
_GONE = tuple(_READER + part for part in ("halve.", "narrow.", "summary."))
_TRUST = -6.0  # logit: a cell weighs a four-hundredth of what the direct pose does


def brought_up(weights: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The weights under today's names; those of today come back as they are."""
    if _READER + "halve.0.weight" not in weights:
        return dict(weights)
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(_GONE)}
    fresh = {
        name: tensor.detach().clone()
        for name, tensor in network.state_dict().items()
        if name.startswith(_READER) and name not in kept
    }
    for name, tensor in fresh.items():
        # A further block, summary and prior that add nothing yet, as their last layers give zeros.
        if any(part in name for part in (".conv.", ".summary.layers.1.", ".prior.layers.1.", ".trust.")):
            tensor.zero_()
    fresh[_READER + "trust.bias"] = torch.full_like(fresh[_READER + "trust.bias"], _TRUST)
    return kept | fresh
