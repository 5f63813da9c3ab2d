"""What a caller gives as camera -> one `Camera` an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from smope.camera import Camera
from smope.config import ModelConfig


def cameras_from(
    pictures: Sequence[Tensor], K: Any, fov: Any, dist: Any, config: ModelConfig
) -> list[Camera]:
    """One camera an image from what the caller gave: one value for all, or one an image."""
    count = len(pictures)
    sizes = [(p.shape[-1], p.shape[-2]) for p in pictures]
    if K is not None and fov is not None:
        raise ValueError("both K and fov given; pass one of them")
    lenses = _one_each(dist, count, 1, "dist")
    if K is not None:
        matrices = _one_each(K, count, 2, "K")
        return [Camera(k, s, d) for k, s, d in zip(matrices, sizes, lenses, strict=True)]
    if fov is not None:
        angles = _one_each(fov, count, 0, "fov")
        return [Camera.from_fov(float(a), s, d) for a, s, d in zip(angles, sizes, lenses, strict=True)]
    cameras = []
    for size, lens in zip(sizes, lenses, strict=True):
        if size != tuple(config.image_size):
            raise ValueError(
                f"no camera given for an image of {size[0]}x{size[1]}: pass K=[[fx, 0, cx], [0, fy, cy], "
                f"[0, 0, 1]] in pixels, or fov= the horizontal field of view in degrees (only images of "
                f"{config.image_size[0]}x{config.image_size[1]} may go without, by the camera of the weights)"
            )
        cameras.append(Camera(torch.tensor(config.K), size, lens))
    return cameras


def _one_each(value: Any, count: int, dims: int, name: str) -> list[Any]:
    """`value` is one thing of `dims` dimensions for all images, or a sequence of `count` such things."""
    if value is None:
        return [None] * count
    if (
        isinstance(value, (list, tuple))
        and len(value)
        and any(isinstance(v, Tensor) or hasattr(v, "shape") for v in value)
    ):
        each = [torch.as_tensor(v) for v in value]
    else:
        try:
            tensor = torch.as_tensor(value, dtype=torch.float64)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}: numbers expected, {value!r} given") from error
        if tensor.dim() <= dims:
            return [tensor] * count
        each = list(tensor)
    if len(each) != count:
        raise ValueError(f"{name}: {len(each)} given for {count} image(s); pass one for all or one an image")
    return each
