"""Runs of elementwise steps of a recorded graph become one kernel each.

Steps join where their results have one shape and one order in memory; what they read may be broadcast or
strided. Within a kernel numbers are float32, and rounded only where they leave it. A step alone becomes a
kernel too where it is large and PyTorch would read its numbers one by one, as a bias of each channel.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite, prod
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from smope.inference.kernels import TYPES, Kernel, Layout
from smope.inference.simplify import _call, relu6_of_sum

aten = torch.ops.aten
MOST_INPUTS = 16
WIDE_FROM = 1 << 18  # numbers; smaller results leave too few threads when each makes eight

# What makes a node's number from its arguments' (C++ expressions); None: not as it is called.
Formula = Callable[..., str | None]


def _scaled_sum(sign: str) -> Formula:
    def formula(a: str, b: str, alpha: Any = 1) -> str:
        return f"{a} {sign} {b}" if alpha == 1 else f"{a} {sign} {_number(alpha)} * {b}"

    return formula


def _clamped(a: str, low: Any = None, high: Any = None) -> str:
    a = a if low in (None, "None") else f"({a} < {low} ? {low} : {a})"
    return a if high in (None, "None") else f"({a} > {high} ? {high} : {a})"


def _power(a: str, exponent: str) -> str | None:
    return {"2.0f": f"{a} * {a}", "0.5f": f"sqrtf({a})"}.get(exponent)


FORMULAS: dict[Any, Formula] = {
    aten.add.Tensor: _scaled_sum("+"),
    aten.sub.Tensor: _scaled_sum("-"),
    aten.rsub.Scalar: lambda a, b, alpha="1.0f": f"{b} - {a}" if alpha == "1.0f" else None,
    aten.mul.Tensor: lambda a, b: f"{a} * {b}",
    aten.div.Tensor: lambda a, b: f"{a} / {b}",
    aten.addcmul.default: lambda a, b, c, value=1: f"{a} + {b} * {c}" if value == 1 else None,
    aten.neg.default: lambda a: f"-{a}",
    aten.abs.default: lambda a: f"fabsf({a})",
    aten.exp.default: lambda a: f"expf({a})",
    aten.log.default: lambda a: f"logf({a})",
    aten.sin.default: lambda a: f"sinf({a})",
    aten.cos.default: lambda a: f"cosf({a})",
    aten.sqrt.default: lambda a: f"sqrtf({a})",
    aten.rsqrt.default: lambda a: f"1.f / sqrtf({a})",
    aten.reciprocal.default: lambda a: f"1.f / {a}",
    aten.sigmoid.default: lambda a: f"1.f / (1.f + expf(-{a}))",
    aten.softplus.default: lambda a: f"({a} > 20.f ? {a} : log1pf(expf({a})))",
    aten.pow.Tensor_Scalar: _power,
    aten.relu.default: lambda a: _clamped(a, "0.0f"),
    aten.clamp.default: _clamped,
    aten.clamp_min.default: lambda a, low: _clamped(a, low),
    aten.hardtanh.default: lambda a, low="-1.0f", high="1.0f": _clamped(a, low, high),
    aten._to_copy.default: lambda a, **how: a if not set(how) - {"dtype", "memory_format"} else None,
    aten.clone.default: lambda a, memory_format=None: a,
    relu6_of_sum: lambda a, b: f"smope::within({a} + {b}, 0.f, 6.f)",
}


@dataclass(eq=False)
class _Group:
    """Nodes that become one kernel"""

    nodes: list[fx.Node] = field(default_factory=list)


def fuse_pointwise(module: fx.GraphModule) -> list[Kernel]:
    graph = module.graph
    groups = _groups(graph)
    _bring_together(graph, groups)
    kernels: list[Kernel] = []
    for group in dict.fromkeys(groups.values()):
        if len(group.nodes) > 1 or _slow_alone(group.nodes[0]):
            kernels.append(_replace(graph, group, f"smope_pointwise_{len(kernels)}"))
    graph.eliminate_dead_code()
    return kernels


def _groups(graph: fx.Graph) -> dict[fx.Node, _Group]:
    """A node joins a group that it reads from, unless it also reads what depends on that group by another
    way."""
    groups: dict[fx.Node, _Group] = {}
    for node in graph.nodes:
        if _formula(node) is None:
            continue
        for source in node.all_input_nodes:
            group = groups.get(source)
            if group is None or not _alike(group.nodes[0], node):
                continue
            inputs = {n for member in (*group.nodes, node) for n in member.all_input_nodes}
            few = len(inputs - {*group.nodes}) <= MOST_INPUTS
            if few and not _reaches(node, group, groups):
                group.nodes.append(node)
                groups[node] = group
                break
        else:
            groups[node] = _Group([node])
    return groups


def _slow_alone(node: fx.Node) -> bool:
    """Whether this step is large, and reads eight numbers at a time here but not in PyTorch"""
    like = node.meta["val"]
    if like.numel() < WIDE_FROM or like.numel() % 8:
        return False
    return any(_packed(n.meta["val"], like) for n in node.all_input_nodes)


def _reaches(node: fx.Node, group: _Group, groups: dict[fx.Node, _Group]) -> bool:
    """Whether what `node` reads besides the group depends on the group"""
    waiting = [n for n in node.all_input_nodes if groups.get(n) is not group]
    seen = set(waiting)
    while waiting:
        one = waiting.pop()
        own = groups.get(one)
        if own is group:
            return True
        for member in own.nodes if own else [one]:
            for source in member.all_input_nodes:
                if source not in seen:
                    seen.add(source)
                    waiting.append(source)
    return False


def _bring_together(graph: fx.Graph, groups: dict[fx.Node, _Group]) -> None:
    """Reorder the graph so that each group's nodes follow each other, else as it was."""
    nodes = list(graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    unit = {node: groups.get(node, node) for node in nodes}
    members: dict[Any, list[fx.Node]] = {}
    for node in nodes:
        members.setdefault(unit[node], []).append(node)
    before = {u: {unit[n] for m in ms for n in m.all_input_nodes} - {u} for u, ms in members.items()}
    after: dict[Any, list[Any]] = {}
    for u, sources in before.items():
        for source in sources:
            after.setdefault(source, []).append(u)
    left = {u: len(sources) for u, sources in before.items()}
    ready = [(place[ms[0]], u) for u, ms in members.items() if not left[u]]
    heapq.heapify(ready)  # places are unique
    last = None
    while ready:
        _, u = heapq.heappop(ready)
        for node in members[u]:
            if last is not None and last.next is not node:  # else torch 2.5 warns
                last.append(node)
            last = node
        for later in after.get(u, []):
            left[later] -= 1
            if not left[later]:
                heapq.heappush(ready, (place[members[later][0]], later))
    graph.lint()


def _replace(graph: fx.Graph, group: _Group, name: str) -> Kernel:
    inside = set(group.nodes)
    given = list(dict.fromkeys(n for m in group.nodes for n in m.all_input_nodes if n not in inside))
    leaving = [node for node in group.nodes if any(user not in inside for user in node.users)]
    first: Tensor = group.nodes[0].meta["val"]
    count = first.numel()
    wide = 8 if count % 8 == 0 and count >= WIDE_FROM else 1
    kernel = Kernel(
        name,
        _body(group, given, leaving, wide),
        [Layout.of(n.meta["val"]) for n in given],
        [Layout.of(n.meta["val"]) for n in leaving],
        count // wide,
        aligned=wide > 1,
    )
    with graph.inserting_before(group.nodes[0]):
        call = _call(graph, kernel, *given)
        results = [call]
        if len(leaving) > 1:
            results = [_call(graph, getitem, call, i) for i in range(len(leaving))]
        for node, result in zip(leaving, results, strict=True):
            result.meta["val"] = node.meta["val"]
    for node, result in zip(leaving, results, strict=True):
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in inside)
    for node in reversed(group.nodes):
        graph.erase_node(node)
    return kernel


