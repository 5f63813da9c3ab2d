"""The squares around boxes: where their cells are, what they are told to see, and what they add."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import trimesh
from small_model import small_model

from smope.data.items import Batch
from smope.network_inputs import mesh_inputs
from smope.networks.gauss_newton import fit_pose, prior_of
from smope.networks.outputs import PoseEstimate, Regions
from smope.networks.pose_head import pixels_to_unit
from smope.networks.refine import read_maps
from smope.networks.regions import RegionReader, cell_grid, square_cells
from smope.objects import ObjectModel
from smope.train.objective import Objective
from smope.train.pose_targets import PairTruth

FOCAL, CENTRE, SIZE = 100.0, (39.5, 29.5), (80, 60)


def test_cells_share_a_square_a_little_larger_than_the_box() -> None:
    boxes = torch.tensor([[[0.5, 0.25, 0.2, 0.1]]])  # 40 x 12 pixels about (99.5, 29.5) of 200 x 120
    pixels, points, share = square_cells(boxes, cell_grid(4, boxes.device), (200, 120))
    steps = [-21.0, -7.0, 7.0, 21.0]  # 56 pixels in four
    assert torch.allclose(pixels[0, 0, 0, :, 0], torch.tensor(steps) + 99.5)
    assert torch.allclose(pixels[0, 0, :, 0, 1], torch.tensor(steps) + 29.5)
    assert torch.allclose(points, pixels_to_unit(pixels, (200, 120)), atol=1e-6)
    assert torch.allclose(torch.cat(share, -1), torch.tensor([40 / 56, 12 / 56]))
    upright = boxes[..., [0, 1, 3, 2]]  # 20 x 24 pixels
    pixels, _, share = square_cells(upright, cell_grid(4, boxes.device), (200, 120))
    assert torch.allclose(pixels[0, 0, 0, :, 0].diff(), torch.tensor(24 * 1.4 / 4))
    assert torch.allclose(torch.cat(share, -1), torch.tensor([20, 24]) / (24 * 1.4))


def reader_inputs() -> tuple[
    RegionReader, PoseEstimate, torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]
]:
    torch.manual_seed(0)
    reader = RegionReader(32, sampled=6, cells=8, blocks=3, hidden=16)
    for block in reader.blocks:  # as after some training
        torch.nn.init.normal_(block.conv.weight, std=0.1)
    maps = (torch.randn(2, 4, 12, 16), torch.randn(2, 2, 6, 8))
    start = PoseEstimate(
        torch.eye(3).expand(2, 3, 3, 3), torch.tensor([0.0, 0.0, 0.5]).expand(2, 3, 3), torch.zeros(2, 3, 2)
    )
    return reader, start, torch.randn(2, 3, 32), torch.rand(2, 3, 4) * 0.4 + 0.3, maps


def test_a_reader_fits_the_pose_to_what_its_cells_say_and_learns_from_it() -> None:
    reader, start, pairs, boxes, maps = reader_inputs()
    K = torch.tensor([[[100.0, 0, 63.5], [0, 100.0, 47.5], [0, 0, 1.0]]]).repeat(2, 1, 1)
    diameters = torch.full((2, 3), 0.1)
    pose, seen, regions = reader(start, pairs, boxes, maps, diameters, K, (128, 96))
    assert torch.equal(seen, pairs)  # what is seen is added to the pairs only as it is learned
    assert regions.surface.shape == (2, 3, 8, 8, 4)
    weights = regions.surface[..., 3].sigmoid().flatten(2)
    points, cells = regions.surface[..., :3].flatten(2, 3), regions.pixels.flatten(2, 3)
    prior = torch.zeros(2, 3, 6), torch.full((2, 3, 6), math.log(2) * 0.1 + 1e-4)
    expected = fit_pose(start, points, cells, weights, *prior, diameters, K, steps=3)
    assert torch.allclose(pose.rotation, expected.rotation, atol=1e-5)
    assert torch.allclose(pose.translation, expected.translation, atol=1e-5)
    (pose.translation * torch.randn(3)).sum().backward()
    for layer in (reader.surface, reader.trust):
        assert layer.weight.grad is not None
        assert layer.weight.grad.abs().max() > 0


def test_a_deeper_reader_begins_with_what_a_shallower_one_sees() -> None:
    reader, start, pairs, boxes, maps = reader_inputs()
    K = torch.tensor([[[100.0, 0, 63.5], [0, 100.0, 47.5], [0, 0, 1.0]]]).repeat(2, 1, 1)
    deeper = RegionReader(32, sampled=6, cells=8, blocks=5, hidden=16)
    missing, unexpected = deeper.load_state_dict(reader.state_dict(), strict=False)
    assert {key.split(".")[1] for key in missing} == {"3", "4"}
    assert not unexpected
    given = (start, pairs, boxes, maps, torch.full((2, 3), 0.1), K, (128, 96))
    assert torch.equal(deeper(*given)[2].surface, reader(*given)[2].surface)
    torch.nn.init.normal_(deeper.blocks[4].conv.weight, std=0.1)
    assert not torch.allclose(deeper(*given)[2].surface, reader(*given)[2].surface, atol=1e-3)


def test_a_single_image_has_the_same_pose_as_in_a_batch() -> None:
    reader, start, pairs, boxes, maps = reader_inputs()
    K = torch.tensor([[[100.0, 0, 63.5], [0, 100.0, 47.5], [0, 0, 1.0]]]).repeat(2, 1, 1)
    diameters = torch.full((2, 3), 0.1)
    both, _, _ = reader(start, pairs, boxes, maps, diameters, K, (128, 96))
    second = PoseEstimate(start.rotation[1:], start.translation[1:], start.centre[1:])
    alone, _, _ = reader(
        second, pairs[1:], boxes[1:], tuple(m[1:] for m in maps), diameters[1:], K[1:], (128, 96)
    )
    assert torch.allclose(both.translation[1:], alone.translation, atol=1e-5)
    assert torch.allclose(both.rotation[1:], alone.rotation, atol=1e-5)


def plainly_read(
    reader: RegionReader,
    direct: PoseEstimate,
    pairs: torch.Tensor,
    boxes: torch.Tensor,
    maps: tuple[torch.Tensor, ...],
    diameters: torch.Tensor,
    K: torch.Tensor,
    size: tuple[int, int],
) -> tuple[PoseEstimate, torch.Tensor, torch.Tensor]:
    """What the reader does, layer by layer, on joined inputs: pose, pairs, surface"""
    n = reader.cells
    grid = cell_grid(n, boxes.device)
    pixels, _, share = square_cells(boxes, grid, size)
    seen = read_maps(maps, pixels_to_unit(pixels.flatten(2, 3), size))
    x = reader.read(torch.cat([seen, grid.flatten(0, 1).expand(*seen.shape[:3], 2)], -1))
    gain, shift = reader.pair(torch.cat([pairs, *share], -1))[..., None, :].chunk(2, -1)
    x = (x * (1 + gain) + shift).flatten(0, 1).unflatten(1, (n, n))
    for block in reader.blocks:
        x = block(x)
    x = reader.norm(x).relu().flatten(1, 2).unflatten(0, pairs.shape[:2])
    surface = reader.surface(x)
    weights = surface[..., 3].sigmoid() * (2 * reader.trust(x)[..., 0].sigmoid())
    means = [(weights[..., None] * x).mean(-2), x.mean(-2)]
    pairs = pairs + reader.summary(torch.cat(means, -1))
    given = (surface[..., :3], pixels.flatten(2, 3), weights, *prior_of(reader.prior(pairs)))
    return fit_pose(direct, *given, diameters, K, reader.steps), pairs, surface


def test_a_reader_is_its_layers_one_after_the_other() -> None:
    """Values and all gradients: products of parts, and of two layers at once, change nothing."""
    reader, start, pairs, boxes, maps = reader_inputs()
    for parameter in reader.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    K = torch.tensor([[[100.0, 0, 63.5], [0, 100.0, 47.5], [0, 0, 1.0]]]).repeat(2, 1, 1)
    results = []
    for read in (reader, lambda *given: plainly_read(reader, *given)):
        leaves = [pairs.clone().requires_grad_(), *(m.clone().requires_grad_() for m in maps)]
        reader.zero_grad()
        pose, added, surface = read(
            start, leaves[0], boxes, tuple(leaves[1:]), torch.full((2, 3), 0.1), K, (128, 96)
        )
        if isinstance(surface, Regions):
            surface = surface.surface.flatten(2, 3)
        made = [pose.rotation, pose.translation, added, surface]
        sum((y * torch.arange(y.numel()).view_as(y).cos()).sum() for y in made).backward()
        results.append([*made, *(x.grad for x in (*leaves, *reader.parameters()))])
    for found, expected in zip(*results, strict=True):
        bound = 1e-5 * float(expected.detach().abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=bound)


def sphere_scene() -> tuple[ObjectModel, Batch, torch.Tensor]:
    """A ball seen by a pinhole (quadratic of ray and sphere), and the points seen [H, W, 3] in metres."""
    model = ObjectModel.from_mesh("ball", trimesh.creation.icosphere(subdivisions=4, radius=0.05), "m")
    place = torch.tensor([0.02, -0.01, 0.5])
    u, v = np.meshgrid(np.arange(SIZE[0]), np.arange(SIZE[1]))
    rays = np.stack([(u - CENTRE[0]) / FOCAL, (v - CENTRE[1]) / FOCAL, np.ones(u.shape)], -1)
    a, b = (rays**2).sum(-1), rays @ place.numpy().astype(np.float64)
    root = b**2 - a * (float(place @ place) - 0.05**2)
    depth = np.where(root > 0, (b - np.sqrt(root.clip(min=0))) / a, 0.0)
    points = torch.from_numpy(rays * depth[..., None]).float()
    T = torch.eye(4)
    T[:3, 3] = place
    K = torch.tensor([[FOCAL, 0, CENTRE[0]], [0, FOCAL, CENTRE[1]], [0, 0, 1.0]])
    depths = torch.from_numpy(depth).float()[None]
    batch = Batch(
        images=torch.zeros(1, 3, SIZE[1], SIZE[0]),
        K=K[None],
        labels=torch.tensor([[0, -1]]),
        T_CO=torch.stack([T, torch.eye(4)])[None],
        boxes_xyxy=torch.tensor([[[30.0, 15, 55, 40], [0, 0, 0, 0]]]),
        visibility=torch.tensor([[1.0, 0.0]]),
        instance=(depths > 0).to(torch.uint8),
        depth=depths,
    )
    return model, batch, points


def test_what_cells_see_is_where_the_ray_meets_the_ball() -> None:
    model, batch, points = sphere_scene()
    objective = Objective([model])
    slots = torch.tensor([[0]])
    truth = PairTruth.of(objective.table, batch.labels, batch.T_CO, slots, batch.K)
    pose = PoseEstimate(torch.eye(3).expand(1, 1, 3, 3), batch.T_CO[:, :1, :3, 3], torch.zeros(1, 1, 2))
    boxes = torch.tensor([[[43.5 / 80, 28.0 / 60, 24 / 80, 24 / 60]]])
    pixels, *_ = square_cells(boxes, cell_grid(8, boxes.device), SIZE)
    u, v = (x.round().long().clamp(min=0) for x in pixels[0, 0].unbind(-1))
    expected = (points[v, u] - batch.T_CO[0, 0, :3, 3]) / model.diameter
    on_ball = batch.depth[0, v, u] > 0  # type: ignore[index]
    assert 12 < on_ball.sum() < 24  # 18 cells of 4.2 pixels fit into a disc of 20

    def losses(surface: torch.Tensor) -> dict[str, float]:
        regions = Regions(pixels, surface[None, None])
        parts = objective.region_losses(regions, pose, truth, batch, slots, torch.ones(1, 1))
        return {name: float(value) for name, value in parts.items()}

    sure = torch.where(on_ball, 20.0, -20.0)[..., None]
    right = losses(torch.cat([expected, sure], -1))
    assert right["regions/where"] < 1e-4
    assert right["regions/seen"] < 1e-6
    # A tenth of a diameter in x, four times over; and no idea of what is seen.
    wrong = losses(torch.cat([expected + torch.tensor([0.1, 0, 0]), 0 * sure], -1))
    assert wrong["regions/where"] == pytest.approx(0.4, rel=1e-3)
    assert wrong["regions/seen"] == pytest.approx(math.log(2), rel=1e-5)


def test_of_poses_that_look_alike_the_nearest_says_where() -> None:
    model, batch, _ = sphere_scene()
    turn = torch.diag(torch.tensor([-1.0, -1.0, 1.0, 1.0]))
    twice = replace(model, symmetries=replace(model.symmetries, discrete=turn[None]))
    objective, slots = Objective([twice]), torch.tensor([[0]])
    truth = PairTruth.of(objective.table, batch.labels, batch.T_CO, slots, batch.K)
    boxes = torch.tensor([[[43.5 / 80, 28.0 / 60, 24 / 80, 24 / 60]]])
    pixels, *_ = square_cells(boxes, cell_grid(8, boxes.device), SIZE)
    found = []
    for rotation in (torch.eye(3), turn[:3, :3]):
        pose = PoseEstimate(rotation.expand(1, 1, 3, 3), batch.T_CO[:, :1, :3, 3], torch.zeros(1, 1, 2))
        surface = torch.zeros(1, 1, 8, 8, 4, requires_grad=True)
        parts = objective.region_losses(Regions(pixels, surface), pose, truth, batch, slots, torch.ones(1, 1))
        found.append(torch.autograd.grad(parts["regions/where"], surface)[0][..., :3])
    # The gradient's sign is that of minus the place: half a turn about z mirrors x and y.
    assert torch.equal(found[0][..., :2], -found[1][..., :2])
    assert torch.equal(found[0][..., 2], found[1][..., 2])
    assert found[0].abs().max() > 0


def test_one_more_mesh_takes_no_query_from_another() -> None:
    model = small_model()
    network = model.network
    image, K = torch.rand(1, 3, 64, 96), torch.tensor([[[90.0, 0, 47.5], [0, 90.0, 31.5], [0, 0, 1]]])
    objects = list(model.objects.values())
    one, two = (
        network.encode_meshes(
            mesh_inputs(some, network.config.surface_points, network.config.anchors)  # type: ignore[union-attr,arg-type]
        )
        for some in (objects[:1], objects)
    )
    with torch.no_grad():
        alone, both = (network(image, K, tokens, top_k=12) for tokens in (one, two))
    ranked = both.labels[0] == 0
    count = int(ranked.sum())
    assert count > 0
    assert torch.allclose(both.scores[0][ranked], alone.scores[0, :count], atol=1e-6)
    assert torch.allclose(
        both.pairs.poses[-1].translation[0][ranked],
        alone.pairs.poses[-1].translation[0, :count],
        atol=1e-5,
    )
