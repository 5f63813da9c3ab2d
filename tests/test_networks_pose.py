"""Geometry inside the network: head, refinement, denoising, and what registering a mesh may change."""

from __future__ import annotations

import math

import pytest
import roma
import torch
from torch import Tensor

from smope.networks.attention3d import MeshAttention, MeshSimilarity
from smope.networks.denoising import attention_mask, noised_boxes
from smope.networks.mesh_encoder import MeshEncoder, MeshInputs, MeshTokens
from smope.networks.outputs import PoseEstimate
from smope.networks.pose_head import pixels_to_unit, pose_from_values, unit_to_pixels

SIZE = (640, 480)
K = torch.tensor([[[572.4, 0.0, 325.3], [0.0, 573.6, 242.0], [0.0, 0.0, 1.0]]])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_pixels_and_unit_coordinates_meet_at_the_image_borders() -> None:
    corners = torch.tensor([[-0.5, -0.5], [639.5, 479.5], [319.5, 239.5]])
    expected = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.5, 0.5]])
    assert torch.allclose(pixels_to_unit(corners, SIZE), expected)
    assert torch.allclose(unit_to_pixels(expected, SIZE), corners)


def head(boxes: Tensor, K: Tensor, shift: Tensor | None = None, log_factor: float = 0.0) -> PoseEstimate:
    rotation6 = torch.tensor([1.0, 0, 0, 0, 1, 0]).expand(1, len(boxes), 6)
    shift = torch.zeros(1, len(boxes), 2) if shift is None else shift
    diameters = torch.full((1, len(boxes)), 0.2)
    return pose_from_values(
        rotation6, shift, torch.full((1, len(boxes)), log_factor), boxes[None], diameters, K, SIZE
    )


def test_the_head_puts_the_object_on_the_ray_of_its_centre_at_the_depth_of_its_size() -> None:
    boxes = torch.tensor([[0.3, 0.6, 0.1, 0.2], [0.5, 0.5, 0.05, 0.05]])
    shift = torch.tensor([[[0.1, -0.2], [0.0, 0.0]]])
    pose = head(boxes, K, shift, log_factor=0.3)
    u = 0.3 * 640 - 0.5 + 0.1 * 64
    v = 0.6 * 480 - 0.5 - 0.2 * 96
    z = math.sqrt(572.4 * 573.6) * 0.2 / math.sqrt(64 * 96) * math.exp(0.3)
    expected = torch.tensor([(u - 325.3) / 572.4 * z, (v - 242.0) / 573.6 * z, z])
    assert torch.allclose(pose.translation[0, 0], expected, atol=1e-5)


def test_another_focal_length_with_the_same_box_scales_the_depth() -> None:
    boxes = torch.tensor([[0.4, 0.5, 0.2, 0.2]])
    longer = K.clone()
    longer[:, [0, 1], [0, 1]] *= 1.4
    near, far = head(boxes, K), head(boxes, longer)
    assert far.translation[0, 0, 2] / near.translation[0, 0, 2] == pytest.approx(1.4, rel=1e-5)


def test_an_object_off_the_axis_is_turned_towards_its_ray() -> None:
    """Allocentric rotation: the identity at the image's edge is the turn of the optical axis onto the ray."""
    pose = head(torch.tensor([[0.95, 0.9, 0.1, 0.1]]), K)
    ray = torch.nn.functional.normalize(pose.translation[0, 0], dim=0)
    assert torch.allclose(pose.rotation[0, 0] @ torch.tensor([0.0, 0.0, 1.0]), ray, atol=1e-6)
    axis = torch.linalg.cross(torch.tensor([0.0, 0.0, 1.0]), ray)
    angle = torch.atan2(axis.norm(), ray[2])
    expected = roma.rotvec_to_rotmat(axis / axis.norm() * angle)
    assert torch.allclose(pose.rotation[0, 0], expected, atol=1e-5)


def mesh_inputs(count: int, seed: int = 0) -> MeshInputs:
    g = seeded(seed)
    surface = torch.randn(count, 200, 10, generator=g)
    return MeshInputs(surface, torch.rand(count, generator=g) + 0.1, surface[:, :16, :9])


