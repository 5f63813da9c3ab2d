"""Meshes that are registered beside the known ones in training, and that no image is said to hold.

Without them a network learns to tell its own objects from the background and from each other only, and
calls whatever is left over by the name of any mesh that is registered later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from smope.scenes.meshes import PreparedMesh

SCALE = (0.6, 1.6)  # factor on a stranger's size, even in its logarithm


@dataclass(frozen=True, eq=False)
class Strangers:
    """Surfaces of S meshes, each centred on its bounding box and over its diameter."""

    surfaces: Tensor  # [S, P, 10] as in `mesh_encoder.MeshInputs`
    diameters: Tensor  # [S] metres

    @staticmethod
    def of(meshes: Sequence[PreparedMesh], points: int) -> Strangers:
        rng = np.random.default_rng(0)
        sizes = [_diameter(mesh) for mesh in meshes]
        surfaces = [_surface(mesh, size, points, rng) for mesh, size in zip(meshes, sizes, strict=True)]
        return Strangers(torch.from_numpy(np.stack(surfaces)), torch.tensor(sizes, dtype=torch.float32))

    def to(self, device: torch.device | str) -> Strangers:
        return Strangers(self.surfaces.to(device), self.diameters.to(device))

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Surfaces [count, P, 10] and diameters [count] of so many, none twice, at sizes of chance."""
        device = self.diameters.device
        chosen = torch.rand(len(self.diameters), device=device).topk(count).indices
        low, high = SCALE
        scale = low * (high / low) ** torch.rand(count, device=device)
        return self.surfaces[chosen], self.diameters[chosen] * scale


def _diameter(mesh: PreparedMesh) -> float:
    """Largest distance of two points, metres; the hull has both of them."""
    hull = mesh.hull.astype(np.float64)
    return max(float(np.linalg.norm(hull - corner, axis=1).max()) for corner in hull)


def _surface(
    mesh: PreparedMesh, diameter: float, points: int, rng: np.random.Generator
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """[P, 10] points even over the surface by chance: point, normal, colour, colour known"""
    corners = mesh.vertices[mesh.faces].astype(np.float64)  # [F, 3, 3]
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    faces = mesh.faces[rng.choice(len(area), points, p=area / area.sum())]  # [P, 3]
    weights = rng.dirichlet(np.ones(3), points)[:, :, None]

    def at(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> np.ndarray:
        return np.asarray((values[faces] * weights).sum(axis=1))

    normals = at(mesh.normals.astype(np.float64))
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9)
    colours = at(mesh.colors / 255.0)
    columns = [at(mesh.vertices.astype(np.float64)) / diameter, normals, colours, np.ones((points, 1))]
    return np.concatenate(columns, axis=1).astype(np.float32)
