"""An endless stream of batches, opened for a run."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def opened(batches: Iterable[Any]) -> Iterator[Iterator[Any]]:
    """Iterate, and close what can be closed: streams own worker processes."""
    iterator = iter(batches)
    try:
        yield iterator
    finally:
        for owner in (iterator, batches):
            if close := getattr(owner, "close", None):
                close()


def next_of(batches: Iterator[Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    try:
        batch = next(batches)
    except StopIteration:
        raise RuntimeError(
            "the stream of batches ended before the run did; training needs an endless one"
        ) from None
    return batch, time.perf_counter() - began
