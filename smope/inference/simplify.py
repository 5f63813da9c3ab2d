"""Fewer and larger operators in a recorded graph, with the same results up to rounding.

A graph's small steps cost about two microseconds each when it is replayed, and a pass over a large map costs
its bytes; so norms go into convolutions, convolutions of one pixel become matrix products that add their bias
themselves, and activations go into what is before them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
_NORMS = (aten.native_batch_norm.default, aten.cudnn_batch_norm.default)
_ADD = aten.add.Tensor


def simplify(
    module: fx.GraphModule,
    cudnn: bool = False,
    before: Callable[[fx.GraphModule], None] = lambda module: None,
    after: Callable[[fx.GraphModule], None] = lambda module: None,
) -> None:
    """In place. `cudnn`: with its fused convolutions, which exist on a GPU alone. `before` and `after` put
    kernels of our own in: where the convolutions are as they were, and at the end."""
    graph = module.graph
    fold_norms(module)
    before(module)
    if cudnn:
        relu_into_cudnn(module)
    pointwise_as_products(module)
    bias_with_relu6(module)
    relu_into_products(graph)
    store_channels_last(module)
    graph.eliminate_dead_code()
    after(module)
    graph.lint()
    module.recompile()
    used = {node.target for node in graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in module.named_buffers() if name not in used]:
        delattr(module, name)


def fold_norms(module: fx.GraphModule) -> None:
    """BatchNorm on stored statistics after a convolution becomes part of its weights and bias."""
    for node in _calls(module.graph, *_NORMS):
        conv, weight, bias, mean, variance, training, _, eps = node.args
        if training or not _is_call(conv, aten.convolution.default) or len(conv.users) > 1:
            continue
        kernel, old_bias = conv.args[1], conv.args[2]
        if not all(_is_constant(n) for n in (kernel, weight, bias, mean, variance)):
            continue
        scale = _wide(weight) * (_wide(variance) + eps).rsqrt()
        shift = _wide(bias) - _wide(mean) * scale
        if old_bias is not None:
            shift = shift + _wide(old_bias) * scale
        kind = _value(kernel).dtype
        folded = (_wide(kernel) * scale[:, None, None, None]).to(kind)
        with module.graph.inserting_before(conv):
            conv.args = (
                conv.args[0],
                _constant(module, folded),
                _constant(module, shift.to(kind)),
                *conv.args[3:],
            )
        for user in list(node.users):
            if user.target is getitem and user.args[1] == 0:
                user.replace_all_uses_with(conv)


def pointwise_as_products(module: fx.GraphModule) -> None:
    """A 1x1 convolution of a map that is stored channels last is a matrix product over its pixels."""
    graph = module.graph
    for node in _calls(graph, aten.convolution.default):
        x, kernel, bias, stride, padding, dilation, transposed, _, groups = node.args
        if not _is_constant(kernel) or transposed or groups != 1 or bias is None or not _is_constant(bias):
            continue
        weight = _value(kernel)
        plain = list(stride) == [1, 1] and not any(padding) and list(dilation) == [1, 1]
        stored = _value(x)
        if weight.shape[2:] != (1, 1) or not plain or not _channels_last(stored):
            continue
        batch, _, height, width = stored.shape
        with graph.inserting_before(node):
            product = _constant(module, weight.flatten(1).contiguous().t())
            rows = _call(graph, aten.permute.default, x, [0, 2, 3, 1])
            rows = _call(graph, aten.view.default, rows, [batch * height * width, weight.shape[1]])
            rows = _call(graph, aten.addmm.default, bias, rows, product)
            y = _call(graph, aten.view.default, rows, [batch, height, width, weight.shape[0]])
            y = _call(graph, aten.permute.default, y, [0, 3, 1, 2])
        y.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(y)


def bias_with_relu6(module: fx.GraphModule) -> None:
    """Convolution, bias and ReLU6: the last two in one pass over the map, where PyTorch makes two."""
    graph = module.graph
    for node in _calls(graph, aten.hardtanh.default):
        before = node.args[0]
        if node.args[1:] != (0.0, 6.0) or len(before.users) > 1:
            continue
        if _is_call(before, aten.convolution.default) and before.args[2] is not None:
            with graph.inserting_before(before):
                bias = _constant(module, _value(before.args[2])[:, None, None])
            before.args = (*before.args[:2], None, *before.args[3:])
        elif _is_call(before, _ADD) and _is_constant(before.args[1]) and not before.kwargs:
            before, bias = before.args
        else:
            continue
        with graph.inserting_before(node):
            node.replace_all_uses_with(_call(graph, relu6_of_sum, before, bias, val=node.meta["val"]))


def relu_into_products(graph: fx.Graph) -> None:
    for node in _calls(graph, aten.relu.default):
        way = _views_back_to(node.args[0], aten.addmm.default)
        if way is None:
            continue
        product = way[-1]
        with graph.inserting_before(product):
            active = _call(graph, aten._addmm_activation.default, *product.args, val=product.meta.get("val"))
        product.replace_all_uses_with(active)
        node.replace_all_uses_with(node.args[0])


def relu_into_cudnn(module: fx.GraphModule) -> None:
    """relu(convolution) and relu(convolution + shortcut) of maps that are stored channels last"""
    graph = module.graph
    for node in _calls(graph, aten.relu.default):
        before, shortcut = node.args[0], None
        if _is_call(before, _ADD) and not before.kwargs and len(before.users) == 1:
            before, shortcut = before.args
        if not _is_call(before, aten.convolution.default) or len(before.users) > 1:
            continue
        x, kernel, bias, stride, padding, dilation, transposed, _, groups = before.args
        if transposed or bias is None or groups != 1 or not _channels_last(_value(x)):
            continue
        rest = (bias, stride, padding, dilation, groups)
        with graph.inserting_before(node):
            if shortcut is None:
                new = _call(graph, aten.cudnn_convolution_relu.default, x, kernel, *rest)
            else:
                new = _call(graph, aten.cudnn_convolution_add_relu.default, x, kernel, shortcut, 1.0, *rest)
        new.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(new)


def store_channels_last(module: fx.GraphModule) -> None:
    """Weights of convolutions as their kernels read them, so that none is turned over in every pass."""
    kinds = (
        aten.convolution.default,
        aten.cudnn_convolution_relu.default,
        aten.cudnn_convolution_add_relu.default,
    )
    for node in _calls(module.graph, *kinds):
        kernel = node.args[1]
        if _is_constant(kernel) and _value(kernel).dim() == 4:
            with module.graph.inserting_before(node):
                stored = _value(kernel).contiguous(memory_format=torch.channels_last)
                node.update_arg(1, _constant(module, stored))


def relu6_of_sum(x: Tensor, bias: Tensor) -> Tensor:
    """min(max(x + bias, 0), 6) in one pass on a GPU"""
    kernel = _relu6_kernel() if x.is_cuda else None
    return (x + bias).clamp_(0.0, 6.0) if kernel is None else kernel(x, bias)


_kernels: dict[str, Callable[..., Tensor] | None] = {}


def _relu6_kernel() -> Callable[..., Tensor] | None:
    """Compiled by PyTorch's own runtime compiler in some 0.1 s, and kept in its cache on disk; None without
    one."""
    if "relu6" not in _kernels:
        code = (
            "template <typename T> T smope_relu6_of_sum(T x, T bias) "
            "{ T y = x + bias; return y < T(0) ? T(0) : (y > T(6) ? T(6) : y); }"
        )
        try:
            kernel = torch.cuda.jiterator._create_jit_fn(code)
            kernel(torch.zeros(1, device="cuda"), torch.zeros(1, device="cuda"))
            _kernels["relu6"] = kernel
        except (AttributeError, RuntimeError):
            _kernels["relu6"] = None
    return _kernels["relu6"]


def launches(module: fx.GraphModule) -> int:
    """How many kernels about a graph starts on a GPU: views start none, a convolution's bias one more."""
    count = 0
    for node in module.graph.nodes:
        if node.op != "call_function" or node.target is getitem or _is_view(node):
            continue
        count += 1 + (node.target is aten.convolution.default and node.args[2] is not None)
    return count


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(r.alias_info is not None for r in schema.returns)


