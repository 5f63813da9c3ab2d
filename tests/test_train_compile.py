"""Compiled parts of a training step: the same numbers as uncompiled, one graph for equal layers, our operator
in it.

The graphs run by PyTorch's own kernels (aot_eager), which need no compiler.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from train_toy import OPTIM, RUN, ToyTask, make_model, stream

from smope.networks.backbone import ConvNorm
from smope.networks.deformable import EncoderLayer
from smope.networks.position import cell_centres, pyramid_positions
from smope.networks.recorded import recorded_whole, whole_steps
from smope.networks.shifted import Twice
from smope.train.distributed import Ranks
from smope.train.loop import Loop
from smope.train.pose_targets import PairTruth

SHAPES = ((4, 6), (2, 3))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def trained(layers: nn.ModuleList, batch: int) -> list[Tensor]:
    """The output under autocast, and all gradients"""
    generator = torch.Generator().manual_seed(batch)
    memory = torch.randn(batch, 30, 32, generator=generator).bfloat16().requires_grad_()
    positions = pyramid_positions(SHAPES, 32, memory.device)[None]
    reference = cell_centres(SHAPES, memory.device)[None, :, None].expand(batch, -1, 2, -1)
    x: Tensor = memory
    with torch.autocast("cpu", torch.bfloat16):
        for layer in layers:
            x = layer(x, positions, reference, SHAPES)
    along = torch.randn(x.shape, generator=generator)
    return [x, *torch.autograd.grad((x.float() * along).sum(), [memory, *layers.parameters()])]


def test_encoder_layers_share_one_graph_with_our_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a GPU: on a CPU the operator is for float32 alone. (The function of this name hides its module.)
    def takes(*_: object) -> bool:
        return True

    takes._dynamo_marked_constant = True  # type: ignore[attr-defined]
    monkeypatch.setattr(sys.modules["smope.ops.ms_deform_attn"], "_takes_kernel", takes)
    torch.manual_seed(0)
    layers = nn.ModuleList(EncoderLayer(32, 4, 2, 2, 64) for _ in range(3)).train()
    for parameter in layers.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    plain = trained(layers, 2)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    for layer in layers:
        layer.compile(backend=backend, fullgraph=True)
    for found, expected in zip(trained(layers, 2), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len(graphs) == 1
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("smope.ms_deform_attn" in name for name in called) == 1
    assert not any("grid_sample" in name for name in called)
    trained(layers, 2)
    assert len(graphs) == 1


def test_depthwise_convolution_without_gradients_sums_shifts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = ConvNorm(6, 6, 3, 2, groups=6)
    x = torch.randn(2, 6, 8, 10)
    plain = layer(x).detach()
    assert not layer._sums_shifts(x)

    def takes(self: ConvNorm, x: torch.Tensor) -> bool:  # as on a GPU
        return self.small and not torch.is_grad_enabled()

    monkeypatch.setattr(ConvNorm, "_sums_shifts", takes)
    called: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        called.append(any("conv2d" in str(node.target) for node in graph.graph.nodes))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    layer.compile(backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain)
    torch.testing.assert_close(layer(x).detach(), plain)
    assert called == [False, True]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by Dynamo itself
def test_doubled_map_is_differentiated_by_our_own_rule_within_a_graph() -> None:
    narrow = torch.randn(2, 3, 4, 5).bfloat16().requires_grad_()
    along = torch.randn(2, 3, 8, 10)
    whole = torch.compile(lambda x: Twice.apply(x.float()), backend="aot_eager", fullgraph=True)
    plain = nn.functional.interpolate(narrow.float(), (8, 10), mode="bilinear", align_corners=False)
    with torch.autocast("cpu", torch.bfloat16):
        found = whole(narrow)
    torch.testing.assert_close(found, plain)
    mine, theirs = (torch.autograd.grad(y, narrow, along)[0] for y in (found, plain))
    assert mine.dtype == torch.bfloat16
    torch.testing.assert_close(mine, theirs)


def test_truth_that_is_repeated_within_a_graph_does_not_end_it() -> None:
    truth = PairTruth(
        torch.randn(2, 3, 4, 3, 3), torch.rand(2, 3, 4, 3) + 1, torch.eye(3).expand(2, 3, 3, 3),
        torch.eye(3).expand(2, 3, 3),
    )  # fmt: skip
    rotation = torch.randn(4, 3, 3, 3)
    whole = torch.compile(
        lambda: truth.repeat(2).nearest(rotation).translation, backend="eager", fullgraph=True
    )
    chosen = (rotation[:, :, None] - truth.rotations.repeat(2, 1, 1, 1, 1)).square().sum((-1, -2)).argmin(-1)
    expected = truth.translations.repeat(2, 1, 1, 1).gather(2, chosen[..., None, None].expand(-1, -1, 1, 3))
    torch.testing.assert_close(whole(), expected[:, :, 0])


class Stem(nn.Conv2d):
    """A layer of our own: Dynamo takes no frame of PyTorch's as the root of a graph."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Judge:
    def error(self, found: Tensor, wanted: Tensor) -> Tensor:
        return (found - wanted).square().mean(0)


class JudgedTask(ToyTask):
    def __init__(self) -> None:
        super().__init__()
        self.judge = Judge()

    def step(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        error = self.judge.error(model(batch[0]), batch[1])
        return error.sum(), {"red": error[0].detach()}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it
def test_loop_compiles_what_the_recipe_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))

    def weights(*compile: str) -> Mapping[str, Tensor]:
        run = replace(RUN, max_steps=3, compile=compile)
        out = tmp_path / str(len(compile))
        model = make_model()
        model.stem = Stem(3, 8, 3, stride=2)
        loop = Loop(model, JudgedTask(), stream, OPTIM, run, out, Ranks(torch.device("cpu")))
        loop.run()
        return loop.model.state_dict()

    plain = weights()
    counters.clear()
    compiled = weights("stem", "task.judge.error")
    assert counters["stats"]["unique_graphs"] == 2
    for name, value in compiled.items():
        torch.testing.assert_close(value, plain[name])
    with pytest.raises(AttributeError, match="no_such_part"):
        weights("no_such_part")


def test_asking_whether_a_pass_is_recorded_ends_no_graph() -> None:
    """Dynamo reads no ContextVar: asked in each of the backbone's blocks, it cut the graph at every one."""

    def step(x: Tensor) -> Tensor:
        return x + 1 if recorded_whole() else x - 1

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    with torch.no_grad(), whole_steps():
        assert compiled(torch.ones(2)).tolist() == [0, 0]  # a compiler fuses the steps itself
        assert step(torch.ones(2)).tolist() == [2, 2]
