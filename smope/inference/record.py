"""Record what a function does with its tensors, as a graph of PyTorch's operators without any Python between.

Whatever follows from weights and constants alone is computed once, while recording, and stands in the graph
as its result: folded BatchNorms, weights in 16 bits, positions, the keys of the registered meshes. A network
needs no second form for this, and one that changes is recorded as it then is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten

# Results whose shape or Python value depends on the data: on a GPU each of them waits for it.
_WAITING = frozenset(
    {
        "aten::_local_scalar_dense",
        "aten::nonzero",
        "aten::masked_select",
        "aten::_unique2",
        "aten::unique_dim",
        "aten::unique_consecutive",
        "aten::repeat_interleave",
        "aten::equal",
        "aten::is_nonzero",
    }
)
# Results that follow from shapes alone.
_OF_SHAPE = frozenset(
    f"aten::{name}"
    for name in ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "new_tensor")
)
_SAME_VALUE = frozenset({"aten::detach", "aten::alias", "aten::lift_fresh"})


class NotRecordable(RuntimeError):
    """The function does what a graph of operators cannot hold; the message says what."""


class Constants(torch.nn.Module):
    """The tensors that a graph reads besides its inputs, as buffers c0, c1, ..."""

    def __init__(self) -> None:
        super().__init__()
        self._names: dict[Any, str] = {}

    def name(self, tensor: Tensor) -> str:
        """Of that tensor, added where it is new; views of the same numbers are one."""
        stored = tensor.untyped_storage()._cdata
        key = (stored, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in self._names:
            self._names[key] = f"c{len(self._names)}"
            self.register_buffer(self._names[key], tensor, persistent=False)
        return self._names[key]


def record(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> fx.GraphModule:
    """`function(*inputs)`, a tensor, as a graph for inputs of the same shapes, strides and types.

    It runs once. No autograd: call under `torch.no_grad`, with autocast as the graph is to have it.
    `NotRecordable` where a result's shape or a Python value depends on the inputs' values.
    """
    recorder = _Recorder(inputs)
    with recorder:
        output = function(*inputs)
    recorder.graph.output(recorder.node_of(output))
    return fx.GraphModule(recorder.constants, recorder.graph)


class _Recorder(TorchDispatchMode):
    """Sees each operator below autocast; those that no input reaches run and leave no trace."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.constants = Constants()
        self._known = WeakTensorKeyDictionary()  # tensor -> (its node, writes to its storage before it)
        self._writes: dict[int, int] = {}  # storage -> how often it was written to by what was recorded
        self._written: list[Any] = []  # those storages, kept so that no other gets their address
        self._same: dict[Any, fx.Node] = {}
        self._fetched: dict[str, fx.Node] = {}
        # Weights in 16 bits -> what they were made from, for folding BatchNorms exactly.
        self._wide: dict[str, Tensor] = {}
        self._origin = WeakTensorKeyDictionary()
        for i, tensor in enumerate(inputs):
            self._know(tensor, self.graph.placeholder(f"input{i}"))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name in _OF_SHAPE or not any(tensor in self._known for tensor in tensors):
            result = func(*args, **kwargs)
            if name == "aten::_to_copy" and isinstance(result, Tensor):
                self._origin[result] = args[0]
            return result
        if name in _WAITING or (name == "aten::index" and _has_mask(args[1])):
            raise NotRecordable(f"{name} of a value that depends on the images waits for the device")
        if name in _SAME_VALUE:
            node = self.node_of(args[0])
            result = func(*args, **kwargs)
            self._know(result, node)
            return result
        pure = _without_writing(func)
        plain = tree_map_only(Tensor, self.node_of, (args, kwargs))
        node = self._node(pure, *plain)
        result = func(*args, **kwargs)
        if pure is not func:
            stored = args[0].untyped_storage()
            self._written.append(stored)
            self._writes[stored._cdata] = self._writes.get(stored._cdata, 0) + 1
            self._know(args[0], node)
        self._know_results(result, node)
        return result

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node that has this value; constants are fetched from the graph's own."""
        writes = self._writes.get(tensor.untyped_storage()._cdata, 0)
        if tensor in self._known:
            node, then = self._known[tensor]
            if then != writes:
                raise NotRecordable(f"a tensor of shape {tuple(tensor.shape)} was written to through a view")
            assert isinstance(node, fx.Node)
            return node
        if writes:
            raise NotRecordable(f"a constant of shape {tuple(tensor.shape)} was written to")
        name = self.constants.name(tensor.detach())
        if name not in self._fetched:
            self._fetched[name] = self.graph.get_attr(name)
            self._fetched[name].meta["val"] = tensor.detach()
            if tensor in self._origin:
                self._fetched[name].meta["wide"] = self._origin[tensor]
        return self._fetched[name]

    def _node(self, func: Any, args: Any, kwargs: Any) -> fx.Node:
        """A new one, or the one that has computed just this."""
        key = (func, repr(args), repr(kwargs))  # nodes print as their names, which are unique
        if key not in self._same:
            self._same[key] = self.graph.call_function(func, args, kwargs)
        return self._same[key]

    def _know_results(self, result: Any, node: fx.Node) -> None:
        if isinstance(result, Tensor):
            self._know(result, node)
            return
        for i, one in enumerate(result if isinstance(result, (tuple, list)) else ()):
            if isinstance(one, Tensor):
                item = self._node(getitem, (node, i), {})
                self._know(one, item)

    def _know(self, tensor: Tensor, node: fx.Node) -> None:
        self._known[tensor] = (node, self._writes.get(tensor.untyped_storage()._cdata, 0))
        node.meta["val"] = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
        )


def _has_mask(indices: Sequence[Tensor | None]) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


def _without_writing(func: Any) -> Any:
    """relu_ -> relu and so on: the same function with its result in a new tensor"""
    if not func._schema.is_mutable:
        return func
    name = func._schema.name.removeprefix("aten::")
    if name == "copy_":
        return aten.copy.default
    packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    overload = func._schema.overload_name or "default"
    if packet is None or not hasattr(packet, overload):
        raise NotRecordable(f"{func} writes to its arguments")
    return getattr(packet, overload)
