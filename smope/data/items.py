"""The one form in which scenes and data sets reach training and evaluation."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Images with everything that losses and metrics need, padded to N object slots an image.

    Poses are model-to-camera in the OpenCV frame and in metres, in each mesh's own frame. Pixel (u, v) with
    whole numbers is a pixel's centre. A slot with label -1 is empty and its other entries mean nothing.
    """

    images: Tensor  # [B, 3, H, W] float32 in 0..1, sRGB
    K: Tensor  # [B, 3, 3] float32 intrinsics, pixels
    labels: Tensor  # [B, N] int64, index into the list of objects, -1 for an empty slot
    T_CO: Tensor  # [B, N, 4, 4] float32, metres
    boxes_xyxy: Tensor  # [B, N, 4] float32, pixels: extent of the whole silhouette, not clipped to the image
    visibility: Tensor  # [B, N] float32, visible share of the silhouette, `visib_fract` of BOP
    instance: Tensor | None = None  # [B, H, W] uint8: slot + 1 of the visible object, 0 elsewhere
    depth: Tensor | None = None  # [B, H, W] float32 metres, 0 where nothing was drawn
    full_masks: Tensor | None = None  # [B, N, 64, 64] bool: the whole silhouette, resampled into its box

    def __post_init__(self) -> None:
        batch, _, height, width = self.images.shape
        slots = self.labels.shape[1]
        expected = {
            "images": (batch, 3, height, width),
            "K": (batch, 3, 3),
            "labels": (batch, slots),
            "T_CO": (batch, slots, 4, 4),
            "boxes_xyxy": (batch, slots, 4),
            "visibility": (batch, slots),
            "instance": (batch, height, width),
            "depth": (batch, height, width),
            "full_masks": (batch, slots, 64, 64),
        }
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"Batch.{name}: shape {tuple(tensor.shape)} given, {shape} expected")

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def present(self) -> Tensor:
        """[B, N] bool: the slots that hold an object."""
        return self.labels >= 0

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        moved = {
            f.name: tensor.to(device, non_blocking=non_blocking)
            for f in fields(self)
            if (tensor := getattr(self, f.name)) is not None
        }
        return replace(self, **moved)

    def object_coordinates(self, centres: Tensor, diameters: Tensor) -> Tensor:
        """[B, 3, H, W] coordinates of the visible surface, centred and in units of the diameter; 0 elsewhere.

        `centres` [M, 3] and `diameters` [M] in metres, one a label.
        """
        if self.instance is None or self.depth is None:
            raise ValueError("object_coordinates needs a batch with `instance` and `depth`; this one has none")
        _, height, width = self.instance.shape
        v, u = torch.meshgrid(
            torch.arange(height, device=self.K.device, dtype=torch.float32),
            torch.arange(width, device=self.K.device, dtype=torch.float32),
            indexing="ij",
        )
        pixels = torch.stack([u, v, torch.ones_like(u)], dim=-1)  # [H, W, 3]
        rays = torch.einsum("bij,hwj->bhwi", torch.linalg.inv(self.K), pixels)
        camera_points = rays * self.depth[..., None]  # [B, H, W, 3]

        labels = self.labels.clamp(min=0)
        rotation, translation = self.T_CO[..., :3, :3], self.T_CO[..., :3, 3]
        slot = (self.instance.long() - 1).clamp(min=0).flatten(1)  # [B, HW]
        rows = torch.arange(len(self), device=slot.device)[:, None]
        local = camera_points.flatten(1, 2) - translation[rows, slot]
        local = torch.einsum("bpji,bpj->bpi", rotation[rows, slot], local) - centres[labels][rows, slot]
        local = local / diameters[labels][rows, slot][..., None]
        local = local * (self.instance.flatten(1) > 0)[..., None]
        return local.unflatten(1, (height, width)).permute(0, 3, 1, 2)
