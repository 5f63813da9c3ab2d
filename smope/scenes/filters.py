"""Convolution of every picture of a batch with a kernel of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from smope.scenes.fuse import fused


def gaussian(sigma: Tensor, reach: int) -> Tensor:
    """[K, 2 reach + 1] taps of Gaussians of `sigma` [K] pixels; they sum to 1."""
    taps = torch.arange(-reach, reach + 1, device=sigma.device, dtype=sigma.dtype)
    kernel = torch.exp(-0.5 * (taps / sigma[:, None]).square())
    return kernel / kernel.sum(dim=1, keepdim=True)


def pad(images: Tensor, reach: int) -> Tensor:
    """Repeat the edges of [K, C, H, W] by `reach` pixels on every side."""
    return F.pad(images, (reach,) * 4, mode="replicate")


def convolve(padded: Tensor, kernels: Tensor) -> Tensor:
    """Valid correlation of each of [K, C, H + a - 1, W + b - 1] with its kernel of [K, a, b] -> [K, C, H, W].

    A grouped convolution: CUDA runs it as a direct one, whose time goes with the number of taps.
    """
    count, channels = padded.shape[:2]
    weight = kernels.repeat_interleave(channels, dim=0)[:, None]
    out = F.conv2d(padded.flatten(0, 1)[None], weight, groups=count * channels)
    return out.unflatten(1, (count, channels))[0]


def separable(padded: Tensor, taps: Tensor) -> Tensor:
    """Valid correlation of each of [K, C, H + k - 1, W + k - 1] with the outer square of its taps [K, k]."""
    if padded.is_cuda:
        return summed(padded, taps)
    return convolve(convolve(padded, taps[:, None, :]), taps[:, :, None])


@fused
def summed(padded: Tensor, taps: Tensor) -> Tensor:
    """`separable` as sums of shifted pictures: fused, a pass over memory along each side."""
    reach = taps.shape[1] - 1
    height, width = padded.shape[-2] - reach, padded.shape[-1] - reach
    weights = taps[:, :, None, None, None].unbind(dim=1)  # [K, 1, 1, 1] each
    across = weights[0] * padded[..., :width]
    for k, weight in enumerate(weights[1:], start=1):
        across = across + weight * padded[..., k : k + width]
    down = weights[0] * across[..., :height, :]
    for k, weight in enumerate(weights[1:], start=1):
        down = down + weight * across[..., k : k + height, :]
    return down
