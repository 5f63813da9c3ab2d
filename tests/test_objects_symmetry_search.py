"""Found symmetries against the known groups of solids, turned and moved to no particular place."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import trimesh
from scipy.spatial import cKDTree

from smope.objects import ObjectModel, Symmetries

PLACE = trimesh.transformations.random_rotation_matrix(np.array([0.3, 0.6, 0.1]))
PLACE[:3, 3] = [0.3, 0.1, -0.2]
create = trimesh.creation
TETRAHEDRON = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) * 0.05


def found(mesh: trimesh.Trimesh) -> tuple[ObjectModel, Symmetries]:
    model = ObjectModel.from_mesh("solid", mesh.copy().apply_transform(PLACE), "m", "auto")
    return model, model.symmetries


def lopsided() -> trimesh.Trimesh:
    ball = create.icosphere(3, 0.1)
    bent = ball.vertices * [1.0, 0.9, 0.8] + 0.03 * np.sin(20 * ball.vertices[:, [1, 2, 0]] + 0.5)
    return trimesh.Trimesh(bent, ball.faces)


@pytest.mark.parametrize(
    ("mesh", "discrete", "continuous"),
    [
        (lopsided(), 0, 0),
        (create.cone(0.05, 0.1, sections=5), 4, 0),  # C5
        (create.box((0.1, 0.2, 0.3)), 3, 0),  # D2
        (trimesh.Trimesh(TETRAHEDRON, [[0, 1, 2], [0, 3, 1], [0, 2, 3], [1, 3, 2]]), 11, 0),  # T
        (create.cone(0.05, 0.1, sections=64), 0, 1),
        (create.cylinder(0.03, 0.1, sections=64), 1, 1),
        (create.icosphere(3, 0.1), 0, 2),
    ],
    ids=["none", "pyramid", "box", "tetrahedron", "cone", "cylinder", "ball"],
)
def test_solids_have_their_groups(mesh, discrete, continuous):
    model, symmetries = found(mesh)
    assert (len(symmetries.discrete), len(symmetries.continuous)) == (discrete, continuous)
    surface = cKDTree(model.mesh.sample(40_000, seed=0))
    some = model.points[:200]
    for transform in symmetries.transforms(step_deg=30.0)[:64]:
        moved = some @ transform[:3, :3].T + transform[:3, 3]
        # 40,000 samples lie about 0.005 diameters apart.
        assert surface.query(moved)[0].max() < 0.025 * model.diameter


def test_what_was_found_is_told(caplog):
    caplog.set_level(logging.INFO, logger="smope")
    ObjectModel.from_mesh("can", create.cylinder(0.03, 0.1, sections=64), "m", "auto")
    assert "can: symmetries found: any turn about (0.00, 0.00, 1.00); 2-fold about" in caplog.text


def test_a_cylinder_with_a_handle_has_only_its_mirror():
    handle = create.box((0.03, 0.01, 0.06)).apply_translation([0.045, 0, 0.01])
    mug = trimesh.util.concatenate([create.cylinder(0.04, 0.1, sections=64), handle])
    assert torch.equal(found(mug)[1].transforms(), torch.eye(4)[None])
