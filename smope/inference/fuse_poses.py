"""Kernels of a recorded pass for poses: a warp a pose where one is fitted, else a thread a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from smope.inference.kernels import TYPES, WARP, Kernel, Layout
from smope.inference.simplify import _call, _calls, _value


def pose_kernels(module: fx.GraphModule) -> list[Kernel]:
    """Of the operators that work on poses; one whose kernel does not read what it is given stays as it is."""
    kernels: list[Kernel] = []
    for make in (_direct_poses, _anchors, _pose_fits, _pose_steps, _tables):
        for node, kernel, given in make(module.graph):
            with module.graph.inserting_before(node):
                new = _call(module.graph, kernel, *given, val=node.meta.get("val"))
            node.replace_all_uses_with(new)
            kernels.append(kernel)
    module.graph.eliminate_dead_code()
    return kernels


Replacement = tuple[fx.Node, Kernel, Sequence[Any]]  # what stands for a node, and what it is called with


def _replaced(
    node: fx.Node, name: str, body: str, rows: _Rows, threads: int, made: Sequence[Layout] = ()
) -> Replacement:
    """`made`: layouts of several results; one is as the node has it"""
    made = made or [Layout.contiguous(_value(node))]
    return node, Kernel(name, body, rows.layouts, made, threads, aligned=False), rows.given


def _direct_poses(graph: fx.Graph) -> Iterator[Replacement]:
    """`smope::pose_from_values`"""
    for number, node in enumerate(_calls(graph, _operator("pose_from_values"))):
        *given, width, height = node.args
        kind, *others = [_value(n).dtype for n in given]
        if kind not in TYPES or others != [kind] * 2 + [torch.float32] * 3:
            continue
        rows = _Rows(given, [2] * 5 + [None])
        batch, pairs = _value(node).shape[:2]
        body = (
            f"smope::direct_pose<smope::{TYPES[kind]}, {pairs}, {rows.apart}>"
            f"({rows.pointers}, y0, {width}.f, {height}.f, {batch * pairs}LL);"
        )
        yield _replaced(node, f"smope_direct_pose_{number}", body, rows, batch * pairs)


def _anchors(graph: fx.Graph) -> Iterator[Replacement]:
    """`smope::place_anchors`"""
    for number, node in enumerate(_calls(graph, _operator("place_anchors"))):
        *given, width, height, kind = node.args
        if kind not in TYPES or any(_value(n).dtype != torch.float32 for n in given):
            continue
        rows = _Rows(given, [2, 2, 3, 2, None])
        batch, pairs, points = _value(given[2]).shape[:3]
        made = [
            Layout.contiguous(torch.empty(batch, pairs, points, columns, dtype=dtype, device="meta"))
            for columns, dtype in ((15, kind), (2, torch.float32), (2, torch.float32))
        ]
        body = (
            f"smope::place_anchors<smope::{TYPES[kind]}, {pairs}, {points}, {rows.apart}>"
            f"({rows.pointers}, y0, y1, y2, {width}.f, {height}.f, {batch * pairs * points}LL);"
        )
        yield _replaced(node, f"smope_place_anchors_{number}", body, rows, batch * pairs * points, made)


def _pose_fits(graph: fx.Graph) -> Iterator[Replacement]:
    """`smope::fit_pose`"""
    for number, node in enumerate(_calls(graph, _operator("fit_pose"))):
        *given, steps, relative = node.args
        if any(_value(n).dtype != torch.float32 for n in given):
            continue
        rows = _Rows(given, [2, 2, 3, 3, 3, 2, 2, 2, None])
        batch, pairs, points = _value(given[2]).shape[:3]
        numbers = f"{pairs}, {points}, {steps}, {str(bool(relative)).lower()}, {rows.apart}"
        body = (
            f"smope::fit_pose<smope::F32, smope::F32, false, {numbers}>"
            f"({rows.pointers}, y0, {batch * pairs}LL);"
        )
        yield _replaced(node, f"smope_fit_pose_{number}", body, rows, batch * pairs * WARP)


def _pose_steps(graph: fx.Graph) -> Iterator[Replacement]:
    """`smope::step_by_layer`: `fit_pose` of one step, with offsets and weights in one tensor, and both halves
    of the prior in one"""
    for number, node in enumerate(_calls(graph, _operator("step_by_layer"))):
        given = node.args
        kinds = [_value(n).dtype for n in given]
        moved, prior = kinds.pop(3), kinds.pop(3)
        if any(kind != torch.float32 for kind in kinds) or not TYPES.keys() >= {moved, prior}:
            continue
        rows = _Rows(given, [2, 2, 3, 3, 2, 2, None])
        batch, pairs, points = _value(given[2]).shape[:3]
        turn, shift, point, target, held, diameter = rows.strides
        apart = (turn, shift, point, target, target, held, held, diameter)
        numbers = ", ".join(map(str, (pairs, points, 1, "true", *apart)))
        body = (
            f"smope::fit_pose<smope::{TYPES[moved]}, smope::{TYPES[prior]}, true, {numbers}>"
            f"(x0, x1, x2, x3, x3 + 2, x4, x4 + 6, x5, x6, y0, {batch * pairs}LL);"
        )
        yield _replaced(node, f"smope_step_pose_{number}", body, rows, batch * pairs * WARP)


def _tables(graph: fx.Graph) -> Iterator[Replacement]:
    """`smope::make_table`"""
    for number, node in enumerate(_calls(graph, _operator("make_table"))):
        *given, width, height = node.args
        kinds = [_value(n).dtype for n in given]
        seen, sigma, scores = kinds.pop(5), kinds.pop(5), kinds.pop(0)
        if any(k != torch.float32 for k in kinds) or seen != sigma or not TYPES.keys() >= {scores, seen}:
            continue
        rows = _Rows(given, [2] * 8)
        batch, pairs = _value(node).shape[:2]
        body = (
            f"smope::table_row<smope::{TYPES[scores]}, smope::{TYPES[seen]}, {rows.apart}>"
            f"({rows.pointers}, y0, {width}.f, {height}.f, {batch * pairs}LL);"
        )
        yield _replaced(node, f"smope_table_{number}", body, rows, batch * pairs)


def _operator(name: str) -> Any:
    """Of that name; None where nothing that defines it was imported, and so no graph can hold it"""
    packet = getattr(torch.ops.smope, name, None)
    return None if packet is None else packet.default


class _Rows:
    """How a kernel reads its inputs: each has a row for every index of as many first dimensions as `dims`
    says; None is for one that is read as a whole."""

    def __init__(self, given: Sequence[fx.Node], dims: Sequence[int | None]) -> None:
        self.given, self.layouts, self.strides = given, list[Layout](), list[int]()
        for value, of_rows in zip(map(_value, given), dims, strict=True):
            row = None if of_rows is None else _row_stride(value, of_rows)
            self.layouts.append(Layout.contiguous(value) if row is None else Layout.of(value))
            if of_rows is not None:
                self.strides.append(prod(value.shape[of_rows:]) if row is None else row)
        self.apart = ", ".join(map(str, self.strides))
        self.pointers = ", ".join(f"x{i}" for i in range(len(given)))


def _row_stride(value: Tensor, dims: int) -> int | None:
    """How far apart the rows of the first `dims` dimensions are, if it is the same everywhere and each row
    lies in one piece"""
    shape, strides = value.shape[:dims], value.stride()[:dims]
    if not value.flatten(0, dims - 1)[0].is_contiguous():
        return None
    row = strides[-1]
    for i in range(dims):
        if shape[i] != 1 and strides[i] != row * prod(shape[i + 1 : dims]):
            return None
    return row
