"""Losses, matching and pose targets against scipy, brute force and hand-computed values."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import roma
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from torch import Tensor

from smope.data.items import Batch
from smope.geometry.boxes import cxcywh_to_xyxy, paired_giou, paired_iou, xyxy_to_cxcywh
from smope.networks.outputs import Detections
from smope.networks.smope_s import SmopeS, SmopeSConfig, Targets
from smope.objects import ObjectModel, Symmetries
from smope.train.losses import chamfer, laplace_nll, masked_mean, model_point_distance, varifocal
from smope.train.matcher import HungarianMatcher
from smope.train.objective import LossConfig, Objective
from smope.train.pose_targets import ObjectTable, PairTruth

TINY = SmopeSConfig(
    encoder_layers=1, decoder_layers=2, queries=12, surface_points=128, anchors=16, rebuilt_points=32
)


def box_object(name: str, size: tuple[float, float, float], half_turn: bool = False) -> ObjectModel:
    """A box off its origin; alike after half a turn about its own z axis where `half_turn`."""
    corner = np.array([0.02, -0.01, 0.03])
    vertices = np.array(list(itertools.product(*[(0.0, s) for s in size]))) + corner
    faces = [
        [0, 1, 3],
        [0, 3, 2],
        [4, 6, 7],
        [4, 7, 5],
        [0, 4, 5],
        [0, 5, 1],
        [2, 3, 7],
        [2, 7, 6],
        [0, 2, 6],
        [0, 6, 4],
    ]
    faces += [[1, 5, 7], [1, 7, 3]]
    symmetries = None
    if half_turn:
        turn = torch.diag(torch.tensor([-1.0, -1.0, 1.0, 1.0]))
        centre = torch.tensor(vertices.mean(0), dtype=torch.float32)
        turn[:3, 3] = centre - turn[:3, :3] @ centre
        symmetries = Symmetries(turn[None])
    return ObjectModel.from_mesh(name, (vertices, np.array(faces)), "m", symmetries=symmetries)


@pytest.fixture(scope="module")
def objects() -> list[ObjectModel]:
    return [box_object("long", (0.2, 0.1, 0.05)), box_object("flat", (0.1, 0.12, 0.02), half_turn=True)]


def make_batch(height: int = 96, width: int = 128, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    T = torch.eye(4).repeat(2, 3, 1, 1)
    T[..., :3, :3] = roma.unitquat_to_rotmat(
        torch.nn.functional.normalize(torch.randn(2, 3, 4, generator=g), dim=-1)
    )
    T[..., :3, 3] = torch.tensor([0.0, 0.0, 0.6]) + 0.1 * torch.randn(2, 3, 3, generator=g)
    boxes = torch.rand(2, 3, 2, generator=g) * 60
    return Batch(
        images=torch.rand(2, 3, height, width, generator=g),
        K=torch.tensor([[120.0, 0.0, 64.0], [0.0, 120.0, 48.0], [0.0, 0.0, 1.0]]).expand(2, 3, 3),
        labels=torch.tensor([[0, 1, -1], [-1, -1, -1]]),
        T_CO=T,
        boxes_xyxy=torch.cat([boxes, boxes + 30], -1),
        visibility=torch.rand(2, 3, generator=g),
        instance=torch.randint(0, 3, (2, height, width), generator=g, dtype=torch.uint8),
        depth=torch.rand(2, height, width, generator=g) + 0.3,
    )


boxes_strategy = st.lists(st.integers(0, 20), min_size=4, max_size=4).map(
    lambda v: (min(v[0], v[2]), min(v[1], v[3]), max(v[0], v[2]) + 1, max(v[1], v[3]) + 1)
)


@given(boxes_strategy, boxes_strategy)
def test_iou_and_giou_count_cells(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    def cells(box: tuple[int, ...]) -> set[tuple[int, int]]:
        return set(itertools.product(range(box[0], box[2]), range(box[1], box[3])))

    common, union = len(cells(a) & cells(b)), len(cells(a) | cells(b))
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    first, second = torch.tensor([a], dtype=torch.float32), torch.tensor([b], dtype=torch.float32)
    assert paired_iou(first, second)[0].item() == pytest.approx(common / union, abs=1e-6)
    assert paired_giou(first, second).item() == pytest.approx(
        common / union - (hull - union) / hull, abs=1e-6
    )
    assert torch.allclose(cxcywh_to_xyxy(xyxy_to_cxcywh(first)), first)


def test_varifocal_by_hand() -> None:
    logits, quality = torch.tensor([0.3, -1.2, 2.0]), torch.tensor([0.8, 0.0, 0.0])
    p = 1 / (1 + np.exp(-logits.numpy().astype(float)))
    expected = [
        0.8 * -(0.8 * np.log(p[0]) + 0.2 * np.log(1 - p[0])),
        0.75 * p[1] ** 2 * -np.log(1 - p[1]),
        0.75 * p[2] ** 2 * -np.log(1 - p[2]),
    ]
    assert np.allclose(varifocal(logits, quality).numpy(), expected, atol=1e-6)


def test_chamfer_against_a_kd_tree() -> None:
    a, b = torch.rand(1, 50, 3), torch.rand(1, 70, 3)
    there = cKDTree(b[0].numpy()).query(a[0].numpy())[0].mean()
    back = cKDTree(a[0].numpy()).query(b[0].numpy())[0].mean()
    assert chamfer(a, b).item() == pytest.approx((there + back) / 2, rel=1e-4)


def test_small_losses_by_hand() -> None:
    quarter = roma.rotvec_to_rotmat(torch.tensor([0.0, 0.0, np.pi / 2]))
    points = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 5.0]])
    expected = (2**0.5 + 2 * 2**0.5 + 0) / 3
    assert model_point_distance(quarter, torch.eye(3), points).item() == pytest.approx(expected, rel=1e-5)
    assert laplace_nll(torch.tensor(0.0), torch.tensor(0.7)).item() == pytest.approx(0.7)
    assert masked_mean(torch.tensor([1.0, 5.0, 9.0]), torch.tensor([1, 0, 1])).item() == 5.0
    assert masked_mean(torch.tensor([1.0]), torch.tensor([0])).item() == 0.0


def test_laplace_likelihood_is_best_at_the_mean_error() -> None:
    errors = torch.tensor([0.1, 0.4, 0.7])
    grid = torch.linspace(-3, 1, 4001)
    losses = laplace_nll(grid[:, None], errors).mean(1)
    assert grid[losses.argmin()].exp().item() == pytest.approx(0.4, rel=2e-3)


def test_matcher_finds_the_cheapest_assignment_of_all() -> None:
    g = torch.Generator().manual_seed(2)
    logits, boxes = torch.randn(2, 1, 6, 3, generator=g), torch.rand(2, 1, 6, 4, generator=g) * 0.5 + 0.2
    found = Detections(
        torch.zeros(2, 1, 6, 8), boxes, logits, boxes[0][:, :5], logits[0, :, :5, 0], denoising=1
    )
    targets = Targets(torch.tensor([[2, -1, 0]]), torch.rand(1, 3, 4, generator=g) * 0.4 + 0.3)
    match = HungarianMatcher()(found, targets)
    assert match.shape == (3, 1, 3)
    assert (match[:, :, 1] == -1).all()

    def cost(logit: Tensor, box: Tensor, slot: int) -> float:
        p = logit.sigmoid()
        focal = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p**2 * -(1 - p + 1e-8).log()
        truth = targets.boxes[0, slot]
        giou = paired_giou(cxcywh_to_xyxy(box), cxcywh_to_xyxy(truth))
        return float(2 * focal + 5 * (box - truth).abs().sum() - 2 * giou)

    for layer in range(2):

        def total(pair: tuple[int, int], layer: int = layer) -> float:
            return cost(logits[layer, 0, pair[0] + 1, 2], boxes[layer, 0, pair[0] + 1], 0) + cost(
                logits[layer, 0, pair[1] + 1, 0], boxes[layer, 0, pair[1] + 1], 2
            )

        best = min(itertools.permutations(range(5), 2), key=total)
        assert (match[layer, 0, 0].item(), match[layer, 0, 2].item()) == best


def test_nearest_pose_is_the_symmetric_one_that_moves_points_least(objects: list[ObjectModel]) -> None:
    table = ObjectTable.of(objects)
    batch = make_batch()
    slots = torch.tensor([[0, 1], [0, 1]])
    truth = PairTruth.of(table, batch.labels, batch.T_CO, slots, batch.K)
    turned = batch.T_CO[:, 1] @ objects[1].symmetries.discrete[0]  # the flat box, half a turn away
    pose = truth.nearest(torch.stack([batch.T_CO[:, 0, :3, :3], turned[:, :3, :3]], 1))
    assert torch.allclose(pose.rotation[0, 1], turned[0, :3, :3], atol=1e-5)
    centre = turned[0, :3, :3] @ objects[1].centre + turned[0, :3, 3]
    assert torch.allclose(pose.translation[0, 1], centre, atol=1e-5)
    pose = truth.nearest(batch.T_CO[:, :2, :3, :3])
    assert torch.allclose(pose.rotation[0], batch.T_CO[0, :2, :3, :3], atol=1e-5)


def test_surface_coordinates_at_a_stride() -> None:
    """A wall at depth 2 seen by a camera of focal length 10: coordinates by hand."""
    T = torch.eye(4).expand(1, 1, 4, 4).clone()
    T[0, 0, :3, 3] = torch.tensor([0.1, 0.0, 1.9])
    instance = torch.zeros(1, 16, 16, dtype=torch.uint8)
    instance[0, 4, 12] = 1
    batch = Batch(
        images=torch.zeros(1, 3, 16, 16),
        K=torch.tensor([[[10.0, 0, 8], [0, 10, 8], [0, 0, 1]]]),
        labels=torch.tensor([[1]]),
        T_CO=T,
        boxes_xyxy=torch.zeros(1, 1, 4),
        visibility=torch.ones(1, 1),
        instance=instance,
        depth=torch.full((1, 16, 16), 2.0),
    )
    where, label = batch.surface_at_stride(
        8, torch.tensor([[9.0, 9, 9], [0.0, 0.1, 0]]), torch.tensor([1.0, 0.5])
    )
    assert label.tolist() == [[[-1, 1], [-1, -1]]]
    # pixel (12, 4): x = (12 - 8) / 10 * 2 = 0.8, y = -0.8, z = 2; minus origin and centre, over 0.5
    assert torch.allclose(where[0, :, 0, 1], torch.tensor([1.4, -1.8, 0.2]), atol=1e-5)
    assert where[0, :, 1, 0].abs().max() == 0


def test_an_objective_step_reaches_every_parameter_and_survives_an_empty_image(
    objects: list[ObjectModel],
) -> None:
    torch.manual_seed(0)
    network = SmopeS(TINY).train()
    loss, parts = Objective(objects)(network, make_batch())
    loss.backward()
    assert torch.isfinite(loss)
    assert set(parts) >= {
        "label",
        "l1",
        "giou",
        "rotation/direct",
        "depth/refined",
        "depth/region",
        "regions/where",
        "offsets",
        "mesh/points",
        "sigma",
    }
    without = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("factor", "ending"), [("direct", "direct"), ("fitted", "region"), ("refined", "refined")]
)
def test_the_total_weighs_each_part_and_the_poses_of_one_kind_once_more(
    objects: list[ObjectModel], factor: str, ending: str
) -> None:
    torch.manual_seed(0)
    network, config = SmopeS(TINY).train(), LossConfig(depth=3.0, label=0.5, **{factor: 2.5})
    loss, parts = Objective(objects, config)(network, make_batch())
    plain = {name: getattr(config, name.split("/")[0]) * value.item() for name, value in parts.items()}
    assert plain[f"depth/{ending}"] == pytest.approx(3 * parts[f"depth/{ending}"].item())
    more = sum(1.5 * value for name, value in plain.items() if name.endswith(f"/{ending}"))
    assert more > 0
    assert loss.item() == pytest.approx(sum(plain.values()) + more, rel=1e-5)


def test_a_few_steps_on_one_batch_bring_the_loss_down(objects: list[ObjectModel]) -> None:
    torch.manual_seed(0)
    network, objective, batch = SmopeS(TINY).train(), Objective(objects), make_batch()
    optimiser = torch.optim.AdamW(network.parameters(), 3e-4)
    losses = []
    for _ in range(12):
        loss, _ = objective(network, batch)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) / 3 < 0.8 * losses[0]
