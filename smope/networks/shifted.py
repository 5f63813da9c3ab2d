"""Filters of feature maps as sums of shifted maps, for torch.compile.

A compiler makes one pass over memory of such a sum, whatever the stride, and takes what comes before and
after it into that pass. Uncompiled each shift is a pass of its own: there PyTorch's own operators are faster.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx


def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, ends: tuple[tuple[int, int], tuple[int, int]]
) -> Tensor:
    """Depthwise convolution of [B, C, H, W], summed in float32 and given in x's type.

    weight [C, 1, k, k], bias [C]; `ends` is the padding (before, after) of the height and of the width.
    Of EfficientNet's first stages two 3x3 on bfloat16 maps, channels last, took 38 ms of a step of 268 by
    cuDNN's choice of a kernel (96 images of 640x480, H200, benchmarks/fit_kernels.py).
    """
    (top, bottom), (left, right) = ends
    padded = F.pad(x, (left, right, top, bottom))
    height, width = ((size - weight.shape[-1]) // stride + 1 for size in padded.shape[-2:])
    total = bias.float()[:, None, None]
    for i in range(weight.shape[-2]):
        for j in range(weight.shape[-1]):
            rows = slice(i, i + (height - 1) * stride + 1, stride)
            columns = slice(j, j + (width - 1) * stride + 1, stride)
            total = total + padded[..., rows, columns].float() * weight[:, 0, i, j].float()[:, None, None]
    return total.to(x.dtype)


class Twice(torch.autograd.Function):
    """[B, C, H, W] -> [B, C, 2 H, 2 W], bilinear, corners not aligned; `Twice.apply(x)`.

    Each input's gradient is gathered from the outputs it went into. A compiler derives atomic additions, one
    for each output and neighbour.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> Tensor:
        # Output 2 i is 3/4 of input i and 1/4 of input i - 1, output 2 i + 1 of i and i + 1. Beyond the edge
        # lies the edge again, whose share comes back with the replicated gradient.
        wide = F.pad(gradients[0], (1, 1, 1, 1), mode="replicate")
        return _halved(_halved(wide, -2), -1)


def _halved(x: Tensor, dim: int) -> Tensor:
    """Every other sum of four neighbours along `dim`, weighed 1, 3, 3, 1 quarters"""
    count = (x.shape[dim] - 2) // 2
    first, second, third, fourth = (
        x.movedim(dim, -1)[..., i : i + 2 * count - 1 : 2].movedim(-1, dim) for i in range(4)
    )
    return 0.25 * (first + fourth) + 0.75 * (second + third)
