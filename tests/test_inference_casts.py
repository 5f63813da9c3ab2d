"""Casts that move up through views: the same numbers to the bit, by fewer casts."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from smope.inference.casts import hoist_casts
from smope.inference.record import record

HALF, BFLOAT = torch.float16, torch.bfloat16


def hoisted(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[fx.GraphModule, fx.GraphModule]:
    """As recorded, and after the pass, having seen that both give the same and that `meta` is true of it"""
    with torch.no_grad():
        graph = record(function, inputs)
        moved = copy.deepcopy(graph)
        hoist_casts(moved)
        moved.graph.lint()
        moved.recompile()
        assert torch.equal(moved(*inputs), graph(*inputs))
        Checked(moved).run(*inputs)
    return graph, moved


class Checked(fx.Interpreter):
    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        if isinstance(result, Tensor) and n.op == "call_function":
            said = n.meta["val"]
            assert (said.shape, said.stride(), said.dtype) == (result.shape, result.stride(), result.dtype)
        return result


def casts(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.target is torch.ops.aten._to_copy.default]


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.view(2, 12),
    "unflatten": lambda x: x.unflatten(-1, (2, 2)),
    "transpose": lambda x: x.transpose(0, 1),
    "permute": lambda x: x.permute(2, 0, 1),
    "unsqueeze": lambda x: x[:, None, :, None],
    "squeeze": lambda x: x[None].squeeze(0).squeeze(),
    "chain": lambda x: x.transpose(1, 2).unsqueeze(0).flatten(0, 1).permute(2, 1, 0),
}


@pytest.mark.parametrize("kind", [HALF, BFLOAT])
@pytest.mark.parametrize("name", VIEWS)
def test_a_cast_goes_above_views_of_a_step(name: str, kind: torch.dtype) -> None:
    _, moved = hoisted(lambda x: VIEWS[name](x.sin()).to(kind), torch.randn(2, 3, 4))
    (cast,) = casts(moved)
    assert cast.args[0].target is torch.ops.aten.sin.default  # type: ignore[union-attr]


def test_a_step_that_lies_in_another_order_keeps_it() -> None:
    x = torch.randn(2, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    _, moved = hoisted(lambda x: x.sin().permute(0, 2, 3, 1).flatten(1, 2).to(HALF), x)
    (cast,) = casts(moved)
    assert cast.meta["val"].stride() == x.stride()


def test_a_layer_norm_sees_one_cast_however_it_is_viewed() -> None:
    weight = torch.randn(8)

    def function(x: Tensor) -> Tensor:
        y = F.layer_norm(x, (8,), weight, weight)
        parts = [y.to(HALF), y.transpose(0, 1).to(HALF), y.flatten(0, 1).to(HALF)]
        return torch.cat([p.flatten() for p in parts]) + y.sum()

    graph, moved = hoisted(function, torch.randn(3, 5, 8))
    assert len(casts(graph)) == 3
    (cast,) = casts(moved)
    norms = [n for n in moved.graph.nodes if n.target is torch.ops.aten.native_layer_norm.default]
    assert cast.args[0].args == (norms[0], 0)  # type: ignore[union-attr]


def test_types_are_cast_apart() -> None:
    def function(x: Tensor) -> Tensor:
        y = x.sin().t()
        return y.to(HALF).float() + y.to(BFLOAT).float()

    _, moved = hoisted(function, torch.randn(3, 4))
    above = [c for c in casts(moved) if c.args[0].target is torch.ops.aten.sin.default]  # type: ignore[union-attr]
    assert {c.meta["val"].dtype for c in above} == {HALF, BFLOAT}


def test_what_only_undoes_a_cast_goes_with_it() -> None:
    graph, moved = hoisted(lambda x: x.float().transpose(0, 1).to(HALF) * 2, torch.randn(3, 4).half())
    assert len(casts(graph)) == 2
    assert not casts(moved)
    # Back to another type of 16 bits, and from there to float32, numbers are rounded.
    _, kept = hoisted(lambda x: x.float().to(BFLOAT) * 2, torch.randn(3, 4).half())
    assert len(casts(kept)) == 2
    _, kept = hoisted(lambda x: x.to(HALF).float() * 2, torch.randn(3, 4))
    assert len(casts(kept)) == 2


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sin()[:, 1:].to(HALF),  # a part of the numbers
        lambda x: x.sin()[None].expand(3, -1, -1).to(HALF),  # some of them more than once
        lambda x: (x @ x.t()).view(-1).to(HALF),  # no kernel of ours makes them: what reads them may cast
        lambda x: x.t().to(HALF),
        lambda x: x.sin().t().double(),  # wider
        lambda x: x.sin().t().to(HALF, memory_format=torch.contiguous_format),  # also another order
    ],
)
def test_other_casts_stay(function: Callable[[Tensor], Tensor]) -> None:
    graph, moved = hoisted(function, torch.randn(3, 4))
    assert [str(n.args[0]) for n in casts(moved)] == [str(n.args[0]) for n in casts(graph)]
    assert len(casts(graph)) == 1
