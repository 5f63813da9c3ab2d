"""Real frames that rendered objects are put into, and the streets' layouts that say where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smope.data.records import Record
from smope.images import load_image

Floats = NDArray[np.float64]
_HEIGHT = 1.65  # metres: KITTI's camera above the road
_SLOPE = 0.03  # steepest ground, as a tangent


@dataclass(frozen=True, eq=False)
class Frame:
    """What a scene must know of one real frame."""

    K: Floats  # [3, 3]
    size: tuple[int, int]
    areas: Floats  # [I, 4] xyxy pixels: all that anybody marked on it, to be ignored
    boxes: Floats  # [O, 4] xyxy pixels of its own objects ...
    places: Floats  # [O, 4] ... their x, z in the camera's frame, metres; their radius; their depth's end
    ground: tuple[float, float]  # height of the camera above it, metres, and its slope dy/dz


@dataclass(frozen=True, eq=False)
class Layouts:
    """What `tools/make_street_layouts.py` wrote: objects of many streets, one row each."""

    classes: tuple[str, ...]
    starts: NDArray[np.int32]  # [S + 1] of each street
    kind: NDArray[np.uint8]  # [N] index into classes
    place: Floats  # [N, 2] x, z
    yaw: Floats  # [N] KITTI's rotation_y
    size: Floats  # [N, 3] width, length, height

    @classmethod
    def load(cls, path: Path | str) -> Layouts:
        with np.load(path, allow_pickle=False) as data:
            numbers = {name: data[name].astype(np.float64) for name in ("place", "yaw", "size")}
            return cls(tuple(map(str, data["classes"])), data["starts"], data["kind"], **numbers)

    def street(self, index: int) -> NDArray[np.intp]:
        return np.arange(self.starts[index], self.starts[index + 1])

    def __len__(self) -> int:
        return len(self.starts) - 1


def frames_of(records: Sequence[Record]) -> tuple[Frame, ...]:
    return tuple(_frame(record) for record in records)


def _frame(record: Record) -> Frame:
    boxes, places, feet = [], [], []
    for a in record.annotations:
        label = a.extra.get("label")
        if label is None or a.box_xyxy is None:
            continue
        _, width, length = label.dimensions
        x, y, z = a.T_CO[:3, 3].tolist()
        boxes.append(label.bbox)
        places.append([x, z, np.hypot(width, length) / 2, z])
        feet.append([y, z])
    areas = [*record.ignored, *boxes]
    return Frame(
        K=np.asarray(record.K, np.float64),
        size=record.size,
        areas=np.array(areas, np.float64).reshape(-1, 4),
        boxes=np.array(boxes, np.float64).reshape(-1, 4),
        places=np.array(places, np.float64).reshape(-1, 4),
        ground=_ground(np.array(feet, np.float64).reshape(-1, 2)),
    )


def _ground(feet: Floats) -> tuple[float, float]:
    """The straight y = height + slope z through objects' feet [O, 2], drawn towards a level road."""
    near = feet[feet[:, 1] < 45]
    # Ridge regression: a few feet say little of the slope.
    rows = np.vstack([np.column_stack([np.ones(len(near)), near[:, 1]]), [3.0, 0.0], [0.0, 60.0]])
    wanted = np.concatenate([near[:, 0], [3.0 * _HEIGHT, 0.0]])
    height, slope = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    return float(np.clip(height, 1.3, 2.1)), float(np.clip(slope, -_SLOPE, _SLOPE))


def frame_bank(records: Sequence[Record], size: tuple[int, int], device: torch.device) -> Tensor:
    """[F, H, W] int32 on the device: the frames, red + 256 green + 65536 blue, zeros beyond their ends."""
    width, height = size
    bank = torch.zeros(max(len(records), 1), height, width, dtype=torch.int32)
    for k, record in enumerate(records):
        red, green, blue = load_image(record.image_path)[:, :height, :width].int()
        bank[k, : red.shape[0], : red.shape[1]] = red | green << 8 | blue << 16
    return bank.to(device)
