"""Mesh terms of the authors' loss in plain PyTorch: a deformed icosphere against a target surface.

Definitions follow PyTorch3D (Ravi et al. 2020), which the authors used; nothing of it is needed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Template:
    """A closed surface whose vertices are moved, and what its triangles say about neighbours."""

    vertices: Tensor  # [V, 3]
    faces: Tensor  # [F, 3]
    edges: Tensor  # [E, 2] each once
    edge_faces: Tensor  # [E, 2] the two faces that meet in it

    def to(self, device: torch.device | str) -> Template:
        return Template(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    @staticmethod
    def of(vertices: Tensor, faces: Tensor) -> Template:
        edges, edge_of_side = _edges(faces)
        order = edge_of_side.flatten().argsort(stable=True)
        if len(order) != 2 * len(edges):
            raise ValueError(
                f"{len(edges)} edges with {len(order)} sides given; a closed surface, where two faces meet "
                "in every edge, expected"
            )
        faces_of_sides = torch.arange(len(faces)).repeat(3)
        return Template(vertices, faces, edges, faces_of_sides[order].view(-1, 2))


@lru_cache(maxsize=4)
def icosphere(level: int) -> Template:
    """Unit sphere with 20 * 4^level faces, vertices in PyTorch3D's order: a decoder's outputs belong to it.

    The icosahedron has four decimals there, which moves vertices by 1e-5; so it has here.
    """
    a, b = 0.5257, 0.8507
    corners = [(-a, b, 0), (a, b, 0), (-a, -b, 0), (a, -b, 0), (0, -a, b), (0, a, b)]
    corners += [(0, -a, -b), (0, a, -b), (b, 0, -a), (b, 0, a), (-b, 0, -a), (-b, 0, a)]
    cap = [(0, 11, 5), (0, 5, 1), (0, 1, 7), (0, 7, 10), (0, 10, 11)]
    upper = [(1, 5, 9), (5, 11, 4), (11, 10, 2), (10, 7, 6), (7, 1, 8)]
    foot = [(3, 9, 4), (3, 4, 2), (3, 2, 6), (3, 6, 8), (3, 8, 9)]
    lower = [(4, 9, 5), (2, 4, 11), (6, 2, 10), (8, 6, 7), (9, 8, 1)]
    vertices, faces = torch.tensor(corners), torch.tensor(cap + upper + foot + lower)
    for _ in range(level):
        edges, sides = _edges(faces)
        middle = sides + len(vertices)  # [3, F] the new vertex opposite corner 0, 1, 2
        vertices = torch.cat([vertices, vertices[edges].mean(1)])
        vertices = vertices / vertices.norm(dim=1, keepdim=True)
        c0, c1, c2 = faces.unbind(1)
        m0, m1, m2 = middle.unbind(0)
        parts = [(c0, m2, m1), (c1, m0, m2), (c2, m1, m0), (m0, m1, m2)]
        faces = torch.cat([torch.stack(part, 1) for part in parts])
    return Template.of(vertices, faces)


def _edges(faces: Tensor) -> tuple[Tensor, Tensor]:
    """[F, 3] -> edges [E, 2] in rising order, and [3, F] which one lies opposite corner 0, 1, 2"""
    sides = torch.stack([faces[:, [1, 2]], faces[:, [2, 0]], faces[:, [0, 1]]]).sort(-1).values
    edges, index = torch.unique(sides.flatten(0, 1), dim=0, return_inverse=True)
    return edges, index.view(3, -1)


def chamfer(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared distance to the nearest point, both ways added: [P, 3] and [Q, 3] -> []"""
    with torch.no_grad():
        distance = torch.cdist(a, b)
        nearest_b, nearest_a = distance.argmin(1), distance.argmin(0)
    there = (a - b[nearest_b]).square().sum(-1).mean()
    back = (b - a[nearest_a]).square().sum(-1).mean()
    return there + back


def edge_length(vertices: Tensor, template: Template) -> Tensor:
    """Mean squared length of the edges: [M, V, 3] -> [M]"""
    ends = vertices[:, template.edges]  # [M, E, 2, 3]
    return (ends[:, :, 0] - ends[:, :, 1]).square().sum(-1).mean(-1)


def normal_consistency(vertices: Tensor, template: Template) -> Tensor:
    """Mean of 1 - cosine between the normals of faces that meet in an edge: [M, V, 3] -> [M]"""
    corners = vertices[:, template.faces]  # [M, F, 3, 3]
    first = corners[:, :, 0]
    normals = torch.linalg.cross(corners[:, :, 1] - first, corners[:, :, 2] - first)
    pairs = normals[:, template.edge_faces]  # [M, E, 2, 3]
    return (1 - F.cosine_similarity(pairs[:, :, 0], pairs[:, :, 1], dim=-1)).mean(-1)


def laplacian(vertices: Tensor, template: Template) -> Tensor:
    """Mean distance of a vertex from the mean of its neighbours: [M, V, 3] -> [M]"""
    a, b = template.edges.unbind(1)
    total = torch.zeros_like(vertices).index_add(1, a, vertices[:, b]).index_add(1, b, vertices[:, a])
    degree = torch.bincount(template.edges.flatten(), minlength=vertices.shape[1])
    return (total / degree[:, None] - vertices).norm(dim=-1).mean(-1)


def key_points(vertices: Tensor, count: int) -> Tensor:
    """[V, 3] -> [count + 1, 3]: the mean, then each time the vertex with the largest sum of squared distances
    to those before. That is the authors' rule; unlike farthest-point sampling it may repeat a vertex."""
    points = [vertices.mean(0)]
    total = torch.zeros(len(vertices), dtype=vertices.dtype, device=vertices.device)
    for _ in range(count):
        total = total + (vertices - points[-1]).square().sum(-1)
        points.append(vertices[total.argmax()])
    return torch.stack(points)
