"""Any mesh source to one `trimesh.Trimesh` in metres with vertex colours, or an error that says why."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import trimesh
from numpy.typing import NDArray
from trimesh.visual.texture import TextureVisuals

log = logging.getLogger(__name__)

METRES_PER_UNIT = {"m": 1.0, "cm": 0.01, "mm": 0.001, "in": 0.0254}
SIZE_RANGE = (0.005, 30.0)  # metres, of the diameter
USUAL_SIZE = 0.3  # metres, of a thing on a table: breaks ties when a unit is suggested

# A texture becomes vertex colours, so a textured face is split until edges are below this share of the box.
TEXTURE_EDGE = 0.01
TEXTURE_MAX_FACES = 60_000


class MeshError(ValueError):
    """A mesh that cannot be used; the message says which, why and what to do."""


def load_mesh(source: Any, units: str, force: bool = False, name: str = "mesh") -> trimesh.Trimesh:
    """One mesh in metres, in its own frame, with vertex colours where the source has colours or a texture.

    `source` is a path (OBJ with materials, PLY, STL, GLB, whatever trimesh reads), a trimesh mesh or scene,
    (vertices [V, 3], faces [F, 3]), or a PyTorch3D `Meshes`. Scenes are put together with their transforms.
    Open meshes are fine. A size outside 5 mm to 30 m is refused unless `force`.
    """
    if not isinstance(units, str) or units not in METRES_PER_UNIT:
        raise MeshError(
            f"{name}: units={units!r} given, one of {', '.join(map(repr, METRES_PER_UNIT))} expected"
        )
    parts = [_with_vertex_colours(part) for part in _read(source, name)]
    if not parts:
        raise MeshError(
            f"{name}: no faces found; a surface is needed, a point cloud or a drawing is not enough"
        )
    for part in parts:
        _check(part, name)
    mesh = _joined(parts)
    mesh.remove_unreferenced_vertices()
    mesh.apply_scale(METRES_PER_UNIT[units])
    extents = mesh.vertices.max(axis=0) - mesh.vertices.min(axis=0)
    if not mesh.area > 1e-10 * float(extents @ extents):
        raise MeshError(
            f"{name}: degenerate, its {len(mesh.faces)} faces have no area; is it a line or one point?"
        )
    if mesh.is_watertight and mesh.volume < 0:
        mesh.invert()  # inside out: normals must leave the body

    size = diameter(mesh.vertices)
    low, high = SIZE_RANGE
    if not force and not low <= size <= high:
        raise MeshError(_size_message(name, size, units))
    log.info("%s: %s across (%s), %d faces", name, _length(size), _box(extents), len(mesh.faces))
    return mesh


def diameter(vertices: NDArray[np.float64]) -> float:
    """The largest distance between two vertices [V, 3], exact.

    With every vertex within R of the middle c, a pair at distance L has both ends at least L - R from c: the
    best pair found so far keeps most vertices out, and the rest is compared cell against cell.
    """
    points = np.unique(np.asarray(vertices, dtype=np.float64), axis=0)
    middle = (points.min(axis=0) + points.max(axis=0)) / 2
    radii = np.linalg.norm(points - middle, axis=1)
    best, end = 0.0, points[radii.argmax()]
    for _ in range(4):  # walking to the farthest point finds a nearly largest pair at once
        distances = np.linalg.norm(points - end, axis=1)
        best, end = max(best, float(distances.max())), points[distances.argmax()]
    points = points[radii >= (best - radii.max()) * (1 - 1e-12)]
    if len(points) < 2 or best == 0.0:  # 0 of different points: their squares underflow
        return best

    cells = np.floor((points - middle) / max(best / 24, 1e-300)).astype(np.int64)
    _, cell_of = np.unique(cells, axis=0, return_inverse=True)
    order = np.argsort(cell_of, kind="stable")
    groups = np.split(points[order], np.flatnonzero(np.diff(cell_of[order])) + 1)
    hearts = np.stack([group.mean(axis=0) for group in groups])
    reach = np.array([np.linalg.norm(g - h, axis=1).max() for g, h in zip(groups, hearts, strict=True)])
    for index, group in enumerate(groups):
        bounds = np.linalg.norm(hearts[index:] - hearts[index], axis=1) + reach[index:] + reach[index]
        rivals = np.flatnonzero(bounds > best) + index
        if len(rivals):
            others = np.concatenate([groups[r] for r in rivals])
            best = max(best, float(_pairwise(group, others).max()))
    return best


def _pairwise(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.linalg.norm(a[:, None] - b[None], axis=-1)


def _read(source: Any, name: str) -> list[trimesh.Trimesh]:
    """The source's surfaces in its own unit, each a copy, unprocessed so that faults are still there."""
    if isinstance(source, str | Path):
        path = Path(source)
        if path.is_dir():
            raise MeshError(f"{name}: the folder {str(path)!r} given, a mesh file expected")
        if not path.is_file():
            raise MeshError(f"{name}: no file {str(path)!r}")
        try:
            return _surfaces(trimesh.load_scene(path, process=False))
        except Exception as error:  # trimesh's readers raise whatever their parsers raise
            known = path.suffix[1:].lower() in trimesh.available_formats()  # without further packages
            hint = "" if known else "; save it as OBJ, PLY, STL or GLB"
            raise MeshError(f"{name}: {str(path)!r} cannot be read as a mesh: {error}{hint}") from error
    if isinstance(source, trimesh.Scene):
        return _surfaces(source)
    if isinstance(source, trimesh.Trimesh):
        return [source.copy()] if len(source.faces) else []
    if hasattr(source, "verts_list") and hasattr(source, "faces_list"):  # PyTorch3D Meshes, not imported
        pairs = zip(source.verts_list(), source.faces_list(), strict=True)
        return [_from_arrays(v, f, name) for v, f in pairs if len(f)]
    if isinstance(source, Sequence) and len(source) == 2:
        vertices, faces = source
        return [_from_arrays(vertices, faces, name)] if len(faces) else []
    raise MeshError(
        f"{name}: {type(source).__name__} given; a path, a trimesh mesh or scene, (vertices, faces) "
        "or a PyTorch3D Meshes expected"
    )


