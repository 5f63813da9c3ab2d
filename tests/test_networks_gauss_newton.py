"""Poses from correspondences, against finite differences and scipy's least squares."""

from __future__ import annotations

import math

import numpy as np
import pytest
import roma
import torch
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation
from torch import Tensor

from smope.geometry.projection import project
from smope.networks.gauss_newton import fit_pose, gauss_newton_step, move
from smope.networks.outputs import PoseEstimate

K = torch.tensor([[[572.4, 0.0, 325.3], [0.0, 573.6, 242.0], [0.0, 0.0, 1.0]]])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_pose(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = seeded(seed)
    rotation = roma.unitquat_to_rotmat(
        torch.nn.functional.normalize(torch.randn(1, 1, 4, generator=g), dim=-1)
    )
    translation = torch.tensor([[[0.15, -0.1, 0.9]]]) + 0.1 * torch.randn(1, 1, 3, generator=g)
    points = 0.5 * torch.rand(1, 1, 40, 3, generator=g) - 0.25
    return rotation.double(), translation.double(), points.double(), torch.tensor([[0.17]]).double()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gauss_newton_finds_the_pose_whose_projections_it_is_shown(seed: int) -> None:
    rotation, translation, anchors, diameter = random_pose(seed)
    intrinsics = K.double()
    target_rotation = roma.rotvec_to_rotmat(torch.tensor([[[0.2, -0.15, 0.25]]]).double()) @ rotation
    target_translation = translation * 1.08 + torch.tensor([[[0.02, -0.01, 0.0]]]).double()

    def uv(R: Tensor, t: Tensor) -> Tensor:
        return project(diameter[..., None, None] * anchors @ R.mT + t[..., None, :], intrinsics)

    wanted = uv(target_rotation, target_translation)
    for _ in range(8):
        arms = diameter[..., None, None] * anchors @ rotation.mT
        apparent = (intrinsics[0, 0, 0] * intrinsics[0, 1, 1]).sqrt() * diameter / translation[..., 2]
        offsets = (wanted - uv(rotation, translation)) / apparent[..., None, None]
        pose = PoseEstimate(rotation, translation, torch.zeros(1, 1, 2))
        weights = torch.full(offsets.shape[:-1], 0.5).double()
        prior = torch.zeros(1, 1, 6).double()
        step = gauss_newton_step(pose, arms, offsets, weights, prior, prior + 1e-9, diameter, intrinsics)
        pose = move(pose, step, diameter, intrinsics)
        rotation, translation = pose.rotation, pose.translation
    assert torch.allclose(rotation, target_rotation, atol=1e-6)
    assert torch.allclose(translation, target_translation, atol=1e-6)


def test_gauss_newton_step_is_the_gradient_of_the_projection() -> None:
    """With one step's true projections (finite differences), the step itself comes back."""
    rotation, translation, anchors, diameter = random_pose(5)
    intrinsics = K.double()
    step = 1e-5 * torch.tensor([[[1.0, -2.0, 0.5, 1.5, -1.0, 2.0]]]).double()
    arms = diameter[..., None, None] * anchors @ rotation.mT
    pose = PoseEstimate(rotation, translation, torch.zeros(1, 1, 2))
    moved = move(pose, step, diameter, intrinsics)
    before = project(arms + translation[..., None, :], intrinsics)
    turned = diameter[..., None, None] * anchors @ moved.rotation.mT
    after = project(turned + moved.translation[..., None, :], intrinsics)
    apparent = (intrinsics[0, 0, 0] * intrinsics[0, 1, 1]).sqrt() * diameter / translation[..., 2]
    offsets = (after - before) / apparent[..., None, None]
    zero = torch.zeros(1, 1, 6).double()
    weights = torch.ones(1, 1, 40).double()
    found = gauss_newton_step(pose, arms, offsets, weights, zero, zero + 1e-12, diameter, intrinsics)
    assert torch.allclose(found, step, atol=2e-9)


def test_a_stiff_prior_holds_the_step() -> None:
    rotation, translation, anchors, diameter = random_pose(6)
    arms = diameter[..., None, None] * anchors @ rotation.mT
    prior = torch.tensor([[[0.1, 0.0, -0.1, 0.0, 0.05, 0.02]]]).double()
    pose = PoseEstimate(rotation, translation, torch.zeros(1, 1, 2))
    step = gauss_newton_step(
        pose,
        arms,
        torch.randn(1, 1, 40, 2).double(),
        torch.ones(1, 1, 40).double(),
        prior,
        torch.full((1, 1, 6), 1e9).double(),
        diameter,
        K.double(),
    )
    assert torch.allclose(step, prior, atol=1e-6)
    moved = move(pose, step, diameter, K.double())
    assert torch.allclose(moved.rotation, roma.rotvec_to_rotmat(prior[..., :3]) @ rotation, atol=1e-6)
    assert torch.allclose(moved.translation[..., 2], translation[..., 2] * math.exp(0.02), atol=1e-6)


def noisy_problem(seed: int) -> tuple[PoseEstimate, Tensor, Tensor, Tensor, Tensor]:
    """A start about 20 degrees and 5 % off, points, noisy pixels, uneven weights, and the diameter"""
    rotation, translation, points, diameter = random_pose(seed)
    g = seeded(seed + 100)
    uv = project(diameter[..., None, None] * points @ rotation.mT + translation[..., None, :], K.double())
    pixels = uv + 2.0 * torch.randn(uv.shape, generator=g).double()
    weights = torch.rand(uv.shape[:-1], generator=g).double()
    off = torch.tensor([[[0.2, -0.2, 0.15]]]).double()
    start = PoseEstimate(roma.rotvec_to_rotmat(off) @ rotation, translation * 1.05, torch.zeros(1, 1, 2))
    return start, points, pixels, weights, diameter


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fitted_pose_is_the_least_squares_pose_of_scipy(seed: int) -> None:
    start, points, pixels, weights, diameter = noisy_problem(seed)
    zero = torch.zeros(1, 1, 6).double()
    pose = fit_pose(start, points, pixels, weights, zero, zero + 1e-10, diameter, K.double(), steps=12)

    p, uv, w = (x[0, 0].numpy() for x in (points * diameter[..., None, None], pixels, weights))
    matrix = K[0].double().numpy()
    begun = np.concatenate(
        [Rotation.from_matrix(start.rotation[0, 0].numpy()).as_rotvec(), start.translation[0, 0].numpy()]
    )

    def residuals(x: np.ndarray) -> np.ndarray:
        seen = (Rotation.from_rotvec(x[:3]).apply(p) + x[3:]) @ matrix.T
        return ((seen[:, :2] / seen[:, 2:] - uv) * np.sqrt(w)[:, None]).ravel()

    best = least_squares(residuals, begun, xtol=1e-14, ftol=1e-14, gtol=1e-14)
    turned = Rotation.from_rotvec(best.x[:3]).inv() * Rotation.from_matrix(pose.rotation[0, 0].numpy())
    # Gauss-Newton weighs pixels by the depth it stands at, the same for all points: the solution is one.
    assert turned.magnitude() < 1e-4
    assert np.allclose(pose.translation[0, 0].numpy(), best.x[3:], atol=1e-5)


def test_gradients_of_the_last_step_are_those_of_the_solution() -> None:
    """Against finite differences of the whole fit: with small residuals nothing is lost of the path."""
    start, points, pixels, weights, diameter = noisy_problem(3)
    rotation, translation, *_ = random_pose(3)
    exact = diameter[..., None, None] * points @ rotation.mT + translation[..., None, :]
    pixels = project(exact, K.double()) + (pixels - project(exact, K.double())) * 0.01
    zero = torch.zeros(1, 1, 6).double()
    aim = torch.randn(3, generator=seeded(4)).double()

    def depthlike(points: Tensor, weights: Tensor) -> Tensor:
        pose = fit_pose(start, points, pixels, weights, zero, zero + 1e-8, diameter, K.double(), steps=10)
        return (pose.translation[0, 0] * aim).sum()

    points.requires_grad_()
    by_points = torch.autograd.grad(depthlike(points, weights), points)[0]
    points = points.detach()
    direction = torch.randn(points.shape, generator=seeded(5)).double()
    step = 1e-5
    numeric = (
        depthlike(points + step * direction, weights) - depthlike(points - step * direction, weights)
    ) / (2 * step)
    assert (by_points * direction).sum().item() == pytest.approx(numeric.item(), rel=1e-3)


def test_a_prior_is_held_over_all_steps() -> None:
    """Where nothing is seen, the pose is the start moved by the prior's step once, not once a step."""
    start, points, pixels, weights, diameter = noisy_problem(7)
    step = torch.tensor([[[0.0, 0.0, 0.3, 0.02, -0.01, 0.1]]]).double()
    pose = fit_pose(start, points, pixels, 0 * weights, step, 0 * step + 0.1, diameter, K.double(), steps=4)
    expected = move(start, step, diameter, K.double())
    assert torch.allclose(pose.rotation, expected.rotation, atol=1e-9)
    assert torch.allclose(pose.translation, expected.translation, atol=1e-9)
