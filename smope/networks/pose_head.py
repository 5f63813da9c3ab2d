"""Pose head: features of a pair (query, mesh) -> rotation, projected centre, depth, visibility, uncertainty.

The rotation is allocentric (as seen along the ray to the object), in the 6-value form of Zhou et al. 2019.
Depth is predicted as a factor on focal length x diameter / box size, so that another lens or another size
of the same object gives the right depth without having been seen. Where the size itself is to be predicted,
as of cars, it is three factors on the registered mesh; their size takes the diameter's place in the depth.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from smope.geometry.rotations import egocentric_from_allocentric, rot6d_to_matrix
from smope.geometry.solve import invert_intrinsics
from smope.geometry.stretch import size_factor
from smope.networks.deformable import MLP, zero_last
from smope.networks.outputs import PairOutputs, PoseEstimate
from smope.networks.precision import without_autocast
from smope.networks.recorded import recorded_whole, whole_steps

ImageSize = tuple[int, int]  # (width, height) in pixels
_MOST_STRETCH = 2.3  # in the logarithm: a tenth to ten times the registered mesh


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
    def __init__(self, width: int = 256, predict_scale: bool = False) -> None:
        super().__init__()
        self.rotation = MLP(width, width, 6, 3)
        self.centre = MLP(width, width, 2, 3)
        self.depth = MLP(width, width, 1, 3)
        self.visibility = MLP(width, width // 2, 1, 2)
        self.log_sigma = MLP(width, width // 2, 2, 2)
        self.log_scale = zero_last(MLP(width, width, 3, 3)) if predict_scale else None

    def forward(
        self, features: Tensor, boxes: Tensor, diameters: Tensor, K: Tensor, size: ImageSize
    ) -> PairOutputs:
        """features [B, P, C], boxes [B, P, 4] cxcywh in 0..1, diameters [B, P] metres, K [B, 3, 3]"""
        rotation6 = self.rotation(features)
        shift = self.centre(features)
        log_factor = self.depth(features)[..., 0]
        visibility = self.visibility(features)[..., 0]
        log_sigma = self.log_sigma(features)
        scale = self.scale(features)
        with without_autocast(features):
            if scale is not None:
                diameters = diameters * size_factor(scale)
            pose = pose_from_values(rotation6, shift, log_factor, boxes, diameters, K, size)
            pose = replace(pose, scale=scale)
        return PairOutputs((pose,), visibility, log_sigma)

    def scale(self, features: Tensor) -> Tensor | None:
        """[B, P, C] -> [B, P, 3] factors on the registered mesh; None where they are not predicted"""
        if self.log_scale is None:
            return None
        return self.log_scale(features).float().clamp(-_MOST_STRETCH, _MOST_STRETCH).exp()


def resized(pose: PoseEstimate, scale: Tensor) -> PoseEstimate:
    """The pose at which a mesh stretched by `scale` [B, P, 3] in place of the pose's own looks as large: the
    depth goes with the size."""
    assert pose.scale is not None
    ratio = size_factor(scale) / size_factor(pose.scale)
    return replace(pose, translation=pose.translation * ratio[..., None], scale=scale)


def pose_from_values(
    rotation6: Tensor,
    shift: Tensor,
    log_factor: Tensor,
    boxes: Tensor,
    diameters: Tensor,
    K: Tensor,
    size: ImageSize,
) -> PoseEstimate:
    """The geometry of the head: [B, P, 6], [B, P, 2] in box sizes, [B, P], of any type, with boxes [B, P, 4]
    cxcywh in 0..1 and diameters [B, P] metres -> pose of the centred mesh, metres."""
    if recorded_whole():
        given = (rotation6, shift, log_factor, boxes, diameters, K)
        values = pose_from_values_whole(*given, *size)
        return PoseEstimate(values[..., :9].unflatten(-1, (3, 3)), values[..., 9:12], values[..., 12:])
    extent = torch.stack([boxes[..., 2] * size[0], boxes[..., 3] * size[1]], -1).clamp(min=1.0)  # pixels
    centre = unit_to_pixels(boxes[..., :2], size) + shift.to(boxes.dtype) * extent  # [B, P, 2] pixels
    box_size = extent.prod(-1).sqrt()
    factor = log_factor.to(boxes.dtype).clamp(-3, 3).exp()
    depth = (focal_length(K)[:, None] * diameters / box_size) * factor  # [B, P] metres
    pixels = torch.cat([centre, torch.ones_like(centre[..., :1])], -1)
    ray = pixels @ invert_intrinsics(K).transpose(-1, -2)  # [B, P, 3] with z = 1
    rotation = egocentric_from_allocentric(rot6d_to_matrix(rotation6.to(boxes.dtype)), ray)
    return PoseEstimate(rotation, ray * depth[..., None], centre)


@torch.library.custom_op("smope::pose_from_values", mutates_args=())
def pose_from_values_whole(
    rotation6: Tensor,
    shift: Tensor,
    log_factor: Tensor,
    boxes: Tensor,
    diameters: Tensor,
    K: Tensor,
    width: int,
    height: int,
) -> Tensor:
    """`pose_from_values`: -> [B, P, 14], rotation, translation and centre"""
    with whole_steps(False):
        pose = pose_from_values(rotation6, shift, log_factor, boxes, diameters, K, (width, height))
    return torch.cat([pose.rotation.flatten(-2), pose.translation, pose.centre], -1)


@pose_from_values_whole.register_fake
def _(rotation6: Tensor, shift: Tensor, log_factor: Tensor, boxes: Tensor, *rest: object) -> Tensor:
    return boxes.new_empty(*boxes.shape[:-1], 14)
