"""3D encoder: surface points of a mesh -> one global and some local tokens.

A mesh enters centred on its bounding box and divided by its diameter; each mesh is encoded alone, so that
registering one never moves another's tokens. Points are a set: pooling and attention do not see their order
(Qi et al. 2017, PointNet; Jaegle et al. 2021, Perceiver, for the local tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smope.networks.deformable import MLP, FeedForward
from smope.networks.self_attention import MultiheadAttention


@dataclass(frozen=True, eq=False)
class MeshInputs:
    """What the network is told of M meshes."""

    surface: (
        Tensor  # [M, P, 10]: point (centred, over the diameter), normal, colour 0..1, colour known 0 or 1
    )
    diameters: Tensor  # [M] metres
    anchors: Tensor  # [M, A, 9]: the points that pose refinement projects: point, normal, colour

    def to(self, device: torch.device | str) -> MeshInputs:
        return MeshInputs(self.surface.to(device), self.diameters.to(device), self.anchors.to(device))


@dataclass(frozen=True, eq=False)
class MeshTokens:
    """Encoded meshes, and the geometry that the pose needs beside them."""

    embedding: Tensor  # [M, C] global token
    local: Tensor  # [M, T, C]
    diameters: Tensor  # [M] metres
    anchors: Tensor  # [M, A, 9]

    def __len__(self) -> int:
        return self.embedding.shape[0]

    @staticmethod
    def cat(tokens: Sequence[MeshTokens]) -> MeshTokens:
        columns = zip(*((t.embedding, t.local, t.diameters, t.anchors) for t in tokens), strict=True)
        return MeshTokens(*(torch.cat(column) for column in columns))

    def to(self, device: torch.device | str) -> MeshTokens:
        return MeshTokens(
            self.embedding.to(device),
            self.local.to(device),
            self.diameters.to(device),
            self.anchors.to(device),
        )


class MeshEncoder(nn.Module):
    def __init__(self, width: int = 256, tokens: int = 32, hidden: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.points = MLP(11, hidden, hidden, 3)
        self.mix = MLP(2 * hidden, hidden, hidden, 2)
        self.embed = MLP(3 * hidden + 1, width, width, 3)
        self.embed_norm = nn.LayerNorm(width)
        self.latents = nn.Parameter(torch.randn(tokens, hidden) * 0.5)
        self.attention = MultiheadAttention(hidden, heads)
        self.attention_norm = nn.LayerNorm(hidden)
        self.feed_forward = FeedForward(hidden, 2 * hidden)
        self.local = nn.Linear(hidden + width, width)

    def forward(self, inputs: MeshInputs) -> MeshTokens:
        size = inputs.diameters.log()[:, None]  # [M, 1]
        surface = torch.cat([inputs.surface, size[:, None].expand(-1, inputs.surface.shape[1], 1)], -1)
        features = self.points(surface)  # [M, P, hidden]
        overview = features.amax(1, keepdim=True).expand_as(features)
        features = features + self.mix(torch.cat([features, overview], -1))
        pooled = [features.amax(1), features.mean(1), features.std(1, unbiased=False), size]
        embedding = self.embed_norm(self.embed(torch.cat(pooled, -1)))  # [M, C]

        latents = self.latents.expand(len(embedding), -1, -1)
        read = self.attention(latents, features, features)
        local = self.feed_forward(self.attention_norm(latents + read))  # [M, T, hidden]
        spread = embedding[:, None].expand(-1, local.shape[1], -1)
        local = self.local(F.relu(torch.cat([local, spread], -1)))
        return MeshTokens(embedding, local, inputs.diameters, inputs.anchors)
