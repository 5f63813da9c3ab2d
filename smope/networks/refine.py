"""Pose refinement inside the pass: look where the current pose says each surface point is, and move the pose.

Some dozens of surface points (anchors) of the registered mesh are projected with the current pose; image
features are read there; attention among the anchors predicts for each where it should move and how far it
is to be trusted. One weighted Gauss-Newton step on the reprojection error, damped by a prior that the network
predicts too, turns that into a new pose. Intrinsics and size enter through the projection alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from roma import rotvec_to_rotmat
from torch import Tensor, nn

from smope.geometry.projection import project
from smope.geometry.solve import solve_spd
from smope.networks.deformable import MLP, FeedForward, zero_last
from smope.networks.outputs import Features, PoseEstimate
from smope.networks.pose_head import ImageSize, focal_length, pixels_to_unit
from smope.networks.precision import without_autocast


class PoseMaps(nn.Module):
    """Feature maps that poses are read from: strides 8 and 16 of the encoded pyramid, and stride 4 of the
    backbone with what stride 8 knows of the place added."""

    def __init__(self, width: int, fine_channels: int, outputs: int = 128) -> None:
        super().__init__()
        self.middle = nn.Conv2d(width, outputs, 1)
        self.coarse = nn.Conv2d(width, outputs // 2, 1)
        self.fine = nn.Conv2d(fine_channels, outputs // 2, 3, padding=1)
        self.context = nn.Conv2d(width, outputs // 2, 1)
        self.merge = nn.Conv2d(outputs // 2, outputs // 2, 3, padding=1, bias=False)
        nn.init.zeros_(self.merge.weight)  # a trained network begins with the maps it had
        self.channels = 2 * outputs

    def forward(self, features: Features) -> tuple[Tensor, Tensor, Tensor]:
        plain = self.fine(features.fine)
        around = F.interpolate(
            self.context(features.level(0)), plain.shape[-2:], mode="bilinear", align_corners=False
        )
        return (
            self.middle(features.level(0)),
            self.coarse(features.level(1)),
            plain + self.merge(F.relu(plain + around)),
        )


def read_maps(maps: tuple[Tensor, ...], points: Tensor) -> Tensor:
    """maps [B, C_i, h_i, w_i], points [B, P, A, 2] in 0..1 -> [B, P, A, sum C_i]; zero outside the image"""
    grid = points * 2 - 1
    read = [F.grid_sample(m.float(), grid, padding_mode="zeros", align_corners=False) for m in maps]
    return torch.cat(read, 1).permute(0, 2, 3, 1)


class PoseRefiner(nn.Module):
    """One refinement layer."""

    def __init__(self, width: int, sampled: int, hidden: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.read = nn.Linear(sampled, hidden)
        self.geometry = MLP(9 + 6, hidden, hidden, 2)
        self.pair = nn.Linear(width, hidden)
        self.token_norm = nn.LayerNorm(hidden)
        self.mix = FeedForward(hidden, 2 * hidden)
        self.attention = nn.MultiheadAttention(hidden, heads, batch_first=True)
        self.attention_norm = nn.LayerNorm(hidden)
        self.feed_forward = FeedForward(hidden, 2 * hidden)
        self.offset = zero_last(MLP(hidden, hidden, 3, 2))  # x, y and the logit of the weight
        self.prior = zero_last(MLP(hidden + width, hidden, 12, 2))  # a step, and how stiffly it is held
        self.summary = nn.Linear(hidden, width)

    def forward(
        self,
        pose: PoseEstimate,
        pairs: Tensor,
        maps: tuple[Tensor, ...],
        anchors: Tensor,
        diameters: Tensor,
        K: Tensor,
        size: ImageSize,
    ) -> tuple[PoseEstimate, Tensor]:
        """pairs [B, P, C], anchors [B, P, A, 9] (point over diameter, normal, colour), diameters [B, P]
        metres

        -> the moved pose, and the pairs' features with what was seen added
        """
        arms = (
            diameters[..., None, None] * anchors[..., :3] @ pose.rotation.transpose(-1, -2)
        )  # [B, P, A, 3] metres
        normals = anchors[..., 3:6] @ pose.rotation.transpose(-1, -2)
        uv = project(arms + pose.translation[..., None, :], K)  # [B, P, A, 2] pixels
        sampled = read_maps(maps, pixels_to_unit(uv, size))
        placed = torch.cat([anchors, arms / diameters[..., None, None], normals], -1)
        tokens = self.read(sampled) + self.geometry(placed) + self.pair(pairs)[..., None, :]
        tokens = self.mix(self.token_norm(tokens)).flatten(0, 1)  # [B P, A, hidden]
        attended = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        tokens = self.feed_forward(self.attention_norm(tokens + attended)).unflatten(0, pairs.shape[:2])

        moved = self.offset(tokens).float()
        offsets, weights = moved[..., :2], moved[..., 2].sigmoid()
        seen = tokens.mean(-2)
        prior = self.prior(torch.cat([seen, pairs], -1)).float()
        with without_autocast(pairs):
            rotation, translation = gauss_newton_step(
                pose,
                arms,
                offsets,
                weights,
                prior[..., :6],
                F.softplus(prior[..., 6:]) * 0.1 + 1e-4,
                diameters,
                K,
            )
            centre = project(translation, K)
        refined = PoseEstimate(rotation, translation, centre, offsets, weights, uv)
        return refined, pairs + self.summary(seen)


def gauss_newton_step(
    pose: PoseEstimate,
    arms: Tensor,
    offsets: Tensor,
    weights: Tensor,
    prior_step: Tensor,
    prior_weight: Tensor,
    diameters: Tensor,
    K: Tensor,
) -> tuple[Tensor, Tensor]:
    """Rotation and translation after one damped step on sum_k w_k |du_k(step) - offset_k|^2 + prior.

    arms [B, P, A, 3] rotated anchors, metres; offsets [B, P, A, 2] in apparent diameters; weights [B, P, A];
    prior_step, prior_weight [B, P, 6]. A step is (rotation vector in the camera's axes; lateral shift x, y
    over the diameter; log depth along the ray), each of which moves the projections by about its own size.
    """
    t = pose.translation
    depth = t[..., 2].clamp(min=1e-2)
    points = arms + t[..., None, :]
    z = points[..., 2].clamp(min=1e-2)
    focal = K.diagonal(dim1=-2, dim2=-1)[:, None, None, :2]  # [B, 1, 1, 2]
    # Pixels per metre of sideways motion, made dimensionless: apparent diameter = f D / depth.
    gain = (
        focal / z[..., None] * (depth / focal_length(K)[:, None])[..., None, None]
    )  # [B, P, A, 2] times metres / D
    along = points[..., :2] / z[..., None]  # [B, P, A, 2] X/Z, Y/Z

    qx, qy, qz = (arms / diameters[..., None, None]).unbind(-1)
    zero, one = torch.zeros_like(qx), torch.ones_like(qx)
    tx, ty, tz = (t / diameters[..., None])[..., None, :].expand_as(arms).unbind(-1)
    # Motion of a point for each of the six steps: omega x arm; the shifts; the ray.
    motion_x = torch.stack([zero, qz, -qy, one, zero, tx], -1)
    motion_y = torch.stack([-qz, zero, qx, zero, one, ty], -1)
    motion_z = torch.stack([qy, -qx, zero, zero, zero, tz], -1)
    row_x = gain[..., :1] * (motion_x - along[..., :1] * motion_z)
    row_y = gain[..., 1:] * (motion_y - along[..., 1:] * motion_z)
    jacobian = torch.stack([row_x, row_y], -2).flatten(-3, -2)  # [B, P, 2A, 6]

    weight = (weights / weights.shape[-1])[..., None].expand_as(offsets).flatten(-2)  # [B, P, 2A]
    weighted = jacobian * weight[..., None]
    normal = weighted.transpose(-1, -2) @ jacobian + torch.diag_embed(prior_weight)
    right = (weighted.transpose(-1, -2) @ offsets.flatten(-2)[..., None])[..., 0] + prior_weight * prior_step
    step = solve_spd(normal, right)
    # A linear step is not to be trusted beyond about half a radian.
    step = step / (step.abs().amax(-1, keepdim=True) / 0.7).clamp(min=1.0)

    rotation = rotvec_to_rotmat(step[..., :3]) @ pose.rotation
    shift = torch.cat([step[..., 3:5] * diameters[..., None], torch.zeros_like(step[..., :1])], -1)
    return rotation, t * step[..., 5:].exp() + shift
