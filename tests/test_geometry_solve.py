"""Small systems and inverses against LAPACK in float64."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from smope.geometry.solve import invert_intrinsics, solve_spd


def spd(count: int, size: int, condition: float, seed: int = 0) -> np.ndarray:
    """[count, size, size] of a given condition number, in float64"""
    random = np.random.default_rng(seed)
    turns = np.linalg.qr(random.standard_normal((count, size, size)))[0]
    values = np.geomspace(1.0, 1 / condition, size)
    return turns @ (values[:, None] * turns.transpose(0, 2, 1))


@pytest.mark.parametrize("size", [1, 2, 3, 6])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e8])
def test_it_solves_as_lapack_does_in_float64(size: int, condition: float) -> None:
    normal = spd(20, size, condition if size > 1 else 1.0)
    right = np.random.default_rng(1).standard_normal((20, size))
    expected = np.linalg.solve(normal, right[..., None])[..., 0]
    found = solve_spd(torch.from_numpy(normal), torch.from_numpy(right)).numpy()
    scale = np.abs(expected).max(-1, keepdims=True)
    assert np.abs((found - expected) / scale).max() < 20 * condition * np.finfo(np.float64).eps


@pytest.mark.parametrize("condition", [10.0, 1e4])
def test_in_float32_it_is_as_exact_as_pivoted_lapack(condition: float) -> None:
    normal = spd(500, 6, condition).astype(np.float32)
    right = np.random.default_rng(1).standard_normal((500, 6)).astype(np.float32)
    exact = np.linalg.solve(normal.astype(np.float64), right.astype(np.float64)[..., None])[..., 0]

    def error(solution: np.ndarray) -> float:
        return float(np.median(np.linalg.norm(solution - exact, axis=-1) / np.linalg.norm(exact, axis=-1)))

    ours = error(solve_spd(torch.from_numpy(normal), torch.from_numpy(right)).numpy())
    pivoted = [scipy.linalg.solve(a, b, assume_a="gen") for a, b in zip(normal, right, strict=True)]
    assert pivoted[0].dtype == np.float32  # numpy's own would compute in float64
    assert ours < 2 * error(np.stack(pivoted))


def test_any_batch_is_solved_and_gradients_are_those_of_differences() -> None:
    normal = torch.from_numpy(spd(6, 4, 50.0)).reshape(2, 3, 4, 4)
    right = torch.arange(24, dtype=torch.float64).reshape(2, 3, 4)
    assert torch.allclose((normal @ solve_spd(normal, right)[..., None])[..., 0], right)
    assert solve_spd(normal[:0], right[:0]).shape == (0, 3, 4)
    assert torch.autograd.gradcheck(
        solve_spd, (normal[0, :1].clone().requires_grad_(), right[0, :1].clone().requires_grad_())
    )


@given(
    fx=st.floats(50, 5000), ratio=st.floats(0.5, 2), skew=st.floats(-5, 5),
    cx=st.floats(-0.5, 4000), cy=st.floats(-0.5, 4000),
)  # fmt: skip
def test_intrinsics_times_their_inverse_are_one(
    fx: float, ratio: float, skew: float, cx: float, cy: float
) -> None:
    K = np.array([[fx, skew, cx], [0, fx * ratio, cy], [0, 0, 1]])
    exact = np.linalg.inv(K)
    np.testing.assert_allclose(invert_intrinsics(torch.from_numpy(K)).numpy(), exact, rtol=1e-12, atol=1e-12)
    batch = torch.from_numpy(K).float().expand(2, 3, 3, 3)
    found = invert_intrinsics(batch)
    assert found.shape == (2, 3, 3, 3)
    np.testing.assert_allclose(found[1, 2].numpy(), exact, rtol=1e-5, atol=1e-6)
