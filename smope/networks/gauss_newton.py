"""One pose from many correspondences: weighted Gauss-Newton on the reprojection error, with a prior.

A step is (rotation vector in the camera's axes; lateral shift x, y over the diameter; log depth along the
ray), each of which moves the projections by about its own size. Errors in the image are in apparent
diameters, so that near and far objects weigh alike. Batched, and without a word to the host.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from roma import rotvec_to_rotmat
from torch import Tensor

from smope.geometry.projection import project
from smope.geometry.solve import solve_spd
from smope.networks.outputs import PoseEstimate
from smope.networks.pose_head import focal_length
from smope.networks.recorded import recorded_whole, whole_steps

LARGEST_STEP = 0.7  # a linear step is not to be trusted beyond about half a radian


def fit_pose(
    start: PoseEstimate,
    points: Tensor,
    pixels: Tensor,
    weights: Tensor,
    prior_step: Tensor,
    prior_weight: Tensor,
    diameters: Tensor,
    K: Tensor,
    steps: int,
) -> PoseEstimate:
    """The pose that takes `points` onto `pixels`, held near `start` moved by `prior_step`.

    points [B, P, A, 3] of the centred mesh over its diameter, pixels [B, P, A, 2], weights [B, P, A], the
    rest as for `gauss_newton_step`. Gradients go through the last step alone: at a solution they are those of
    the solution itself (implicit function theorem), and the path that led there does not matter.
    """
    if recorded_whole():
        observed = (points, pixels, weights, prior_step, prior_weight, diameters, K)
        return _unpacked(fit_pose_whole(start.rotation, start.translation, *observed, steps, False), K)
    pose, moved = start.detach(), torch.zeros_like(prior_step)
    for left in reversed(range(steps)):
        given = (points, weights, prior_step, prior_weight)
        p, w, step, stiffness = given if left == 0 else [x.detach() for x in given]
        arms = (diameters[..., None, None] * p) @ pose.rotation.transpose(-1, -2)  # [B, P, A, 3] metres
        uv = project(arms + pose.translation[..., None, :], K)
        apparent = focal_length(K)[:, None] * diameters / pose.translation[..., 2].clamp(min=1e-2)
        offsets = (pixels - uv) / apparent[..., None, None]
        change = gauss_newton_step(pose, arms, offsets, w, step - moved, stiffness, diameters, K)
        pose, moved = move(pose, change, diameters, K), moved + change
        if left:
            pose, moved = pose.detach(), moved.detach()
    return pose


def gauss_newton_step(
    pose: PoseEstimate,
    arms: Tensor,
    offsets: Tensor,
    weights: Tensor,
    prior_step: Tensor,
    prior_weight: Tensor,
    diameters: Tensor,
    K: Tensor,
) -> Tensor:
    """The step [B, P, 6] that minimises mean_k w_k |du_k(step) - offset_k|^2 + |step - prior_step|^2, the
    latter weighed by prior_weight.

    arms [B, P, A, 3] rotated points, metres; offsets [B, P, A, 2] in apparent diameters; weights [B, P, A];
    prior_step, prior_weight [B, P, 6]; diameters [B, P] metres; K [B, 3, 3].
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
    return step / (step.abs().amax(-1, keepdim=True) / LARGEST_STEP).clamp(min=1.0)


def step_pose(
    pose: PoseEstimate,
    points: Tensor,
    offsets: Tensor,
    weights: Tensor,
    prior_step: Tensor,
    prior_weight: Tensor,
    diameters: Tensor,
    K: Tensor,
) -> PoseEstimate:
    """The pose after the one step that `offsets` [B, P, A, 2], in apparent diameters, ask for.

    The rest as for `fit_pose`.
    """
    given = (points, offsets, weights, prior_step, prior_weight, diameters, K)
    if recorded_whole():
        return _unpacked(fit_pose_whole(pose.rotation, pose.translation, *given, 1, True), K)
    arms = (diameters[..., None, None] * points) @ pose.rotation.transpose(-1, -2)  # [B, P, A, 3] metres
    step = gauss_newton_step(pose, arms, offsets, weights, prior_step, prior_weight, diameters, K)
    return move(pose, step, diameters, K)


