"""Calls the C++ kernel of `smope/_ext/ms_deform_attn_cpu.cpp` on PyTorch tensors."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor


def takes(value: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor) -> bool:
    """Whether the kernel reads tensors of these types: float32 alone."""
    return all(t.dtype == torch.float32 for t in (value, reference, offsets, logits))


def forward(
    library: ctypes.CDLL,
    value: Tensor,
    flat_shapes: list[int],
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
) -> Tensor:
    """Arguments as of `ms_deform_attn`, the levels as [h0, w0, h1, w1, ...]. Returns [B, Q, H*D]."""
    inputs = [t.contiguous() for t in (value, reference, offsets, logits)]
    output = value.new_empty(value.shape[0], logits.shape[1], value.shape[2] * value.shape[3])
    if output.numel():
        library.smope_msda_cpu_forward(
            *_sizes(value, flat_shapes, reference, logits), *_pointers(*inputs, output), _threads(logits)
        )
    return output


def backward(
    library: ctypes.CDLL,
    grad_output: Tensor,
    value: Tensor,
    flat_shapes: list[int],
    reference: Tensor,
    offsets: Tensor,
    logits: Tensor,
    in_cells: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, of offsets (`in_cells`: of the locations, in cells of a level) and of logits."""
    inputs = [t.contiguous() for t in (value, reference, offsets, logits, grad_output)]
    grads = (value.new_zeros(value.shape), offsets.new_empty(offsets.shape), logits.new_empty(logits.shape))
    if grad_output.numel():
        library.smope_msda_cpu_backward(
            *_sizes(value, flat_shapes, reference, logits),
            *_pointers(*inputs, *grads),
            int(in_cells),
            _threads(logits),
        )
    return grads


def _sizes(
    value: Tensor, flat_shapes: list[int], reference: Tensor, logits: Tensor
) -> tuple[ctypes.Array[ctypes.c_int64], ctypes.Array[ctypes.c_int]]:
    batch, queries, heads, levels, points = logits.shape
    sizes = (batch, queries, heads, value.shape[3], levels, points, reference.shape[3])
    return (ctypes.c_int64 * 7)(*sizes), (ctypes.c_int * len(flat_shapes))(*flat_shapes)


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def _threads(logits: Tensor) -> int:
    """torch's number, but no more than have a thousand samples each: starting one costs microseconds."""
    return min(torch.get_num_threads(), 1 + logits.numel() // 1000)
