"""A small z-buffer in numpy: triangles to a face index and a depth per pixel, without OpenGL.

Scan conversion in two vectorised steps, triangles to rows and rows to pixels, so that the work grows with the
pixels covered and not with bounding boxes. Pixel (u, v) with whole numbers is a pixel's centre; a pixel
belongs to a triangle if its centre does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.int64]

_CHUNK = 1 << 20  # rows or fragments held at a time: about 100 MB of temporaries
_MIN_AREA = 1e-12  # pixels squared: thinner triangles have no depth plane


@dataclass(frozen=True, eq=False)
class Raster:
    """What is seen through each pixel."""

    face: IntArray  # [H, W] index of the nearest face, -1 where there is none
    depth: FloatArray  # [H, W] z of the surface in the unit of the input, inf where there is none

    @property
    def mask(self) -> NDArray[np.bool_]:
        seen: NDArray[np.bool_] = self.face >= 0
        return seen


def rasterise(
    uv: FloatArray, z: FloatArray, faces: IntArray, size: tuple[int, int], near: float = 1e-3
) -> Raster:
    """Nearest face and depth per pixel.

    uv [V, 2] projected vertices in pixels, z [V] their depth, faces [F, 3], size (width, height). Both sides
    of a face are drawn. Faces that reach nearer than `near` are left out, not clipped.
    """
    width, height = size
    usable = np.isfinite(uv).all(axis=1) & (z > near)  # [V]
    index = np.flatnonzero(usable[faces].all(axis=1))  # faces drawn, as indices into `faces`
    triangles = uv[faces[index]].astype(np.float64)  # [F, 3, 2]
    planes, proper = _inverse_depth_planes(triangles, 1.0 / z[faces[index]])
    index, triangles, planes = index[proper], triangles[proper], planes[proper]

    first_row, rows = _whole_numbers_between(
        triangles[..., 1].min(axis=1), triangles[..., 1].max(axis=1), height
    )
    nearest = np.zeros(height * width)  # inverse depth: larger is nearer, 0 is nothing
    winner = np.full(height * width, -1, dtype=np.int64)
    for part in _chunks(rows):
        owner, v = _expand(part.start, first_row[part], rows[part])
        left, right = _span(triangles[owner], v)
        first_column, columns = _whole_numbers_between(left, right, width)
        for span in _chunks(columns):
            row, u = _expand(span.start, first_column[span], columns[span])
            triangle = owner[row]
            a, b, c, low, high = planes[triangle].T
            # The plane of a sliver is ill-conditioned away from its vertices, hence the clip.
            inverse = np.clip(a * u + b * v[row] + c, low, high)
            pixel = v[row] * width + u
            np.maximum.at(nearest, pixel, inverse)
            front = inverse >= nearest[pixel]
            winner[pixel[front]] = triangle[front]

    face = np.full(height * width, -1, dtype=np.int64)
    hit = winner >= 0
    face[hit] = index[winner[hit]]
    with np.errstate(divide="ignore"):
        depth = 1.0 / nearest
    return Raster(face.reshape(height, width), depth.reshape(height, width))


def barycentric(pixels: FloatArray, triangles: FloatArray, z: FloatArray) -> FloatArray:
    """Perspective-correct weights [N, 3] of pixels [N, 2] in triangles [N, 3, 2] with depths z [N, 3]."""
    edges = np.roll(triangles, -1, axis=1) - pixels[:, None], np.roll(triangles, -2, axis=1) - pixels[:, None]
    areas = edges[0][..., 0] * edges[1][..., 1] - edges[0][..., 1] * edges[1][..., 0]  # [N, 3] twice, signed
    weights: FloatArray = np.clip(areas / areas.sum(axis=1, keepdims=True), 0.0, 1.0) / z
    weights /= weights.sum(axis=1, keepdims=True)
    return weights


def _inverse_depth_planes(triangles: FloatArray, inverse: FloatArray) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Planes [F, 5] (a, b, c, lowest, highest) with 1/z = a u + b v + c, and which triangles have one [F].

    1/z, unlike z, is linear in the image of a plane.
    """
    du, dv = np.moveaxis(triangles[:, 1:] - triangles[:, :1], -1, 0)  # [F, 2] each
    d = inverse[:, 1:] - inverse[:, :1]
    area = du[:, 0] * dv[:, 1] - du[:, 1] * dv[:, 0]
    proper = np.abs(area) > _MIN_AREA
    area = np.where(proper, area, 1.0)
    a = (d[:, 0] * dv[:, 1] - d[:, 1] * dv[:, 0]) / area
    b = (d[:, 1] * du[:, 0] - d[:, 0] * du[:, 1]) / area
    c = inverse[:, 0] - a * triangles[:, 0, 0] - b * triangles[:, 0, 1]
    return np.stack([a, b, c, inverse.min(axis=1), inverse.max(axis=1)], axis=1), proper


def _span(triangles: FloatArray, v: IntArray) -> tuple[FloatArray, FloatArray]:
    """Leftmost and rightmost u [R] at which row v [R] meets its triangle [R, 3, 2]."""
    start, end = triangles, np.roll(triangles, -1, axis=1)
    rise = end[..., 1] - start[..., 1]  # [R, 3]
    along = (v[:, None] - start[..., 1]) / np.where(rise == 0, np.inf, rise)
    crosses = (along >= 0) & (along <= 1) & (rise != 0)
    u = start[..., 0] + along * (end[..., 0] - start[..., 0])
    return np.where(crosses, u, np.inf).min(axis=1), np.where(crosses, u, -np.inf).max(axis=1)


def _whole_numbers_between(low: FloatArray, high: FloatArray, limit: int) -> tuple[IntArray, IntArray]:
    """First whole number and how many of them lie in [low, high] and in [0, limit)."""
    first = np.ceil(np.clip(low, 0, limit)).astype(np.int64)
    last = np.floor(np.clip(high, -1, limit - 1)).astype(np.int64)
    return first, np.maximum(last - first + 1, 0)


def _expand(offset: int, first: IntArray, counts: IntArray) -> tuple[IntArray, IntArray]:
    """Entry i repeated counts[i] times, as its index plus `offset`; beside it first[i], first[i] + 1, ..."""
    entry = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum(counts) - counts
    return entry + offset, np.arange(len(entry)) - starts[entry] + first[entry]


def _chunks(counts: IntArray) -> Iterator[slice]:
    """Slices of `counts` whose sums stay near _CHUNK."""
    ends = np.cumsum(counts)
    start = 0
    while start < len(counts):
        done = ends[start - 1] if start else 0
        stop = max(int(np.searchsorted(ends, done + _CHUNK, side="right")), start + 1)
        yield slice(start, stop)
        start = stop