def _surfaces(scene: trimesh.Scene) -> list[trimesh.Trimesh]:
    return [part for part in scene.dump() if isinstance(part, trimesh.Trimesh) and len(part.faces)]


def _from_arrays(vertices: Any, faces: Any, name: str) -> trimesh.Trimesh:
    try:
        points, corners = np.asarray(_on_host(vertices), dtype=np.float64), np.asarray(_on_host(faces))
    except (TypeError, ValueError) as error:
        raise MeshError(f"{name}: vertices and faces of numbers expected ({error})") from error
    if points.ndim != 2 or points.shape[1] != 3 or corners.ndim != 2 or corners.shape[1] != 3:
        raise MeshError(
            f"{name}: vertices {points.shape} and faces {corners.shape} given, [V, 3] and [F, 3] expected"
        )
    if not np.issubdtype(corners.dtype, np.integer):
        raise MeshError(f"{name}: faces of type {corners.dtype} given, whole numbers expected")
    return trimesh.Trimesh(points, corners, process=False)


def _on_host(values: Any) -> Any:
    """A tensor as NumPy takes it: on the CPU, and not part of a graph."""
    return values.detach().cpu() if hasattr(values, "detach") else values


def _check(mesh: trimesh.Trimesh, name: str) -> None:
    bad = ~np.isfinite(np.asarray(mesh.vertices)).all(axis=-1, keepdims=True)
    if bad.any():
        raise MeshError(f"{name}: {bad.sum()} of {len(bad)} vertices are not finite; repair the mesh first")
    low, high = int(mesh.faces.min()), int(mesh.faces.max())
    if low < 0 or high >= len(mesh.vertices):
        raise MeshError(
            f"{name}: faces name vertices {low} to {high}, but there are {len(mesh.vertices)}, counted from 0"
        )


