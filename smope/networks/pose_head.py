"""Pose head: features of a pair (query, mesh) -> rotation, projected centre, depth, visibility, uncertainty.

The rotation is allocentric (as seen along the ray to the object), in the 6-value form of Zhou et al. 2019.
Depth is predicted as a factor on focal length x diameter / box size, so that another lens or another size
of the same object gives the right depth without having been seen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smope.geometry.rotations import egocentric_from_allocentric, rot6d_to_matrix
from smope.geometry.solve import invert_intrinsics
from smope.networks.deformable import MLP
from smope.networks.outputs import PairOutputs, PoseEstimate
from smope.networks.precision import without_autocast

ImageSize = tuple[int, int]  # (width, height) in pixels


def unit_to_pixels(points: Tensor, size: ImageSize) -> Tensor:
    """[..., 2] in 0..1 of the image -> pixels, whole numbers at pixel centres."""
    # Numbers, not a tensor of the size: making one would copy to the device and wait for it.
    return torch.stack([points[..., 0] * size[0], points[..., 1] * size[1]], -1) - 0.5


def pixels_to_unit(points: Tensor, size: ImageSize) -> Tensor:
    return torch.stack([(points[..., 0] + 0.5) / size[0], (points[..., 1] + 0.5) / size[1]], -1)


def focal_length(K: Tensor) -> Tensor:
    """[..., 3, 3] -> [...] geometric mean of fx and fy, pixels"""
    return (K[..., 0, 0] * K[..., 1, 1]).sqrt()


class PoseHead(nn.Module):
    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.rotation = MLP(width, width, 6, 3)
        self.centre = MLP(width, width, 2, 3)
        self.depth = MLP(width, width, 1, 3)
        self.visibility = MLP(width, width // 2, 1, 2)
        self.log_sigma = MLP(width, width // 2, 2, 2)

    def forward(
        self, features: Tensor, boxes: Tensor, diameters: Tensor, K: Tensor, size: ImageSize
    ) -> PairOutputs:
        """features [B, P, C], boxes [B, P, 4] cxcywh in 0..1, diameters [B, P] metres, K [B, 3, 3]"""
        rotation6 = self.rotation(features)
        shift = self.centre(features)
        log_factor = self.depth(features)[..., 0]
        visibility = self.visibility(features)[..., 0]
        log_sigma = self.log_sigma(features)
        with without_autocast(features):
            pose = pose_from_values(
                rotation6.float(), shift.float(), log_factor.float(), boxes, diameters, K, size
            )
        return PairOutputs((pose,), visibility, log_sigma)


def pose_from_values(
    rotation6: Tensor,
    shift: Tensor,
    log_factor: Tensor,
    boxes: Tensor,
    diameters: Tensor,
    K: Tensor,
    size: ImageSize,
) -> PoseEstimate:
    """The geometry of the head: [B, P, 6], [B, P, 2] in box sizes, [B, P] -> pose of the centred mesh,
    metres."""
    extent = torch.stack([boxes[..., 2] * size[0], boxes[..., 3] * size[1]], -1).clamp(min=1.0)  # pixels
    centre = unit_to_pixels(boxes[..., :2], size) + shift * extent  # [B, P, 2] pixels
    box_size = extent.prod(-1).sqrt()
    depth = (focal_length(K)[:, None] * diameters / box_size) * log_factor.clamp(-3, 3).exp()  # [B, P] metres
    pixels = torch.cat([centre, torch.ones_like(centre[..., :1])], -1)
    ray = pixels @ invert_intrinsics(K).transpose(-1, -2)  # [B, P, 3] with z = 1
    rotation = egocentric_from_allocentric(rot6d_to_matrix(rotation6), ray)
    return PoseEstimate(rotation, ray * depth[..., None], centre)
