"""What JPEG does to a picture, batched in torch: 4:2:0 chroma, 8x8 DCT, quantisation (ITU-T T.81)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Quantisation tables of T.81, annex K.
_LUMA = """16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"""
_CHROMA = """17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99 47 66 99 99 99 99 99 99
99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99"""
_TO_YCC = torch.tensor(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
)  # JFIF

_TO_RGB = torch.linalg.inv(_TO_YCC)


def jpeg(images: Tensor, quality: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] in 0..1 after coding at `quality` [B] in 1..100 and decoding."""
    _, _, height, width = images.shape
    padded = F.pad(images, (0, -width % 16, 0, -height % 16), mode="replicate")
    matrix = _TO_YCC.to(images)
    ycc = torch.einsum("ij,bjhw->bihw", matrix, padded * 255) - torch.tensor(
        [128.0, 0.0, 0.0], device=images.device
    ).view(1, 3, 1, 1)
    luma = _quantise(ycc[:, :1], _table(_LUMA, quality))
    chroma = _quantise(F.avg_pool2d(ycc[:, 1:], 2), _table(_CHROMA, quality))
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False)
    decoded = torch.cat([luma + 128, chroma], dim=1)
    rgb = torch.einsum("ij,bjhw->bihw", _TO_RGB.to(images), decoded) / 255
    return rgb[:, :, :height, :width].clamp(0, 1)


def _table(text: str, quality: Tensor) -> Tensor:
    """[B, 8, 8] quantisation steps at a quality, scaled as libjpeg does."""
    base = torch.tensor([float(x) for x in text.split()], device=quality.device).view(1, 8, 8)
    scale = torch.where(quality < 50, 5000 / quality.clamp(min=1), 200 - 2 * quality)[:, None, None]
    return ((base * scale + 50) / 100).floor().clamp(1, 255)


def _quantise(planes: Tensor, steps: Tensor) -> Tensor:
    """Round the 8x8 DCT coefficients of [B, C, H, W] to multiples of steps [B, 8, 8]."""
    batch, channels, height, width = planes.shape
    k = torch.arange(8, device=planes.device, dtype=planes.dtype)
    dct = torch.cos((2 * k[None] + 1) * k[:, None] * (math.pi / 16)) * 0.5  # [frequency, place]
    dct[0] /= math.sqrt(2)
    blocks = planes.reshape(batch, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
    frequencies = dct @ blocks @ dct.T
    steps = steps[:, None, None, None]
    frequencies = (frequencies / steps).round_() * steps
    blocks = dct.T @ frequencies @ dct
    return blocks.transpose(3, 4).reshape(batch, channels, height, width)
