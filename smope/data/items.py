"""The one form in which scenes and data sets reach training and evaluation."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

UNKNOWN = 255  # in Batch.instance: nobody said what this pixel shows


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
    instance: Tensor | None = None  # [B, H, W] uint8: slot + 1 of the visible object, 0 elsewhere, UNKNOWN
    depth: Tensor | None = None  # [B, H, W] float32 metres, 0 where nothing was drawn
    full_masks: Tensor | None = None  # [B, N, 64, 64] bool: the whole silhouette, resampled into its box
    scale: Tensor | None = None  # [B, N, 3] float32, of the meshes along their own axes; None: all are 1
    # [B, I, 4] float32 xyxy pixels: areas where nothing found is wrong, since nobody said what is there; an
    # empty area is none
    ignored: Tensor | None = None

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
            "scale": (batch, slots, 3),
        }
        if self.ignored is not None:
            expected["ignored"] = (batch, self.ignored.shape[1], 4)
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

    def __getitem__(self, rows: slice) -> Batch:
        """Some of the images."""
        cut = {f.name: tensor[rows] for f in fields(self) if (tensor := getattr(self, f.name)) is not None}
        return replace(self, **cut)

    def filled(self, slots: int, areas: int) -> Batch:
        """With `slots` object slots, scales, and `areas` ignored areas."""
        more, batch = slots - self.labels.shape[1], len(self)
        ignored = self.ignored if self.ignored is not None else self.boxes_xyxy.new_zeros(batch, 0, 4)
        scale = self.scale if self.scale is not None else torch.ones_like(self.T_CO[..., :3, 3])
        masks = self.full_masks
        return replace(
            self,
            labels=F.pad(self.labels, (0, more), value=-1),
            T_CO=F.pad(self.T_CO, (0, 0, 0, 0, 0, more)),
            boxes_xyxy=F.pad(self.boxes_xyxy, (0, 0, 0, more)),
            visibility=F.pad(self.visibility, (0, more)),
            scale=F.pad(scale, (0, 0, 0, more), value=1.0),
            ignored=F.pad(ignored, (0, 0, 0, areas - ignored.shape[1])),
            full_masks=None if masks is None else F.pad(masks, (0, 0, 0, 0, 0, more)),
        )

    def with_surfaces(self) -> Batch:
        """With `instance` and `depth`, which say of every pixel that nobody knows, where there are none."""
        shape = (len(self), *self.images.shape[-2:])
        instance, depth = self.instance, self.depth
        if instance is None or depth is None:
            instance = torch.full(shape, UNKNOWN, dtype=torch.uint8, device=self.images.device)
            depth = torch.zeros(shape, device=self.images.device)
        return replace(self, instance=instance, depth=depth)

    def surface_at_stride(self, stride: int, centres: Tensor, diameters: Tensor) -> tuple[Tensor, Tensor]:
        """What the middle pixel of each cell of `stride` pixels sees.

        `centres` [M, 3] and `diameters` [M] in metres, one a label. Returns object coordinates [B, 3, h,
        w], centred and over the diameter, and labels [B, h, w], -1 where no object is seen.
        """
        if self.instance is None or self.depth is None:
            raise ValueError("surface_at_stride needs a batch with `instance` and `depth`; this one has none")
        instance = self.instance[:, stride // 2 :: stride, stride // 2 :: stride].long()  # [B, h, w]
        depth = self.depth[:, stride // 2 :: stride, stride // 2 :: stride]
        batch, height, width = instance.shape
        v = torch.arange(height, device=depth.device, dtype=torch.float32) * stride + stride // 2
        u = torch.arange(width, device=depth.device, dtype=torch.float32) * stride + stride // 2
        pixels = torch.stack([u.expand(height, width), v[:, None].expand(height, width)], -1)  # [h, w, 2]
        pixels = torch.cat([pixels, torch.ones_like(pixels[..., :1])], -1).flatten(0, 1)
        inverse = torch.linalg.inv_ex(self.K)[0]  # without the check, which would wait for the device
        points = (pixels @ inverse.transpose(-1, -2)) * depth.flatten(1)[..., None]  # [B, hw, 3] metres

        slot = (instance.flatten(1) - 1).clamp(min=0)
        slot = torch.where(instance.flatten(1) == UNKNOWN, 0, slot)
        rows = torch.arange(batch, device=slot.device)[:, None]
        pose, label = self.T_CO[rows, slot], self.labels[rows, slot]  # [B, hw, 4, 4], [B, hw]
        seen = (instance.flatten(1) > 0) & (instance.flatten(1) != UNKNOWN) & (label >= 0)
        label = label.clamp(min=0)
        local = points - pose[..., :3, 3]
        local = (local[..., None, :] @ pose[..., :3, :3])[..., 0, :]
        if self.scale is not None:
            local = local / self.scale[rows, slot]
        local = local - centres[label]
        local = torch.where(seen[..., None], local / diameters[label][..., None], 0.0)
        return local.mT.unflatten(-1, (height, width)), label.masked_fill(~seen, -1).unflatten(
            -1, (height, width)
        )