def test_mesh_tokens_do_not_depend_on_the_order_of_points_or_on_other_meshes() -> None:
    torch.manual_seed(0)
    encoder = MeshEncoder().eval()
    inputs = mesh_inputs(3)
    order = torch.randperm(200, generator=seeded(1))
    with torch.no_grad():
        tokens = encoder(inputs)
        shuffled = encoder(MeshInputs(inputs.surface[:, order], inputs.diameters, inputs.anchors))
        alone = encoder(MeshInputs(inputs.surface[1:2], inputs.diameters[1:2], inputs.anchors[1:2]))
    assert torch.allclose(tokens.embedding, shuffled.embedding, atol=1e-5)
    assert torch.allclose(tokens.local, shuffled.local, atol=1e-5)
    assert torch.allclose(tokens.embedding[1], alone.embedding[0], atol=1e-5)
    assert (tokens.embedding[0] - tokens.embedding[1]).abs().max() > 0.1


def test_a_new_mesh_changes_no_other_similarity_and_no_other_pair() -> None:
    torch.manual_seed(0)
    encoder, similarity, attention = MeshEncoder(), MeshSimilarity(), MeshAttention()
    queries = torch.randn(2, 5, 256)
    labels = torch.tensor([[0, 1, 2, 1, 0], [2, 2, 0, 1, 1]])
    with torch.no_grad():
        eight, nine = encoder(mesh_inputs(3)), encoder(mesh_inputs(4, seed=9))
        more = MeshTokens.cat(
            [eight, MeshTokens(*(x[3:] for x in (nine.embedding, nine.local, nine.diameters, nine.anchors)))]
        )
        assert torch.allclose(similarity(queries, eight), similarity(queries, more)[..., :3], atol=1e-6)
        pairs, pairs_more = attention(queries, labels, eight), attention(queries, labels, more)
    assert torch.allclose(pairs, pairs_more, atol=1e-6)


def test_mesh_attention_is_attention_to_the_tokens_of_the_pairs_own_mesh() -> None:
    """Against torch's own multi-head attention with the same weights, pair by pair."""
    torch.manual_seed(3)
    attention = MeshAttention(width=32, heads=4, hidden=64)
    tokens = MeshTokens(torch.randn(3, 32), torch.randn(3, 6, 32), torch.ones(3), torch.zeros(3, 4, 9))
    queries, labels = torch.randn(1, 4, 32), torch.tensor([[2, 0, 1, 2]])
    reference = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([attention.query.weight, attention.key_value.weight]))
        reference.in_proj_bias.copy_(torch.cat([attention.query.bias, attention.key_value.bias]))
        reference.out_proj.weight.copy_(attention.output.weight)
        reference.out_proj.bias.copy_(attention.output.bias)
        found = attention(queries, labels, tokens)
        for i, label in enumerate(labels[0].tolist()):
            x = attention.norm(queries[0, i] + attention.embedding(tokens.embedding[label]))
            local = tokens.local[label][None]
            attended = reference(x[None, None], local, local)[0][0, 0]
            expected = attention.feed_forward(attention.output_norm(x + attended))
            assert torch.allclose(found[0, i], expected, atol=1e-5)


def test_denoising_boxes_stay_near_the_truth_and_groups_apart() -> None:
    torch.manual_seed(0)
    labels = torch.tensor([[0, 1, -1]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.1], [0.3, 0.7, 0.1, 0.1], [0.0, 0.0, 0.0, 0.0]]])
    noised = noised_boxes(labels, boxes, groups=50)
    assert noised.shape == (1, 150, 4)
    first = noised[0, 0::3]
    assert ((first[:, :2] - 0.5).abs() <= torch.tensor([0.04, 0.02]) + 1e-6).all()
    assert (first[:, 2:] / torch.tensor([0.2, 0.1]) - 1).abs().max() <= 0.4 + 1e-6
    assert first.std(0).min() > 0.005

    blocked = attention_mask(groups=2, slots=2, queries=3, device=torch.device("cpu"))
    seen = ~blocked
    assert seen[0].tolist() == [True, True, False, False, True, True, True]
    assert seen[2].tolist() == [False, False, True, True, True, True, True]
    assert seen[4].tolist() == [False, False, False, False, True, True, True]
