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

from smope.networks.deformable import EncoderLayer
from smope.networks.position import cell_centres, pyramid_positions
from smope.train.distributed import Ranks
from smope.train.loop import Loop

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
    takes = lambda *_: True  # noqa: E731
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
