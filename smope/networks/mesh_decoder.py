"""3D decoder: rebuilds a mesh's surface points, its scale and its centre from the global token (the paper's
L_M)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from smope.networks.deformable import MLP


@dataclass(frozen=True, eq=False)
class RebuiltMeshes:
    points: Tensor  # [M, P, 3] centred on the bounding box, over the diameter
    log_diameter: Tensor  # [M] log metres
    centre: Tensor  # [M, 3] mean of the surface, centred on the bounding box, over the diameter


class MeshDecoder(nn.Module):
    def __init__(self, width: int = 256, points: int = 512, hidden: int = 512) -> None:
        super().__init__()
        self.shape = MLP(width, hidden, points * 3, 3)
        self.size = MLP(width, width // 2, 4, 2)

    def forward(self, embedding: Tensor) -> RebuiltMeshes:  # [M, C]
        points = self.shape(embedding).unflatten(-1, (-1, 3))
        size = self.size(embedding)
        return RebuiltMeshes(points, size[:, 0], size[:, 1:])
