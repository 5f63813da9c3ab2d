"""A bounded line of requests before the one model."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from smope.serve.limits import Limits, Refused

T = TypeVar("T")


class Line:
    """One photo at a time goes through the model, in a thread; a limited number waits for it.

    A place in the line is taken before a photo is read and held until the thread is done with it, also where
    nobody waits for the answer any longer: what is in memory is bounded, whatever clients do.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._free = limits.waiting + 1
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="smope-serve")

    @contextmanager
    def place(self) -> Iterator[Place]:
        """A place of one's own; `Refused` (503) where all are taken."""
        if self._free < 1:
            raise Refused(
                503, f"{self._limits.waiting + 1} photos are in the line already; send it again later", 2
            )
        self._free -= 1
        place = Place(self._thread, self._limits.seconds)
        try:
            yield place
        finally:
            if place.job is None:
                self._leave()
            else:
                place.job.add_done_callback(self._leave)

    def _leave(self, _: Any = None) -> None:
        self._free += 1

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)


class Place:
    """Of one request."""

    def __init__(self, thread: ThreadPoolExecutor, seconds: float) -> None:
        self._thread, self._seconds = thread, seconds
        self.job: asyncio.Future[Any] | None = None

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` gives, in its turn; `Refused` (503) where that takes too long."""
        given_up = threading.Event()

        def turn() -> T | None:
            return None if given_up.is_set() else work()

        self.job = asyncio.get_running_loop().run_in_executor(self._thread, turn)
        try:
            async with asyncio.timeout(self._seconds):
                found = await asyncio.shield(self.job)
        except TimeoutError:
            raise Refused(
                503,
                f"no poses within {self._seconds:g} s; send it again later, or a smaller photo",
                math.ceil(self._seconds),
            ) from None
        finally:
            given_up.set()
        assert found is not None  # nobody gave up
        return found