def _body(group: _Group, given: list[fx.Node], leaving: list[fx.Node], wide: int) -> str:
    """A thread makes `wide` numbers that lie together."""
    like: Tensor = group.nodes[0].meta["val"]
    count = like.numel()
    code = [f"const long long first = THREAD * {wide}; if (first >= {count}LL) return;"]
    number = {}
    straight = {n: _same_order(n.meta["val"], like) for n in given}
    together = {n: wide > 1 and (straight[n] or _packed(n.meta["val"], like)) for n in given}
    for i, node in enumerate(given):
        kind = TYPES.get(node.meta["val"].dtype)
        number[node] = f"v{i}"
        if together[node] and kind:
            at = "first" if straight[node] else _offset(node.meta["val"], like, "(unsigned)first")
            code.append(f"float p{i}[{wide}]; smope::load<smope::{kind}, {wide}>(x{i} + {at}, p{i});")
    code += [f"float q{i}[{wide}];" for i in range(len(leaving))]
    code += ["\n#pragma unroll\n"] if wide > 1 else []
    code.append(
        f"for (int lane = 0; lane < {wide}; ++lane) {{ "
        "[[maybe_unused]] const unsigned i = (unsigned)first + lane;"
    )
    for i, node in enumerate(given):
        kind = TYPES.get(node.meta["val"].dtype)
        if together[node] and kind:
            code.append(f"const float v{i} = p{i}[lane];")
        else:
            at = "i" if straight[node] else _offset(node.meta["val"], like, "i")
            code.append(
                f"const float v{i} = " + (f"smope::{kind}::wide(x{i}[{at}]);" if kind else f"x{i}[{at}];")
            )
    for i, node in enumerate(group.nodes):
        formula = _formula(node, number)
        number[node] = f"w{i}"
        code.append(f"const float w{i} = {formula};")
    code += [f"q{i}[lane] = {number[node]};" for i, node in enumerate(leaving)]
    code.append("}")
    for i, node in enumerate(leaving):
        kind = TYPES[node.meta["val"].dtype]
        code.append(f"smope::store<smope::{kind}, {wide}>(y{i} + first, q{i});")
    return " ".join(code)


