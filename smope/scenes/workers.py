"""Worker processes that sample scenes, and draw them where OpenGL does, into a ring of shared batches."""

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
from typing import Any, Protocol

import numpy as np
import torch
import torch.multiprocessing as mp
from numpy.typing import NDArray
from torch import Tensor

from smope.scenes.config import SceneConfig
from smope.scenes.layout import Scene, pack, scene_size
from smope.scenes.meshes import PreparedMesh
from smope.scenes.raster_table import pack_draws, table_shape
from smope.scenes.rasterise import GBuffer, Rasteriser

log = logging.getLogger(__name__)


class Sampler(Protocol):
    """Draws scenes; the same seed always gives the same one."""

    @property
    def targets(self) -> tuple[PreparedMesh, ...]: ...
    @property
    def clutter(self) -> tuple[PreparedMesh, ...]: ...
    @property
    def config(self) -> SceneConfig: ...
    def __call__(self, seed: tuple[int, ...]) -> Scene: ...


class WorkerError(RuntimeError):
    """A worker failed; the message holds its traceback."""


@dataclass(frozen=True, eq=False)
class RawBatch:
    """One batch on the CPU: `rows` [B, scene_size] and either its pictures, under GBuffer's names, or what to
    draw, `draws` [B, D, DRAW_WORDS]."""

    arrays: dict[str, Tensor]

    @classmethod
    def empty(cls, batch: int, config: SceneConfig, shared: bool, pictures: bool = True) -> RawBatch:
        arrays = {"rows": torch.zeros((batch, scene_size(config)))}
        if pictures:
            for name, (shape, kind) in GBuffer.shapes(config).items():
                arrays[name] = torch.zeros(
                    (batch, *shape), dtype=torch.uint8 if kind is np.uint8 else torch.float32
                )
        else:
            arrays["draws"] = torch.zeros((batch, *table_shape(config)))
        if shared:
            for tensor in arrays.values():
                tensor.share_memory_()
        return cls(arrays)

    def images(self) -> list[dict[str, NDArray[Any]]]:
        """The arrays of each image, as numpy views."""
        held = {name: tensor.numpy() for name, tensor in self.arrays.items()}
        return [{name: array[i] for name, array in held.items()} for i in range(len(held["rows"]))]


def make_one(
    sampler: Sampler,
    rasteriser: Rasteriser | None,
    seed: tuple[int, ...],
    out: dict[str, NDArray[Any]],
) -> None:
    """Sample a scene and draw it; without a rasteriser, write down what is to be drawn."""
    scene = sampler(seed)
    pack(scene.fields, sampler.config, out["rows"])
    if rasteriser is None:
        pack_draws(scene, out["draws"])
    else:
        rasteriser.draw(scene, GBuffer(**{name: array for name, array in out.items() if name != "rows"}))


def _work(
    packed: Tensor,
    slots: list[RawBatch],
    tasks: Any,
    done: Any,
    parent: int,
    pictures: bool,
    device_index: int | None,
) -> None:
    """A worker's life: take (batch, slot, [(image, seed)]), make those images, say so; None ends it.

    It touches neither CUDA nor, where it draws no pictures, OpenGL.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when Ctrl-C ends the workers
    torch.set_num_threads(1)
    try:
        sampler: Sampler = pickle.loads(packed.numpy().tobytes())
        rasteriser = None
        if pictures:
            rasteriser = Rasteriser(sampler.targets + sampler.clutter, sampler.config, device_index)
        views = [slot.images() for slot in slots]
        while True:
            try:
                task = tasks.get(timeout=5)
            except Empty:
                if os.getppid() != parent:  # the parent was killed
                    return
                continue
            if task is None:
                return
            batch, slot, images = task
            for image, seed in images:
                make_one(sampler, rasteriser, seed, views[slot][image])
            done.put((batch, len(images), None))
    except BaseException:
        done.put((-1, 0, traceback.format_exc()))


def _last_words(exit_code: int | None) -> str:
    """What is known of a worker that ended without telling why."""
    if exit_code is not None and exit_code < 0:
        return (
            f"a scene worker was ended by signal {-exit_code}; where memory is short the system does so with "
            "signal 9, and fewer `workers` need less"
        )
    return (
        f"a scene worker ended with exit code {exit_code}; what it printed says why. Each "
        'worker imports the script that started it: there, train below `if __name__ == "__main__":`'
    )


class WorkerPool:
    """Keeps `slots` batches in the making, in order; `take` gives the next one, `free` returns its memory."""

    def __init__(
        self,
        sampler: Sampler,
        workers: int,
        batch_size: int,
        seed_of: Callable[[int, int], tuple[int, ...]],
        slots: int = 3,
        first: int = 0,
        pictures: bool = True,
        device_index: int | None = None,
    ) -> None:
        context = mp.get_context("spawn")
        try:
            self.slots = [
                RawBatch.empty(batch_size, sampler.config, shared=True, pictures=pictures)
                for _ in range(slots)
            ]
        except RuntimeError as error:
            raise WorkerError(
                f"no shared memory for {slots} batches of {batch_size} images ({error}); "
                "give /dev/shm more room (docker: --shm-size=2g), or a smaller batch_size"
            ) from error
        self._tasks, self._done = context.Queue(), context.Queue()
        self._seed_of, self._batch_size = seed_of, batch_size
        # Sampling alone is quick: a few images a message spare the parent's time.
        self._share = 1 if pictures else max(1, min(8, batch_size // workers))
        self._left: dict[int, int] = {}
        self._where: deque[tuple[int, int]] = deque()
        self._next, self._closed = first, False
        # Through shared memory: what goes in the arguments is read only after a process has imported torch,
        # and `start` waits for that, so that meshes among them would start the workers one after another.
        packed = torch.frombuffer(bytearray(pickle.dumps(sampler)), dtype=torch.uint8).share_memory_()
        self._processes = [
            context.Process(
                target=_work,
                args=(packed, self.slots, self._tasks, self._done, os.getpid(), pictures, device_index),
                daemon=True,
            )
            for _ in range(workers)
        ]
        for process in self._processes:
            process.start()
        for slot in range(slots):
            self.free(slot)

    def free(self, slot: int) -> None:
        """The slot's memory may be overwritten: the next batch is made in it."""
        batch, self._next = self._next, self._next + 1
        self._left[batch] = self._batch_size
        self._where.append((batch, slot))
        for begin in range(0, self._batch_size, self._share):
            images = range(begin, min(begin + self._share, self._batch_size))
            self._tasks.put((batch, slot, [(image, self._seed_of(batch, image)) for image in images]))

    def take(self, stopped: Callable[[], bool] = lambda: False) -> tuple[int, int] | None:
        """Wait for the next batch in order: its number and slot; None when `stopped` says so."""
        batch, slot = self._where[0]
        while self._left[batch] > 0:
            if stopped():
                return None
            try:
                finished, images, failure = self._done.get(timeout=0.5)
            except Empty:
                dead = [p.exitcode for p in self._processes if not p.is_alive()]
                if dead:
                    raise WorkerError(_last_words(dead[0])) from None
                continue
            if failure is not None:
                raise WorkerError(f"a scene worker failed:\n{failure}")
            self._left[finished] -= images
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
