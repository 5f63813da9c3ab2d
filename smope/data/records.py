"""The format-neutral form of one annotated image, into which every reader puts what it finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from smope.data.items import Batch
from smope.data.reading import DataError, FloatArray
from smope.images import load_image

if TYPE_CHECKING:
    from smope.poses import Poses

_MASK_CELLS = 64  # Batch.full_masks: cells along each side of the box


@dataclass(frozen=True, eq=False)
class Annotation:
    """One object in one image; model-to-camera, OpenCV frame, metres."""

    name: str  # object or class
    T_CO: FloatArray  # [4, 4]
    box_xyxy: FloatArray | None = None  # [4] pixels, continuous, not clipped; None where the format has none
    visibility: float = 1.0  # visible share of the silhouette
    scale: FloatArray = field(default_factory=lambda: np.ones(3))  # [3] along the mesh's own axes
    object_id: int | None = None
    score: float = 1.0  # of a prediction
    mask_path: Path | None = None  # whole silhouette
    mask_visible_path: Path | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # what the format says besides, under its own names


@dataclass(frozen=True, eq=False)
class Record:
    """One image with its camera and its annotated objects."""

    key: str  # names the image within its data set
    image_path: Path
    K: FloatArray  # [3, 3] pixels
    annotations: tuple[Annotation, ...] = ()
    depth_path: Path | None = None
    depth_scale: float = 1.0  # millimetres a stored unit
    scene_id: int = 0
    image_id: int = 0
    ignored: tuple[tuple[float, float, float, float], ...] = ()  # xyxy: areas that hold what nobody annotated

    @cached_property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return image_size(self.image_path)

    def depth(self) -> NDArray[np.float32] | None:
        """[H, W] metres, 0 where there is no reading; None where the data set has no depth."""
        if self.depth_path is None:
            return None
        stored = _read_plane(self.depth_path)
        return (stored.astype(np.float64) * (self.depth_scale / 1000)).astype(np.float32)


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels, from the file's header."""
    try:
        with Image.open(path) as image:
            return image.size
    except OSError as error:
        raise DataError(path, None, f"not a readable image ({error})") from None


def from_poses(poses: Poses) -> tuple[Annotation, ...]:
    """What `predict` found in an image, in the form that the writers take."""
    arrays = poses.numpy()
    return tuple(
        Annotation(
            name=name,
            T_CO=arrays["T_CO"][n].astype(np.float64),
            box_xyxy=arrays["boxes_xyxy"][n].astype(np.float64),
            visibility=float(arrays["visibility"][n]),
            scale=arrays["scale"][n].astype(np.float64),
            score=float(arrays["scores"][n]),
        )
        for n, name in enumerate(poses.names)
    )


