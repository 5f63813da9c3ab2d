"""Pose refinement inside the pass: look where the current pose says each surface point is, and move the pose.

Some dozens of surface points (anchors) of the registered mesh are projected with the current pose; image
features are read there; attention among the anchors predicts for each where it should move and how far it
is to be trusted. One weighted Gauss-Newton step on the reprojection error, damped by a prior that the network
predicts too, turns that into a new pose. Intrinsics and size enter through the projection alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smope.geometry.projection import project
from smope.networks.deformable import MLP, FeedForward, zero_last
from smope.networks.gauss_newton import step_by_layer
from smope.networks.outputs import Features, PoseEstimate
from smope.networks.pose_head import ImageSize, pixels_to_unit
from smope.networks.precision import autocast_type, without_autocast
from smope.networks.recorded import recorded_whole, whole_steps
from smope.networks.self_attention import MultiheadAttention
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
        near = features.cells(0).contiguous()  # read twice
        around = enlarged(self._mapped(self.context, near, features.shapes[0]), plain.shape[-2:])
        return (
            self._mapped(self.middle, near, features.shapes[0]),
            self._mapped(self.coarse, features.cells(1).contiguous(), features.shapes[1]),
            plain + self.merge(F.relu(plain + around)),
        )

    @staticmethod
    def _mapped(conv: nn.Conv2d, cells: Tensor, shape: tuple[int, int]) -> Tensor:
        """A 1x1 convolution of cells [B, h w, C] -> [B, C', h, w], stored channels last.

        As a product over the cells, which lie as it wants them: the convolution would turn them over.
        """
        product = F.linear(cells, conv.weight.flatten(1), conv.bias)
        return product.transpose(1, 2).unflatten(-1, shape)


def enlarged(x: Tensor, shape: Sequence[int]) -> Tensor:
    """[B, C, h, w] -> [B, C, *shape], bilinear; float32 under autocast, as PyTorch has it on a GPU"""
    shape = (shape[0], shape[1])
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


def place_anchors(
    pose: PoseEstimate, anchors: Tensor, diameters: Tensor, K: Tensor, size: ImageSize
) -> tuple[Tensor, Tensor, Tensor]:
    """anchors [B, P, A, 9], diameters [B, P] metres -> the anchors with point and normal as the pose turns
    them [B, P, A, 15], and where they are seen, in pixels and in 0..1 of the image [B, P, A, 2]"""
    if recorded_whole():
        given = (pose.rotation, pose.translation, anchors, diameters, K)
        return place_anchors_whole(*given, *size, autocast_type(anchors))
    with without_autocast(anchors):  # in 16 bits a pixel's coordinate is known to a pixel or two
        back = pose.rotation.transpose(-1, -2)
        arms = (diameters[..., None, None] * anchors[..., :3]) @ back  # [B, P, A, 3] metres
        normals = anchors[..., 3:6] @ back
        uv = project(arms + pose.translation[..., None, :], K)
    placed = torch.cat([anchors, arms / diameters[..., None, None], normals], -1)
    return placed, uv, pixels_to_unit(uv, size)


# Written out, as torch 2.5 derives none from a type.
_PLACE_ANCHORS = (
    "(Tensor rotation, Tensor translation, Tensor anchors, Tensor diameters, Tensor K, "
    "int width, int height, ScalarType kind) -> (Tensor, Tensor, Tensor)"
)


@torch.library.custom_op("smope::place_anchors", mutates_args=(), schema=_PLACE_ANCHORS)
def place_anchors_whole(
    rotation: Tensor,
    translation: Tensor,
    anchors: Tensor,
    diameters: Tensor,
    K: Tensor,
    width: int,
    height: int,
    kind: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """`place_anchors`, the first rounded to `kind`"""
    pose = PoseEstimate(rotation, translation, translation[..., :2])
    with whole_steps(False):
        placed, uv, places = place_anchors(pose, anchors, diameters, K, (width, height))
    return placed.to(kind), uv, places


@place_anchors_whole.register_fake
def _(rotation: Tensor, translation: Tensor, anchors: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    kind, shape = rest[-1], anchors.shape[:-1]
    assert isinstance(kind, torch.dtype)
    uv = anchors.new_empty(*shape, 2)
    return anchors.new_empty(*shape, 15, dtype=kind), uv, torch.empty_like(uv)


class PoseRefiner(nn.Module):
    """One refinement layer."""

    def __init__(self, width: int, sampled: int, hidden: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.read = nn.Linear(sampled, hidden)
        self.geometry = MLP(9 + 6, hidden, hidden, 2)
        self.pair = nn.Linear(width, hidden)
        self.token_norm = nn.LayerNorm(hidden)
        self.mix = FeedForward(hidden, 2 * hidden)
        self.attention = MultiheadAttention(hidden, heads)
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
        placed, uv, places = place_anchors(pose, anchors, diameters, K, size)
        sampled = read_maps(maps, places)
        tokens = self.read(sampled) + self.geometry(placed) + self.pair(pairs)[..., None, :]
        tokens = self.mix(self.token_norm(tokens)).flatten(0, 1)  # [B P, A, hidden]
        attended = self.attention(tokens, tokens, tokens)
        tokens = self.feed_forward(self.attention_norm(tokens + attended))
        # What follows are products, which would round each of them apart.
        tokens = tokens.to(autocast_type(pairs)).unflatten(0, pairs.shape[:2])

        moved = self.offset(tokens)
        seen = tokens.mean(-2)
        prior = self.prior(torch.cat([seen, pairs.to(seen.dtype)], -1))
        with without_autocast(pairs):
            moved_pose = step_by_layer(pose, anchors[..., :3], moved, prior, diameters, K)
        return replace(moved_pose, anchors_uv=uv), pairs + self.summary(seen)
