"""Rotations and projection against scipy, numpy and worked cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from smope.geometry import rotations
from smope.geometry.projection import project


def random_rotations(count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(Rotation.random(count, rng=np.random.default_rng(seed)).as_matrix())


def test_rot6d_takes_columns_back_and_forth():
    matrices = random_rotations(20)
    values = rotations.matrix_to_rot6d(matrices)
    assert torch.equal(values[:, :3], matrices[:, :, 0])
    assert torch.allclose(rotations.rot6d_to_matrix(values), matrices)


def test_rot6d_is_gram_schmidt():
    values = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrices = rotations.rot6d_to_matrix(values)
    for value, matrix in zip(values.numpy(), matrices.numpy(), strict=True):
        q, r = np.linalg.qr(value.reshape(2, 3).T)  # Gram-Schmidt up to the columns' signs
        np.testing.assert_allclose(matrix[:, :2], q * np.sign(np.diag(r)), atol=1e-12)
        assert np.linalg.det(matrix) == pytest.approx(1.0)
    assert torch.autograd.gradcheck(rotations.rot6d_to_matrix, (values[:3].requires_grad_(),))


@settings(max_examples=60, deadline=None)
@given(x=st.floats(-3, 3), y=st.floats(-3, 3), z=st.floats(0.1, 5))
def test_the_ray_rotation_is_the_smallest_one(x, y, z):
    matrix = rotations.rotation_onto_ray(torch.tensor([x, y, z], dtype=torch.float64)).numpy()
    unit = np.array([x, y, z]) / np.linalg.norm([x, y, z])
    np.testing.assert_allclose(matrix @ [0, 0, 1], unit, atol=1e-12)
    assert Rotation.from_matrix(matrix).magnitude() == pytest.approx(math.acos(min(1.0, unit[2])), abs=1e-6)


def test_allocentric_and_egocentric_undo_each_other_and_agree_on_the_axis():
    matrices, rays = random_rotations(10), torch.randn(10, 3, dtype=torch.float64).abs()
    there = rotations.egocentric_from_allocentric(matrices, rays)
    assert torch.allclose(rotations.allocentric_from_egocentric(there, rays), matrices)
    ahead = torch.tensor([0.0, 0.0, 2.0], dtype=torch.float64)
    assert torch.allclose(rotations.egocentric_from_allocentric(matrices, ahead), matrices)


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-7, 1e-3, 1.0, 3.0, math.pi - 1e-7, math.pi])
def test_geodesic_angle_near_its_ends(angle):
    a = Rotation.random(rng=np.random.default_rng(1))
    b = a * Rotation.from_rotvec(angle * np.array([0.6, 0.0, 0.8]))
    got = rotations.geodesic_angle(torch.from_numpy(a.as_matrix()), torch.from_numpy(b.as_matrix()))
    assert float(got) == pytest.approx(angle, abs=1e-15 + 1e-14)


def test_geodesic_angle_has_a_finite_gradient_everywhere():
    eye = torch.eye(3, dtype=torch.float64, requires_grad=True)
    for other in (torch.eye(3, dtype=torch.float64), torch.diag(torch.tensor([1.0, -1.0, -1.0]).double())):
        (gradient,) = torch.autograd.grad(rotations.geodesic_angle(eye, other), eye)
        assert torch.isfinite(gradient).all()
    pair = random_rotations(2).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: rotations.geodesic_angle(m[0], m[1]), (pair,))


def test_project_by_hand_and_finite_behind_the_camera():
    K = torch.tensor([[[500.0, 0.0, 320.0], [0.0, 400.0, 240.0], [0.0, 0.0, 1.0]]])
    points = torch.tensor([[[0.2, -0.1, 2.0], [0.0, 0.0, 1.0], [0.1, 0.1, -1.0]]])
    pixels = project(points, K)[0]
    assert pixels[0].tolist() == pytest.approx([370.0, 220.0])
    assert pixels[1].tolist() == [320.0, 240.0]
    assert torch.isfinite(pixels).all()
