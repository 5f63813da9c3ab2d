"""smope-paper in training: padding, truth from a batch, and steps that lower the loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import trimesh
from scipy.spatial.transform import Rotation

from smope.data.items import Batch
from smope.networks.paper_detector import resize_padding
from smope.networks.paper_meshes import MeshSurfaces
from smope.networks.position import cell_centres, unpadded_centres, valid_ratios
from smope.networks.smope_paper import SmopePaper, SmopePaperConfig, normalise, pad_batch
from smope.objects import ObjectModel
from smope.train.paper_objective import PaperObjective, image_truths

TINY = SmopePaperConfig(
    width=64,
    hidden=64,
    encoder_layers=1,
    decoder_layers=2,
    queries=8,
    surface_points=50,
    template_vertices=42,
)


@pytest.fixture(scope="module")
def objects() -> list[ObjectModel]:
    return [
        ObjectModel.from_mesh("box", trimesh.creation.box((0.1, 0.2, 0.15)), "m"),
        ObjectModel.from_mesh("ball", trimesh.creation.icosphere(2, 0.1), "m"),
    ]


def batch() -> Batch:
    draw = torch.Generator().manual_seed(0)
    turns = Rotation.random(4, random_state=0).as_matrix().reshape(2, 2, 3, 3)
    T_CO = torch.eye(4).repeat(2, 2, 1, 1)
    T_CO[..., :3, :3] = torch.tensor(turns, dtype=torch.float32)
    T_CO[..., :3, 3] = torch.tensor([0.1, -0.2, 1.0])
    boxes = torch.tensor([[9.5, 19.5, 39.5, 49.5], [29.5, 9.5, 89.5, 29.5]]).expand(2, 2, 4)
    labels = torch.tensor([[0, 1], [1, -1]])
    images = torch.rand(2, 3, 64, 96, generator=draw)
    return Batch(images, torch.eye(3).expand(2, 3, 3), labels, T_CO, boxes, torch.ones(2, 2))


def test_truth_of_a_batch_by_hand() -> None:
    first, second = image_truths(batch())
    assert first.meshes.tolist() == [0, 1]
    assert second.meshes.tolist() == [1]
    assert first.labels.tolist() == [0, 0]
    wanted = [[25 / 96, 35 / 64, 30 / 96, 30 / 64], [60 / 96, 20 / 64, 60 / 96, 20 / 64]]
    torch.testing.assert_close(first.boxes, torch.tensor(wanted))
    torch.testing.assert_close(first.translations[1], torch.tensor([0.1, -0.2, 1.0]))
    expected = Rotation.random(4, random_state=0).as_matrix()[2]
    found = Rotation.from_quat(second.quaternions[0].numpy()).as_matrix()
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "variant", [{}, {"box_refine": True}, {"box_refine": True, "two_stage": True}], ids=str
)
def test_five_steps_find_boxes_better(objects: list[ObjectModel], variant: dict[str, bool]) -> None:
    torch.manual_seed(0)
    network = SmopePaper(replace(TINY, **variant))
    objective = PaperObjective(objects, samples=100)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 5e-4)

    def detection() -> float:
        """L_D without dropout; the mesh terms are drawn anew in every step, too loud for five of them."""
        with torch.no_grad():
            _, parts = objective(network.eval(), batch())
        assert not any(value.requires_grad for value in parts.values())
        return sum(value.item() for name, value in parts.items() if name.startswith("loss_"))

    before = detection()
    for _ in range(5):
        loss, _ = objective(network.train(), batch())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in trained)
        assert all(torch.isfinite(p.grad).all() for p in trained if p.grad is not None)
        optimizer.step()
    assert detection() < 0.9 * before
    frozen = {name.split(".")[2] for name, p in network.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "layer1"}


def test_the_verbatim_objective_trains_too(objects: list[ObjectModel]) -> None:
    torch.manual_seed(0)
    network = SmopePaper(TINY).train()
    loss, _ = PaperObjective(objects, objective="paper-verbatim", samples=100)(network, batch())
    loss.backward()
    assert torch.isfinite(loss)


def test_one_object_cannot_be_trained(objects: list[ObjectModel]) -> None:
    with pytest.raises(ValueError, match=r"1 object\(s\) given, two at least"):
        PaperObjective(objects[:1])


def test_two_stages_need_refinement() -> None:
    with pytest.raises(ValueError, match="set box_refine as well"):
        SmopePaperConfig(two_stage=True)


def test_evaluation_is_repeatable_and_training_drops_out() -> None:
    torch.manual_seed(0)
    network = SmopePaper(TINY).eval()
    surfaces = MeshSurfaces(torch.rand(3, 50, 3), torch.rand(3, 50, 3))
    images, padding = pad_batch([torch.randn(3, 64, 64)])
    with torch.no_grad():
        first, second = (network(images, padding, surfaces).detections.queries for _ in range(2))
        assert torch.equal(first, second)
        network.train()
        third = network(images, padding, surfaces).detections.queries
    assert not torch.allclose(first, third, atol=1e-3)


def test_a_wrong_count_of_surface_points_is_named() -> None:
    with pytest.raises(ValueError, match="40 surface points a mesh given, 50 expected"):
        SmopePaper(TINY).encode_meshes(MeshSurfaces(torch.rand(2, 40, 3), torch.rand(2, 40, 3)))
    with pytest.raises(ValueError, match=r"\[M, P, 3\] each expected"):
        MeshSurfaces(torch.rand(2, 40, 3), torch.rand(2, 30, 3))


def test_padding_by_hand() -> None:
    images, padding = pad_batch([torch.ones(3, 4, 8), torch.ones(3, 2, 6)])
    assert images.shape == (2, 3, 4, 8)
    assert images.sum((1, 2, 3)).tolist() == [96, 36]
    assert (~padding).sum((1, 2)).tolist() == [32, 12]
    torch.testing.assert_close(valid_ratios(padding), torch.tensor([[1.0, 1.0], [0.75, 0.5]]))
    small = resize_padding(padding, (2, 3))  # columns 0, 2, 5 and rows 0, 2 are looked at
    assert small[1].tolist() == [[False, False, False], [True, True, True]]


def test_centres_without_padding_are_those_of_the_cells() -> None:
    centres = unpadded_centres(torch.zeros(1, 3, 5, dtype=torch.bool))
    torch.testing.assert_close(centres[0], cell_centres(((3, 5),), torch.device("cpu")), atol=1e-6, rtol=0)


def test_images_are_normalised_by_imagenets_mean() -> None:
    grey = normalise(torch.full((1, 3, 2, 2), 0.5))[0, :, 0, 0]
    assert grey.tolist() == pytest.approx(
        [(0.5 - m) / s for m, s in [(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]]
    )
