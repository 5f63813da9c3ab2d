"""The authors' loss: mesh terms against scipy and trimesh, and what `paper` mends."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation
from torch import Tensor

from smope.networks.paper_meshes import DecodedMeshes
from smope.networks.paper_pose import PaperPoses
from smope.objects import MeshError
from smope.paper_surfaces import (
    draw_surfaces,
    normalised,
    raw_mesh,
    raw_surfaces,
    sample_surface,
    surface_points,
)
from smope.train import paper_meshes as terms
from smope.train.matcher import MatchCosts
from smope.train.paper_losses import (
    ImageTruth,
    MeshTruth,
    PaperCriterion,
    PaperWeights,
    Predictions,
    random_sampler,
    rotation_matrix,
)
from smope.train.paper_matcher import match_images, matching_cost

MESHES = 3


def box(*extents: float) -> tuple[Tensor, Tensor]:
    mesh = trimesh.creation.box(extents)
    return torch.tensor(mesh.vertices, dtype=torch.float32), torch.tensor(mesh.faces)


@pytest.fixture
def meshes() -> MeshTruth:
    parts = [box(0.1, 0.2, 0.3), box(0.4, 0.1, 0.1), box(0.2, 0.2, 0.1)]
    return MeshTruth.of([v + 0.05 for v, _ in parts], [f for _, f in parts])


def predictions(seed: int = 0, images: int = 2, queries: int = 6) -> Predictions:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    raw = normal(images, queries, MESHES, 7)
    poses = torch.cat([raw[..., :3], torch.nn.functional.normalize(raw[..., 3:], dim=-1)], -1)
    logits = normal(images, queries, MESHES)
    return Predictions(
        normal(2, images, queries, 2),
        torch.cat(
            [torch.rand(2, images, queries, 2, generator=draw), 0.1 + normal(2, images, queries, 2).abs()], -1
        ),
        DecodedMeshes(0.1 * normal(MESHES, 42, 3), normal(MESHES, 1), normal(MESHES, 3)),
        PaperPoses(logits, logits.softmax(-1), raw, poses),
    )


def truth(*meshes: int, seed: int = 1) -> ImageTruth:
    draw = torch.Generator().manual_seed(seed)
    count = len(meshes)
    quaternions = torch.nn.functional.normalize(torch.randn(count, 4, generator=draw), dim=-1)
    boxes = 0.2 + 0.3 * torch.rand(count, 4, generator=draw)
    labels = torch.zeros(count, dtype=torch.int64)
    return ImageTruth(
        labels, boxes, torch.tensor(meshes, dtype=torch.int64), torch.rand(count, 3), quaternions
    )


# -- mesh terms ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0, 1, 3])
def test_icosphere_is_a_closed_unit_sphere(level: int) -> None:
    sphere = terms.icosphere(level)
    mesh = trimesh.Trimesh(sphere.vertices.numpy(), sphere.faces.numpy(), process=False)
    assert (len(mesh.vertices), len(mesh.faces)) == (10 * 4**level + 2, 20 * 4**level)
    assert mesh.is_watertight
    assert mesh.is_winding_consistent
    assert mesh.euler_number == 2
    assert mesh.volume > 0
    assert np.linalg.norm(mesh.vertices, axis=1) == pytest.approx(1, abs=1e-4)


def test_edges_normals_and_laplacian_against_trimesh() -> None:
    sphere = terms.icosphere(2)
    moved = sphere.vertices + 0.2 * torch.randn(2, len(sphere.vertices), 3)
    lengths = terms.edge_length(moved, sphere)
    normals = terms.normal_consistency(moved, sphere)
    smooth = terms.laplacian(moved, sphere)
    for i in range(2):
        mesh = trimesh.Trimesh(moved[i].numpy(), sphere.faces.numpy(), process=False)
        assert lengths[i].item() == pytest.approx((mesh.edges_unique_length**2).mean(), rel=1e-5)
        assert normals[i].item() == pytest.approx((1 - np.cos(mesh.face_adjacency_angles)).mean(), rel=1e-4)
        around = np.stack([mesh.vertices[n].mean(0) for n in mesh.vertex_neighbors])
        assert smooth[i].item() == pytest.approx(
            np.linalg.norm(around - mesh.vertices, axis=1).mean(), rel=1e-5
        )


def test_chamfer_against_a_tree_and_finite_differences() -> None:
    a, b = torch.randn(40, 3, dtype=torch.float64), torch.randn(30, 3, dtype=torch.float64)
    there, _ = cKDTree(b.numpy()).query(a.numpy())
    back, _ = cKDTree(a.numpy()).query(b.numpy())
    assert terms.chamfer(a, b).item() == pytest.approx((there**2).mean() + (back**2).mean(), rel=1e-6)
    assert torch.autograd.gradcheck(lambda x: terms.chamfer(x, b), a[:8].clone().requires_grad_())


def test_an_open_surface_has_no_template() -> None:
    with pytest.raises(ValueError, match="closed surface"):
        terms.Template.of(torch.rand(4, 3), torch.tensor([[0, 1, 2], [1, 2, 3]]))


def test_key_points_by_hand() -> None:
    # Mean 0; the ends of the long side are farthest from it, then the sum of distances wins, not the least.
    points = torch.tensor([[-3.0, 0, 0], [3, 0, 0], [0, 1, 0], [0, -1, 0]])
    found = terms.key_points(points, 3)
    assert found[0].tolist() == [0, 0, 0]
    assert found[1].tolist() == [-3, 0, 0]
    assert found[2].tolist() == [3, 0, 0]  # 9 + 36 against 9 + 0
    assert found[3].tolist() == [-3, 0, 0]  # 9 + 0 + 36 once more: the rule repeats itself


def test_normalised_meshes_come_back() -> None:
    vertices = torch.randn(50, 3) * torch.tensor([1.0, 5.0, 2.0]) + 7
    moved, scale, centre = normalised(vertices)
    assert moved.abs().max().item() == pytest.approx(1)
    assert moved.mean(0).abs().max() < 1e-6
    torch.testing.assert_close(moved * scale + centre, vertices)


def test_samples_are_even_over_the_area_and_carry_normals() -> None:
    vertices, faces = box(1.0, 2.0, 3.0)
    chosen, weights = sample_surface(vertices, faces, 40_000, torch.Generator().manual_seed(0))
    points = surface_points(vertices, faces, chosen, weights)
    half = torch.tensor([0.5, 1.0, 1.5])
    on_side = (points.abs() - half).abs() < 1e-6
    assert on_side.any(1).all()
    assert (points.abs() <= half + 1e-6).all()
    # Sides square to x, y, z have 6, 3 and 2 of 11 parts of the area; standard error below 0.0026.
    assert on_side.float().mean(0).tolist() == pytest.approx([6 / 11, 3 / 11, 2 / 11], abs=0.01)
    surfaces = draw_surfaces([vertices], [faces], 500, seed=3)
    outward = (surfaces.normals[0] * surfaces.points[0]).sum(-1)  # the distance of the side from the middle
    assert torch.isclose(outward[:, None], half, atol=1e-5).any(1).all()


def test_a_seed_fixes_a_mesh_whatever_stands_beside_it() -> None:
    a, b = box(1, 2, 3), box(2, 1, 1)
    alone = draw_surfaces([b[0]], [b[1]], 100, seed=5)
    both = draw_surfaces([a[0], b[0]], [a[1], b[1]], 100, seed=5)
    assert torch.equal(alone.points[0], both.points[1])
    assert torch.equal(alone.normals[0], both.normals[1])
    assert not torch.equal(alone.points, draw_surfaces([b[0]], [b[1]], 100, seed=6).points)


def test_obj_files_are_read_as_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "x.obj"
    path.write_text(
        "# a square of four corners, one twice, and a vertex that no face uses\n"
        "mtllib x.mtl\nv 0 0 0\nv 2 0 0 0.5 0.5 0.5\nv 2 2 0\nv 0 2 0\nv 2 2 0\nv 9 9 9\nvn 0 0 1\n"
        "\nf 1//1 2//1 3//1 4//1\nf -6 -2 -3\n"
    )
    vertices, faces = raw_mesh(path)
    assert vertices.tolist() == [[0, 0, 0], [2, 0, 0], [2, 2, 0], [0, 2, 0], [2, 2, 0], [9, 9, 9]]
    assert faces.tolist() == [[0, 1, 2], [0, 2, 3], [0, 4, 3]]
    for other in (
        (vertices, faces),
        (vertices.numpy(), faces.numpy()),
        trimesh.Trimesh(vertices, faces, process=False),
    ):
        again, triangles = raw_mesh(other)
        assert torch.equal(again, vertices)
        assert torch.equal(triangles, faces)
    assert raw_surfaces([path, path], 30).points.shape == (2, 30, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v 0 0\n", "line 1: a vertex or a face"),
        ("v 0 0 0\nf 1 x 1\n", "line 2: a vertex or a face"),
        ("v 0 0 0\nf 1 1\n", "line 2"),
        ("v 0 0 0\nf 1 -2 1\n", "line 2"),
        ("v 0 0 0\nf 1 2 3\n", "1 vertices, 1 faces that do not fit"),
        ("v 0 0 0\n", "0 faces"),
    ],
)
def test_damaged_obj_files_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.obj"
    path.write_text(text)
    with pytest.raises(MeshError, match=message):
        raw_mesh(path)


def test_mesh_terms_against_pytorch3d() -> None:
    reason = "pytorch3d is not installed; it has no wheels for this Python on PyPI"
    losses = pytest.importorskip("pytorch3d.loss", reason=reason)
    structures = pytest.importorskip("pytorch3d.structures", reason=reason)
    utils = pytest.importorskip("pytorch3d.utils", reason=reason)
    sphere = terms.icosphere(3)
    theirs = utils.ico_sphere(3)
    assert torch.equal(theirs.faces_packed(), sphere.faces)
    moved = sphere.vertices + 0.1 * torch.randn_like(sphere.vertices)
    mesh = structures.Meshes([moved], [sphere.faces])
    ours = (terms.edge_length, terms.normal_consistency, terms.laplacian)
    names = ("mesh_edge_loss", "mesh_normal_consistency", "mesh_laplacian_smoothing")
    for function, name in zip(ours, names, strict=True):
        torch.testing.assert_close(function(moved[None], sphere)[0], getattr(losses, name)(mesh))
    a, b = torch.rand(100, 3), torch.rand(80, 3)
    torch.testing.assert_close(terms.chamfer(a, b), losses.chamfer_distance(a[None], b[None])[0])


# -- matching -----------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.integers(0, 3))
def test_matching_is_the_cheapest_assignment(seed: int, count: int) -> None:
    found, wanted = predictions(seed, images=1, queries=4), truth(*range(count), seed=seed)
    logits, boxes = found.logits[-1], found.boxes[-1]
    costs = MatchCosts()
    [(query, target)] = match_images(logits, boxes, [wanted.labels], [wanted.boxes], costs)
    cost = matching_cost(logits[0], boxes[0], wanted.labels, wanted.boxes, costs)
    cheapest = min(sum(cost[q, t].item() for t, q in enumerate(p)) for p in permutations(range(4), count))
    assert cost[query, target].sum().item() == pytest.approx(cheapest, abs=1e-5)
    assert query.tolist() == sorted(query.tolist())


# -- objectives ---------------------------------------------------------------------------------------------


@given(st.integers(0, 1000))
def test_rotations_against_scipy(seed: int) -> None:
    quaternion = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = Rotation.from_quat(quaternion.numpy()).as_matrix()
    assert rotation_matrix(quaternion).numpy() == pytest.approx(expected, abs=1e-9)
    shuffled = quaternion[:, [3, 0, 1, 2]]
    assert rotation_matrix(shuffled, verbatim=True).numpy() == pytest.approx(expected, abs=1e-5)


def exact(found: Predictions, truths: list[ImageTruth], criterion: PaperCriterion) -> Predictions:
    """The predictions with the true pose, and its opposite quaternion, at every matched query."""
    assert found.poses is not None
    poses = found.poses.poses.clone()
    match = criterion.match(found.logits[-1], found.boxes[-1], truths)
    for image, (query, target) in enumerate(match):
        t = truths[image]
        poses[image, query, t.meshes[target], :3] = t.translations[target]
        poses[image, query, t.meshes[target], 3:] = -t.quaternions[target]
    return replace(found, poses=replace(found.poses, poses=poses))


def test_opposite_quaternions_are_one_rotation_only_where_mended(meshes: MeshTruth) -> None:
    truths = [truth(0, 2), truth(1, seed=4)]
    mended = PaperCriterion(meshes, PaperWeights(), "paper")
    found = exact(predictions(), truths, mended)
    _, parts = mended(found, truths, random_sampler(20))
    for name in ("pose_6dof_add", "pose_6dof_fps_points_3d", "pose_6dof_rotation"):
        assert parts[name].item() == pytest.approx(0, abs=1e-6)
    assert found.poses is not None
    likeliest = torch.zeros_like(found.poses.probabilities)
    match = mended.match(found.logits[-1], found.boxes[-1], truths)
    for image, (query, target) in enumerate(match):
        likeliest[image, query, truths[image].meshes[target]] = 1
    verbatim = PaperCriterion(meshes, PaperWeights(), "paper-verbatim")
    _, theirs = verbatim(
        replace(found, poses=replace(found.poses, probabilities=likeliest)), truths, random_sampler(20)
    )
    assert theirs["pose_6dof_add"].item() == pytest.approx(0, abs=1e-6)
    assert theirs["pose_6dof_rotation"].item() > 0.3


def test_points_are_turned_as_scipy_turns_them(meshes: MeshTruth) -> None:
    truths = [truth(1), truth()]
    criterion = PaperCriterion(meshes, PaperWeights(), "paper")
    found = predictions(3)
    _, parts = criterion(found, truths, random_sampler(20))
    [(query, _), _] = criterion.match(found.logits[-1], found.boxes[-1], truths)
    assert found.poses is not None
    pose = found.poses.poses[0, query[0], 1].numpy()
    points = meshes.key_points[1].numpy()
    moved = Rotation.from_quat(pose[3:]).apply(points) + pose[:3]
    wanted = Rotation.from_quat(truths[0].quaternions[0].numpy()).apply(points)
    wanted = wanted + truths[0].translations[0].numpy()
    assert parts["pose_6dof_fps_points_3d"].item() == pytest.approx(np.abs(moved - wanted).mean(), rel=1e-5)


def test_a_wrong_class_does_not_change_the_pose_terms_where_mended(meshes: MeshTruth) -> None:
    truths, found = [truth(0), truth(2, seed=3)], predictions()
    assert found.poses is not None
    other = found.poses.class_logits.roll(1, -1)
    swapped = replace(found, poses=replace(found.poses, class_logits=other, probabilities=other.softmax(-1)))
    for objective, same in (("paper", True), ("paper-verbatim", False)):
        criterion = PaperCriterion(meshes, PaperWeights(), objective)  # type: ignore[arg-type]
        a = criterion(found, truths, random_sampler(20))[1]["pose_6dof_add"]
        b = criterion(swapped, truths, random_sampler(20))[1]["pose_6dof_add"]
        assert torch.equal(a, b) == same


def test_a_sure_class_costs_nothing_only_where_mended(meshes: MeshTruth) -> None:
    truths, found = [truth(1), truth(1, seed=3)], predictions()
    assert found.poses is not None
    sure = torch.full_like(found.poses.class_logits, -20)
    sure[..., 1] = 20
    found = replace(found, poses=replace(found.poses, class_logits=sure, probabilities=sure.softmax(-1)))
    mended = PaperCriterion(meshes, PaperWeights(), "paper")(found, truths, random_sampler(20))[1]
    theirs = PaperCriterion(meshes, PaperWeights(), "paper-verbatim")(found, truths, random_sampler(20))[1]
    assert mended["pose_6dof_class"].item() == pytest.approx(0, abs=1e-6)
    # Softmax of the probabilities 1, 0, 0: -log(e / (e + 2)).
    assert theirs["pose_6dof_class"].item() == pytest.approx(-np.log(np.e / (np.e + 2)), rel=1e-5)


def test_a_batch_without_objects(meshes: MeshTruth) -> None:
    truths, found = [truth(), truth()], predictions()
    assert found.poses is not None
    found.logits.requires_grad_()
    found.poses.poses.requires_grad_()
    total, parts = PaperCriterion(meshes, PaperWeights(), "paper")(found, truths, random_sampler(20))
    total.backward()
    assert 0 < total.item() < 1e3
    assert parts["pose_6dof_rotation"].item() == 0
    assert found.logits.grad is not None
    assert found.logits.grad.abs().sum() > 0
    assert found.poses.poses.grad is not None
    assert not found.poses.poses.grad.any()
    with pytest.raises(ValueError, match="batch without objects"):
        PaperCriterion(meshes, PaperWeights(), "paper-verbatim")(found, truths, random_sampler(20))


def test_proposals_are_trained_only_where_mended(meshes: MeshTruth) -> None:
    truths, found = [truth(0), truth(2, seed=3)], predictions()
    found = replace(found, proposal_logits=found.logits[0], proposal_boxes=found.boxes[0])
    mended = PaperCriterion(meshes, PaperWeights(), "paper")(found, truths, random_sampler(20))[1]
    assert mended["loss_ce_enc"].item() == pytest.approx(mended["loss_ce_0"].item())
    assert mended["loss_giou_enc"].item() == pytest.approx(mended["loss_giou_0"].item())
    theirs = PaperCriterion(meshes, PaperWeights(), "paper-verbatim")(found, truths, random_sampler(20))[1]
    assert not [name for name in theirs if name.endswith("_enc")]


def test_total_is_the_weighted_sum(meshes: MeshTruth) -> None:
    truths, found = [truth(0), truth(2, seed=3)], predictions()
    weights = PaperWeights.linemod()
    total, parts = PaperCriterion(meshes, weights, "paper")(found, truths, random_sampler(20))
    p = {name: value.item() for name, value in parts.items()}
    expected = p["loss_ce"] + p["loss_ce_0"] + 5 * (p["loss_bbox"] + p["loss_bbox_0"])
    expected += 2 * (p["loss_giou"] + p["loss_giou_0"])
    expected += 120 * p["model3d_scales"] + 50 * p["model3d_centers"] + 50 * p["model3d_points"]
    expected += 0.5 * p["pose_6dof_class"] + 10 * p["pose_6dof_add"]
    expected += 50 * p["pose_6dof_fps_points_3d"] + 3 * p["pose_6dof_rotation"]
    assert total.item() == pytest.approx(expected, rel=1e-5)


def test_wrong_settings_are_named(meshes: MeshTruth) -> None:
    with pytest.raises(ValueError, match="5 weights given for 3 meshes"):
        PaperCriterion(meshes, PaperWeights.kitti3d())
    with pytest.raises(ValueError, match="'paper' or 'paper-verbatim' expected"):
        PaperCriterion(meshes, PaperWeights(), "papers")  # type: ignore[arg-type]
