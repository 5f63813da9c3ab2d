"""Annotated photos made to look like others: mirrored, seen through another lens and frame, in other light.

Only changes after which the labels are still exact: a resize and a crop change K, a mirror image changes K
and the poses. For those an object must be alike on both sides of x = 0 in its own frame, as vehicles are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from smope.data.items import Batch
from smope.geometry.boxes import share_inside

ImageSize = tuple[int, int]  # (width, height) in pixels
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class AugmentConfig:
    """How far photos are changed; ranges are even in the logarithm where they are factors."""

    mirror: float = 0.5  # probability
    zoom: tuple[float, float] = (0.8, 1.5)
    brightness: tuple[float, float] = (0.7, 1.4)
    contrast: tuple[float, float] = (0.75, 1.3)
    saturation: tuple[float, float] = (0.6, 1.4)
    warmth: float = 0.06  # standard deviation of the logarithm of red over blue
    gamma: tuple[float, float] = (0.8, 1.25)
    noise: float = 0.015  # largest standard deviation
    blur: float = 0.2  # probability
    seen: float = 0.3  # an object of which the frame shows less than this share of the box is ignored


def augmented(batch: Batch, frame: ImageSize, config: AugmentConfig, seed: tuple[int, ...]) -> Batch:
    """The images of `batch` (without masks and depth), each changed on its own, in a `frame` filled up with
    zeros where the photo ends."""
    pieces = []
    for b in range(len(batch)):
        rng = np.random.default_rng((*seed, b))
        item = batch[b : b + 1]
        if rng.random() < config.mirror:
            item = mirrored(item)
        width, height = item.images.shape[-1], item.images.shape[-2]
        factor = float(np.exp(rng.uniform(*np.log(config.zoom))))
        size = (round(width * factor), round(height * factor))
        # A larger picture is cut somewhere; a smaller one leaves its frame empty at the right and the bottom.
        x0 = int(rng.integers(0, max(size[0] - frame[0], 0) + 1))
        y0 = int(rng.integers(0, max(size[1] - frame[1], 0) + 1))
        item = framed(resized(item, size), (x0, y0), frame)
        item = replace(item, images=coloured(item.images, config, rng))
        pieces.append(without_unseen(item, frame, config.seen))
    return concatenated(pieces)


def mirrored(batch: Batch) -> Batch:
    """Left and right exchanged. A point X of the scene goes to M X with M = diag(-1, 1, 1), and so the pose
    R, t of an object that is alike under M in its own frame goes to M R M, M t; pixel u goes to W - 1 - u."""
    width = batch.images.shape[-1]
    M = torch.tensor([-1.0, 1.0, 1.0, 1.0])
    K = batch.K.clone()
    K[:, 0, 2] = width - 1 - K[:, 0, 2]
    K[:, 0, 1] = -K[:, 0, 1]
    return replace(
        batch,
        images=batch.images.flip(-1),
        K=K,
        T_CO=M[:, None] * batch.T_CO * M,
        boxes_xyxy=_mirrored_boxes(batch.boxes_xyxy, width),
        ignored=None if batch.ignored is None else _mirrored_boxes(batch.ignored, width),
    )


def resized(batch: Batch, size: ImageSize) -> Batch:
    """Every picture brought to `size`, and with it K and the boxes; poses stay."""
    height, width = batch.images.shape[-2:]
    images = F.interpolate(
        batch.images, size=(size[1], size[0]), mode="bilinear", align_corners=False, antialias=True
    )
    factor = torch.tensor([size[0] / width, size[1] / height])
    # Whole numbers are pixel centres: u goes to (u + 0.5) s - 0.5.
    K = batch.K.clone()
    K[:, :2] *= factor[:, None]
    K[:, :2, 2] += 0.5 * factor - 0.5

    def boxes(values: Tensor) -> Tensor:
        return (values + 0.5) * factor.repeat(2) - 0.5

    return replace(
        batch,
        images=images.clamp(0, 1),
        K=K,
        boxes_xyxy=boxes(batch.boxes_xyxy),
        ignored=None if batch.ignored is None else boxes(batch.ignored),
    )


def framed(batch: Batch, corner: tuple[int, int], frame: ImageSize) -> Batch:
    """What a frame shows whose left top pixel is `corner` of the picture; zeros beyond the picture's end."""
    (x0, y0), (width, height) = corner, frame
    images = batch.images[..., y0 : y0 + height, x0 : x0 + width]
    images = F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))
    K = batch.K.clone()
    K[:, :2, 2] -= torch.tensor([x0, y0], dtype=K.dtype)
    moved = torch.tensor([x0, y0, x0, y0], dtype=K.dtype)
    return replace(
        batch,
        images=images,
        K=K,
        boxes_xyxy=batch.boxes_xyxy - moved,
        ignored=None if batch.ignored is None else batch.ignored - moved,
    )


