"""Chains of plain tensor operations, fused into few kernels where a compiler for them is to be had."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class Fused(Generic[Result]):
    """A pure function of tensors, compiled for the shapes it meets on CUDA, run as it is elsewhere.

    Such functions read and write full-size pictures dozens of times over where each operation is a kernel;
    fused, each is a pass or two. What fails to compile runs eagerly from then on, which is said once.
    """

    def __init__(self, function: Callable[..., Result]) -> None:
        functools.update_wrapper(self, function)
        self.eager = function
        self._compiled: Callable[..., Result] | None = None
        self._given_up = find_spec("triton") is None

    def __call__(self, *args: Any) -> Result:
        first = next(arg for arg in args if isinstance(arg, Tensor))
        if self._given_up or not first.is_cuda:
            return self.eager(*args)
        if self._compiled is None:
            self._compiled = torch.compile(self.eager, dynamic=False)
        try:
            return self._compiled(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of Dynamo, Inductor, Triton or the C compiler that Triton calls
            self._given_up = True
            name = getattr(self.eager, "__name__", "")
            log.warning("%s runs unfused, which is slower: it could not be compiled (%s)", name, error)
            return self.eager(*args)


def fused(function: Callable[..., Result]) -> Fused[Result]:
    """Decorator: see `Fused`. Static shapes, no data-dependent control flow, random numbers passed in."""
    return Fused(function)
