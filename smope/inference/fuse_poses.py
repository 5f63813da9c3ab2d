"""Kernels of a recorded pass for poses: one thread or warp a pose."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, fx

from smope.inference.kernels import WARP, Kernel, Layout
from smope.inference.simplify import _call, _calls, _value


def pose_fits(module: fx.GraphModule) -> list[Kernel]:
    """`smope::fit_pose`: a warp a pose"""
    graph, kernels = module.graph, list[Kernel]()
    for node in _calls(graph, torch.ops.smope.fit_pose.default):
        *given, steps, relative = node.args
        values = [_value(n) for n in given]
        if any(value.dtype != torch.float32 for value in values):
            continue
        batch, pairs, points = values[2].shape[:3]
        layouts = [Layout.contiguous(value) for value in values]
        apart = []
        for i in (2, 3, 4, 5, 6):
            row = _row_stride(values[i], 3 if i < 5 else 2)
            if row is not None:
                layouts[i] = Layout.of(values[i])
            apart.append(row or (values[i].shape[-1] if values[i].dim() > (3 if i < 5 else 2) else 1))
        sizes = [pairs, points, steps, str(bool(relative)).lower(), *apart]
        pointers = ", ".join(f"x{i}" for i in range(9))
        kernel = Kernel(
            f"smope_fit_pose_{len(kernels)}",
            f"smope::fit_pose<{', '.join(map(str, sizes))}>({pointers}, y0, {batch * pairs}LL);",
            layouts,
            [Layout.contiguous(_value(node))],
            batch * pairs * WARP,
            aligned=False,
        )
        with graph.inserting_before(node):
            node.replace_all_uses_with(_call(graph, kernel, *given, val=_value(node)))
        kernels.append(kernel)
    graph.eliminate_dead_code()
    return kernels


def _row_stride(value: Tensor, dims: int) -> int | None:
    """How far apart the rows of the first `dims` dimensions are, if it is the same everywhere"""
    shape, strides = value.shape[:dims], value.stride()[:dims]
    if value.dim() > dims and value.stride(-1) != 1:
        return None
    row = strides[-1]
    for i in range(dims):
        if shape[i] != 1 and strides[i] != row * prod(shape[i + 1 : dims]):
            return None
    return row