def _same_order(value: Tensor, like: Tensor) -> bool:
    if value.shape != like.shape:
        return value.numel() == like.numel() == 1
    return all(n == 1 or a == b for n, a, b in zip(like.shape, value.stride(), like.stride(), strict=True))


def _packed(value: Tensor, like: Tensor) -> bool:
    """Whether eight numbers that lie together in `like` do so in `value`, broadcast, which is of another
    order"""
    if value.dim() > like.dim() or _same_order(value, like):
        return False
    steps = zip(like.shape, like.stride(), value.expand(like.shape).stride(), strict=True)
    inner = [(size, stride) for size, step, stride in steps if step == 1 and size > 1]
    others = [
        s for s, step in zip(value.expand(like.shape).stride(), like.stride(), strict=True) if step != 1
    ]
    return len(inner) == 1 and inner[0][0] % 8 == 0 and inner[0][1] == 1 and not any(s % 8 for s in others)


def _offset(value: Tensor, like: Tensor, i: str) -> str:
    """Where `value`, broadcast, has the number that stands at place `i` of `like`'s memory"""
    strides = value.expand(like.shape).stride()
    terms = []
    for size, step, stride in zip(like.shape, like.stride(), strides, strict=True):
        if size > 1 and stride:
            whole = step * size == like.numel()
            place = f"{i} / {step}u" if step > 1 else i
            terms.append(f"({place}{'' if whole else f' % {size}u'}) * {stride}u")
    return " + ".join(terms) or "0"


def _alike(a: fx.Node, b: fx.Node) -> bool:
    one, other = a.meta["val"], b.meta["val"]
    return one.shape == other.shape and _same_order(one, other)


def _formula(node: fx.Node, number: dict[fx.Node, str] | None = None) -> str | None:
    """Of a node that may be part of a kernel; with stand-ins where `number` does not name its arguments."""
    make = FORMULAS.get(node.target) if node.op == "call_function" else None
    if make is None or not _fits(node):
        return None
    try:
        return make(*[_argument(argument, number) for argument in node.args], **node.kwargs)
    except TypeError:  # called in another way than the formula knows
        return None


def _argument(argument: Any, number: dict[fx.Node, str] | None) -> str:
    if isinstance(argument, fx.Node):
        return "x" if number is None else number[argument]
    return "None" if argument is None else _number(argument)


def _number(value: Any) -> str:
    if not isinstance(value, (int, float)) or not isfinite(value):
        raise TypeError(value)
    number = float(value)
    return f"({number!r}f)" if number < 0 else f"{number!r}f"


def _fits(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if value is None or value.dtype not in TYPES or not 0 < value.numel() < 1 << 31 or not _dense(value):
        return False
    sources = [source.meta.get("val") for source in node.all_input_nodes]
    kinds = {*TYPES, torch.uint8}
    return bool(sources) and all(s is not None and s.dtype in kinds and _reach(s) < 1 << 31 for s in sources)


def _dense(value: Tensor) -> bool:
    """Whether its numbers fill a piece of memory, in whatever order"""
    expected = 1
    for step, size in sorted((s, n) for n, s in zip(value.shape, value.stride(), strict=True) if n > 1):
        if step != expected:
            return False
        expected *= size
    return expected == prod(value.shape)


def _reach(value: Tensor) -> int:
    return 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
