"""One kernel from the images as they come to the first convolution's input: type, scale, order, padding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from smope.inference.kernels import TYPES, Kernel, Layout
from smope.inference.pointwise import _formula
from smope.inference.simplify import _call, _channels_last, _is_call, _is_constant, _value

aten = torch.ops.aten


@dataclass
class _Chain:
    """Steps one after the other, each of which reads nothing else but constants of a channel."""

    source: fx.Node
    steps: list[Any] = field(default_factory=list)  # nodes; their arguments may be anything


def pictures(module: fx.GraphModule) -> list[Kernel]:
    """A thread makes all channels of a pixel."""
    kernels: list[Kernel] = []
    for source in [node for node in module.graph.nodes if node.op == "placeholder"]:
        chain = _chain_of(source)
        if not any(_is_pad(step) for step in chain.steps) or not _channels_last(_value(chain.steps[-1])):
            continue
        end = chain.steps[-1]
        constants = list(
            dict.fromkeys(n for step in chain.steps for n in step.all_input_nodes if _is_constant(n))
        )
        batch, _, height, width = _value(end).shape
        kernel = Kernel(
            f"smope_pictures_{len(kernels)}",
            _body(chain, constants),
            [Layout.of(_value(n)) for n in (source, *constants)],
            [Layout.of(_value(end))],
            batch * height * width,
            aligned=False,
        )
        with module.graph.inserting_before(end):
            end.replace_all_uses_with(_call(module.graph, kernel, source, *constants, val=_value(end)))
        kernels.append(kernel)
    module.graph.eliminate_dead_code()
    return kernels


def _chain_of(source: fx.Node) -> _Chain:
    chain, node = _Chain(source), source
    value = node.meta.get("val")
    if value is None or value.dim() != 4 or value.dtype not in {*TYPES, torch.uint8}:
        return chain
    while len(node.users) == 1:
        node = next(iter(node.users))
        if not (_is_call(node, aten.clone.default) or _is_pad(node) or _is_step(node)):
            break
        chain.steps.append(node)
    while chain.steps and _value(chain.steps[-1]).dtype not in TYPES:
        chain.steps.pop()
    return chain


def _is_pad(node: Any) -> bool:
    return (
        _is_call(node, aten.constant_pad_nd.default)
        and len(node.args[1]) == 4
        and min(node.args[1]) >= 0
        and not any(node.args[2:])
    )


def _is_step(node: fx.Node) -> bool:
    """Elementwise, of the picture and constants that differ from channel to channel alone"""
    others = [n for n in node.all_input_nodes if _is_constant(n)]
    plain = all(n.meta["val"].dim() in (0, 3, 4) and n.meta["val"].numel() in (1, 3) for n in others)
    return len(node.all_input_nodes) == len(others) + 1 and plain and _formula(node) is not None


def _body(chain: _Chain, constants: list[fx.Node]) -> str:
    source: Tensor = _value(chain.source)
    batch, channels, height, width = _value(chain.steps[-1]).shape
    code = [
        f"const long long i = THREAD; if (i >= {batch * height * width}LL) return;",
        f"const int column = i % {width}, row = i / {width} % {height};",
        f"const long long image = i / {height * width};",
    ]
    top, left = _pads(chain.steps)
    rows, columns = source.shape[2:]
    images, planes, down, across = source.stride()
    code.append(f"const bool known = {_inside(top, left, rows, columns)};")
    at = f"(row - {top}) * {down}LL + (column - {left}) * {across}LL"
    at = f"image * {images}LL + channel * {planes}LL + {at}"
    code.append(f"for (int channel = 0; channel < {channels}; ++channel) {{")
    code.append(f"const float v = known ? {_wide(source.dtype, f'x0[{at}]')} : 0.f;")
    number = {}
    for k, node in enumerate(constants):
        stride = 0 if _value(node).numel() == 1 else _value(node).stride(-3)
        number[node] = f"c{k}"
        code.append(f"const float c{k} = {_wide(_value(node).dtype, f'x{k + 1}[channel * {stride}]')};")
    name, before = "v", chain.source
    for k, step in enumerate(chain.steps):
        number[before] = name
        if _is_pad(step):
            top, left = _pads(chain.steps[k + 1 :])
            edges = step.args[1]
            inside = _inside(top + edges[2], left + edges[0], *_value(before).shape[2:])
            formula = f"{inside} ? {name} : 0.f" if any(edges) else name
        else:
            formula = name if _is_call(step, aten.clone.default) else _formula(step, number) or name
        name, before = f"w{k}", step
        code.append(f"const float {name} = {formula};")
    kind = TYPES[_value(chain.steps[-1]).dtype]
    code.append(f"y0[i * {channels} + channel] = smope::{kind}::narrow({name}); }}")
    return " ".join(code)


def _pads(steps: list[Any]) -> tuple[int, int]:
    """What these steps add above and to the left"""
    edges = [step.args[1] for step in steps if _is_pad(step)]
    return sum(e[2] for e in edges), sum(e[0] for e in edges)


def _inside(top: int, left: int, rows: int, columns: int) -> str:
    return f"(row >= {top} && row < {top + rows} && column >= {left} && column < {left + columns})"


def _wide(kind: torch.dtype, stored: str) -> str:
    return f"(float){stored}" if kind == torch.uint8 else f"smope::{TYPES[kind]}::wide({stored})"
