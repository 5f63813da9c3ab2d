"""AdamW with a detector's parameter groups, and a step that is left out when a gradient is not finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from smope.train.recipe import OptimConfig

_UNDECAYED_NAMES = ("embed", "token", "query")


def _is_decayed(owner: nn.Module, leaf: str, parameter: nn.Parameter) -> bool:
    # Norms and biases are vectors. Embeddings are looked up and not multiplied with, so decay is no use.
    if parameter.ndim <= 1 or isinstance(owner, nn.Embedding):
        return False
    return not any(part in leaf for part in _UNDECAYED_NAMES)


def _scale_of(name: str, scales: Mapping[str, float]) -> float:
    parts = name.split(".")
    factor = 1.0
    for key, scale in scales.items():
        if key in parts:
            factor *= scale
    return factor


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, object]]:
    """One group for every pair of (learning-rate scale, weight decay), in the model's own order.

    A key of `config.lr_scale` holds for each parameter that has it as one of the dotted parts of its name.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    matched: set[str] = set()
    for prefix, owner in model.named_modules():
        for leaf, parameter in owner.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            name = f"{prefix}.{leaf}" if prefix else leaf
            matched.update(key for key in config.lr_scale if key in name.split("."))
            decay = config.weight_decay if _is_decayed(owner, leaf, parameter) else 0.0
            groups.setdefault((_scale_of(name, config.lr_scale), decay), []).append(parameter)
    if idle := sorted(set(config.lr_scale) - matched):
        raise ValueError(f"optim.lr_scale: no trained parameter has {', '.join(idle)} in its name")
    return [
        {"params": parameters, "lr": config.lr * scale, "base_lr": config.lr * scale, "weight_decay": decay}
        for (scale, decay), parameters in groups.items()
    ]


class GuardedAdamW:
    """Clips, checks and steps without a value coming to the host.

    A step whose gradient norm is not finite changes nothing: neither weights, moments nor the running
    statistics of batch norms, which the bad forward pass has already touched.
    """

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        self.clip = config.clip_norm
        self.adamw = torch.optim.AdamW(parameter_groups(model, config), betas=config.betas, fused=True)
        self._parameters = [p for group in self.adamw.param_groups for p in group["params"]]
        self._buffers = [b for b in model.buffers() if b.is_floating_point()]
        self._kept: list[Tensor] = [b.clone() for b in self._buffers]

    def set_factor(self, factor: float) -> float:
        """Scale every group's learning rate; gives back the full rate, for the log."""
        for group in self.adamw.param_groups:
            group["lr"] = group["base_lr"] * factor
        return max(group["lr"] for group in self.adamw.param_groups)

    def step(self) -> Tensor:
        """Use and clear the gradients; returns their norm before clipping [] on the device."""
        norm = nn.utils.clip_grad_norm_(self._parameters, self.clip, foreach=True)
        bad = (~torch.isfinite(norm)).float()
        # The fused kernel reads this flag on the device and leaves everything as it is where it is 1.
        # GradScaler sets it too, but the class does not declare it.
        self.adamw.found_inf = bad  # type: ignore[attr-defined]
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self._guard_buffers(bad)
        return norm.detach()

    @torch.no_grad()
    def _guard_buffers(self, bad: Tensor) -> None:
        if not self._buffers:
            return
        flat = torch.cat([b.reshape(-1) for b in self._buffers])
        kept = torch.cat([b.reshape(-1) for b in self._kept])
        chosen = torch.where(bad > 0, kept, flat).split([b.numel() for b in self._buffers])
        values = [part.view_as(buffer) for part, buffer in zip(chosen, self._buffers, strict=True)]
        torch._foreach_copy_(self._buffers, values)
        torch._foreach_copy_(self._kept, values)

    def state_dict(self) -> dict[str, Any]:
        return self.adamw.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the moments; rates and decays stay those of the present configuration."""
        present = [{k: v for k, v in group.items() if k != "params"} for group in self.adamw.param_groups]
        self.adamw.load_state_dict(dict(state))
        for group, own in zip(self.adamw.param_groups, present, strict=True):
            group.update(own)
        self.restart_guard()

    def restart_guard(self) -> None:
        """Take the buffers as they are now for good ones: after weights were loaded."""
        if self._buffers:
            torch._foreach_copy_(self._kept, self._buffers)
