"""Attention map and pose head of the authors' network.

A query reaches its pose through one number a head and mesh only, and both the attention's softmax and the
head's group norm run over all meshes together: registering a mesh changes the poses of the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class PaperPoses:
    """A mesh and a pose for every pair of query and mesh."""

    class_logits: Tensor  # [B, Q, M]
    probabilities: Tensor  # [B, Q, M] their softmax over the meshes
    raw: Tensor  # [B, Q, M, 7] translation, quaternion before it is normalised
    poses: Tensor  # [B, Q, M, 7] translation in metres, unit quaternion (x, y, z, w)


class AttentionMap(nn.Module):
    """How much each query attends to each mesh; there are no values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)

    def forward(self, queries: Tensor, meshes: Tensor) -> Tensor:
        """queries [B, Q, C], meshes [M, C] -> [B, Q, H, M], softmaxed over heads and meshes together"""
        query = self.query(queries).unflatten(-1, (self.heads, -1))  # [B, Q, H, D]
        key = self.key(meshes).unflatten(-1, (self.heads, -1))  # [M, H, D]
        scores = torch.einsum("bqhd,mhd->bqhm", query * query.shape[-1] ** -0.5, key)
        return scores.flatten(2).softmax(-1).view_as(scores)


class PaperPoseHead(nn.Module):
    """Two towers over a mesh's feature and a query's attention to it: is it this mesh, and where."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, width)
        self.norm = nn.GroupNorm(8, width)
        self.class_tower = self._tower(width + heads)
        self.class_out = nn.Linear((width + heads) // 16, 1)
        self.pose_tower = self._tower(width + heads)
        self.pose_out = nn.Linear((width + heads) // 16, 7)

    @staticmethod
    def _tower(inputs: int) -> nn.Sequential:
        sizes = [inputs // 2**i for i in range(5)]  # 264, 132, 66, 33, 16
        layers: list[nn.Module] = []
        for a, b in pairwise(sizes):
            layers += [nn.Linear(a, b), nn.ReLU()]
        return nn.Sequential(*layers)

    def forward(self, attention: Tensor, meshes: Tensor) -> PaperPoses:
        """attention [B, Q, H, M], meshes [M, C]"""
        features = self.norm(self.project(meshes).T[None])  # [1, C, M]: statistics over all meshes
        features = features.relu()[0].T.expand(*attention.shape[:2], -1, -1)  # [B, Q, M, C]
        pairs = torch.cat([features, attention.transpose(-1, -2)], -1)  # [B, Q, M, C + H]
        logits = self.class_out(self.class_tower(pairs))[..., 0]
        raw = self.pose_out(self.pose_tower(pairs))
        quaternion = raw[..., 3:] / (raw[..., 3:].norm(dim=-1, keepdim=True) + 1e-10)
        poses = torch.cat([raw[..., :3], quaternion], -1)
        return PaperPoses(logits, logits.softmax(-1), raw, poses)