def _views_back_to(node: Any, target: Any) -> list[fx.Node] | None:
    """From `node` back to a call of `target` through views that nothing else reads"""
    way = []
    while isinstance(node, fx.Node) and len(node.users) == 1:
        way.append(node)
        if node.target is target:
            return way
        if node.op != "call_function" or not (_is_view(node) or node.target is aten._unsafe_view.default):
            return None
        node = node.args[0]
    return None


def _calls(graph: fx.Graph, *targets: Any) -> Iterator[Any]:  # nodes; their arguments may be anything
    yield from [node for node in graph.nodes if node.op == "call_function" and node.target in targets]


def _call(graph: fx.Graph, target: Any, *args: Any, val: Tensor | None = None) -> Any:
    node = graph.call_function(target, args)
    if val is not None:
        node.meta["val"] = val
    return node


def _is_call(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is target


def _is_constant(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _value(node: fx.Node) -> Tensor:
    """A constant itself; of others an empty tensor of its shape, strides and type"""
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value


def _wide(node: fx.Node) -> Tensor:
    """A constant in float32, as it was before it was rounded"""
    return node.meta.get("wide", _value(node)).float()


def _constant(module: fx.GraphModule, tensor: Tensor) -> fx.Node:
    """A new one; call where nodes are being inserted"""
    name = f"s{len(module.graph.nodes)}_{sum(1 for _ in module.buffers())}"
    module.register_buffer(name, tensor, persistent=False)
    node = module.graph.get_attr(name)
    node.meta["val"] = tensor
    return node


def _channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
