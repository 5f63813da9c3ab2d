"""What a caller gives as camera -> one `Camera` an image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from smope.camera import Camera, CameraError
from smope.config import ModelConfig


def cameras_from(
    pictures: Sequence[Tensor], K: Any, fov: Any, dist: Any, config: ModelConfig
) -> list[Camera]:
    """One camera an image from what the caller gave: one value for all, or one an image."""
    count = len(pictures)
    sizes = [(p.shape[-1], p.shape[-2]) for p in pictures]
    if K is not None and fov is not None:
        raise CameraError("both K and fov given; pass one of them")
    lenses = _one_each(dist, count, 1, "dist")
    if K is not None:
        matrices = _one_each(K, count, 2, "K")
        return _made(Camera, zip(matrices, sizes, lenses, strict=True), count)
    if fov is not None:
        angles = _one_each(fov, count, 0, "fov")
        return _made(Camera.from_fov, zip(map(float, angles), sizes, lenses, strict=True), count)

    def by_the_weights(size: tuple[int, int], lens: Any) -> Camera:
        if size != tuple(config.image_size):
            raise CameraError(
                f"no camera given for an image of {size[0]}x{size[1]}: pass K=[[fx, 0, cx], [0, fy, cy], "
                f"[0, 0, 1]] in pixels, or fov= the horizontal field of view in degrees (only images of "
                f"{config.image_size[0]}x{config.image_size[1]} may go without, by the camera of the weights)"
            )
        return Camera(torch.tensor(config.K), size, lens)

    return _made(by_the_weights, zip(sizes, lenses, strict=True), count)


def _made(make: Callable[..., Camera], arguments: Iterable[tuple[Any, ...]], count: int) -> list[Camera]:
    """A camera of each; an error says of which image. What is given for many images is looked at once."""
    cameras: list[Camera] = []
    made: dict[tuple[Any, ...], Camera] = {}
    kept = list(arguments)  # so that one identity is one thing
    for number, given in enumerate(kept, start=1):
        key = tuple(id(one) if isinstance(one, Tensor) else one for one in given)
        try:
            if key not in made:
                made[key] = make(*given)
            cameras.append(made[key])
        except CameraError as error:
            raise error if count == 1 else CameraError(f"image {number} of {count}: {error}") from error
    return cameras


def _one_each(value: Any, count: int, dims: int, name: str) -> list[Any]:
    """`value` is one thing of `dims` dimensions for all images, or a sequence of `count` such things."""
    if value is None:
        return [None] * count
    try:
        whole = _tensor(value)
    except (TypeError, ValueError, RuntimeError):  # of unlike lengths, or with None among them: one an image
        whole = None
    if whole is not None and whole.dim() <= dims:
        return [whole] * count
    if dims == 1 and whole is not None and whole.dim() == 2 and 1 in whole.shape:
        return [whole.flatten()] * count  # OpenCV writes its coefficients as [1, n] or [n, 1]
    if whole is not None and whole.dim() == dims + 1 and len(whole) == count:
        return list(whole)
    try:
        each = [None if one is None and name == "dist" else _tensor(one) for one in value]
    except (TypeError, ValueError, RuntimeError):
        raise CameraError(f"{name}: numbers expected, {value!r} given") from None
    if len(each) != count:
        raise CameraError(f"{name}: {len(each)} given for {count} image(s); pass one for all or one an image")
    return each


def _tensor(value: Any) -> Tensor:
    if isinstance(value, (list, tuple)):
        if _plain(value):  # the usual case, several times as quick
            return torch.tensor(value, dtype=torch.float64)
        return torch.stack([_tensor(one) for one in value]) if len(value) else torch.zeros(0)
    return torch.as_tensor(value, dtype=torch.float64)


def _plain(value: Any) -> bool:
    """Whether it is a number of Python's, or lists of nothing else"""
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return isinstance(value, (int, float))
