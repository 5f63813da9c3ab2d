"""The running mean of the weights that is evaluated, saved and shipped."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Ema:
    """Exponential moving average of a model's parameters, kept on the model's device.

    Buffers (the running statistics of batch norms) are averages already and are copied. The decay rises from
    0.1 towards `decay` in the first steps, so that the random start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"EMA decay: {decay} given, a number in 0..1 (1 excluded) expected")
        self.decay = decay
        self.updates = 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._follow(model)

    def _follow(self, model: nn.Module) -> None:
        """Pair the entries once: walking the modules at every step would cost more than the update itself."""
        self._mine: list[Tensor] = list(self.model.parameters())
        self._theirs: list[Tensor] = list(model.parameters())
        # By type: one launch each, where a list of mixed types would be copied tensor by tensor.
        self._buffers: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            pair = self._buffers.setdefault(mine.dtype, ([], []))
            pair[0].append(mine)
            pair[1].append(theirs)

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the followed model's present weights; no value comes to the host."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(self._mine, self._theirs, 1.0 - decay)
        for averaged, followed in self._buffers.values():
            torch._foreach_copy_(averaged, followed)
