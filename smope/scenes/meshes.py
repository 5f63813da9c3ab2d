"""Meshes made ready for rasterising: centred, decimated twice, with creased normals and resting poses."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import trimesh
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from trimesh.visual import ColorVisuals, TextureVisuals

log = logging.getLogger(__name__)
Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class PreparedMesh:
    """One mesh, centred on its bounding box, in metres. The coarse one serves shadows and silhouettes."""

    name: str
    centre: Floats  # [3] what was subtracted from the own frame
    vertices: Floats  # [V, 3]
    normals: Floats  # [V, 3] creased vertex normals, outward by the faces' winding
    colors: NDArray[np.uint8]  # [V, 3] sRGB
    faces: NDArray[np.int32]  # [F, 3]
    coarse_vertices: Floats  # [v, 3]
    coarse_faces: NDArray[np.int32]  # [f, 3]
    hull: Floats  # [h, 3] convex-hull vertices of the whole mesh
    rests: Floats  # [R, 3, 3] object-to-world rotations at rest on a plane z = 0
    rest_weights: Floats  # [R] sum to 1
    scale_known: bool = True

    @cached_property
    def diameter(self) -> float:
        """Diagonal of the bounding box, metres."""
        return float(np.linalg.norm(np.ptp(self.hull, axis=0)))

    @cached_property
    def hull_rows(self) -> NDArray[np.float64]:
        """[3, h] the hull's x, y and z, contiguous: extremes along rows are found fast."""
        return np.ascontiguousarray(self.hull.T, dtype=np.float64)

    @cached_property
    def box_rows(self) -> NDArray[np.float64]:
        """[3, 8] the corners of the bounding box: x, y and z."""
        low, high = self.hull.min(axis=0), self.hull.max(axis=0)
        ends = np.stack([low, high], axis=1).astype(np.float64)
        return np.stack(np.meshgrid(*ends, indexing="ij")).reshape(3, 8)

    @cached_property
    def mean_color(self) -> NDArray[np.float64]:
        """[3] sRGB in 0..1, the mean over the surface."""
        corners = self.vertices[self.faces]
        area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
        of_faces = self.colors[self.faces].mean(axis=1) / 255.0
        return np.asarray(np.average(of_faces, axis=0, weights=np.maximum(area, 1e-12)), dtype=np.float64)

    @cached_property
    def slender(self) -> float:
        """Longest over middle side of the bounding box: a screwdriver's is large, a ball's 1."""
        sides = np.sort(np.ptp(self.hull, axis=0))
        return float(sides[2] / max(sides[1], 1e-6))


def prepare_mesh(
    name: str, mesh: trimesh.Trimesh, faces: int = 3000, coarse_faces: int = 600, scale_known: bool = True
) -> PreparedMesh:
    """Decimate, shade and settle one mesh (metres)."""
    vertices = np.asarray(mesh.vertices, dtype=np.float64)
    triangles = np.asarray(mesh.faces, dtype=np.int64)
    colors = vertex_colors(mesh)
    centre = (vertices.min(axis=0) + vertices.max(axis=0)) / 2
    vertices = vertices - centre
    # Colour seams duplicate vertices; decimation must see them as one or it tears the surface.
    welded, welded_faces, first = weld(vertices, triangles)
    welded_colors = colors[first]
    fine_vertices, fine_faces = decimate(welded, welded_faces, faces)
    nearest = cKDTree(welded).query(fine_vertices)[1]
    corner_vertices, corner_normals, corner_colors, corner_faces = crease(
        fine_vertices, fine_faces, welded_colors[nearest]
    )
    coarse_v, coarse_f = decimate(welded, welded_faces, coarse_faces)
    hull = trimesh.convex.convex_hull(welded)
    rests, weights = resting_poses(hull)
    return PreparedMesh(
        name=name,
        centre=centre.astype(np.float32),
        vertices=corner_vertices.astype(np.float32),
        normals=corner_normals.astype(np.float32),
        colors=corner_colors,
        faces=corner_faces.astype(np.int32),
        coarse_vertices=coarse_v.astype(np.float32),
        coarse_faces=coarse_f.astype(np.int32),
        hull=np.asarray(hull.vertices, dtype=np.float32),
        rests=rests,
        rest_weights=weights,
        scale_known=scale_known,
    )


