"""Instances larger or smaller than their mesh: geometry, truth, losses and the way to `Poses.scale`."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest
import roma
import torch
import trimesh
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from torch import Tensor

from smope.config import ModelConfig
from smope.data.items import UNKNOWN, Batch
from smope.geometry.projection import project
from smope.geometry.stretch import size_factor, stretched_anchors, turned_scale
from smope.model import SMOPE
from smope.networks.outputs import PoseEstimate
from smope.networks.pose_head import PoseHead
from smope.networks.smope_s import SmopeS, SmopeSConfig
from smope.objects import ObjectModel, Symmetries
from smope.train.objective import Objective
from smope.train.pose_targets import ObjectTable, PairTruth

K = torch.tensor([[[700.0, 0.0, 320.0], [0.0, 700.0, 160.0], [0.0, 0.0, 1.0]]])
CLOSE = torch.tensor([[100.0, 0.0, 47.5], [0.0, 100.0, 31.5], [0.0, 0.0, 1.0]])
factors = st.tuples(*[st.floats(0.4, 2.5)] * 3)


@functools.cache
def quarter_turned() -> ObjectModel:
    """A square slab off its origin, alike after a quarter turn about its own z axis."""
    mesh = trimesh.creation.box((2.0, 2.0, 0.5)).apply_translation((0.3, -0.2, 0.25))
    turns = torch.eye(4).repeat(3, 1, 1)
    for k in range(3):
        turns[k, :3, :3] = roma.rotvec_to_rotmat(torch.tensor([0.0, 0.0, (k + 1) * torch.pi / 2]))
        centre = torch.tensor([0.3, -0.2, 0.0])
        turns[k, :3, 3] = centre - turns[k, :3, :3] @ centre
    return ObjectModel.from_mesh("slab", mesh, "m", symmetries=Symmetries(turns))


def some_pose(seed: int) -> Tensor:
    T = torch.eye(4)
    generator = torch.Generator().manual_seed(seed)
    T[:3, :3] = roma.unitquat_to_rotmat(
        torch.nn.functional.normalize(torch.randn(4, generator=generator), dim=0)
    )
    T[:3, 3] = torch.tensor([0.4, -0.3, 9.0])
    return T


@given(factors)
def test_anchors_of_a_stretched_mesh_are_those_of_the_mesh_that_trimesh_stretches(
    s: tuple[float, ...],
) -> None:
    mesh = trimesh.creation.icosphere(subdivisions=1)
    points, normals = torch.tensor(mesh.triangles_center).float(), torch.tensor(mesh.face_normals).float()
    anchors = torch.cat([points / 2, normals, torch.rand(len(points), 3)], -1)
    scale = torch.tensor(s)
    found = stretched_anchors(anchors, scale)
    stretched = mesh.copy().apply_transform(np.diag([*s, 1.0]))
    size = 2 * float(np.prod(s)) ** (1 / 3)
    assert size_factor(scale).item() == pytest.approx(size / 2, rel=1e-5)
    assert np.allclose(found[:, :3] * size, stretched.triangles_center, atol=1e-4)
    assert np.allclose(found[:, 3:6], stretched.face_normals, atol=1e-4)
    assert torch.equal(found[:, 6:], anchors[:, 6:])


@given(factors, st.permutations([0, 1, 2]), st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3))
def test_factors_after_a_turn_that_swaps_axes(
    s: tuple[float, ...], order: list[int], signs: tuple[float, ...]
) -> None:
    turn = torch.zeros(3, 3)
    turn[torch.arange(3), torch.tensor(order)] = torch.tensor(signs)
    turned = turned_scale(torch.tensor(s), turn[None])[0]
    assert torch.allclose(torch.diag(torch.tensor(s)) @ turn, turn @ torch.diag(turned))


@given(factors, st.integers(0, 50))
def test_every_pose_of_the_truth_shows_the_same_stretched_surface(s: tuple[float, ...], seed: int) -> None:
    slab, T, scale = quarter_turned(), some_pose(seed), torch.tensor(s)
    table = ObjectTable.of([slab])
    slots = torch.zeros(1, 1, dtype=torch.int64)
    truth = PairTruth.of(table, slots, T[None, None], slots, K, scale[None, None])
    corners = torch.tensor(slab.mesh.vertices).float()  # type: ignore[union-attr]
    seen = (scale * corners) @ T[:3, :3].T + T[:3, 3]
    tree = cKDTree(seen.numpy())
    assert truth.scales is not None
    for k in range(4):
        centred = (corners - slab.centre) * truth.scales[0, 0, k]
        shown = centred @ truth.rotations[0, 0, k].T + truth.translations[0, 0, k]
        distance, index = tree.query(shown.numpy())
        assert distance.max() < 1e-4
        assert len(set(index)) == 8


def pair(slab: ObjectModel, T: Tensor, scale: Tensor) -> PoseEstimate:
    rotation, translation = T[:3, :3], T[:3, :3] @ (scale * slab.centre) + T[:3, 3]
    estimate = (rotation[None, None], translation[None, None], project(translation[None, None], K))
    return PoseEstimate(*estimate, scale=scale[None, None])


def test_losses_vanish_at_the_truth_and_count_a_wrong_size() -> None:
    slab, T, scale = quarter_turned(), some_pose(3), torch.tensor([1.5, 0.7, 1.1])
    objective, slots = Objective([slab]), torch.zeros(1, 1, dtype=torch.int64)
    truth = PairTruth.of(objective.table, slots, T[None, None], slots, K, scale[None, None])
    weight = torch.ones(1, 1)
    exact = objective.pose_errors(pair(slab, T, scale), truth, slots, weight)
    assert all(value.item() < 1e-4 for value in exact.values()), exact
    wrong = pair(slab, T, scale)
    wrong = replace(wrong, scale=wrong.scale * 1.1)  # type: ignore[operator]
    errors = objective.pose_errors(wrong, truth, slots, weight)
    assert errors["scale"].item() == pytest.approx(3 * np.log(1.1), rel=1e-4)
    # The surface about the centre is a tenth off, in sizes of the stretched mesh.
    middle = (objective.table.points[0] * slab.diameter * scale).norm(dim=-1).mean()
    size = slab.diameter * float(scale.prod()) ** (1 / 3)
    assert errors["points"].item() == pytest.approx(0.1 * float(middle) / size, rel=1e-3)


def test_depth_follows_from_the_predicted_size() -> None:
    torch.manual_seed(0)
    head = PoseHead(16, predict_scale=True)
    features, boxes = torch.randn(1, 4, 16), torch.rand(1, 4, 4) * 0.3 + 0.2
    diameters = torch.full((1, 4), 4.0)
    plain = head(features, boxes, diameters, K, (640, 320)).poses[0]
    assert plain.scale is not None
    assert torch.equal(plain.scale, torch.ones(1, 4, 3))  # a trained network begins with the sizes it had
    assert head.log_scale is not None
    torch.nn.init.constant_(head.log_scale.layers[-1].bias, float(np.log(1.25)))
    larger = head(features, boxes, diameters, K, (640, 320)).poses[0]
    assert torch.allclose(larger.translation, plain.translation * 1.25, rtol=1e-5)
    assert torch.allclose(larger.centre, plain.centre)


def test_a_pixel_says_its_place_on_the_registered_mesh() -> None:
    slab, T, scale = quarter_turned(), torch.eye(4), torch.tensor([1.5, 0.5, 2.0])
    T[2, 3] = 6.0
    place = torch.tensor([0.5, -0.6, 0.0])  # on the registered mesh, facing the camera
    point = T[:3, :3] @ (scale * place) + T[:3, 3]
    u, v = (project(point[None, None], K)[0, 0] / 8).floor().long().tolist()
    pixel = torch.tensor([u * 8 + 4.0, v * 8 + 4.0, 1.0])
    seen = pixel @ torch.linalg.inv(K[0]).T * 6.0
    depth, instance = torch.zeros(1, 320, 640), torch.zeros(1, 320, 640, dtype=torch.uint8)
    depth[0, v * 8 + 4, u * 8 + 4], instance[0, v * 8 + 4, u * 8 + 4] = 6.0, 1
    instance[0, :8] = UNKNOWN
    batch = Batch(
        images=torch.zeros(1, 3, 320, 640),
        K=K,
        labels=torch.zeros(1, 1, dtype=torch.int64),
        T_CO=T[None, None],
        boxes_xyxy=torch.zeros(1, 1, 4),
        visibility=torch.ones(1, 1),
        instance=instance,
        depth=depth,
        scale=scale[None, None],
    )
    coordinates, labels = batch.surface_at_stride(8, slab.centre[None], torch.tensor([slab.diameter]))
    assert labels[0, v, u] == 0
    assert (labels >= 0).sum() == 1  # what nobody knows is no object
    expected = ((seen - T[:3, 3]) / scale - slab.centre) / slab.diameter
    assert torch.allclose(coordinates[0, :, v, u], expected, atol=1e-5)


def test_boxes_in_an_ignored_area_are_not_judged_unless_they_match() -> None:
    objective = Objective([quarter_turned()])
    boxes = torch.tensor([[0.2, 0.5, 0.1, 0.1], [0.7, 0.5, 0.1, 0.1], [0.72, 0.5, 0.1, 0.1]])[None, None]
    logits = torch.full((1, 1, 3, 1), 1.0)
    match, labels = torch.tensor([[[1]]]), torch.zeros(1, 1, dtype=torch.int64)
    truth, present = boxes[0, :, 1], torch.ones(1, 1, dtype=torch.bool)
    area = torch.tensor([[[0.6, 0.4, 0.9, 0.6], [0.0, 0.0, 0.0, 0.0]]])

    def label_loss(queries: list[int], ignored: Tensor | None) -> float:
        chosen = match.clamp(max=len(queries) - 1)
        parts = (logits[:, :, queries], boxes[:, :, queries], chosen, labels, truth, present)
        return objective.matched_losses(*parts, ignored)[0].item()

    assert label_loss([0, 1, 2], area) == pytest.approx(label_loss([0, 1], None), rel=1e-6)
    assert label_loss([0, 1, 2], None) > label_loss([0, 1], None) * 1.2


def test_scale_reaches_poses_and_survives_the_file(tmp_path: object) -> None:
    torch.manual_seed(0)
    tiny = SmopeSConfig(
        encoder_layers=1, decoder_layers=1, queries=6, surface_points=64, anchors=8, refine_layers=1,
        rebuilt_points=16, region_cells=8, predict_scale=True,
    )  # fmt: skip
    network, slab = SmopeS(tiny), quarter_turned()
    assert network.pose_head.log_scale is not None
    torch.nn.init.normal_(network.pose_head.log_scale.layers[-1].weight, std=0.2)
    rows = tuple(tuple(row) for row in CLOSE.tolist())
    config = ModelConfig("smope-s", tiny, ("slab",), (96, 64), rows, (1.0, 3.0))
    model = SMOPE(network, config, {"slab": replace(slab, trained=True)})
    image = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    found = model.predict(image, K=CLOSE, threshold=0.0, top_k=4)
    assert len(found) > 0
    assert not torch.allclose(found.scale, torch.ones_like(found.scale), atol=1e-3)
    model.save_pretrained(f"{tmp_path}/model")
    again = SMOPE.from_pretrained(f"{tmp_path}/model", device="cpu").predict(
        image, K=CLOSE, threshold=0.0, top_k=4
    )
    assert torch.allclose(again.scale, found.scale, atol=1e-5)
    # The middle of the stretched mesh is where the network put it: on the ray of a pixel, not moved by scale.
    corners = torch.tensor(list(itertools.product(*zip((-0.7, -1.2, 0.0), (1.3, 0.8, 0.5), strict=True))))
    placed = (corners * found.scale[0]) @ found.T_CO[0, :3, :3].T + found.T_CO[0, :3, 3]
    middle = found.T_CO[0, :3, :3] @ (slab.centre * found.scale[0]) + found.T_CO[0, :3, 3]
    assert torch.allclose(placed.mean(0), middle, atol=1e-4)
