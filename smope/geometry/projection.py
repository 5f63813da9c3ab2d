"""Points to pixels by a pinhole camera, in the batched form that networks and losses use."""

from __future__ import annotations

from torch import Tensor


def project(points: Tensor, K: Tensor) -> Tensor:
    """points [B, ..., 3] metres in the camera, K [B, 3, 3] or broadcastable -> [B, ..., 2] pixels"""
    K = K.view(K.shape[0], *[1] * (points.dim() - 2), 3, 3)
    scaled = points / points[..., 2:].clamp(min=1e-2)
    return (K[..., :2, :] @ scaled[..., None])[..., 0]