def vertex_colors(mesh: trimesh.Trimesh) -> NDArray[np.uint8]:
    """[V, 3] sRGB; textures are baked, a mesh without colours is light grey."""
    visual = mesh.visual
    if isinstance(visual, TextureVisuals):
        visual = visual.to_color()
    if not isinstance(visual, ColorVisuals) or visual.kind is None:
        return np.full((len(mesh.vertices), 3), 180, dtype=np.uint8)
    return np.ascontiguousarray(np.asarray(visual.vertex_colors)[:, :3], dtype=np.uint8)


def weld(
    vertices: NDArray[np.float64], faces: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Merge vertices closer than 1e-5 of the size, drop faces that collapse; also which were kept."""
    step = max(float(np.ptp(vertices, axis=0).max()), 1e-9) * 1e-5
    keys = np.round(vertices / step).astype(np.int64)
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    merged = inverse.reshape(-1)[faces]
    whole = (merged[:, 0] != merged[:, 1]) & (merged[:, 1] != merged[:, 2]) & (merged[:, 0] != merged[:, 2])
    return vertices[first], merged[whole], first


def decimate(
    vertices: NDArray[np.float64], faces: NDArray[np.int64], count: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Quadric decimation to about `count` faces; the mesh itself where it is small or decimation fails."""
    if len(faces) <= count:
        return vertices, faces
    import fast_simplification  # here, because a machine that only renders prepared meshes needs none

    points, triangles = fast_simplification.simplify(
        vertices.astype(np.float32), faces.astype(np.int32), target_count=count
    )
    size, before = np.ptp(points, axis=0) if len(points) else np.zeros(3), np.ptp(vertices, axis=0)
    if len(triangles) < 4 or np.any(size < 0.9 * before - 1e-4) or not np.isfinite(points).all():
        log.debug("decimation to %d faces failed (%d left); the mesh stays whole", count, len(triangles))
        return vertices, faces
    return points.astype(np.float64), triangles.astype(np.int64)


def crease(
    vertices: NDArray[np.float64],
    faces: NDArray[np.int64],
    colors: NDArray[np.uint8],
    angle_deg: float = 42.0,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.uint8], NDArray[np.int64]]:
    """Vertex normals that stay sharp over edges above `angle_deg`: vertices there are split.

    Each face corner averages the area-weighted normals of those faces around its vertex that lie within the
    angle of its own face.
    """
    edges = vertices[faces[:, 1:]] - vertices[faces[:, :1]]
    weighted = np.cross(edges[:, 0], edges[:, 1])  # [F, 3] length = twice the area
    length = np.linalg.norm(weighted, axis=1, keepdims=True)
    unit = weighted / np.maximum(length, 1e-20)
    corner_vertex = faces.reshape(-1)
    corner_face = np.repeat(np.arange(len(faces)), 3)
    order = np.argsort(corner_vertex, kind="stable")
    counts = np.bincount(corner_vertex, minlength=len(vertices))
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    # Every ordered pair of corners that share a vertex.
    repeats = counts[corner_vertex]
    left = np.repeat(np.arange(len(corner_vertex)), repeats)
    offset = np.arange(len(left)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    right = order[starts[corner_vertex[left]] + offset]
    cosine = np.einsum("ij,ij->i", unit[corner_face[left]], unit[corner_face[right]])
    near = (cosine > np.cos(np.deg2rad(angle_deg))) | (left == right)
    normals = np.zeros((len(corner_vertex), 3))
    np.add.at(normals, left[near], weighted[corner_face[right[near]]])
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-20)
    keys = np.concatenate([corner_vertex[:, None], np.round(normals * 50).astype(np.int64)], axis=1)
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    source = corner_vertex[first]
    return vertices[source], normals[first], colors[source], inverse.reshape(-1, 3)


