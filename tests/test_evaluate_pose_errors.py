"""Pose errors against bop_toolkit's values, scipy, brute force and hand-computed cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from smope.evaluate import pose_errors
from smope.evaluate.pose_errors import symmetry_transforms

GOLDEN = Path(__file__).parent / "golden" / "bop"
CASES: dict[str, Any] = json.loads((GOLDEN / "cases.json").read_text())
SETS = list(CASES["symmetries"])


def _golden_poses(kind: str) -> np.ndarray:
    poses = np.tile(np.eye(4), (len(CASES["cases"]), 1, 1))
    poses[:, :3, :3] = [case[f"R_{kind}"] for case in CASES["cases"]]
    poses[:, :3, 3] = [case[f"t_{kind}"] for case in CASES["cases"]]
    return poses


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "arrays.npz") as stored:
        return dict(stored)


EST, GT, K = _golden_poses("est"), _golden_poses("gt"), np.array(CASES["K"])


def _expected(*keys: str) -> list[float]:
    values = []
    for case in CASES["cases"]:
        for key in keys:
            case = case[key]
        values.append(case)
    return values


@pytest.mark.parametrize("kind", SETS)
def test_number_of_symmetries_is_bop_toolkits(kind: str) -> None:
    transforms = symmetry_transforms(CASES["symmetries"][kind], CASES["max_sym_disc_step"])
    assert len(transforms) == CASES["n_symmetries"][kind]
    np.testing.assert_array_equal(transforms[0], np.eye(4))


@pytest.mark.parametrize("kind", SETS)
def test_mssd_and_mspd_are_bop_toolkits(arrays: dict[str, np.ndarray], kind: str) -> None:
    symmetries = symmetry_transforms(CASES["symmetries"][kind], CASES["max_sym_disc_step"])
    points = arrays["vertices"]
    mssd = pose_errors.mssd(EST, GT, points, symmetries)
    mspd = pose_errors.mspd(EST, GT, K, points, symmetries)
    np.testing.assert_allclose(mssd, _expected("mssd_mm", kind), atol=1e-6)
    np.testing.assert_allclose(mspd, _expected("mspd_px", kind), atol=1e-6)


def test_the_other_errors_are_bop_toolkits(arrays: dict[str, np.ndarray]) -> None:
    points = arrays["vertices"]
    found = {
        "add_mm": pose_errors.add_s(EST, GT, points, symmetric=False),
        "adi_mm": pose_errors.add_s(EST, GT, points, symmetric=True),
        "proj_px": pose_errors.projection_error(EST, GT, K, points),
        "re_deg": pose_errors.rotation_error(EST, GT),
        "te_mm": pose_errors.translation_error(EST, GT),
    }
    for key, values in found.items():
        np.testing.assert_allclose(values, _expected(key), atol=1e-6, err_msg=key)


@pytest.mark.parametrize("i", range(len(CASES["cases"])))
def test_vsd_is_bop_toolkits(arrays: dict[str, np.ndarray], i: int) -> None:
    expected = CASES["cases"][i]["vsd"]
    depths = (arrays[f"depth_{kind}_{i}"] for kind in ("est", "gt", "test"))
    taus = expected["taus_fraction_of_diameter"]
    found = pose_errors.vsd(*depths, K, expected["delta"], taus, CASES["diameter"])
    np.testing.assert_allclose(found, expected["errors"], atol=2e-3)


def test_vsd_by_hand() -> None:
    """A camera so long that distance is depth; a row of six pixels."""
    far = np.array([[1e6, 0, 2.5], [0, 1e6, 0], [0, 0, 1]])
    truth = np.array([[0.0, 10, 10, 10, 10, 0]])
    found = np.array([[10.0, 10, 10.4, 11, 0, 0]])
    scene = np.array([[10.0, 10, 10, 10, 10, 10]])
    # Seen of the truth 4 pixels, of the estimate 4 (pixel 3 through the truth); both 3, either 5.
    # Beyond tau: at 0.3 the pixels that are 0.4 and 1 off, at 0.5 one, at 2 none. Two pixels are in one only.
    expected = [(2 + 2) / 5, (1 + 2) / 5, (0 + 2) / 5]
    np.testing.assert_allclose(
        pose_errors.vsd(found, truth, scene, far, 0.1, [0.03, 0.05, 0.2], 10.0), expected, atol=1e-9
    )
    # Behind the scene's surface nothing is seen, and what is not seen is wrong.
    assert pose_errors.vsd(found, truth, scene - 5, far, 0.1, [0.2], 10.0) == [1.0]
    # Without a reading everything is seen.
    np.testing.assert_allclose(pose_errors.vsd(found, truth, 0 * scene, far, 0.1, [0.2], 10.0), [0.4])


vectors = st.tuples(*(st.floats(-3, 3),) * 3).map(np.array)


def _pose(vector: np.ndarray, t: np.ndarray) -> np.ndarray:
    T = np.eye(4)
    T[:3, :3] = Rotation.from_rotvec(vector).as_matrix()
    T[:3, 3] = t
    return T


@given(vectors, vectors, vectors, vectors, st.integers(0, 629))
def test_a_symmetric_turn_is_no_error(
    r: np.ndarray, t: np.ndarray, axis: np.ndarray, offset: np.ndarray, turn: int
) -> None:
    if np.linalg.norm(axis) < 1e-3:
        axis = np.array([0.0, 0, 1])
    info = {
        "symmetries_discrete": [np.diag([1.0, -1, -1, 1]).reshape(-1)],
        "symmetries_continuous": [{"axis": axis, "offset": offset}],
    }
    symmetries = symmetry_transforms(info)
    T = _pose(r, t + np.array([0, 0, 20]))
    points = np.random.default_rng(0).normal(size=(20, 3))
    turned = T @ symmetries[turn]
    assert pose_errors.mssd(turned, T, points, symmetries) < 1e-9
    assert pose_errors.mspd(turned, T, K, points, symmetries) < 1e-8
    assert pose_errors.rotation_error(turned, T, symmetries) < 1e-5
    assert pose_errors.translation_error(turned, T, symmetries) < 1e-9


@given(vectors, vectors, vectors, vectors)
def test_rotation_and_translation_are_scipys(
    r1: np.ndarray, t1: np.ndarray, r2: np.ndarray, t2: np.ndarray
) -> None:
    expected = np.degrees((Rotation.from_rotvec(r1) * Rotation.from_rotvec(r2).inv()).magnitude())
    assert pose_errors.rotation_error(_pose(r1, t1), _pose(r2, t2)) == pytest.approx(expected, abs=1e-6)
    assert pose_errors.translation_error(_pose(r1, t1), _pose(r2, t2)) == pytest.approx(
        np.sqrt(((t1 - t2) ** 2).sum())
    )


@pytest.mark.parametrize("degrees", [1e-7, 1e-3, 90, 179.999, 180])
def test_small_and_large_angles_are_exact(degrees: float) -> None:
    turn = _pose(np.radians(degrees) * np.array([0.6, 0, 0.8]), np.zeros(3))
    assert pose_errors.rotation_error(turn, np.eye(4)) == pytest.approx(degrees, rel=1e-9)


def test_adi_is_brute_force() -> None:
    rng = np.random.default_rng(1)
    points = rng.normal(size=(200, 3))
    est, gt = _pose(rng.normal(size=3), rng.normal(size=3)), _pose(rng.normal(size=3), rng.normal(size=3))
    a, b = pose_errors.transform(est, points), pose_errors.transform(gt, points)
    expected = np.linalg.norm(b[:, None] - a[None], axis=2).min(axis=1).mean()
    assert pose_errors.adi(est, gt, points) == pytest.approx(expected)


def test_5cm_5deg_needs_both() -> None:
    near = _pose(np.radians([4.9, 0, 0]), np.array([0, 0.049, 0]))
    turned = _pose(np.radians([5.1, 0, 0]), np.array([0, 0.049, 0]))
    moved = _pose(np.radians([4.9, 0, 0]), np.array([0, 0.051, 0]))
    poses = np.stack([near, turned, moved])
    assert pose_errors.within_5cm_5deg(poses, np.eye(4)).tolist() == [True, False, False]
    poses[:, :3, 3] *= 1000
    assert pose_errors.within_5cm_5deg(poses, np.eye(4), unit=1000).tolist() == [True, False, False]


def test_a_point_in_the_cameras_plane_is_infinitely_wrong() -> None:
    points = np.array([[0.0, 0, 0], [1, 0, -5]])
    T = _pose(np.zeros(3), np.array([0, 0, 5.0]))
    other = _pose(np.zeros(3), np.array([0, 0, 6.0]))
    assert pose_errors.mspd(T, other, K, points) == np.inf
    assert pose_errors.projection_error(other, T, K, points) == np.inf


def test_errors_come_in_the_shape_of_the_pairs(arrays: dict[str, np.ndarray]) -> None:
    table = pose_errors.mssd(EST[:, None], GT[None, :3], arrays["vertices"])
    assert table.shape == (len(EST), 3)
    np.testing.assert_allclose(np.diagonal(table[:3]), _expected("mssd_mm", "none")[:3], atol=1e-6)
    with pytest.raises(ValueError, match=r"\[N, 4, 4\] expected, shape \(12, 3, 3\) given"):
        pose_errors.add(EST[:, :3, :3], GT[:, :3, :3], arrays["vertices"])