def step_by_layer(
    pose: PoseEstimate, points: Tensor, moved: Tensor, prior: Tensor, diameters: Tensor, K: Tensor
) -> PoseEstimate:
    """`step_pose` by what a layer says, of any type: moved [B, P, A, 3], offsets and the logits of their
    weights, and prior [B, P, 12] for `prior_of`"""
    given = (points, moved, prior, diameters, K)
    if recorded_whole():
        return _unpacked(step_by_layer_whole(pose.rotation, pose.translation, *given), K)
    moved, prior = moved.to(points.dtype), prior.to(points.dtype)
    offsets, weights = moved[..., :2], moved[..., 2].sigmoid()
    stepped = step_pose(pose, points, offsets, weights, *prior_of(prior), diameters, K)
    return replace(stepped, offsets=offsets, offset_weights=weights)


def move(pose: PoseEstimate, step: Tensor, diameters: Tensor, K: Tensor) -> PoseEstimate:
    """The pose after a step [B, P, 6]"""
    rotation = rotvec_to_rotmat(step[..., :3]) @ pose.rotation
    shift = torch.cat([step[..., 3:5] * diameters[..., None], torch.zeros_like(step[..., :1])], -1)
    translation = pose.translation * step[..., 5:].exp() + shift
    return PoseEstimate(rotation, translation, project(translation, K))


def prior_of(values: Tensor) -> tuple[Tensor, Tensor]:
    """[..., 12] -> the step [..., 6] that a layer expects without looking at points, and how stiffly it is
    held [..., 6]"""
    return values[..., :6], F.softplus(values[..., 6:]) * 0.1 + 1e-4


@torch.library.custom_op("smope::fit_pose", mutates_args=())
def fit_pose_whole(
    rotation: Tensor,
    translation: Tensor,
    points: Tensor,
    targets: Tensor,
    weights: Tensor,
    prior_step: Tensor,
    prior_weight: Tensor,
    diameters: Tensor,
    K: Tensor,
    steps: int,
    relative: bool,
) -> Tensor:
    """`fit_pose`, or with `relative` and one step `step_pose`: -> [B, P, 12], rotation and translation."""
    start = _started(rotation, translation, K)
    given = (points, targets, weights, prior_step, prior_weight, diameters, K)
    with whole_steps(False):
        pose = step_pose(start, *given) if relative else fit_pose(start, *given, steps)
    return _packed(pose)


@torch.library.custom_op("smope::step_by_layer", mutates_args=())
def step_by_layer_whole(
    rotation: Tensor,
    translation: Tensor,
    points: Tensor,
    moved: Tensor,
    prior: Tensor,
    diameters: Tensor,
    K: Tensor,
) -> Tensor:
    """`step_by_layer`: -> [B, P, 12], rotation and translation."""
    start = _started(rotation, translation, K)
    with whole_steps(False):
        return _packed(step_by_layer(start, points, moved, prior, diameters, K))


@fit_pose_whole.register_fake
@step_by_layer_whole.register_fake
def _(rotation: Tensor, *rest: object) -> Tensor:
    return rotation.new_empty(*rotation.shape[:-2], 12)


def _started(rotation: Tensor, translation: Tensor, K: Tensor) -> PoseEstimate:
    return PoseEstimate(rotation, translation, project(translation, K))


def _packed(pose: PoseEstimate) -> Tensor:
    return torch.cat([pose.rotation.flatten(-2), pose.translation], -1)


def _unpacked(values: Tensor, K: Tensor) -> PoseEstimate:
    translation = values[..., 9:]
    return _started(values[..., :9].unflatten(-1, (3, 3)), translation, K)
