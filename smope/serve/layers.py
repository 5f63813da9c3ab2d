"""What the page lays over each other: the photo, and over it surfaces, boxes and axes, each by itself."""

from __future__ import annotations

import base64
import io
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from smope.poses import Poses

LONGEST = 1280  # pixels of a side: a page shows no more
_PARTS = {"surfaces": ("surfaces",), "boxes": ("boxes", "labels"), "axes": ("axes",)}


def draw_layers(photo: Tensor, poses: Poses) -> dict[str, str]:
    """photo uint8 [3, H, W] -> data URLs: "photo", and pictures of its shown size, transparent elsewhere."""
    whole = Image.fromarray(photo.permute(1, 2, 0).numpy())
    shown, poses = _shrunk(whole, poses)
    layers = {"photo": _url(shown, "JPEG", quality=90)}
    plain = np.asarray(shown)
    for layer, parts in _PARTS.items():
        chosen = {part: part in parts for part in ("surfaces", "boxes", "axes", "labels")}
        drawn = np.asarray(poses.draw(shown, **chosen))
        changed = (drawn != plain).any(axis=2, keepdims=True)
        painted = np.concatenate([drawn, np.where(changed, 255, 0).astype(np.uint8)], axis=2)
        painted[~changed[..., 0]] = 0  # compresses well
        layers[layer] = _url(Image.fromarray(painted), "PNG", compress_level=3)
    return layers


def _shrunk(whole: Image.Image, poses: Poses) -> tuple[Image.Image, Poses]:
    """As large as a page shows it, with the poses of that picture."""
    factor = LONGEST / max(whole.size)
    if factor >= 1:
        return whole, poses
    size = (max(1, round(whole.width * factor)), max(1, round(whole.height * factor)))
    scale = torch.tensor([size[0] / whole.width, size[1] / whole.height]).repeat(2)
    boxes = (poses.boxes_xyxy.cpu() + 0.5) * scale - 0.5  # edges on edges, as Camera.resize
    smaller = replace(poses.to("cpu"), boxes_xyxy=boxes, camera=poses.camera.to("cpu").resize(size))
    return whole.resize(size, Image.Resampling.BOX, reducing_gap=2.0), smaller


def _url(picture: Image.Image, form: str, **options: int) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
