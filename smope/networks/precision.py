"""Which type is computed in: what autocast says, and how to be without it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_type(x: Tensor) -> torch.dtype:
    """The type that autocast computes in on x's device; x's own where there is no autocast."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A block in which operations on x's device keep the types they are given.

    Nothing at all where autocast is off already: exporters make a graph of its own of each such block.
    """
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
