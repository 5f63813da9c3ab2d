"""Scores after a closer look: which wrong pairs are learned from, and what becomes of the scores."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import expit, logit
from small_model import noise, small_model

from smope import SMOPE
from smope.config import ConfigError
from smope.data.items import Batch
from smope.export.network import PlainNetwork, mesh_tensors
from smope.network_inputs import mesh_inputs
from smope.networks.rivals import Rivals, choose_rivals, shifted_scores
from smope.networks.smope_s import SmopeS, Targets
from smope.objects import ObjectModel
from smope.results import find_table
from smope.train.choice import make_objective, network_config
from smope.train.objective import LossConfig, Objective
from smope.train.recipe import Recipe
from smope.train.rescore import rescore_loss

K = torch.tensor([[[90.0, 0, 47.5], [0, 90.0, 31.5], [0, 0, 1]]])


def looking_closer() -> tuple[SMOPE, SmopeS]:
    """The small model with its weights, and with rescoring that shifts by much and by little."""
    model = small_model()
    plain = model.network
    assert isinstance(plain, SmopeS)
    torch.manual_seed(3)
    network = SmopeS(replace(plain.config, rescore=True)).eval()
    missing, unknown = network.load_state_dict(plain.state_dict(), strict=False)
    assert not unknown
    assert all(key.startswith("rescorer.") for key in missing)
    assert network.rescorer is not None
    with torch.no_grad():
        network.rescorer.layers[-1].weight.mul_(30)
        network.rescorer.layers[-1].bias.fill_(4.0)
    return model, network


def test_rivals_are_the_best_scored_pairs_whose_mesh_is_elsewhere() -> None:
    rng = np.random.default_rng(0)
    boxes = torch.tensor(rng.uniform(0.2, 0.6, (2, 9, 4)), dtype=torch.float32)
    truth = torch.tensor(rng.uniform(0.2, 0.6, (2, 3, 4)), dtype=torch.float32)
    boxes[0, 2], boxes[0, 5], boxes[1, 7] = truth[0, 0], truth[0, 1], truth[1, 2]
    labels = torch.tensor([[1, 0, -1], [-1, -1, 2]])
    logits = torch.tensor(rng.normal(size=(2, 9, 4)), dtype=torch.float32)
    query, label, score = choose_rivals(logits, boxes, labels, truth, 5)
    for image in range(2):
        wrong = {}
        for q in range(9):
            x, y, w, h = boxes[image, q].tolist()
            for mesh in range(4):
                most = 0.0
                for box, name in zip(truth[image].tolist(), labels[image].tolist(), strict=True):
                    if name != mesh:
                        continue
                    across = min(x + w / 2, box[0] + box[2] / 2) - max(x - w / 2, box[0] - box[2] / 2)
                    down = min(y + h / 2, box[1] + box[3] / 2) - max(y - h / 2, box[1] - box[3] / 2)
                    common = max(across, 0) * max(down, 0)
                    most = max(most, common / (w * h + box[2] * box[3] - common))
                if most <= 0.3:
                    wrong[q, mesh] = float(logits[image, q, mesh])
        best = sorted(wrong, key=lambda pair: -wrong[pair])[:5]
        assert list(zip(query[image].tolist(), label[image].tolist(), strict=True)) == best
        assert score[image].tolist() == [wrong[pair] for pair in best]
        assert len(wrong) < 36  # something was left out


def test_shifted_scores_by_scipy() -> None:
    scores, shift = torch.rand(50, dtype=torch.float64), -3 * torch.rand(50, dtype=torch.float64)
    np.testing.assert_allclose(
        shifted_scores(scores, shift).numpy(), expit(logit(scores.numpy()) + shift.numpy()), rtol=1e-4
    )
    torch.testing.assert_close(shifted_scores(scores, torch.zeros(50)), scores)


def test_a_closer_look_lowers_scores_and_leaves_all_else() -> None:
    model, network = looking_closer()
    plain = model.network
    assert isinstance(plain, SmopeS)
    images = noise(0)[None].float() / 255
    inputs = mesh_inputs(list(model.objects.values()), plain.config.surface_points, plain.config.anchors)
    with torch.no_grad():
        before, after = (each(images, K, each.encode_meshes(inputs), top_k=8) for each in (plain, network))
    assert (after.scores < before.scores).all()
    assert len(set((after.scores / before.scores).round(decimals=3).tolist()[0])) > 1
    for name in ("labels", "boxes"):
        assert torch.equal(getattr(after, name), getattr(before, name))
    assert torch.equal(after.pairs.poses[-1].translation, before.pairs.poses[-1].translation)


def test_what_is_handed_out_is_in_the_order_of_the_new_scores() -> None:
    model, network = looking_closer()
    closer = SMOPE(network, replace(model.config, network=network.config), model.objects)
    image = noise(1)
    table = find_table(network, image[None], K, closer._tokens, top_k=10)[0]
    assert (table[:-1, 0] >= table[1:, 0]).all()
    found = network(image[None].float() / 255, K, closer._tokens, 10)
    assert not (found.scores[0, :-1] >= found.scores[0, 1:]).all()  # the order did change
    scores = closer.predict(image, threshold=0.0, top_k=10).scores
    assert torch.equal(scores, scores.sort(descending=True).values)
    photo = image.permute(1, 2, 0)[None]
    exported = PlainNetwork(network, 10)(photo, K, *mesh_tensors(closer).values())
    torch.testing.assert_close(exported[0][0], table[:, 0])
    torch.testing.assert_close(exported[2][0], table[:, 2:6])


@pytest.fixture
def batch() -> Batch:
    T = torch.eye(4).repeat(1, 2, 1, 1)
    T[..., 2, 3] = 0.6
    return Batch(
        images=noise(2)[None].float() / 255,
        K=K,
        labels=torch.tensor([[0, -1]]),
        T_CO=T,
        boxes_xyxy=torch.tensor([[[20.0, 10, 60, 50], [0, 0, 1, 1]]]),
        visibility=torch.ones(1, 2),
    )


def test_it_learns_from_matched_pairs_and_rivals_and_not_for_the_detector(batch: Batch) -> None:
    model, network = looking_closer()
    objects: list[ObjectModel] = list(model.objects.values())
    network.train()
    parts = Objective(objects, LossConfig(rivals=3)).parts(network, batch)
    assert parts["rescore"] > 0
    parts["rescore"].backward()
    assert network.rescorer is not None
    assert all(p.grad is not None and p.grad.any() for p in network.rescorer.parameters())
    assert all(p.grad is None or not p.grad.any() for p in network.similarity.parameters())
    assert all(p.grad is None or not p.grad.any() for p in network.box_heads.parameters())
    assert "rescore" not in Objective(objects, LossConfig(rivals=0)).parts(network, batch)


def test_the_loss_is_varifocal_on_the_shifted_logits_by_hand() -> None:
    """One object of two slots, matched to query 1 behind 2 denoising queries; of two rivals one is real."""
    logits = torch.full((1, 1, 5, 2), -9.0)
    logits[0, 0, 3, 1] = 0.7
    boxes = torch.full((1, 1, 5, 4), 0.3)
    boxes[0, 0, 3] = torch.tensor([0.5, 0.5, 0.2, 0.2])
    truth = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.1, 0.1, 0.1, 0.1]]])  # twice as high: IoU 0.5
    shift = torch.tensor([[-0.4, -5.0]], requires_grad=True)
    lowered = torch.tensor([[-0.2, -5.0]], requires_grad=True)
    outputs = SimpleNamespace(
        detections=SimpleNamespace(logits=logits, boxes=boxes, denoising=2),
        match=torch.tensor([[[1, -1]], [[0, -1]]]),
        refined=SimpleNamespace(score_shift=shift),
    )
    rivals = Rivals(torch.tensor([[1.2, -torch.inf]]), lowered)
    loss = rescore_loss(outputs, rivals, Targets(torch.tensor([[1, -1]]), truth))  # type: ignore[arg-type]
    right, wrong = expit(0.7 - 0.4), expit(1.2 - 0.2)
    expected = 0.5 * -(0.5 * np.log(right) + 0.5 * np.log(1 - right)) - 0.75 * wrong**2 * np.log(1 - wrong)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert shift.grad is not None
    assert lowered.grad is not None
    assert shift.grad[0, 0] > 0  # sure of 0.57 where the box is worth 0.5
    assert lowered.grad[0, 0] > 0  # further down
    assert shift.grad[0, 1] == lowered.grad[0, 1] == 0


def test_rescoring_without_rivals_is_refused() -> None:
    plan = Recipe(network={"rescore": True}, loss={"rivals": 0})
    objects = list(small_model().objects.values())
    with pytest.raises(ConfigError, match="at least 1 expected"):
        make_objective(plan, objects, network_config(plan))