def coloured(images: Tensor, config: AugmentConfig, rng: np.random.Generator) -> Tensor:
    """Other exposure, tone, colour and noise for pictures [B, 3, H, W] in 0..1; what is black stays black."""

    def factor(range_: tuple[float, float]) -> float:
        return float(np.exp(rng.uniform(*np.log(range_))))

    warmth = float(rng.normal(0, config.warmth))
    gain = torch.tensor([np.exp(warmth / 2), 1.0, np.exp(-warmth / 2)], dtype=torch.float32)
    x = images.clamp(0, 1) ** factor(config.gamma) * (factor(config.brightness) * gain[:, None, None])
    middle = x.mean()
    x = middle + (x - middle) * factor(config.contrast)
    grey = torch.tensordot(torch.tensor(_LUMA), x, dims=([0], [1]))[:, None]
    x = grey + (x - grey) * factor(config.saturation)
    if rng.random() < config.blur:
        x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1) * 0.7 + 0.3 * x
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    x = x + torch.randn(x.shape, generator=generator) * (config.noise * rng.random())
    empty = images.amax(1, keepdim=True) <= 0
    return torch.where(empty, 0.0, x.clamp(0, 1))


def without_unseen(batch: Batch, frame: ImageSize, seen: float) -> Batch:
    """Objects mostly outside of the frame become ignored areas; the others' visibility counts what is cut."""
    whole = torch.tensor([-0.5, -0.5, frame[0] - 0.5, frame[1] - 0.5])
    share = share_inside(batch.boxes_xyxy, whole)  # [B, N]
    before = batch.visibility
    lost = batch.present & (share < seen)
    areas = torch.where(lost[..., None], batch.boxes_xyxy, 0.0)
    ignored = areas if batch.ignored is None else torch.cat([batch.ignored, areas], 1)
    return replace(
        batch,
        labels=batch.labels.masked_fill(lost, -1),
        visibility=torch.minimum(before, share).masked_fill(lost, 0.0),
        ignored=ignored,
    )


def concatenated(batches: list[Batch]) -> Batch:
    """One batch of several with pictures of one size. What only some have is unknown in the others."""
    slots = max(batch.labels.shape[1] for batch in batches)
    areas = max(0 if batch.ignored is None else batch.ignored.shape[1] for batch in batches)
    filled = [batch.filled(slots, areas) for batch in batches]
    surfaces = any(batch.instance is not None for batch in batches)
    columns = {
        name: torch.cat([getattr(batch, name) for batch in filled])
        for name in ("images", "K", "labels", "T_CO", "boxes_xyxy", "visibility", "scale", "ignored")
    }
    if surfaces:
        known = [batch.with_surfaces() for batch in filled]
        columns |= {name: torch.cat([getattr(b, name) for b in known]) for name in ("instance", "depth")}
    masks = [batch.full_masks for batch in filled if batch.full_masks is not None]
    if len(masks) == len(filled):
        columns["full_masks"] = torch.cat(masks)
    return Batch(**columns)


def _mirrored_boxes(boxes: Tensor, width: int) -> Tensor:
    x0, y0, x1, y1 = boxes.unbind(-1)
    return torch.stack([width - 1 - x1, y0, width - 1 - x0, y1], -1)
