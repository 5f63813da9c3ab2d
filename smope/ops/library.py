"""The operators `smope::ms_deform_attn` and its backward, as torch.library knows them.

Schemas, shapes (for torch.compile) and gradients live here; kernels are in `smope/_ext` (see `build`).
On a CPU the operators run the C++ kernel if that is loaded, else the definition, so that all of this is
tested where there is no GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smope.ops import build, cpu
from smope.ops.ms_deform_attn import (
    Shapes,
    ms_deform_attn_core,
    ms_deform_attn_torch,
    sampling_locations,
    softmaxed,
)

_library = torch.library.Library("smope", "DEF")
_library.define(
    "ms_deform_attn(Tensor value, int[] spatial_shapes, Tensor reference, Tensor offsets, Tensor logits) "
    "-> Tensor"
)
_library.define(
    "ms_deform_attn_backward(Tensor grad_output, Tensor value, int[] spatial_shapes, Tensor reference, "
    "Tensor offsets, Tensor logits, bool in_cells) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "ms_deform_attn_from_cells(Tensor grad_cells, int[] spatial_shapes, Tensor reference, Tensor offsets) "
    "-> (Tensor, Tensor)"
)


def pairs(flat: list[int]) -> Shapes:
    """[h0, w0, h1, w1, ...] as ((h0, w0), (h1, w1), ...)."""
    return tuple(zip(flat[::2], flat[1::2], strict=True))


@torch.library.register_fake("smope::ms_deform_attn", lib=_library)
def _forward_shape(
    value: Tensor, spatial_shapes: list[int], reference: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    return value.new_empty(value.shape[0], logits.shape[1], value.shape[2] * value.shape[3])


@torch.library.register_fake("smope::ms_deform_attn_backward", lib=_library)
def _backward_shapes(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: list[int],
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    in_cells: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kind = torch.float32 if in_cells else offsets.dtype
    return (
        value.new_empty(value.shape),
        offsets.new_empty(offsets.shape, dtype=kind),
        logits.new_empty(logits.shape),
    )


def _forward_cpu(
    value: Tensor, spatial_shapes: list[int], reference: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    library = build.loaded_cpu_kernel()
    if library is not None and cpu.takes(value, reference, offsets, logits):
        return cpu.forward(library, value, spatial_shapes, reference, offsets, logits)
    return ms_deform_attn_torch(value, pairs(spatial_shapes), reference, offsets, logits).contiguous()


def _backward_cpu(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: list[int],
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    in_cells: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    library = build.loaded_cpu_kernel()
    if library is not None and cpu.takes(value, reference, offsets, logits):
        return cpu.backward(library, grad_output, value, spatial_shapes, reference, offsets, logits, in_cells)
    shapes = pairs(spatial_shapes)
    with torch.enable_grad():
        value, offsets, logits = (t.detach().requires_grad_() for t in (value, offsets, logits))
        locations = sampling_locations(shapes, reference.detach().float(), offsets.float())
        output = ms_deform_attn_core(value, shapes, locations, softmaxed(logits.float()))
        moved = locations if in_cells else offsets
        grad_value, grad_moved, grad_logits = torch.autograd.grad(output, (value, moved, logits), grad_output)
    if in_cells:
        grad_moved = grad_moved / level_sizes(shapes, grad_moved)[:, None, :]
    return grad_value.contiguous(), grad_moved.contiguous(), grad_logits.contiguous()


_library.impl("ms_deform_attn", _forward_cpu, "CPU")
_library.impl("ms_deform_attn_backward", _backward_cpu, "CPU")


def level_sizes(spatial_shapes: Shapes, like: Tensor) -> Tensor:
    """(w, h) of each level, cells: [L, 2]."""
    return like.new_tensor([(w, h) for h, w in spatial_shapes])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.spatial_shapes, reference, offsets, logits = inputs
    ctx.save_for_backward(value, reference, offsets, logits)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, reference, offsets, logits = ctx.saved_tensors
    of_reference = ctx.needs_input_grad[2]
    grad_value, grad_offsets, grad_logits = torch.ops.smope.ms_deform_attn_backward(
        grad_output, value, ctx.spatial_shapes, reference, offsets, logits, of_reference
    )
    grad_reference = None
    if of_reference:
        grad_offsets, grad_reference = from_cells(grad_offsets, ctx.spatial_shapes, reference, offsets)
    return grad_value, None, grad_reference, grad_offsets, grad_logits


def from_cells(
    grad_cells: Tensor, spatial_shapes: list[int], reference: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of offsets and of reference from that of the locations in cells, [B, Q, H, L, P, 2]."""
    sizes = level_sizes(pairs(spatial_shapes), grad_cells)  # [L, 2]
    grad_xy = grad_cells.sum(dim=(2, 4)) * sizes  # [B, Q, L, 2]
    if reference.shape[-1] == 2:
        return grad_cells.to(offsets.dtype), grad_xy.to(reference.dtype)
    half_step = sizes * (0.5 / offsets.shape[4])  # cells a unit of offset and of box side
    grad_sides = (grad_cells * offsets).sum(dim=(2, 4)) * half_step
    grad_offsets = grad_cells * (reference[..., 2:] * half_step)[:, :, None, :, None, :]
    return grad_offsets.to(offsets.dtype), torch.cat([grad_xy, grad_sides], dim=-1).to(reference.dtype)


# Of CUDA tensors smope/_ext/autograd.h does the same, in less time; it calls from_cells by its name.
torch.library.register_autograd(
    "smope::ms_deform_attn", _backward, setup_context=_save_for_backward, lib=_library
)
_library.impl("ms_deform_attn_from_cells", from_cells, "CompositeImplicitAutograd")


def ms_deform_attn_operator(
    value: Tensor, spatial_shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """The operator; brings offsets and logits to one type (value's or float32) and reference to float32."""
    flat = [side for shape in spatial_shapes for side in shape]
    kind = offset_dtype(value.dtype, offsets.dtype, logits.dtype)
    return _attend(value, flat, typed(reference, torch.float32), typed(offsets, kind), typed(logits, kind))


_attend = torch.ops.smope.ms_deform_attn.default


def typed(tensor: Tensor, kind: torch.dtype) -> Tensor:
    """`tensor.to(kind)`, without the microsecond that this takes where nothing is to do."""
    return tensor if tensor.dtype == kind else tensor.to(kind)


def offset_dtype(value: torch.dtype, offsets: torch.dtype, logits: torch.dtype) -> torch.dtype:
    """The type in which the kernel reads offsets and logits."""
    return value if value == offsets == logits else torch.float32
