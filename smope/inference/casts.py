"""Changes of type in a recorded graph, brought to where the numbers are made.

The kernel that makes numbers can write them in 16 bits as well, if the cast is the next thing that it sees;
behind a view it would be a kernel of its own.
"""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from smope.inference.pointwise import FORMULAS
from smope.inference.simplify import _call, _calls, _is_call, _is_constant, _value

aten = torch.ops.aten
# Each number stays, and none comes twice.
_VIEWS = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
_NARROW = (torch.float16, torch.bfloat16)


def hoist_casts(module: fx.GraphModule) -> None:
    """Casts to 16 bits go above views of what a kernel of ours makes; of equal casts one stays, and none that
    only undoes the one before. Results are the same to the bit."""
    graph = module.graph
    for node in _casts(graph):
        _hoist(graph, node)
    for node in _casts(graph):
        before = node.args[0]
        if _is_cast(before) and _value(before).dtype == torch.float32:
            given = before.args[0].meta.get("val")
            same = given is not None and given.dtype == _value(node).dtype in _NARROW
            if same and given.stride() == _value(node).stride():
                node.replace_all_uses_with(before.args[0])
    first: dict[Any, fx.Node] = {}
    for node in _casts(graph):
        one = first.setdefault((node.args[0], _value(node).dtype), node)
        if one is not node:
            node.replace_all_uses_with(one)
    graph.eliminate_dead_code()


def _hoist(graph: fx.Graph, cast: fx.Node) -> None:
    views: list[Any] = []  # nodes; what they call may be anything
    base: Any = cast.args[0]
    while any(_is_call(base, target) for target in _VIEWS):
        views.insert(0, base)
        base = base.args[0]
    kind = _value(cast).dtype
    if not views or kind not in _NARROW or not _made_by_kernel(base) or _value(base).dtype != torch.float32:
        return
    values = [_empty(_value(base)).to(kind)]
    try:
        for view in views:
            values.append(view.target(values[-1], *view.args[1:], **view.kwargs))
    except RuntimeError:  # what was cast lies in another order, of which this is no view
        return
    if values[-1].stride() != _value(cast).stride():
        return
    with graph.inserting_after(base):
        moved = graph.call_function(aten._to_copy.default, (base,), dict(cast.kwargs))
    moved.meta["val"] = values[0]
    with graph.inserting_before(cast):
        for view, value in zip(views, values[1:], strict=True):
            moved = _call(graph, view.target, moved, *view.args[1:], val=value)
            moved.kwargs = view.kwargs
    cast.replace_all_uses_with(moved)


def _made_by_kernel(node: Any) -> bool:
    """Whether it is a step that a cast may join: otherwise the cast is better left to what reads it"""
    if _is_call(node, getitem):
        return node.args[1] == 0 and _is_call(node.args[0], aten.native_layer_norm.default)
    step = isinstance(node, fx.Node) and node.op == "call_function" and node.target in FORMULAS
    return step and "val" in node.meta


def _casts(graph: fx.Graph) -> list[Any]:
    return [node for node in _calls(graph, aten._to_copy.default) if _is_cast(node)]


def _is_cast(node: Any) -> bool:
    """Another type and nothing else, of what depends on the inputs"""
    plain = _is_call(node, aten._to_copy.default) and {*node.kwargs} == {"dtype"}
    return plain and not _is_constant(node.args[0])


def _empty(value: Tensor) -> Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
