"""3D attention: image queries meet the registered meshes.

A query is classified by its similarity to each mesh's global token, mesh by mesh (a sigmoid each, no
softmax over meshes), and a pair of query and mesh attends to that mesh's local tokens alone. So meshes may
come and go without a new head, and registering one never moves the pose of another.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smope.networks.deformable import MLP, FeedForward
from smope.networks.mesh_encoder import MeshTokens
from smope.networks.precision import autocast_type


class MeshSimilarity(nn.Module):
    """Logits of each query for each mesh: scaled cosine of two projections."""

    def __init__(self, width: int = 256, prior: float = 0.02) -> None:
        super().__init__()
        self.query = MLP(width, width, width, 2)
        self.mesh = nn.Linear(width, width)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-math.log((1 - prior) / prior)))

    def forward(self, queries: Tensor, meshes: MeshTokens) -> Tensor:
        """[..., Q, C] and M meshes -> [..., Q, M] logits"""
        a = F.normalize(self.query(queries).float(), dim=-1)
        b = F.normalize(self.mesh(meshes.embedding).float(), dim=-1)
        return self.log_scale.exp() * (a @ b.T) + self.bias


class MeshAttention(nn.Module):
    """[B, P, C] queries, each paired with one mesh -> [B, P, C] features of the pair."""

    def __init__(self, width: int = 256, heads: int = 8, hidden: int = 512) -> None:
        super().__init__()
        self.heads = heads
        self.embedding = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)
        self.output_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, hidden)

    def forward(self, queries: Tensor, labels: Tensor, meshes: MeshTokens) -> Tensor:
        """queries [B, P, C], labels [B, P] index of each one's mesh"""
        # Keys and values are made once a mesh and handed to the pairs. A product with one-hot rows hands them
        # out exactly, and its backward is a product too, where that of indexing adds row by row.
        each = torch.arange(len(meshes), device=labels.device)
        chosen = labels[..., None] == each  # [B, P, M]; F.one_hot reads labels on the CPU
        chosen = chosen.to(autocast_type(queries))
        x = self.norm(queries + chosen @ self.embedding(meshes.embedding))
        key_value = self.key_value(meshes.local)  # [M, T, 2 C]
        key_value = (chosen.to(key_value.dtype) @ key_value.flatten(1)).unflatten(-1, key_value.shape[1:])
        key, value = key_value.chunk(2, -1)  # [B, P, T, C] each
        query = self.query(x).unflatten(-1, (self.heads, 1, -1)).flatten(0, 1)  # [B P, H, 1, D]
        key = key.unflatten(-1, (self.heads, -1)).transpose(-2, -3).flatten(0, 1)  # [B P, H, T, D]
        value = value.unflatten(-1, (self.heads, -1)).transpose(-2, -3).flatten(0, 1)
        attended = F.scaled_dot_product_attention(query, key, value).flatten(1)  # [B P, C]
        attended = attended.unflatten(0, queries.shape[:2])
        return self.feed_forward(self.output_norm(x + self.output(attended)))
