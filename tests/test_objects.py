"""Meshes of every usual form become objects: against trimesh's primitives, scipy's hulls and brute force."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from scipy.spatial import cKDTree
from scipy.spatial.distance import pdist
from scipy.spatial.transform import Rotation

from smope.meshes import diameter
from smope.objects import MeshError, ObjectModel, Symmetries, SymmetryError, load_mesh

BOX = trimesh.creation.box((0.1, 0.2, 0.3))


def painted(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """Each corner coloured by where it stands."""
    share = (mesh.vertices - mesh.bounds[0]) / mesh.extents
    return trimesh.Trimesh(
        mesh.vertices, mesh.faces, vertex_colors=(share * 255).astype(np.uint8), process=False
    )


@pytest.mark.parametrize("ending", ["ply", "stl", "obj", "glb"])
def test_every_format_gives_the_same_box_in_metres(tmp_path, ending):
    path = tmp_path / f"box.{ending}"
    BOX.copy().apply_scale(1000).export(path)
    mesh = load_mesh(path, "mm")
    np.testing.assert_allclose(mesh.bounds, BOX.bounds, atol=1e-7)
    assert mesh.area == pytest.approx(BOX.area, rel=1e-5)
    assert mesh.is_watertight


def test_every_object_in_memory_gives_the_same_box():
    pytorch3d_like = SimpleNamespace(
        verts_list=lambda: [torch.tensor(BOX.vertices)], faces_list=lambda: [torch.tensor(BOX.faces)]
    )
    tensors = (torch.tensor(BOX.vertices), torch.tensor(BOX.faces))
    for source in (BOX, (BOX.vertices, BOX.faces), tensors, pytorch3d_like, trimesh.Scene([BOX])):
        mesh = load_mesh(source, "m")
        np.testing.assert_allclose(mesh.bounds, BOX.bounds, atol=1e-7)
        assert mesh is not BOX


def test_units_scale_and_the_size_is_logged(caplog):
    caplog.set_level(logging.INFO, logger="smope")
    for unit, metres in {"m": 1.0, "cm": 0.01, "mm": 0.001, "in": 0.0254}.items():
        mesh = load_mesh((BOX.vertices / metres, BOX.faces), unit, name="brick")
        np.testing.assert_allclose(mesh.extents, [0.1, 0.2, 0.3])
    assert "brick: 37.4 cm across" in caplog.text  # sqrt(0.01 + 0.04 + 0.09) = 0.374


def test_a_scene_is_put_together_with_its_transforms(tmp_path):
    scene = trimesh.Scene()
    scene.add_geometry(BOX, transform=trimesh.transformations.translation_matrix([1, 0, 0]))
    scene.add_geometry(BOX, transform=trimesh.transformations.translation_matrix([-1, 0, 0]))
    scene.export(tmp_path / "two.glb")
    mesh = load_mesh(tmp_path / "two.glb", "m")
    np.testing.assert_allclose(mesh.extents, [2.1, 0.2, 0.3], atol=1e-6)
    assert len(mesh.faces) == 24


def test_obj_materials_and_textures_become_colours(tmp_path):
    Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8).repeat(64, 0).repeat(32, 1)).save(
        tmp_path / "t.png"
    )
    (tmp_path / "q.mtl").write_text("newmtl paint\nKd 1 1 1\nmap_Kd t.png\nnewmtl green\nKd 0 1 0\n")
    (tmp_path / "q.obj").write_text(
        "mtllib q.mtl\nv 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nv 0 0 1\nv 1 0 1\nv 1 1 1\n"
        "vt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\n"
        "usemtl paint\nf 1/1 2/2 3/3\nf 1/1 3/3 4/4\nusemtl green\nf 5/1 6/2 7/3\n"
    )
    model = ObjectModel.from_mesh("quad", tmp_path / "q.obj", "m")
    assert model.colors is not None
    points, colours = model.points, model.colors
    left = (points[:, 2] < 0.5) & (points[:, 0] < 0.48)
    right = (points[:, 2] < 0.5) & (points[:, 0] > 0.52)
    # The texture changes in the middle of a face, far from its corners.
    assert torch.allclose(colours[left].mean(0), torch.tensor([1.0, 0.0, 0.0]), atol=0.02)
    assert torch.allclose(colours[right].mean(0), torch.tensor([0.0, 0.0, 1.0]), atol=0.02)
    assert torch.allclose(colours[points[:, 2] > 0.5].mean(0), torch.tensor([0.0, 1.0, 0.0]), atol=0.02)


def test_an_inside_out_body_is_turned_and_an_open_sheet_accepted():
    inverted = BOX.copy()
    inverted.invert()
    assert load_mesh(inverted, "m").volume == pytest.approx(0.006)
    sheet = ([[0, 0, 0], [0.2, 0, 0], [0, 0.2, 0]], [[0, 1, 2]])
    model = ObjectModel.from_mesh("sheet", sheet, "m")
    assert torch.allclose(model.normals, torch.tensor([0.0, 0.0, 1.0]), atol=1e-6)


@pytest.mark.parametrize(
    ("source", "units", "says"),
    [
        ("nowhere.ply", "m", "no file"),
        (BOX, "km", "units='km' given"),
        (BOX.copy().apply_scale(1000), "m", "374.2 m across.*units='mm' it would be 37.4 cm"),
        (BOX, "mm", "0.374 mm across.*units='m' it would be 37.4 cm"),
        ((BOX.vertices, np.zeros((0, 3), int)), "m", "no faces"),
        ((BOX.vertices * np.nan, BOX.faces), "m", "8 of 8 vertices are not finite"),
        ((BOX.vertices, BOX.faces + 1), "m", "counted from 0"),
        ((BOX.vertices[:, :2], BOX.faces), "m", r"\[V, 3\]"),
        ((BOX.vertices, BOX.faces.astype(float)), "m", "whole numbers"),
        (([[0, 0, 0], [1, 0, 0], [2, 0, 0]], [[0, 1, 2]]), "m", "degenerate"),
        ((np.ones((3, 3)), [[0, 1, 2]]), "m", "degenerate"),
        (3.0, "m", "float given"),
    ],
)
def test_what_is_no_mesh_is_refused_with_its_reason(source, units, says):
    with pytest.raises(MeshError, match=says):
        load_mesh(source, units, name="thing")


def test_force_takes_any_size():
    assert load_mesh(BOX, "mm", force=True).extents.max() == pytest.approx(0.0003)


@settings(max_examples=60, deadline=None)
@given(points=arrays(np.float64, st.tuples(st.integers(2, 60), st.just(3)), elements=st.floats(-5, 5)))
def test_diameter_is_the_brute_force_one(points):
    assert diameter(points) == pytest.approx(pdist(points).max(), rel=1e-12, abs=1e-12)


def test_diameter_of_a_ball_is_quick_and_exact():
    ball = Rotation.random(20_000, rng=np.random.default_rng(0)).apply([0, 0, 1.0])
    corners = np.concatenate([ball, [[1.001, 0, 0]]])
    assert diameter(corners) == pytest.approx(np.linalg.norm(ball - corners[-1], axis=1).max(), rel=1e-12)


def test_points_lie_on_the_surface_and_cover_it_by_area():
    model = ObjectModel.from_mesh("box", BOX, "m")
    points = model.points.double().numpy()
    _, distance, faces = trimesh.proximity.closest_point(BOX, points)
    assert distance.max() < 1e-7
    np.testing.assert_allclose(np.abs(model.normals.numpy()).max(axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(BOX.face_normals[faces] @ np.ones(3), model.normals.sum(1).numpy(), atol=1e-4)
    shares = np.bincount(faces, minlength=12) / len(points)
    np.testing.assert_allclose(shares, BOX.area_faces / BOX.area, atol=0.025)
    # Even: the nearest neighbour of every point is nearly as far as in a hexagonal packing of that density.
    gaps = cKDTree(points).query(points, k=2)[0][:, 1]
    packed = math.sqrt(2 / math.sqrt(3) * BOX.area / len(points))
    assert gaps.min() > 0.55 * packed


def test_the_first_points_cover_the_whole_surface():
    points = ObjectModel.from_mesh("box", BOX, "m").points.numpy()
    for count in (16, 64, 256):
        reach = cKDTree(points[:count]).query(points)[0].max()
        assert reach < 1.5 * math.sqrt(BOX.area / count)


def test_normals_of_a_ball_point_outwards():
    model = ObjectModel.from_mesh("ball", trimesh.creation.icosphere(4, 0.1), "m")
    outwards = torch.nn.functional.normalize(model.points, dim=-1)
    assert (model.normals * outwards).sum(-1).min() > 0.998


def test_colours_are_interpolated():
    mesh = painted(BOX)
    model = ObjectModel.from_mesh("box", mesh, "m")
    expected = (model.points.numpy() - BOX.bounds[0]) / BOX.extents
    # The diagonal of a face makes this piecewise linear paint exact.
    np.testing.assert_allclose(model.colors, expected, atol=1e-5)
    assert ObjectModel.from_mesh("box", BOX, "m").colors is None


def rough() -> trimesh.Trimesh:
    ball = trimesh.creation.icosphere(3, 0.1)
    wave = 1 + 0.2 * np.sin(30 * ball.vertices[:, [1, 2, 0]]).sum(axis=1, keepdims=True)
    return painted(trimesh.Trimesh(ball.vertices * wave, ball.faces, process=False))


def test_the_same_points_for_shuffled_vertices_another_unit_and_origin():
    mesh = rough()
    random = np.random.default_rng(0)
    order, faces = random.permutation(len(mesh.vertices)), random.permutation(len(mesh.faces))
    shuffled = trimesh.Trimesh(
        (mesh.vertices[order] + [0.5, -2.0, 1.0]) * 1000,
        np.roll(np.argsort(order)[mesh.faces[faces]], 1, axis=1),
        vertex_colors=mesh.visual.vertex_colors[order],
        process=False,
    )
    one, other = ObjectModel.from_mesh("a", mesh, "m"), ObjectModel.from_mesh("a", shuffled, "mm")
    moved = other.points - torch.tensor([0.5, -2.0, 1.0])
    assert torch.allclose(one.points, moved, atol=1e-6)
    assert torch.allclose(one.normals, other.normals, atol=0.01)
    assert (one.normals - other.normals).norm(dim=-1).mean() < 1e-3
    assert torch.allclose(one.colors, other.colors, atol=1e-4)
    assert one.diameter == pytest.approx(other.diameter)


def test_the_same_points_for_other_triangles():
    mesh = rough()
    one, other = ObjectModel.from_mesh("a", mesh, "m"), ObjectModel.from_mesh("a", mesh.subdivide(), "m")
    assert torch.allclose(one.points, other.points, atol=1e-6)


def test_tensors_round_trip():
    symmetries = Symmetries.from_bop({"symmetries_continuous": [{"axis": [0, 0, 1], "offset": [0, 0, 0]}]})
    model = ObjectModel.from_mesh("box", painted(BOX), "m", symmetries)
    again = ObjectModel.from_tensors("box", model.to_tensors())
    for name in ("points", "normals", "colors", "centre", "extents"):
        assert torch.equal(getattr(again, name), getattr(model, name))
    assert again.diameter == model.diameter
    assert torch.equal(again.symmetries.transforms(), model.symmetries.transforms())
    assert again.trained
    assert again.mesh is None
    bare = ObjectModel.from_tensors("box", ObjectModel.from_mesh("box", BOX, "m").to_tensors())
    assert bare.colors is None
    assert len(bare.symmetries.transforms()) == 1


def test_bop_symmetries_round_trip_in_millimetres():
    half_turn = [-1, 0, 0, 10, 0, -1, 0, 20, 0, 0, 1, 0, 0, 0, 0, 1]
    info = {
        "diameter": 1.0,
        "symmetries_discrete": [half_turn],
        "symmetries_continuous": [{"axis": [0, 0, 2], "offset": [5, 10, 0]}],
    }
    symmetries = Symmetries.from_bop(info)
    assert symmetries.discrete[0, :3, 3].tolist() == pytest.approx([0.01, 0.02, 0.0])
    back = symmetries.to_bop()
    np.testing.assert_allclose(back["symmetries_discrete"], [half_turn], atol=1e-5)
    np.testing.assert_allclose(back["symmetries_continuous"][0]["axis"], [0, 0, 1])
    np.testing.assert_allclose(back["symmetries_continuous"][0]["offset"], [5, 10, 0], atol=1e-5)


def test_transforms_against_scipy():
    info = {"symmetries_continuous": [{"axis": [1, 2, 2], "offset": [30, 0, 10]}]}
    transforms = Symmetries.from_bop(info).transforms(step_deg=10.0).double().numpy()
    assert len(transforms) == 36
    axis, offset = np.array([1, 2, 2]) / 3, np.array([0.03, 0.0, 0.01])
    for step, transform in enumerate(transforms):
        turn = Rotation.from_rotvec(np.radians(10 * step) * axis)
        np.testing.assert_allclose(transform[:3, :3], turn.as_matrix(), atol=1e-6)
        np.testing.assert_allclose(transform[:3, 3], offset - turn.apply(offset), atol=1e-7)


def test_discrete_and_continuous_are_combined():
    flip = [1, 0, 0, 0, 0, -1, 0, 0, 0, 0, -1, 0, 0, 0, 0, 1]
    info = {
        "symmetries_discrete": [flip],
        "symmetries_continuous": [{"axis": [0, 0, 1], "offset": [0, 0, 0]}],
    }
    transforms = Symmetries.from_bop(info).transforms(step_deg=90.0)
    assert torch.equal(transforms[0], torch.eye(4))
    assert len({tuple(t.round().flatten().tolist()) for t in transforms}) == 8


def test_a_ball_is_turned_evenly():
    info = {"symmetries_continuous": [{"axis": a, "offset": [0, 0, 0]} for a in ([0, 0, 1], [1, 0, 0])]}
    rotations = Symmetries.from_bop(info).transforms()[:, :3, :3].double().numpy()
    assert len(rotations) == 1024
    np.testing.assert_allclose(rotations[0], np.eye(3), atol=1e-6)
    strangers = Rotation.random(200, rng=np.random.default_rng(0)).as_matrix()
    cosines = (np.einsum("aij,bij->ab", strangers, rotations).max(axis=1) - 1) / 2
    assert np.degrees(np.arccos(cosines)).max() < 30


@pytest.mark.parametrize(
    ("info", "says"),
    [
        ({"symmetries_discrete": [[1, 0, 0]]}, "16 finite"),
        ({"symmetries_discrete": [np.diag([1, 1, -1, 1]).ravel().tolist()]}, "rigid motion"),
        ({"symmetries_discrete": [np.diag([2, 2, 2, 1]).ravel().tolist()]}, "rigid motion"),
        ({"symmetries_continuous": [{"axis": [0, 0, 0], "offset": [0, 0, 0]}]}, "an axis"),
        ({"symmetries_continuous": [{"offset": [0, 0, 0]}]}, "an axis"),
        ({"symmetries_discrete": [[-1, 0, 0, 500, 0, -1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1]]}, "mesh's units"),
        ("yes", '"auto"'),
    ],
)
def test_wrong_symmetries_are_refused(info, says):
    with pytest.raises(SymmetryError, match=says):
        ObjectModel.from_mesh("box", (BOX.vertices * 1000, BOX.faces), "mm", info)


@pytest.fixture(scope="module")
def linemod() -> Path:
    if "SMOPE_DATA" not in os.environ:
        pytest.skip("SMOPE_DATA is not set: no LM-O meshes at hand")
    return Path(os.environ["SMOPE_DATA"]) / "lmo"


def test_a_scan_and_its_simplified_copy_give_nearly_the_same_object(linemod):
    one, other = (
        ObjectModel.from_mesh("ape", linemod / folder / "obj_000001.ply", "mm")
        for folder in ("models", "models_eval")
    )
    assert one.diameter == pytest.approx(0.102099, abs=1e-5)  # as models_info.json says
    assert one.diameter == pytest.approx(other.diameter, rel=0.01)
    there, back = (cKDTree(a.points).query(b.points)[0].mean() for a, b in ((one, other), (other, one)))
    assert max(there, back) < 0.02 * one.diameter