def _joined(parts: list[trimesh.Trimesh]) -> trimesh.Trimesh:
    """One mesh with equal vertices merged; parts without colours are grey beside parts with."""
    visuals: list[Any] = [part.visual for part in parts]
    coloured = any(visual.kind == "vertex" for visual in visuals)
    counts = np.cumsum([0, *(len(part.vertices) for part in parts)])
    vertices = np.concatenate([part.vertices for part in parts])
    faces = np.concatenate([part.faces + start for part, start in zip(parts, counts[:-1], strict=True)])
    colours = np.concatenate([visual.vertex_colors for visual in visuals]) if coloured else None
    # Faces keep apart where colours differ: a vertex is merged with its equals in place and colour.
    keys = vertices if colours is None else np.column_stack([vertices, colours])
    _, first, merged = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    return trimesh.Trimesh(
        vertices[first],
        merged[faces],
        vertex_colors=None if colours is None else colours[first],
        process=False,
    )


def _with_vertex_colours(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    visual: Any = mesh.visual
    if visual.kind == "face":
        # Each face gets corners of its own, so that a colour does not bleed into its neighbour.
        colours = np.repeat(visual.face_colors, 3, axis=0)
        corners = np.arange(3 * len(mesh.faces)).reshape(-1, 3)
        return trimesh.Trimesh(mesh.triangles.reshape(-1, 3), corners, vertex_colors=colours, process=False)
    if not isinstance(visual, TextureVisuals):
        return mesh
    vertices, faces, uv = np.asarray(mesh.vertices), np.asarray(mesh.faces), visual.uv
    if uv is None or len(uv) != len(vertices) or not _has_picture(visual.material):
        colours = np.tile(visual.material.main_color, (len(vertices), 1))
        return trimesh.Trimesh(vertices, faces, vertex_colors=colours, process=False)
    longest = TEXTURE_EDGE * float(np.linalg.norm(np.ptp(vertices, axis=0)))
    while len(faces) < TEXTURE_MAX_FACES / 4 and np.isfinite(vertices).all():
        corners = vertices[faces]
        edges = np.linalg.norm(corners - np.roll(corners, 1, axis=1), axis=-1).max(axis=1)
        if not (edges > longest).any():
            break
        vertices, faces, attributes = trimesh.remesh.subdivide(vertices, faces, edges > longest, {"uv": uv})
        uv = attributes["uv"]
    return trimesh.Trimesh(vertices, faces, vertex_colors=visual.material.to_color(uv), process=False)


def _has_picture(material: Any) -> bool:
    """A plain OBJ material has an `image`, a glTF one a `baseColorTexture`."""
    return any(getattr(material, name, None) is not None for name in ("image", "baseColorTexture"))


def _size_message(name: str, size: float, units: str) -> str:
    low, high = SIZE_RANGE
    raw = size / METRES_PER_UNIT[units]
    fitting = {unit: raw * metres for unit, metres in METRES_PER_UNIT.items() if low <= raw * metres <= high}
    message = (
        f"{name}: {_length(size)} across with units={units!r}, {_length(low)} to {_length(high)} expected"
    )
    if fitting:
        likely = min(fitting, key=lambda unit: abs(np.log(fitting[unit] / USUAL_SIZE)))
        message += f"; with units={likely!r} it would be {_length(fitting[likely])}"
    return f"{message}. Pass the unit of the file, or force=True if this size is meant"


def _length(metres: float) -> str:
    if metres >= 1:
        return f"{metres:.4g} m"
    return f"{metres * 100:.3g} cm" if metres >= 0.1 else f"{metres * 1000:.3g} mm"


def _box(extents: NDArray[np.float64]) -> str:
    return " x ".join(_length(float(extent)) for extent in extents)
