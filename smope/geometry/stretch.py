"""A mesh stretched along its own axes: three factors, and what becomes of sizes, points and normals.

The size of a stretched mesh is its diameter times the geometric mean of the factors. That is no diameter any
more, but it has what depth needs of it: all three factors times k make the size k times as large.
"""

from __future__ import annotations

import torch
from torch import Tensor


def size_factor(scale: Tensor) -> Tensor:
    """[..., 3] factors -> [...] their geometric mean"""
    return scale.log().mean(-1).exp()


def stretched_points(points: Tensor, scale: Tensor) -> Tensor:
    """points [..., A, 3] of a mesh over its diameter, scale [..., 3] -> those of the stretched mesh over its
    size"""
    return points * (scale / size_factor(scale)[..., None])[..., None, :]


def stretched_anchors(anchors: Tensor, scale: Tensor) -> Tensor:
    """anchors [..., A, 9] (point over the diameter, normal, colour) of a mesh, scale [..., 3] -> those of the
    stretched mesh, its points over the stretched size"""
    relative = (scale / size_factor(scale)[..., None])[..., None, :]
    # A normal is a row vector of the surface: it goes with the inverse of the stretch (Jacobian transposed).
    normals = torch.nn.functional.normalize(anchors[..., 3:6] / relative, dim=-1)
    return torch.cat([anchors[..., :3] * relative, normals, anchors[..., 6:]], -1)


def turned_scale(scale: Tensor, symmetry: Tensor) -> Tensor:
    """[..., 3] and [..., S, 3, 3] -> [..., S, 3] factors along the axes after the symmetry's turn.

    For a turn S that swaps axes or mirrors them diag(s) S = S diag(s'), with s' = (S * S)^T s; so, too,
    where the factors are equal along the axes that the turn mixes. Other turns are no symmetry of the
    stretched mesh.
    """
    return (symmetry.square().transpose(-1, -2) @ scale[..., None, :, None])[..., 0]
