"""Whatever a user holds a photo in -> uint8 [3, H, W] RGB, upright."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

log = logging.getLogger(__name__)

_VIDEOS = {".avi", ".mkv", ".mov", ".mp4", ".webm"}
_ROUNDING = 1e-3  # beyond 0..1, as arithmetic in few bits leaves; such values are cut


class ImageError(ValueError):
    """An image that cannot be used; the message says what was given and what is expected."""


def load_image(source: Any, device: torch.device | None = None, copy: bool = True) -> Tensor:
    """uint8 [3, H, W] RGB, contiguous, on the CPU; a uint8 tensor that is on a GPU `device` already stays
    there, and is not copied: use it before its owner writes to it. So, too, any tensor without `copy`.

    `source` is a path or a PIL image (any mode; EXIF orientation applied, 16-bit grey scaled to 8,
    transparency laid over white), an array [H, W, 3], [H, W, 4] or [H, W] of uint8 or uint16, or a
    tensor [3, H, W] or [1, H, W], uint8 or float in 0..1.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        if path.is_dir():
            raise ImageError(f"the folder {str(source)!r} given; a file expected, or a list of its files")
        if not path.is_file():
            raise ImageError(f"no image file {str(source)!r}")
        try:
            with Image.open(path) as opened:
                return _from_pil(opened)
        except (ImageError, MemoryError):
            raise
        except Exception as error:  # damaged files make the decoders raise whatever they stumble over
            hint = "; take the frames out of a video first" if path.suffix.lower() in _VIDEOS else ""
            raise ImageError(f"{str(path)!r} cannot be read as an image: {error}{hint}") from error
    if isinstance(source, Image.Image):
        return _from_pil(source)
    if isinstance(source, Tensor):
        return _from_tensor(source, device, copy)
    if isinstance(source, np.ndarray):
        return _from_array(source)
    hint = ""
    if isinstance(source, bytes | bytearray | io.IOBase):
        hint = "; an encoded picture goes in as PIL.Image.open(...), bytes within io.BytesIO"
    elif isinstance(source, Iterator):
        hint = "; call list() on it, or model.stream, which takes any number of images"
    raise ImageError(
        f"{type(source).__name__} given; a path, a PIL image, an array [H, W, 3] of uint8 "
        f"or a tensor [3, H, W] expected{hint}"
    )


def load_images(
    sources: Sequence[Any], device: torch.device | None = None, copy: bool = True
) -> list[Tensor]:
    """`load_image` of each; an error says which of them it is."""
    loaded = []
    for number, source in enumerate(sources, start=1):
        try:
            loaded.append(load_image(source, device, copy))
        except ImageError as error:
            raise ImageError(f"image {number} of {len(sources)}: {error}") from error
    return loaded


def _from_pil(image: Image.Image) -> Tensor:
    if 0 in image.size:
        raise ImageError(f"an image of {image.width} x {image.height} pixels given, at least 1 x 1 expected")
    # Each of the two would copy where there is nothing to do, and keep other threads from decoding meanwhile.
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    upright = ImageOps.exif_transpose(image) if turned else image
    if upright.mode.startswith("I") or upright.mode == "F":
        return _from_array(_deep_grey(upright))
    if upright.has_transparency_data:
        rgba = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return _from_array(np.asarray(upright if upright.mode == "RGB" else upright.convert("RGB")))


def _deep_grey(image: Image.Image) -> NDArray[np.uint16]:
    """PIL's modes I;16, I and F hold 16-bit greys."""
    values = np.asarray(image)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 65535:
        raise ImageError(
            f"grey values {values.min()} to {values.max()} given, 16-bit ones (0 to 65535) expected"
        )
    return values.astype(np.uint16)


def _from_array(array: NDArray[Any]) -> Tensor:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        hint = "; a [3, H, W] image goes in as a tensor" if array.ndim == 3 and array.shape[0] == 3 else ""
        hint = "; pass a batch as a list of images" if array.ndim == 4 else hint
        raise ImageError(
            f"an array of shape {array.shape} given, [H, W, 3], [H, W, 4] or [H, W] expected{hint}"
        )
    if array.size == 0:
        raise ImageError(f"an empty image of shape {array.shape} given, at least 1 x 1 pixels expected")
    if array.dtype == np.uint16:
        array = _to_eight_bits(array)
    if array.dtype == np.uint8 and array.max() == 1:
        log.warning(
            "a picture of values 0 and 1 given, which is black: was it in 0..1? Times 255, then uint8"
        )
    if array.dtype != np.uint8:
        raise ImageError(
            f"an array of {array.dtype} given, uint8 or uint16 expected; a float image goes in as a tensor "
            "[3, H, W] in 0..1"
        )
    if array.shape[2] == 4:
        alpha = array[..., 3:].astype(np.float32) / 255
        array = np.rint(array[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    rgb = np.broadcast_to(array, (*array.shape[:2], 3)).transpose(2, 0, 1)
    return torch.from_numpy(np.array(rgb, order="C"))


def _to_eight_bits(values: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """0..65535 to 0..255: 65535 = 255 * 257."""
    return np.rint(values.astype(np.float32) / 257).astype(np.uint8)


def _from_tensor(tensor: Tensor, device: torch.device | None, copy: bool) -> Tensor:
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3):
        hint = "; pass a batch as a list of images" if tensor.ndim == 4 else ""
        hint = "; call .permute(2, 0, 1)" if tensor.ndim == 3 and tensor.shape[2] in (1, 3) else hint
        raise ImageError(f"a tensor of shape {tuple(tensor.shape)} given, [3, H, W] expected{hint}")
    if tensor.numel() == 0:
        raise ImageError(
            f"an empty tensor {tuple(tensor.shape)} given, [3, H, W] with at least 1 x 1 pixels expected"
        )
    stays = tensor.dtype == torch.uint8 and tensor.device == device
    pixels = tensor.detach() if stays else tensor.detach().cpu()
    if pixels.is_floating_point():
        pixels = pixels.float()
        if not torch.isfinite(pixels).all():
            raise ImageError(f"{int((~torch.isfinite(pixels)).sum())} pixel values are NaN or infinite")
        low, high = float(pixels.min()), float(pixels.max())
        if low < -_ROUNDING or high > 1 + _ROUNDING:
            hint = "undo the normalisation by mean and deviation"
            if low >= 0 and high <= 255:
                hint = "divide by 255" if high > 2 else "call .clamp(0, 1) if it was resampled"
            raise ImageError(f"a float tensor from {low:.4g} to {high:.4g} given, 0 to 1 expected: {hint}")
        pixels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    if pixels.dtype != torch.uint8:
        raise ImageError(f"a tensor of {pixels.dtype} given, uint8 or float in 0..1 expected")
    pixels = pixels.expand(3, -1, -1).contiguous()
    shared = pixels.data_ptr() == tensor.data_ptr()
    return pixels.clone() if shared and copy and not pixels.is_cuda else pixels
