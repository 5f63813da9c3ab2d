"""Worker processes that rasterise into shared memory, and the ring of batches they fill."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from numpy.typing import NDArray
from torch import Tensor

from smope.scenes.config import SceneConfig
from smope.scenes.layout import pack, scene_size
from smope.scenes.rasterise import GBuffer, Rasteriser
from smope.scenes.sample import SceneSampler

log = logging.getLogger(__name__)


class WorkerError(RuntimeError):
    """A worker failed; the message holds its traceback."""


@dataclass(frozen=True, eq=False)
class RawBatch:
    """G-buffers and scenes of one batch on the CPU: names as in GBuffer, and `rows` [B, scene_size]."""

    arrays: dict[str, Tensor]

    @classmethod
    def empty(cls, batch: int, config: SceneConfig, shared: bool) -> RawBatch:
        arrays = {}
        for name, (shape, kind) in GBuffer.shapes(config).items():
            arrays[name] = torch.zeros(
                (batch, *shape), dtype=torch.uint8 if kind is np.uint8 else torch.float32
            )
        arrays["rows"] = torch.zeros((batch, scene_size(config)))
        if shared:
            for tensor in arrays.values():
                tensor.share_memory_()
        return cls(arrays)

    def views(self) -> list[tuple[GBuffer, NDArray[np.float32]]]:
        """For each image its G-buffer and its row, as numpy views."""
        held = {name: tensor.numpy() for name, tensor in self.arrays.items()}
        rows = held.pop("rows")
        return [(GBuffer(**{k: v[i] for k, v in held.items()}), rows[i]) for i in range(len(rows))]


def render_one(
    sampler: SceneSampler,
    rasteriser: Rasteriser,
    seed: tuple[int, ...],
    out: tuple[GBuffer, NDArray[np.float32]],
) -> None:
    scene = sampler(seed)
    rasteriser.draw(scene, out[0])
    pack(scene.fields, sampler.config, out[1])


def _work(
    packed: Tensor, slots: list[RawBatch], tasks: Any, done: Any, parent: int, device_index: int | None
) -> None:
    """A worker's life: take (batch, image, slot, seed), draw it, say so; None ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when Ctrl-C ends the workers
    torch.set_num_threads(1)
    try:
        sampler: SceneSampler = pickle.loads(packed.numpy().tobytes())
        rasteriser = Rasteriser(sampler.targets + sampler.clutter, sampler.config, device_index)
        views = [slot.views() for slot in slots]
        while True:
            try:
                task = tasks.get(timeout=5)
            except Empty:
                if os.getppid() != parent:  # the parent was killed
                    return
                continue
            if task is None:
                return
            batch, image, slot, seed = task
            render_one(sampler, rasteriser, seed, views[slot][image])
            done.put((batch, None))
    except BaseException:
        done.put((-1, traceback.format_exc()))


class WorkerPool:
    """Keeps `slots` batches in the making, in order; `take` gives the next one, `free` returns its memory."""

    def __init__(
        self,
        sampler: SceneSampler,
        workers: int,
        batch_size: int,
        seed_of: Callable[[int, int], tuple[int, ...]],
        slots: int = 3,
        first: int = 0,
        device_index: int | None = None,
    ) -> None:
        context = mp.get_context("spawn")
        try:
            self.slots = [RawBatch.empty(batch_size, sampler.config, shared=True) for _ in range(slots)]
        except RuntimeError as error:
            raise WorkerError(
                f"no shared memory for {slots} batches of {batch_size} images ({error}); "
                "give /dev/shm more room (docker: --shm-size=2g), or a smaller batch_size"
            ) from error
        self._tasks, self._done = context.Queue(), context.Queue()
        self._seed_of, self._batch_size = seed_of, batch_size
        self._left: dict[int, int] = {}
        self._where: deque[tuple[int, int]] = deque()
        self._next, self._closed = first, False
        # Through shared memory: what goes in the arguments is read only after a process has imported torch,
        # and `start` waits for that, so that meshes among them would start the workers one after another.
        packed = torch.frombuffer(bytearray(pickle.dumps(sampler)), dtype=torch.uint8).share_memory_()
        self._processes = [
            context.Process(
                target=_work,
                args=(packed, self.slots, self._tasks, self._done, os.getpid(), device_index),
                daemon=True,
            )
            for _ in range(workers)
        ]
        for process in self._processes:
            process.start()
        for slot in range(slots):
            self.free(slot)

    def free(self, slot: int) -> None:
        """The slot's memory may be overwritten: the next batch is drawn into it."""
        batch, self._next = self._next, self._next + 1
        self._left[batch] = self._batch_size
        self._where.append((batch, slot))
        for image in range(self._batch_size):
            self._tasks.put((batch, image, slot, self._seed_of(batch, image)))

    def take(self, stopped: Callable[[], bool] = lambda: False) -> tuple[int, int] | None:
        """Wait for the next batch in order: its number and slot; None when `stopped` says so."""
        batch, slot = self._where[0]
        while self._left[batch] > 0:
            if stopped():
                return None
            try:
                finished, failure = self._done.get(timeout=0.5)
            except Empty:
                dead = [p.exitcode for p in self._processes if not p.is_alive()]
                if dead:
                    raise WorkerError(
                        f"a scene worker ended with exit code {dead[0]} and no traceback"
                    ) from None
                continue
            if failure is not None:
                raise WorkerError(f"a scene worker failed:\n{failure}")
            self._left[finished] -= 1
        self._where.popleft()
        del self._left[batch]
        return batch, slot

    def close(self) -> None:
        """End the workers, within a few seconds; calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        for _ in self._processes:
            self._tasks.put(None)
        deadline = time.monotonic() + 0.5
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        for process in self._processes:
            if process.is_alive():
                process.terminate()
        for process in self._processes:
            process.join(5)
        for queue in (self._tasks, self._done):
            queue.cancel_join_thread()
            queue.close()