def to_batch(
    records: Sequence[Record],
    names: Sequence[str],
    masks: bool = False,
    size: tuple[int, int] | None = None,
) -> Batch:
    """Records as a `Batch`, with labels into `names`; objects not named are left out.

    Images are all of one size or, with `size` (width, height), filled up to that with zeros at the right and
    the bottom, which leaves K as it is. With `masks`, `instance`, `full_masks` and `depth` are read too,
    where every record has them. An annotation without a box gets zeros.
    """
    sizes = {record.size for record in records}
    if size is None and len(sizes) != 1:
        raise ValueError(f"to_batch: records of one image size, or size=, expected, {sorted(sizes)} given")
    size = size or next(iter(sizes))
    if any(width > size[0] or height > size[1] for width, height in sizes):
        raise ValueError(f"to_batch: images of {sorted(sizes)} do not fit into {size}")
    index = {name: i for i, name in enumerate(names)}
    kept = [[a for a in record.annotations if a.name in index] for record in records]
    slots = max(len(objects) for objects in kept)
    count = len(records)

    labels = torch.full((count, slots), -1, dtype=torch.int64)
    T_CO = torch.eye(4).repeat(count, slots, 1, 1)
    boxes = torch.zeros(count, slots, 4)
    visibility = torch.zeros(count, slots)
    scale = torch.ones(count, slots, 3)
    for b, objects in enumerate(kept):
        for n, annotation in enumerate(objects):
            labels[b, n] = index[annotation.name]
            T_CO[b, n] = torch.from_numpy(annotation.T_CO)
            visibility[b, n] = annotation.visibility
            scale[b, n] = torch.from_numpy(annotation.scale)
            if annotation.box_xyxy is not None:
                boxes[b, n] = torch.from_numpy(annotation.box_xyxy)

    instance = depth = full_masks = None
    if masks:
        flat = [annotation for objects in kept for annotation in objects]
        if all(a.mask_visible_path for a in flat):
            maps = (_instance_map(r.size, a) for r, a in zip(records, kept, strict=True))
            instance = torch.stack([_filled(plane, size) for plane in maps])
        if all(a.mask_path and a.box_xyxy is not None for a in flat):
            full_masks = torch.zeros(count, slots, _MASK_CELLS, _MASK_CELLS, dtype=torch.bool)
            for b, objects in enumerate(kept):
                for n, annotation in enumerate(objects):
                    full_masks[b, n] = _mask_in_box(annotation)
        planes = [record.depth() for record in records]
        if all(plane is not None for plane in planes):
            depth = torch.stack([_filled(torch.from_numpy(p), size) for p in planes if p is not None])

    return Batch(
        images=torch.stack([_filled(load_image(record.image_path), size) for record in records]).float()
        / 255,
        K=torch.stack([torch.from_numpy(record.K).float() for record in records]),
        labels=labels,
        T_CO=T_CO,
        boxes_xyxy=boxes,
        visibility=visibility,
        instance=instance,
        depth=depth,
        full_masks=full_masks,
        scale=scale,
        ignored=_stacked_areas(records),
    )


def _stacked_areas(records: Sequence[Record]) -> torch.Tensor | None:
    """[B, I, 4] the ignored areas of records, filled up with empty ones; None where there are none."""
    most = max(len(record.ignored) for record in records)
    areas = torch.zeros(len(records), most, 4)
    for b, record in enumerate(records):
        areas[b, : len(record.ignored)] = torch.from_numpy(
            np.asarray(record.ignored, np.float32).reshape(-1, 4)
        )
    return areas if most else None


def _filled(plane: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """[..., H, W] with zeros behind its columns and below its rows up to `size` (width, height)."""
    return F.pad(plane, (0, size[0] - plane.shape[-1], 0, size[1] - plane.shape[-2]))


def _read_plane(path: Path) -> NDArray[Any]:
    """A one-channel image as stored."""
    try:
        with Image.open(path) as image:
            plane = np.asarray(image)
    except OSError as error:
        raise DataError(path, None, f"not a readable image ({error})") from None
    if plane.ndim != 2:
        raise DataError(path, None, f"one channel expected, shape {plane.shape} given")
    return plane


def _instance_map(size: tuple[int, int], annotations: Sequence[Annotation]) -> torch.Tensor:
    """[H, W] uint8: slot + 1 of the visible object."""
    out = np.zeros((size[1], size[0]), np.uint8)
    for slot, annotation in enumerate(annotations):
        assert annotation.mask_visible_path is not None
        plane = _read_plane(annotation.mask_visible_path)
        if plane.shape != out.shape:
            raise DataError(annotation.mask_visible_path, None, f"shape {plane.shape}, image {out.shape}")
        out[plane > 0] = slot + 1
    return torch.from_numpy(out)


def _mask_in_box(annotation: Annotation) -> torch.Tensor:
    """[64, 64] bool: the whole silhouette at the cells' centres; False beyond the image's edge."""
    assert annotation.mask_path is not None
    assert annotation.box_xyxy is not None
    plane = _read_plane(annotation.mask_path) > 0
    x0, y0, x1, y1 = annotation.box_xyxy
    steps = (np.arange(_MASK_CELLS) + 0.5) / _MASK_CELLS
    u = np.rint(x0 + steps * (x1 - x0)).astype(int)
    v = np.rint(y0 + steps * (y1 - y0)).astype(int)
    inside_u, inside_v = (u >= 0) & (u < plane.shape[1]), (v >= 0) & (v < plane.shape[0])
    sampled = plane[np.ix_(v.clip(0, plane.shape[0] - 1), u.clip(0, plane.shape[1] - 1))]
    return torch.from_numpy(sampled & inside_v[:, None] & inside_u[None, :])
