"""A step as a CUDA graph: the same training as without, and batches of another form beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from train_toy import OPTIM, RUN, ToyTask, make_model, stream

from smope.data.items import Batch
from smope.train.distributed import Ranks
from smope.train.graphed import EAGER_STEPS, Gradients, copy_into, map_tensors, same_form, tensors_of
from smope.train.loop import Loop

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def batch(slots: int = 2, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        torch.rand(2, 3, 8, 8, generator=generator),
        torch.eye(3).repeat(2, 1, 1),
        torch.zeros(2, slots, dtype=torch.int64),
        torch.rand(2, slots, 4, 4, generator=generator),
        torch.rand(2, slots, 4, generator=generator),
        torch.rand(2, slots, generator=generator),
    )


def test_batches_are_told_apart_by_their_form_and_copied_by_their_places() -> None:
    one, other = batch(seed=0), batch(seed=1)
    assert same_form(one, other)
    assert not same_form(one, batch(slots=3))
    assert not same_form(one, replace(one, scale=torch.ones(2, 2, 3)))
    assert not same_form(one, (one.images,))
    assert not same_form(one.images, one.images.half())
    kept = map_tensors(torch.clone, one)
    assert all(
        torch.equal(a, b) and a is not b for a, b in zip(tensors_of(kept), tensors_of(one), strict=True)
    )
    copy_into(kept, other)
    assert torch.equal(kept.images, other.images)
    assert torch.equal(kept.T_CO, other.T_CO)
    assert not torch.equal(kept.images, one.images)


def test_without_a_graph_a_step_leaves_its_gradients() -> None:
    model = nn.Linear(3, 1)

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss = self.model(x).sum()
            return loss, {"sum": loss.detach()}

    x = torch.rand(4, 3)
    loss, parts = Gradients(Step(), False)(x)
    assert not loss.requires_grad
    assert torch.equal(loss, parts["sum"])
    assert model.weight.grad is not None
    torch.testing.assert_close(model.weight.grad, x.sum(0, keepdim=True))


class OnDevice(ToyTask):
    """Some steps with fewer images, which a graph of whole batches is not for."""

    def step(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        images, target = batch
        error = (model(images) - target).square().mean(0)
        return error.sum(), {"red": error[0].detach(), "blue": error[1].detach()}


def moved(start: int) -> Iterator[tuple[Tensor, Tensor]]:
    for index, (images, target) in enumerate(stream(start)):
        count = 4 if index % 7 == 5 else 8
        yield images[:count].cuda(), target[:count].cuda()


@needs_gpu
def test_training_by_a_graph_is_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    steps = 4 * EAGER_STEPS
    weights, losses = [], []
    for graph in (False, True):
        model = make_model()
        model[3] = nn.Identity()  # no chance, which a graph draws otherwise
        run = replace(RUN, max_steps=steps, graph=graph)
        loop = Loop(model, OnDevice(), moved, OPTIM, run, tmp_path / str(graph), Ranks(torch.device("cuda")))
        loop.run()
        assert ("replayed as a CUDA graph" in caplog.text) == graph
        weights.append(model.state_dict())
        losses.append(loop.record["losses"]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-5, msg=name)


@needs_gpu
def test_a_step_that_waits_for_the_device_goes_on_without_a_graph(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Waiting(OnDevice):
        def step(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
            loss, parts = super().step(model, batch)
            return loss * (2.0 if float(loss) > 1e9 else 1.0), parts

    run = replace(RUN, max_steps=2 * EAGER_STEPS, graph=True)
    loop = Loop(make_model(), Waiting(), moved, OPTIM, run, tmp_path, Ranks(torch.device("cuda")))
    loop.run()
    assert "goes on without" in caplog.text
    assert torch.isfinite(torch.tensor(loop.record["losses"]["loss"]))
