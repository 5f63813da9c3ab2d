"""What JPEG does to a picture, batched in torch: 4:2:0 chroma, 8x8 DCT, quantisation (ITU-T T.81)."""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

# Quantisation tables of T.81, annex K.
_LUMA = """16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"""
_CHROMA = """17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99 47 66 99 99 99 99 99 99
99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99 99"""


def jpeg(images: Tensor, quality: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] in 0..1 after coding at `quality` [B] in 1..100 and decoding."""
    return recode(images, *coding_tables(quality))


def coding_tables(quality: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantisation steps of luma and chroma [B, 64] at qualities [B], and the 8x8 DCT [64, 64]."""
    luma, chroma, transform = _constants(quality.device)
    # Scaled as libjpeg does.
    scale = torch.where(quality < 50, 5000 / quality.clamp(min=1), 200 - 2 * quality)[:, None]
    luma, chroma = (((base * scale + 50) / 100).floor().clamp(1, 255) for base in (luma, chroma))
    return luma, chroma, transform


def recode(images: Tensor, luma_steps: Tensor, chroma_steps: Tensor, transform: Tensor) -> Tensor:
    """`jpeg` by its tables: a pure function."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (0, -width % 16, 0, -height % 16), mode="replicate") * 255
    red, green, blue = padded.unbind(dim=1)
    # JFIF, eq. 1 of its section on colour; the level shift of 128 is for luma alone, chroma is signed.
    luma = 0.299 * red + 0.587 * green + 0.114 * blue - 128
    cb = -0.168736 * red - 0.331264 * green + 0.5 * blue
    cr = 0.5 * red - 0.418688 * green - 0.081312 * blue
    luma = _quantise(luma[:, None], luma_steps, transform)[:, 0] + 128
    chroma = _quantise(F.avg_pool2d(torch.stack([cb, cr], dim=1), 2), chroma_steps, transform)
    cb, cr = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False).unbind(dim=1)
    rgb = torch.stack([luma + 1.402 * cr, luma - 0.344136 * cb - 0.714136 * cr, luma + 1.772 * cb], dim=1)
    return (rgb[:, :, :height, :width] / 255).clamp(0, 1)


@cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Kept for each device: to bring them there anew would wait for all that is queued on it."""
    k = torch.arange(8)
    dct = torch.cos((2 * k[None] + 1) * k[:, None] * (math.pi / 16)) * 0.5  # [frequency, place]
    dct[0] /= math.sqrt(2)
    luma, chroma = (torch.tensor([float(x) for x in text.split()]) for text in (_LUMA, _CHROMA))
    return luma.to(device), chroma.to(device), torch.kron(dct, dct).to(device)


def _quantise(planes: Tensor, steps: Tensor, transform: Tensor) -> Tensor:
    """Round the 8x8 DCT coefficients of [B, C, H, W] to multiples of steps [B, 64].

    Rows and columns are transformed in one product: 64 x 64 is a size that matrix units like, 8 x 8 is not.
    """
    batch, channels, height, width = planes.shape
    blocks = planes.reshape(batch, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
    frequencies = (blocks.reshape(-1, 64) @ transform.T).view(batch, -1, 64)
    steps = steps[:, None]
    levels = (frequencies / steps).round() * steps
    blocks = (levels.view(-1, 64) @ transform).view(batch, channels, height // 8, width // 8, 8, 8)
    return blocks.transpose(3, 4).reshape(batch, channels, height, width)
