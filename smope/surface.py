"""Points spread evenly over a mesh's surface: the same ones however the surface is cut into triangles.

The surface is pierced by a fixed set of jittered lines parallel to the three axes: where a line meets it
depends on the surface alone, not on triangles, their order or size. Farthest-point sampling then picks
from the hits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import trimesh
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

POINTS = 2048
CANDIDATES = 8 * POINTS
SMOOTHING = 0.03  # of the diameter: normals are averaged over this radius
_START = np.array([0.48, 0.36, 0.80])  # a direction that no axis-aligned face is square to


class SurfacePoints(NamedTuple):
    points: Floats  # [P, 3] in the mesh's unit
    normals: Floats  # [P, 3] unit length, out of the faces' front sides
    colors: Floats | None  # [P, 3] sRGB 0..1


class Hits(NamedTuple):
    points: Floats  # [N, 3] in the mesh's unit
    normals: Floats  # [N, 3] of the faces
    faces: Ints  # [N]
    weights: Floats  # [N, 3] barycentric


def sample_surface(mesh: trimesh.Trimesh, diameter: float, count: int = POINTS) -> SurfacePoints:
    """`count` points in farthest-point order: for every k, the first k cover the whole surface evenly."""
    hits = pierce_surface(mesh, diameter, max(CANDIDATES, 8 * count))
    chosen = farthest_points(hits.points / diameter, count)
    normals = _smooth_normals(hits.points / diameter, hits.normals, chosen)
    colours = None
    visual: Any = mesh.visual
    if visual.kind == "vertex":
        corners = np.asarray(visual.vertex_colors, dtype=np.float64)[mesh.faces[hits.faces[chosen]], :3] / 255
        colours = np.einsum("nk,nkc->nc", hits.weights[chosen], corners)
    return SurfacePoints(hits.points[chosen], normals, colours)


def pierce_surface(mesh: trimesh.Trimesh, diameter: float, count: int) -> Hits:
    """About `count` points, as many on every patch as its area says, in an order the surface alone sets."""
    triangles = np.asarray(mesh.triangles, dtype=np.float64)
    low = triangles.min(axis=(0, 1))
    shape = (triangles - low) / diameter  # the same for every unit and origin
    crosses = np.cross(shape[:, 1] - shape[:, 0], shape[:, 2] - shape[:, 0])
    lengths = np.linalg.norm(crosses, axis=1)
    normals = crosses / np.maximum(lengths, 1e-300)[:, None]

    spacing = float(np.sqrt(lengths.sum() / 2 / count))
    faces, weights = _pierce(shape, normals, spacing)
    while len(faces) < count / 4:  # all but lost between the lines
        spacing *= 0.7
        faces, weights = _pierce(shape, normals, spacing)
    return Hits(
        np.einsum("nk,nkd->nd", weights, shape[faces]) * diameter + low, normals[faces], faces, weights
    )


def farthest_points(points: Floats, count: int) -> Ints:
    """[N, 3] -> indices [count], each the point farthest from those before it (Gonzalez 1985).

    It begins at the point farthest along a fixed slanted direction.
    """
    columns = np.ascontiguousarray(points.T)  # [3, N]
    nearest = np.full(len(points), np.inf)
    offsets, squares = np.empty_like(columns), np.empty_like(nearest)  # made once: two thousand rounds
    chosen = np.empty(count, dtype=np.int64)
    chosen[0] = int(np.argmax(points @ _START))
    for index in range(1, count):
        np.subtract(columns, columns[:, chosen[index - 1], None], out=offsets)
        np.multiply(offsets, offsets, out=offsets)
        np.add(offsets[0], offsets[1], out=squares)
        np.add(squares, offsets[2], out=squares)
        np.minimum(nearest, squares, out=nearest)
        chosen[index] = int(nearest.argmax())
    return chosen


def _pierce(triangles: Floats, normals: Floats, spacing: float) -> tuple[Ints, Floats]:
    """Hits of the lines of all three axes: (face [N], barycentric weights [N, 3]), in an order of their own.

    A face with normal n is met by |nx| + |ny| + |nz| lines a cell; a hit is kept with one over that chance.
    """
    found = [_pierce_along(axis, triangles / spacing, normals) for axis in range(3)]
    faces = np.concatenate([hit[0] for hit in found])
    weights = np.concatenate([hit[1] for hit in found])
    keys = np.concatenate([hit[2] for hit in found])
    order = np.lexsort(keys.T)  # by axis, line and depth: independent of the faces' order
    faces, weights, keys = faces[order], weights[order], keys[order]

    # Then shuffled by a noise of the line and of the hit's number on it, so that every beginning of the list
    # covers the surface; a stride would take the front sides alone.
    number = np.arange(len(keys))
    fresh = np.ones(len(keys), dtype=bool)
    fresh[1:] = (keys[1:, 1:] != keys[:-1, 1:]).any(axis=1)
    on_line = number - np.maximum.accumulate(np.where(fresh, number, 0))
    column, row, axis = keys[:, 1:].astype(np.int64).T
    order = np.argsort(_noise(column + (on_line << 32), row + (axis << 32), 9), kind="stable")
    return faces[order], weights[order]


def _pierce_along(axis: int, triangles: Floats, normals: Floats) -> tuple[Ints, Floats, Floats]:
    """Scan conversion of triangles [F, 3, 3], in cells, square to `axis`; one jittered line a cell."""
    u, v = triangles[..., (axis + 1) % 3], triangles[..., (axis + 2) % 3]  # [F, 3]

    # Rows: the lines of one row j share v = j + jitter(j). A row cuts a triangle in one interval of u.
    first = np.floor(v.min(axis=1)).astype(np.int64)
    last = np.floor(v.max(axis=1)).astype(np.int64)
    face, row = _expand(first, last)
    level = row + _noise(row, 0 * row, 2 * axis)
    below = v[face] <= level[:, None]  # [R, 3]
    crossing = below != np.roll(below, -1, axis=1)  # edge k runs from corner k to corner k + 1
    keep = crossing.any(axis=1)
    face, row, level, crossing = face[keep], row[keep], level[keep], crossing[keep]
    rise = np.roll(v[face], -1, axis=1) - v[face]
    share = (level[:, None] - v[face]) / np.where(crossing, rise, 1.0)
    at = u[face] + share * (np.roll(u[face], -1, axis=1) - u[face])
    start = np.where(crossing, at, np.inf).min(axis=1)
    stop = np.where(crossing, at, -np.inf).max(axis=1)

    # Columns: line (i, j) stands at u = i + jitter(i, j).
    part, column = _expand(np.floor(start).astype(np.int64), np.floor(stop).astype(np.int64))
    face, row, level = face[part], row[part], level[part]
    position = column + _noise(column, row, 2 * axis + 1)
    keep = (position >= start[part]) & (position < stop[part])
    keep &= _noise(column, row, 6 + axis) * np.abs(normals[face]).sum(axis=1) < 1
    face, row, column, level, position = face[keep], row[keep], column[keep], level[keep], position[keep]

    a, b, c = np.moveaxis(np.stack([u[face], v[face]], axis=-1), 1, 0)  # [N, 2] each
    p = np.stack([position, level], axis=-1)
    double_area = _cross(b - a, c - a)
    weights = np.stack([_cross(b - p, c - p), _cross(c - p, a - p), _cross(a - p, b - p)], axis=-1)
    weights = np.clip(weights / double_area[:, None], 0.0, 1.0)
    weights /= weights.sum(axis=1, keepdims=True)
    depth = (weights * triangles[face, :, axis]).sum(axis=1)
    return face, weights, np.stack([depth, column, row, np.full(len(face), axis)], axis=-1).astype(np.float64)


def _expand(first: Ints, last: Ints) -> tuple[Ints, Ints]:
    """All whole numbers first..last of every entry: (entry [N], number [N])."""
    counts = last - first + 1
    entry = np.repeat(np.arange(len(first)), counts)
    starts = np.cumsum(counts) - counts
    return entry, np.arange(len(entry)) - starts[entry] + first[entry]


def _cross(a: Floats, b: Floats) -> Floats:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _noise(i: Ints, j: Ints, stream: int) -> Floats:
    """A fixed number in [0, 1) for every cell and stream: splitmix64's finaliser (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        bits = i.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + j.astype(np.uint64) * np.uint64(
            0xC2B2AE3D27D4EB4F
        )
        bits += np.uint64(stream + 1) * np.uint64(0x165667B19E3779F9)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((bits ^ (bits >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _smooth_normals(hits: Floats, normals: Floats, chosen: Ints) -> Floats:
    """Mean normal of the hits around each chosen one that face the same way: edges stay, scans get smooth."""
    half = len(hits) // 2
    own_points, own = torch.from_numpy(hits[chosen]).float(), torch.from_numpy(normals[chosen]).float()
    points, directions = torch.from_numpy(hits[:half]).float(), torch.from_numpy(normals[:half]).float()
    smooth = []
    for centre, normal in zip(own_points.split(256), own.split(256), strict=True):
        # Weights fall to 0 without a jump, so that rounding changes nothing.
        near = torch.cdist(centre, points).div_(-SMOOTHING).add_(1).clamp_(min=0)
        alike = (normal @ directions.T).sub_(0.7).clamp_(min=0)
        smooth.append(0.1 * normal + near.mul_(alike) @ directions)
    return torch.nn.functional.normalize(torch.cat(smooth), dim=-1).double().numpy()
