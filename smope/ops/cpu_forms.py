"""Forms of some steps for results alone on a CPU: faster there than the plain ones, the same up to rounding.

`SMOPE.predict` asks for them; training, recording and exporting keep the plain forms.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_wanted: ContextVar[bool] = ContextVar("smope_cpu_forms", default=False)


@contextmanager
def cpu_forms(wanted: bool = True) -> Iterator[None]:
    """Within it, and without gradients, float32 on a CPU takes these forms."""
    token = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


def takes_cpu_form(x: Tensor) -> bool:
    # A compiler fuses steps itself, and a ContextVar would end its graph.
    if torch.compiler.is_dynamo_compiling() or not _wanted.get():
        return False
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled()