def resting_poses(hull: trimesh.Trimesh, most: int = 12) -> tuple[Floats, Floats]:
    """Rotations [R, 3, 3] in which a convex body lies stably on z = 0, and how often it comes to each.

    A body dropped onto a hull face tips over the edge beyond which its centre projects, until a face holds
    it (Goldberg et al., "Part pose statistics", 1999); the solid angles seen from the centre are the odds.
    """
    triangles = np.asarray(hull.triangles)
    centre = np.asarray(hull.center_mass) if hull.is_volume else triangles.mean(axis=(0, 1))
    normals = np.asarray(hull.face_normals)
    height = np.einsum("fi,fi->f", triangles[:, 0] - centre, normals)
    foot = centre + height[:, None] * normals
    neighbours = _neighbours(np.asarray(hull.faces))
    edges = np.roll(triangles, -1, axis=1) - triangles
    inward = np.cross(normals[:, None], edges)
    inside = np.einsum("fei,fei->fe", inward, foot[:, None] - triangles)
    inside /= np.maximum(np.linalg.norm(inward, axis=2), 1e-12)
    worst = inside.argmin(axis=1)
    rows = np.arange(len(triangles))
    target = np.where(inside[rows, worst] >= -1e-9, rows, neighbours[rows, worst])
    # Tipping always lowers the centre; a step that would not is numerical and ends the walk.
    target = np.where(height[target] < height + 1e-12, target, rows)
    for _ in range(64):
        target = target[target]
    odds = np.zeros(len(triangles))
    np.add.at(odds, target, _solid_angles(triangles - centre))
    ends = np.argsort(-odds)[: 4 * most]
    chosen: list[int] = []
    weights: list[float] = []
    for face in ends[odds[ends] > 0]:
        same = [k for k, other in enumerate(chosen) if normals[face] @ normals[other] > 0.995]
        if same:
            weights[same[0]] += odds[face]
        elif len(chosen) < most:
            chosen.append(int(face))
            weights.append(float(odds[face]))
    rotations = np.stack([_align(normals[face], np.array([0.0, 0.0, -1.0])) for face in chosen])
    share = np.asarray(weights) / np.sum(weights)
    return rotations.astype(np.float32), share.astype(np.float32)


def _neighbours(faces: NDArray[np.int64]) -> NDArray[np.int64]:
    """[F, 3] the face across each edge (k, k+1) of a closed triangle mesh; itself where there is none."""
    edges = np.sort(np.stack([faces, np.roll(faces, -1, axis=1)], axis=-1), axis=-1).reshape(-1, 2)
    owner = np.repeat(np.arange(len(faces)), 3)
    order = np.lexsort((edges[:, 1], edges[:, 0]))
    across = owner.copy()
    paired = (edges[order[:-1]] == edges[order[1:]]).all(axis=1)
    across[order[:-1][paired]] = owner[order[1:][paired]]
    across[order[1:][paired]] = owner[order[:-1][paired]]
    return across.reshape(-1, 3)


def _solid_angles(triangles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Solid angle of triangles [F, 3, 3] seen from the origin (Van Oosterom & Strackee, 1983)."""
    a, b, c = triangles[:, 0], triangles[:, 1], triangles[:, 2]
    la, lb, lc = (np.linalg.norm(x, axis=1) for x in (a, b, c))
    volume = np.abs(np.einsum("fi,fi->f", a, np.cross(b, c)))
    below = la * lb * lc + (a * b).sum(1) * lc + (a * c).sum(1) * lb + (b * c).sum(1) * la
    return 2 * np.arctan2(volume, below)


def _align(source: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """The smallest rotation that turns unit vector `source` onto `target`."""
    axis, cosine = np.cross(source, target), float(source @ target)
    if cosine < -1 + 1e-9:
        side = np.cross(source, [1.0, 0.0, 0.0] if abs(source[0]) < 0.9 else [0.0, 1.0, 0.0])
        side /= np.linalg.norm(side)
        return 2 * np.outer(side, side) - np.eye(3)
    skew = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    return np.eye(3) + skew + skew @ skew / (1 + cosine)
