"""Rotations in six values, rotations as seen along the ray to the object, and the angle between two."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def rot6d_to_matrix(values: Tensor) -> Tensor:
    """[..., 6] -> [..., 3, 3]: the first two columns by Gram-Schmidt, the third their cross product.

    Zhou et al. 2019, "On the Continuity of Rotation Representations in Neural Networks", equation 15.
    """
    first = F.normalize(values[..., :3], dim=-1)
    second = values[..., 3:] - (first * values[..., 3:]).sum(dim=-1, keepdim=True) * first
    second = F.normalize(second, dim=-1)
    return torch.stack([first, second, torch.linalg.cross(first, second)], dim=-1)


def matrix_to_rot6d(rotation: Tensor) -> Tensor:
    """[..., 3, 3] -> [..., 6]: its first two columns, one after the other."""
    return rotation[..., :2].transpose(-1, -2).flatten(-2)


def rotation_onto_ray(ray: Tensor) -> Tensor:
    """The smallest rotation that takes the optical axis [0, 0, 1] onto `ray` [..., 3] -> [..., 3, 3].

    With the unit ray (x, y, z) and a = 1 / (1 + z), Rodrigues' formula for the axis (-y, x, 0) becomes the
    matrix below. The ray must not point straight backwards, where no rotation is the smallest.
    """
    x, y, z = F.normalize(ray, dim=-1).unbind(-1)
    a = 1 / (1 + z)
    rows = [
        torch.stack([1 - a * x * x, -a * x * y, x], dim=-1),
        torch.stack([-a * x * y, 1 - a * y * y, y], dim=-1),
        torch.stack([-x, -y, z], dim=-1),
    ]
    return torch.stack(rows, dim=-2)


def egocentric_from_allocentric(allocentric: Tensor, ray: Tensor) -> Tensor:
    """Rotation [..., 3, 3] as seen along the `ray` [..., 3] to the object -> rotation in the camera frame.

    An object looks alike along any ray under one allocentric rotation (Kundu et al. 2018, "3D-RCNN").
    """
    return rotation_onto_ray(ray) @ allocentric


def allocentric_from_egocentric(egocentric: Tensor, ray: Tensor) -> Tensor:
    """The inverse of `egocentric_from_allocentric`."""
    return rotation_onto_ray(ray).transpose(-1, -2) @ egocentric


def geodesic_angle(a: Tensor, b: Tensor) -> Tensor:
    """[..., 3, 3] twice -> [...] the angle between them in radians, 0 to pi.

    For the rotation m between them, the sine is half the length of (m32 - m23, m13 - m31, m21 - m12) and the
    cosine is (trace - 1) / 2. Their atan2 is exact near 0 and near pi, where the arccosine of the trace alone
    loses half its digits, and its gradient is finite everywhere (0 at both ends, where it has no direction).
    """
    m = a.transpose(-1, -2) @ b
    turn = torch.stack(
        [m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]], dim=-1
    )
    cosine = (m.diagonal(dim1=-2, dim2=-1).sum(dim=-1) - 1) / 2
    return torch.atan2(torch.linalg.vector_norm(turn, dim=-1) / 2, cosine)
