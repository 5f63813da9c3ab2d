"""Rigid motions as matrices [..., 4, 4], rotation and translation in one; `T_AB` takes points of B into A."""

from __future__ import annotations

import torch
from torch import Tensor


def compose(rotation: Tensor, translation: Tensor) -> Tensor:
    """[..., 3, 3] and [..., 3] -> [..., 4, 4]."""
    shape = torch.broadcast_shapes(rotation.shape[:-2], translation.shape[:-1])
    upper = torch.cat([rotation.expand(*shape, 3, 3), translation.expand(*shape, 3)[..., None]], dim=-1)
    last = upper.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(*shape, 1, 4)
    return torch.cat([upper, last], dim=-2)


def invert(pose: Tensor) -> Tensor:
    """[..., 4, 4] -> its inverse: rotation transposed, translation -R^T t."""
    back = pose[..., :3, :3].transpose(-1, -2)
    return compose(back, -(back @ pose[..., :3, 3:])[..., 0])


def transform_points(pose: Tensor, points: Tensor) -> Tensor:
    """[..., 4, 4] and [..., P, 3], leading dimensions broadcast -> [..., P, 3]."""
    return points @ pose[..., :3, :3].transpose(-1, -2) + pose[..., None, :3, 3]


def project(K: Tensor, points: Tensor) -> Tensor:
    """Intrinsics [..., 3, 3] and points in the camera frame [..., P, 3] -> pixels [..., P, 2], by a pinhole.

    A depth below 1 mm counts as 1 mm, so that points beside or behind the camera stay finite in a loss.
    """
    normalised = points / points[..., 2:].clamp(min=1e-3)
    return (normalised @ K.transpose(-1, -2))[..., :2]
