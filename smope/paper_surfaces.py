"""Meshes as the authors' network takes them: normalised, as random surface points with normals.

The authors drew new points in every pass, in inference too, so the same photo gave another answer each time.
Here inference draws them once, with a seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

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
