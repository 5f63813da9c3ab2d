"""Whether a pass is being recorded that has kernels of its own for some steps (smope/inference).

Such a step is then one operator, defined by its PyTorch form, in place of the many that it is made of.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_whole: ContextVar[bool] = ContextVar("smope_recorded_whole", default=False)


@contextmanager
def whole_steps(whole: bool = True) -> Iterator[None]:
    """Within it, and without gradients, steps that a recorded pass has kernels for are one operator each."""
    token = _whole.set(whole)
    try:
        yield
    finally:
        _whole.reset(token)


def recorded_whole() -> bool:
    # A compiler fuses steps itself, and a ContextVar would end its graph.
    if torch.compiler.is_dynamo_compiling():
        return False
    return _whole.get() and not torch.is_grad_enabled()
