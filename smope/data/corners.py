"""Boxes of projected 3D boxes, for data whose 2D boxes are those and not the silhouette's, as of streets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from smope.data.reading import FloatArray
from smope.data.records import Record
from smope.objects import ObjectModel

_NEAR = 0.1  # metres: the part of a box that is nearer, or behind the camera, has no place in the image
_SIGNS = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=np.float64)
_EDGES = np.array([[a, b] for a in range(8) for b in range(a) if np.abs(_SIGNS[a] - _SIGNS[b]).sum() == 1])


def corner_box(
    T_CO: FloatArray, low: FloatArray, high: FloatArray, scale: FloatArray, K: FloatArray
) -> FloatArray | None:
    """[4] xyxy pixels: the extent of the projected corners of the box from `low` to `high` [3], metres in the
    object's own frame, stretched by `scale` [3]; None where all of it is behind the camera. Not clipped."""
    corners = (low + _SIGNS * (high - low)) * scale @ T_CO[:3, :3].T + T_CO[:3, 3]
    in_front = corners[:, 2] >= _NEAR
    if not in_front.any():
        return None
    points = corners[in_front]
    if not in_front.all():
        first, second = corners[_EDGES[:, 0]], corners[_EDGES[:, 1]]
        cut = in_front[_EDGES[:, 0]] != in_front[_EDGES[:, 1]]
        first, second = first[cut], second[cut]
        share = (_NEAR - first[:, 2:]) / (second[:, 2:] - first[:, 2:])
        points = np.concatenate([points, first + share * (second - first)])
    pixels = points @ K.T
    pixels = pixels[:, :2] / pixels[:, 2:]
    return np.concatenate([pixels.min(axis=0), pixels.max(axis=0)])


def with_corner_boxes(records: Sequence[Record], objects: Sequence[ObjectModel]) -> list[Record]:
    """The records with the boxes of these objects in place of their own; others keep theirs."""
    bounds = {model.name: _bounds(model) for model in objects}
    return [_with_corner_boxes(record, bounds) for record in records]


def _with_corner_boxes(record: Record, bounds: Mapping[str, tuple[FloatArray, FloatArray]]) -> Record:
    annotations = tuple(
        replace(a, box_xyxy=corner_box(a.T_CO, *bounds[a.name], a.scale, record.K)) if a.name in bounds else a
        for a in record.annotations
    )
    return replace(record, annotations=annotations)


def _bounds(model: ObjectModel) -> tuple[FloatArray, FloatArray]:
    centre, half = model.centre.double().numpy(), model.extents.double().numpy() / 2
    return centre - half, centre + half
