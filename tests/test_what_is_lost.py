"""tools/what_is_lost.py: the truth is put in for the part that is named, and for no other."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

TOOL = runpy.run_path(str(Path(__file__).resolve().parent.parent / "tools" / "what_is_lost.py"))

R, TRUE_R = Rotation.from_euler("xyz", [[0.1, 0.2, 0.3], [1.0, -0.5, 2.0]]).as_matrix()
T, TRUE_T = np.array([0.2, -0.1, 2.0]), np.array([0.1, 0.3, 1.0])


@pytest.mark.parametrize(
    ("part", "rotation", "translation"),
    [
        ("nothing", R, [0.2, -0.1, 2.0]),
        ("rotation", TRUE_R, [0.2, -0.1, 2.0]),
        ("depth", R, [0.1, -0.05, 1.0]),  # along the found ray (0.1, -0.05, 1)
        ("depth, as far as the box's size", R, [0.24, -0.12, 2.4]),  # the box was 1.2 times too large
        ("lateral", R, [0.2, 0.6, 2.0]),  # along the true ray (0.1, 0.3, 1)
        ("rotation + depth", TRUE_R, [0.1, -0.05, 1.0]),
        ("rotation + lateral", TRUE_R, [0.2, 0.6, 2.0]),
        ("all but rotation", R, [0.1, 0.3, 1.0]),
    ],
)
def test_a_part_is_replaced_and_the_others_stay(part: str, rotation: object, translation: object) -> None:
    found = TOOL["replaced"](R, T, TRUE_R, TRUE_T, 1.2)
    np.testing.assert_allclose(found[part][0], rotation)
    np.testing.assert_allclose(found[part][1], translation)
    assert len(found) == 8


def test_the_centre_of_the_mesh_comes_out_where_it_was_said() -> None:
    middle = np.array([0.01, -0.02, 0.03])
    pose = TOOL["pose_of"](R, T, middle)
    np.testing.assert_allclose(pose @ [*middle, 1.0], [*T, 1.0])


def test_of_symmetric_poses_the_one_nearest_in_rotation_is_the_truth() -> None:
    half_turn = np.diag([-1.0, -1.0, 1.0, 1.0])
    truth = np.eye(4)
    truth[:3, :3] = TRUE_R
    near = Rotation.from_matrix(TRUE_R @ half_turn[:3, :3]) * Rotation.from_rotvec([0.0, 0.1, 0.0])
    found = TOOL["nearest_truth"](near.as_matrix(), truth, np.stack([np.eye(4), half_turn]))
    np.testing.assert_allclose(found, truth @ half_turn)
