"""Pose refinement inside the pass: look where the current pose says each surface point is, and move the pose.

Some dozens of surface points (anchors) of the registered mesh are projected with the current pose; image
features are read there; attention among the anchors predicts for each where it should move and how far it
is to be trusted. One weighted Gauss-Newton step on the reprojection error, damped by a prior that the network
predicts too, turns that into a new pose. Intrinsics and size enter through the projection alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smope.geometry.projection import project
from smope.networks.deformable import MLP, FeedForward, zero_last
from smope.networks.gauss_newton import prior_of, step_pose
from smope.networks.outputs import Features, PoseEstimate
from smope.networks.pose_head import ImageSize, pixels_to_unit
from smope.networks.precision import autocast_type, without_autocast
from smope.networks.recorded import recorded_whole, whole_steps
from smope.networks.shifted import Twice


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
        around = enlarged(self.context(features.level(0)), (plain.shape[-2], plain.shape[-1]))
        return (
            self.middle(features.level(0)),
            self.coarse(features.level(1)),
            plain + self.merge(F.relu(plain + around)),
        )


def enlarged(x: Tensor, shape: tuple[int, int]) -> Tensor:
    """[B, C, h, w] -> [B, C, *shape], bilinear; float32 under autocast, as PyTorch has it on a GPU"""
    twice = shape == (2 * x.shape[-2], 2 * x.shape[-1])
    if twice and x.is_cuda and torch.compiler.is_compiling() and torch.is_grad_enabled():
        widened = x.float() if torch.is_autocast_enabled("cuda") else x
        doubled: Tensor = Twice.apply(widened)
        return doubled
    return F.interpolate(x, shape, mode="bilinear", align_corners=False)


def read_maps(maps: tuple[Tensor, ...], points: Tensor) -> Tensor:
    """maps [B, C_i, h_i, w_i], points [B, P, A, 2] in 0..1 -> [B, P, A, sum C_i]; zero outside the image"""
    if recorded_whole():
        return read_maps_whole(list(maps), points, autocast_type(points))
    grid = points * 2 - 1
    read = [F.grid_sample(m.float(), grid, padding_mode="zeros", align_corners=False) for m in maps]
    return torch.cat(read, 1).permute(0, 2, 3, 1)


# Written out, as torch 2.5 derives none from a `list[Tensor]`.
_READ_MAPS = "(Tensor[] maps, Tensor points, ScalarType kind) -> Tensor"


@torch.library.custom_op("smope::read_maps", mutates_args=(), schema=_READ_MAPS)
def read_maps_whole(maps: list[Tensor], points: Tensor, kind: torch.dtype) -> Tensor:
    """`read_maps`, rounded to `kind`"""
    with whole_steps(False):
        return read_maps(tuple(maps), points).to(kind, memory_format=torch.contiguous_format)


@read_maps_whole.register_fake
def _(maps: list[Tensor], points: Tensor, kind: torch.dtype) -> Tensor:
    return points.new_empty(*points.shape[:-1], sum(m.shape[1] for m in maps), dtype=kind)


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
        with without_autocast(pairs):  # in 16 bits a pixel's coordinate is known to a pixel or two
            back = pose.rotation.transpose(-1, -2)
            arms = (diameters[..., None, None] * anchors[..., :3]) @ back  # [B, P, A, 3] metres
            normals = anchors[..., 3:6] @ back
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
            points = anchors[..., :3]
            moved_pose = step_pose(pose, points, offsets, weights, *prior_of(prior), diameters, K)
        refined = replace(moved_pose, offsets=offsets, offset_weights=weights, anchors_uv=uv)
        return refined, pairs + self.summary(seen)
