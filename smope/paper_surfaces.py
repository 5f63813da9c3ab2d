"""Meshes as the authors' network takes them: normalised, as random surface points with normals.

The authors drew new points in every pass, in inference too, so the same photo gave another answer each time.
Here inference draws them once, with a seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import trimesh
from torch import Tensor

from smope.meshes import MeshError, load_mesh
from smope.networks.paper_meshes import MeshSurfaces
from smope.objects import ObjectModel


def normalised(vertices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[V, 3] -> the same about the mean and over the largest absolute coordinate, that scale [1], that mean
    [3]"""
    centre = vertices.mean(0)
    moved = vertices - centre
    scale = moved.abs().max()[None]
    return moved / scale, scale, centre


def sample_surface(
    vertices: Tensor, faces: Tensor, count: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """`count` random points, even over the area, as faces [S] and barycentric weights [S, 3]"""
    corners = vertices.detach()[faces]
    area = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]).norm(dim=-1)
    chosen = torch.multinomial(area, count, replacement=True, generator=generator)
    u, v = torch.rand(2, count, device=vertices.device, generator=generator)
    root = u.sqrt()  # so that a triangle is covered evenly
    return chosen, torch.stack([1 - root, root * (1 - v), root * v], -1)


def surface_points(vertices: Tensor, faces: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Faces [S] and barycentric weights [S, 3] -> points [S, 3]"""
    return (vertices[faces[chosen]] * weights[..., None]).sum(1)


def draw_surfaces(
    vertices: Sequence[Tensor], faces: Sequence[Tensor], count: int, seed: int | None = None
) -> MeshSurfaces:
    """Points and normals of normalised meshes. With a seed, a mesh's points do not depend on the other
    meshes."""
    points, normals = [], []
    for corners, triangles in zip(vertices, faces, strict=True):
        generator = None if seed is None else torch.Generator(corners.device).manual_seed(seed)
        chosen, weights = sample_surface(corners, triangles, count, generator)
        points.append(surface_points(corners, triangles, chosen, weights))
        a, b, c = corners[triangles[chosen]].unbind(1)
        normals.append(F.normalize(torch.linalg.cross(b - a, c - a), dim=-1))
    return MeshSurfaces(torch.stack(points), torch.stack(normals))


def mesh_tensors(model: ObjectModel) -> tuple[Tensor, Tensor]:
    """Vertices [V, 3] in metres and faces [F, 3] of an object that still has its mesh."""
    if model.mesh is None:
        raise ValueError(
            f"{model.name}: an object without a mesh given, as saved weights hold them; pass its mesh anew"
        )
    vertices = torch.as_tensor(model.mesh.vertices.copy(), dtype=torch.float32)
    return vertices, torch.as_tensor(model.mesh.faces.copy(), dtype=torch.int64)


def object_surfaces(objects: Sequence[ObjectModel], count: int, seed: int = 0) -> MeshSurfaces:
    """What the network takes of these objects; the same objects give the same samples."""
    meshes = [mesh_tensors(model) for model in objects]
    return draw_surfaces([normalised(v)[0] for v, _ in meshes], [f for _, f in meshes], count, seed)


def raw_surfaces(sources: Sequence[Any], count: int, seed: int = 0) -> MeshSurfaces:
    """What the authors' own weights take of these meshes, which are sources as `load_mesh` has them."""
    meshes = [raw_mesh(source) for source in sources]
    return draw_surfaces([normalised(v)[0] for v, _ in meshes], [f for _, f in meshes], count, seed)


def raw_mesh(source: Any) -> tuple[Tensor, Tensor]:
    """Vertices [V, 3] in the source's own unit and faces [F, 3], unprocessed.

    The authors centre on the mean of the vertices that the OBJ file lists, so a vertex that is merged, split
    or dropped on the way moves the whole mesh: by up to a twelfth of its size in their KITTI-3D set.
    """
    if isinstance(source, str | Path) and Path(source).suffix.lower() == ".obj":
        return _read_obj(Path(source))
    if isinstance(source, trimesh.Trimesh):
        vertices, faces = source.vertices, source.faces
    elif hasattr(source, "verts_list") and hasattr(source, "faces_list"):  # PyTorch3D Meshes, not imported
        vertices, faces = source.verts_list()[0], source.faces_list()[0]
    elif isinstance(source, Sequence) and not isinstance(source, str) and len(source) == 2:
        vertices, faces = source
    else:
        mesh = load_mesh(source, "m", force=True)
        vertices, faces = mesh.vertices, mesh.faces
    arrays = [x.numpy(force=True) if isinstance(x, Tensor) else np.asarray(x) for x in (vertices, faces)]
    return torch.from_numpy(arrays[0].astype(np.float32)), torch.from_numpy(arrays[1].astype(np.int64))


def _read_obj(path: Path) -> tuple[Tensor, Tensor]:
    """All vertices in the file's order; polygons as fans about their first corner."""
    if not path.is_file():
        raise MeshError(f"{path}: no such file")
    vertices: list[list[float]] = []
    faces: list[list[int]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        kind, *values = line.split() or [""]
        try:
            if kind == "v":
                x, y, z = map(float, values[:3])  # colours may follow
                vertices.append([x, y, z])
            elif kind == "f":
                corners = [int(value.split("/")[0]) for value in values]
                # Counted from 1; below 0 from the last vertex so far.
                corners = [c - 1 if c > 0 else len(vertices) + c for c in corners]
                if min(corners) < 0 or len(corners) < 3:
                    raise ValueError
                faces += [[corners[0], b, c] for b, c in pairwise(corners[1:])]
        except ValueError:
            raise MeshError(f"{path}, line {number}: a vertex or a face expected, {line!r} given") from None
    if not faces or max(map(max, faces)) >= len(vertices):
        raise MeshError(
            f"{path}: {len(vertices)} vertices, {len(faces)} faces that do not fit them; damaged?"
        )
    return torch.tensor(vertices, dtype=torch.float32), torch.tensor(faces)
