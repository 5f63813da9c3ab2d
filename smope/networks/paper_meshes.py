"""3D encoder and decoder of the authors' network.

A mesh enters as a list of surface points and normals in some order, centred on the mean of its vertices and
divided by its largest absolute coordinate. The decoder gives offsets for the vertices of an icosphere, and
the scale and the centre that the normalisation took away.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class MeshSurfaces:
    """Surface samples of M meshes, normalised."""

    points: Tensor  # [M, P, 3]
    normals: Tensor  # [M, P, 3] unit length

    def __post_init__(self) -> None:
        if self.points.shape != self.normals.shape or self.points.dim() != 3 or self.points.shape[2] != 3:
            raise ValueError(
                f"MeshSurfaces: points {tuple(self.points.shape)} and normals {tuple(self.normals.shape)} "
                "given, [M, P, 3] each expected"
            )

    def to(self, device: torch.device | str) -> MeshSurfaces:
        return MeshSurfaces(self.points.to(device), self.normals.to(device))


@dataclass(frozen=True, eq=False)
class DecodedMeshes:
    """What the decoder makes of M features."""

    offsets: Tensor  # [M, V, 3] of the icosphere's vertices, in -1..1
    scales: Tensor  # [M, 1] any sign: a linear output
    centres: Tensor  # [M, 3]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(getattr(self, field.name) for field in fields(self))


class PaperMeshEncoder(nn.Module):
    """Two branches over the flattened lists, then one feature a mesh. Norms stand behind the ReLUs."""

    def __init__(self, width: int, surface_points: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.surface_points = surface_points
        self.points_branch = self._branch(3 * surface_points, width, dropout)
        self.normals_branch = self._branch(3 * surface_points, width, dropout)
        self.fuse = nn.Sequential(
            nn.Linear(2 * width, width),
            nn.ReLU(),
            nn.BatchNorm1d(width),
            nn.Linear(width, width),
            nn.ReLU(),
        )
        self.apply(_reset)

    @staticmethod
    def _branch(inputs: int, width: int, dropout: float) -> nn.Sequential:
        return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.BatchNorm1d(width), nn.Dropout(dropout))

    def forward(self, surfaces: MeshSurfaces) -> Tensor:
        """-> [M, C]"""
        given = surfaces.points.shape[1]
        if given != self.surface_points:
            raise ValueError(
                f"{given} surface points a mesh given, {self.surface_points} expected: the authors' encoder "
                "has a weight for each; sample that many"
            )
        points = self.points_branch(surfaces.points.flatten(1))
        normals = self.normals_branch(surfaces.normals.flatten(1))
        return self.fuse(torch.cat([points, normals], -1))


class PaperMeshDecoder(nn.Module):
    def __init__(self, width: int, template_vertices: int) -> None:
        super().__init__()
        self.offsets = self._tower(width, template_vertices, 3 * template_vertices)
        self.scale = self._tower(width, width // 2, 1)
        self.centre = self._tower(width, width // 2, 3)
        self.apply(_reset)

    @staticmethod
    def _tower(width: int, hidden: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, outputs))

    def forward(self, features: Tensor) -> DecodedMeshes:  # [M, C]
        offsets = 2 * self.offsets(features).sigmoid() - 1
        return DecodedMeshes(offsets.unflatten(-1, (-1, 3)), self.scale(features), self.centre(features))


def _reset(module: nn.Module) -> None:
    """The authors' start: thousands of inputs a layer, and none too faint behind its ReLU."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_normal_(module.weight, gain=nn.init.calculate_gain("relu"))
        nn.init.zeros_(module.bias)
