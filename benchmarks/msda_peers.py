"""The other implementations of deformable attention, as operators that take what a layer has."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from msda_cases import Operator
from torch import Tensor

from smope.ops import ms_deform_attn
from smope.ops.ms_deform_attn import Shapes, ms_deform_attn_torch, sampling_locations, softmaxed


def from_locations(core: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor], whole: bool) -> Operator:
    """An operator that takes ready locations and weights; `whole`: in float32, for peers without 16 bit."""

    def run(value: Tensor, shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        sizes, starts = level_tensors(shapes)
        locations = sampling_locations(shapes, reference, offsets.float())
        weights = softmaxed(logits.float())
        if whole:
            return core(value.float(), sizes, starts, locations, weights).to(value.dtype)
        return core(value, sizes, starts, locations, weights.to(value.dtype))

    return run


_level_tensors: dict[Shapes, tuple[Tensor, Tensor]] = {}


def level_tensors(shapes: Shapes) -> tuple[Tensor, Tensor]:
    if shapes not in _level_tensors:
        sizes = torch.tensor(shapes, device="cuda")
        _level_tensors[shapes] = sizes, torch.cat([sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]])
    return _level_tensors[shapes]


def peers() -> dict[str, Operator]:
    """Every peer that imports here, by name."""
    found: dict[str, Operator] = {}

    def attempt(name: str, module: str, build: Callable[[Any], Operator]) -> None:
        try:
            found[name] = build(importlib.import_module(module))
        except Exception as error:  # a peer may fail to import in any way; say so and go on
            reason = str(error).splitlines()[0] if str(error) else ""
            print(f"not run: {name} ({type(error).__name__}: {reason})")

    attempt(
        "torch-ms-deform-attn", "torch_ms_deform_attn", lambda m: from_locations(m.ms_deform_attn, whole=True)
    )
    for backend in ("TRITON", "CUDA"):
        attempt(f"deformops {backend}", "deformops.registry", functools.partial(deformops, backend))
    attempt("DCNv4 FlashDeformAttn", "DCNv4.functions", flash_deform_attn)
    return found


def deformops(backend: str, module: Any) -> Operator:
    chosen = getattr(module.Backend, backend)
    return from_locations(functools.partial(module.msda, backend=chosen), whole=False)


def flash_deform_attn(module: Any) -> Operator:
    function = module.FlashDeformAttnFunction

    def run(value: Tensor, shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        sizes, starts = level_tensors(shapes)
        locations = sampling_locations(shapes, reference, offsets.float())
        joined = torch.cat([locations.flatten(3), logits.float().flatten(3)], -1).to(value.dtype)
        return function.apply(value, sizes, starts, joined, 64, offsets.shape[4])

    return run


def implementations() -> dict[str, Operator]:
    return {"smope": ms_deform_attn, "grid_sample (PyTorch)": ms_deform_attn_torch, **peers()}
