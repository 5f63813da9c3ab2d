"""Kernels of a recorded pass for maps: depthwise convolutions, norms, enlarging, reading at points."""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from torch import fx

from smope.inference.kernels import TYPES, WARP, Kernel, Layout
from smope.inference.simplify import (
    _call,
    _calls,
    _channels_last,
    _constant,
    _is_call,
    _is_constant,
    _is_view,
    _value,
    _wide,
)

aten = torch.ops.aten


def depthwise_convolutions(module: fx.GraphModule) -> list[Kernel]:
    """With their padding, bias and the ReLU6 on either side, of maps that are stored channels last; with the
    bias of the convolution before where that ends in ReLU6"""
    kernels: list[Kernel] = []
    for node in _calls(module.graph, aten.convolution.default):
        x, weight, bias, stride, padding, dilation, transposed, _, groups = node.args
        if not _is_constant(weight) or transposed or any(d != 1 for d in dilation):
            continue
        filters = _value(weight)
        if filters.dim() != 4 or filters.shape[1] != 1 or groups != filters.shape[0] or groups % 8:
            continue
        if not (bias is None or _is_constant(bias)) or _value(node).dtype not in TYPES:
            continue
        size = filters.shape[-1]
        if filters.shape[2:] != (size, size) or size > 7 or len(set(stride)) != 1 or stride[0] > 2:
            continue
        top, left = padding
        if _is_call(x, aten.constant_pad_nd.default) and len(x.args[1]) == 4 and not any(x.args[2:]):
            pads = x.args[1]
            if min(pads) >= 0:
                top, left, x = top + pads[2], left + pads[0], x.args[0]
        first = _is_call(x, aten.hardtanh.default) and x.args[1:] == (0.0, 6.0) and len(x.users) == 1
        x = x.args[0] if first else x
        if not _channels_last(_value(x)) or not _channels_last(_value(node)):
            continue
        before = _loose_bias(x) if first and len(x.users) == 1 else None
        (batch, channels, height, width), (_, _, down, across) = _value(x).shape, _value(node).shape
        last = _only_user(node, aten.hardtanh.default)
        active = last is not None and last.args[1:] == (0.0, 6.0)
        end = last if active else node
        shift = torch.zeros_like(_wide(weight)[:, 0, 0, 0]) if bias is None else _wide(bias)
        with module.graph.inserting_before(end):
            rows = _constant(module, _wide(weight).flatten(1).t().contiguous())  # [k k, C]
            given = [x, rows, _constant(module, shift.contiguous())]
            if before is not None:
                given.append(_constant(module, _wide(before).contiguous()))
                x.args = (*x.args[:2], None, *x.args[3:])
            sizes = (channels, height, width, down, across, size, stride[0], top, left)
            flags = [str(flag).lower() for flag in (before is not None, first, active)]
            numbers = ", ".join([TYPES[_value(x).dtype], *map(str, sizes), *flags])
            blocks = batch * -(-down // 8) * -(-across // 32) * -(-channels // 32)
            added = "nullptr" if before is None else "x3"
            kernel = Kernel(
                f"smope_depthwise_{len(kernels)}",
                f"using namespace smope; depthwise<{numbers}>(x0, x1, x2, {added}, y0);",
                [Layout.of(_value(n)) for n in given],
                [Layout.of(_value(end))],
                blocks * 256,
            )
            end.replace_all_uses_with(_call(module.graph, kernel, *given, val=_value(end)))
        kernels.append(kernel)
    module.graph.eliminate_dead_code()
    return kernels


def loose_biases(module: fx.GraphModule) -> None:
    """Biases of convolutions become steps of their own, as on a GPU they are: runs of small steps take them
    in, and eight channels are read at once."""
    for node in _calls(module.graph, aten.convolution.default):
        bias = _loose_bias(node)
        if bias is None or not _channels_last(_value(node)):
            continue
        with module.graph.inserting_before(node):
            plain = _call(module.graph, node.target, *node.args[:2], None, *node.args[3:], val=_value(node))
            column = _constant(module, _value(bias)[:, None, None].contiguous())
            added = _call(module.graph, aten.add.Tensor, plain, column, val=_value(node))
        node.replace_all_uses_with(added)
    module.graph.eliminate_dead_code()


def _loose_bias(node: Any) -> Any:
    """The bias of a convolution that adds it in a pass of its own, which a product of matrices does not"""
    if not _is_call(node, aten.convolution.default) or not _is_constant(node.args[2]):
        return None
    return None if _value(node.args[1]).shape[2:] == (1, 1) else node.args[2]


def layer_norms(module: fx.GraphModule) -> list[Kernel]:
    """With the sum before them, the ReLU after them, and the change of type on either side"""
    graph, kernels = module.graph, list[Kernel]()
    for node in _calls(graph, aten.native_layer_norm.default):
        x, shape, weight, bias, eps = node.args
        results = [user for user in node.users if user.users]
        if len(results) != 1 or results[0].target is not getitem or results[0].args[1] != 0:
            continue
        if len(shape) != 1 or shape[0] % WARP or shape[0] > 1024:
            continue
        if not all(_is_constant(n) for n in (weight, bias)):
            continue
        end, active = results[0], False
        if (user := _only_user(end, aten.relu.default)) is not None:
            end, active = user, True
        given = _summed(_uncast(x))
        types = [_value(given[0]).dtype, _value(given[-1]).dtype, _value(end).dtype]
        if not all(_value(n).is_contiguous() for n in given) or not TYPES.keys() >= {*types}:
            continue
        casts = [user for user in end.users if _is_cast(user) and _value(user).dtype in TYPES]
        narrow = {_value(cast).dtype for cast in casts}
        casts = casts if len(narrow) == 1 else []
        # The cast result alone, or both, or what there is without a cast.
        kinds = [*([] if casts and len(casts) == len(end.users) else types[2:]), *(narrow if casts else ())]
        rows, summed, twice = _value(x).numel() // shape[0], len(given) == 2, len(kinds) == 2
        names = ", ".join(TYPES[kind] for kind in (*types[:2], kinds[0], kinds[-1]))
        flags = ", ".join(str(flag).lower() for flag in (summed, active, twice))
        pointers = ["x0", "x1" if summed else "nullptr", f"x{len(given)}", f"x{len(given) + 1}"]
        pointers += ["y0", "y1" if twice else "nullptr"]
        made = [torch.empty(_value(end).shape, dtype=kind, device="meta") for kind in kinds]
        with graph.inserting_before(node):
            affine = [_constant(module, _wide(n).contiguous()) for n in (weight, bias)]
            kernel = Kernel(
                f"smope_layer_norm_{len(kernels)}",
                f"using namespace smope; layer_norm<{names}, {shape[0]}, {flags}>"
                f"({', '.join(pointers)}, {rows}LL, {float(eps)!r}f);",
                [Layout.of(_value(n)) for n in (*given, *affine)],
                [Layout.of(value) for value in made],
                rows * WARP,
            )
            new = _call(graph, kernel, *given, *affine, val=made[0])
            parts = [_call(graph, getitem, new, i, val=made[i]) for i in range(2)] if twice else [new]
        for cast in casts:
            cast.replace_all_uses_with(parts[-1])
        end.replace_all_uses_with(parts[0])
        kernels.append(kernel)
    graph.eliminate_dead_code()
    return kernels


def map_reads(module: fx.GraphModule) -> list[Kernel]:
    """`smope::read_maps`: a warp a point, all maps one after the other"""
    graph, kernels = module.graph, list[Kernel]()
    for node in _calls(graph, torch.ops.smope.read_maps.default):
        maps, points, kind = node.args
        values = [_value(n) for n in maps]
        channels = [value.shape[1] for value in values]
        if any(c % WARP for c in channels) or any(v.dtype not in TYPES for v in values) or kind not in TYPES:
            continue
        batch, pairs, each = _value(points).shape[:3]
        count, width = batch * pairs * each, sum(channels)
        body = [
            f"const long long point = THREAD / WARP; if (point >= {count}LL) return;",
            f"const long long image = point / {pairs * each}LL;",
            f"const float x = x{len(maps)}[point * 2], y = x{len(maps)}[point * 2 + 1];",
        ]
        for i, value in enumerate(values):
            _, depth, height, across = value.shape
            sizes = f"smope::{TYPES[value.dtype]}, smope::{TYPES[kind]}, {depth}, {height}, {across}"
            at, to = (
                f"x{i} + image * {depth * height * across}LL",
                f"y0 + point * {width} + {sum(channels[:i])}",
            )
            body.append(f"smope::read_map<{sizes}>({at}, x, y, {to});")
        layouts = [Layout.of(v.to("meta").contiguous(memory_format=torch.channels_last)) for v in values]
        kernel = Kernel(
            f"smope_read_maps_{len(kernels)}",
            " ".join(body),
            [*layouts, Layout.contiguous(_value(points))],
            [Layout.contiguous(_value(node))],
            count * WARP,
        )
        with graph.inserting_before(node):
            node.replace_all_uses_with(_call(graph, kernel, *maps, points, val=_value(node)))
        kernels.append(kernel)
    graph.eliminate_dead_code()
    return kernels


def cell_norms(module: fx.GraphModule) -> list[Kernel]:
    """`smope::normed_cells`: GroupNorm in two kernels, a warp a piece of an image's cells"""
    graph, kernels = module.graph, list[Kernel]()
    for node in _calls(graph, torch.ops.smope.normed_cells.default):
        x, weight, bias, groups, eps = node.args
        value = _value(x)
        batch, cells, channels = value.shape
        each = channels // groups
        if groups % WARP or each & (each - 1) or value.dtype not in TYPES or not value.is_contiguous():
            continue
        if not (_is_constant(weight) and _is_constant(bias)):
            continue
        piece = min(max(batch * cells // 4096, 32), 128)  # some thousands of warps, or few to sum up
        pieces = batch * -(-cells // piece)
        sizes = f"smope::{TYPES[value.dtype]}, {channels}, {groups}, {cells}, {piece}"
        stored = Layout.of(value)
        measured = torch.empty(pieces, groups, 2, device="meta")
        with graph.inserting_before(node):
            affine = [_constant(module, _wide(n).contiguous()) for n in (weight, bias)]
            measure = Kernel(
                f"smope_measure_cells_{len(kernels)}",
                f"smope::measure_cells<{sizes}>(x0, y0, {pieces}LL);",
                [stored],
                [Layout.of(measured)],
                pieces * WARP,
            )
            norm = Kernel(
                f"smope_norm_cells_{len(kernels)}",
                f"smope::norm_cells<{sizes}>(x0, x1, x2, x3, y0, {float(eps)!r}f, {pieces}LL);",
                [stored, Layout.of(measured), *(Layout.of(_value(n)) for n in affine)],
                [stored],
                pieces * WARP,
            )
            new = _call(graph, measure, x, val=measured)
            new = _call(graph, norm, x, new, *affine, val=value)
        node.replace_all_uses_with(new)
        kernels += [measure, norm]
    graph.eliminate_dead_code()
    return kernels


def enlargements(module: fx.GraphModule) -> list[Kernel]:
    """Bilinear maps of twice the size, in the type they have before they are widened for PyTorch's"""
    graph, kernels = module.graph, list[Kernel]()
    for node in _calls(graph, aten.upsample_bilinear2d.vec, aten.upsample_bilinear2d.default):
        x = _uncast(node.args[0])
        value, result = _value(x), _value(node)
        _, channels, height, width = value.shape
        twice = tuple(result.shape[2:]) == (2 * height, 2 * width) and not node.args[2]
        if not twice or channels % 8 or value.dtype not in TYPES or not _channels_last(value):
            continue
        if any(_is_view(user) for user in node.users):  # which may want the order that PyTorch gives it
            continue
        made = torch.empty(result.shape, dtype=value.dtype, device="meta", memory_format=torch.channels_last)
        count = made.numel() // 8
        kernel = Kernel(
            f"smope_enlarge_{len(kernels)}",
            f"smope::enlarge<smope::{TYPES[value.dtype]}, {channels}, {height}, {width}>(x0, y0, {count}LL);",
            [Layout.of(value)],
            [Layout.of(made)],
            count,
        )
        with graph.inserting_before(node):
            new = _call(graph, kernel, x, val=made)
            if made.dtype != result.dtype:
                new = graph.call_function(aten._to_copy.default, (new,), {"dtype": result.dtype})
                new.meta["val"] = made.to(result.dtype)
        node.replace_all_uses_with(new)
        kernels.append(kernel)
    graph.eliminate_dead_code()
    return kernels


def _only_user(node: fx.Node, target: Any) -> Any:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target is target else None


def _is_cast(node: Any) -> bool:
    """Another type, and nothing else"""
    return (
        _is_call(node, aten._to_copy.default)
        and not set(node.kwargs) - {"dtype"}
        and _value(node).stride() == _value(node.args[0]).stride()
    )


def _uncast(node: Any) -> Any:
    """What was widened before it came"""
    if _is_cast(node) and _value(node).dtype == torch.float32 and _value(node.args[0]).dtype in TYPES:
        return node.args[0]
    return node


def _summed(node: Any) -> tuple[fx.Node, ...]:
    """The two that were added, or the one"""
    if not _is_call(node, aten.add.Tensor) or len(node.users) > 1 or node.kwargs:
        return (node,)
    parts = tuple(_uncast(n) if isinstance(n, fx.Node) else n for n in node.args)
    same = all(isinstance(n, fx.Node) and _value(n).shape == _value(node).shape for n in parts)
    return parts if same and all(_value(n).is_contiguous() for n in parts) else (node,)
