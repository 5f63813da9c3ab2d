"""A whole step's forward and backward pass as one CUDA graph: the host starts it at once.

Thousands of small operations a step take the host as long as the device, or longer. Shapes are the same in
every step and nothing in it waits for the device, so what was seen once can be replayed, on other images.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

Losses = tuple[Tensor, dict[str, Tensor]]  # the loss and its parts
EAGER_STEPS = 6  # first ones, in which kernels are compiled and chosen


class Gradients:
    """Runs a step up to its gradients, which it leaves in the parameters."""

    def __init__(self, step: nn.Module, graph: bool) -> None:
        """`step` gives the loss and its parts of a batch. `graph`: as a CUDA graph after the first steps."""
        self.step, self.graph_wanted = step, graph
        self._parameters = [p for p in step.parameters() if p.requires_grad]
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: Any = None  # what the graph reads
        self._result: Losses | None = None  # and writes
        self._gradients: list[Tensor | None] = []

    def __call__(self, batch: Any) -> Losses:
        """The parameters must have no gradients yet."""
        self._calls += 1
        if self.graph_wanted and self._graph is None and self._calls > EAGER_STEPS:
            self._capture(batch)
        if self._graph is None or not same_form(self._batch, batch):
            return self._eager(batch)
        assert self._result is not None
        copy_into(self._batch, batch)
        self._graph.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._result

    def _eager(self, batch: Any) -> Losses:
        loss, parts = self.step(batch)
        loss.backward()
        return loss.detach(), parts

    def _capture(self, batch: Any) -> None:
        graph = torch.cuda.CUDAGraph()
        self._batch = map_tensors(torch.clone, batch)
        torch.cuda.empty_cache()  # the graph's memory is its own
        try:
            # Other threads may go on using the device: they copy the next batch.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                result = self._eager(self._batch)
        except RuntimeError as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            self.graph_wanted = False
            log.warning("a step cannot be replayed as a CUDA graph, and goes on without: %s", error)
            for parameter in self._parameters:
                parameter.grad = None
            return
        self._graph, self._result = graph, result
        self._gradients = [parameter.grad for parameter in self._parameters]
        log.info("steps are replayed as a CUDA graph from now on")


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A dataclass, tuple, tensor or other value with its tensors changed"""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(map_tensors(function, one) for one in value)
    if is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: map_tensors(function, getattr(value, f.name)) for f in fields(value)}
        return replace(value, **changed)
    return value


def tensors_of(value: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, value)
    return found


def same_form(one: Any, other: Any) -> bool:
    """Whether two batches have tensors of the same shapes and types in the same places, and equal rests"""

    def form(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.shape, value.dtype, value.device
        if isinstance(value, tuple):
            return [form(one) for one in value]
        if is_dataclass(value) and not isinstance(value, type):
            return type(value), [form(getattr(value, f.name)) for f in fields(value)]
        return value

    return bool(form(one) == form(other))


def copy_into(target: Any, source: Any) -> None:
    for to, given in zip(tensors_of(target), tensors_of(source), strict=True):
        to.copy_(given, non_blocking=True)
