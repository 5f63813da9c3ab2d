"""Runs the network on batches: as it is, or as a recorded graph in 16 bits of each shape that comes."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from smope.architectures import Network, Tokens
from smope.inference.record import NotRecordable, record
from smope.inference.simplify import simplify
from smope.results import find_table

log = logging.getLogger(__name__)

LARGEST_BATCH = 32  # of one graph; more images go through it in turn
KEPT = 8  # graphs at most
PATIENCE = 3  # once so many are kept, a new shape replaces one only when it comes this often

Key = tuple[tuple[int, ...], torch.dtype, int]  # shape and type of the images, top_k


class Program:
    """One shape's pass. On a GPU the recorded graph as a CUDA graph, with tensors of its own for what goes in
    and comes out; elsewhere the recorded graph itself."""

    def __init__(
        self, function: Callable[[Tensor, Tensor], Tensor], images: Tensor, K: Tensor, pool: Any = None
    ) -> None:
        """`pool` is the memory that a CUDA graph works in; graphs that take turns may share one."""
        self.images = torch.empty_like(images, memory_format=torch.channels_last).copy_(images)
        self.K = K.clone()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.module = self._recorded(function, cudnn=images.is_cuda)
        if images.is_cuda:
            try:
                self._warm_up()
            except RuntimeError as error:  # fused convolutions are not there for every shape and card
                log.debug("without cuDNN's fused convolutions: %s", error)
                self.module = self._recorded(function, cudnn=False)
                self._warm_up()
            self._capture(pool)

    def _recorded(self, function: Callable[[Tensor, Tensor], Tensor], cudnn: bool) -> fx.GraphModule:
        kind = self.images.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            module = record(function, (self.images, self.K))
        simplify(module, cudnn)
        return module

    def _run(self) -> Tensor:
        with torch.autocast(self.images.device.type, enabled=False):  # the graph holds its own casts
            output = self.module(self.images, self.K)
        assert isinstance(output, Tensor)
        return output

    def _warm_up(self) -> None:
        """cuDNN and cuBLAS choose and load their kernels, which a capture must not see."""
        aside, current = torch.cuda.Stream(), torch.cuda.current_stream()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(2):
                self._run()
        current.wait_stream(aside)

    def _capture(self, pool: Any) -> None:
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the device meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self.output = self._run()
        self.read = torch.empty(self.output.shape, dtype=self.output.dtype, pin_memory=True)
        self.graph = graph

    def __call__(self, images: Tensor, K: Tensor) -> Tensor:
        """The table of the first images, on the CPU; a smaller batch leaves the rest of the graph's as it
        was."""
        count = len(images)
        self.images[:count].copy_(images, non_blocking=True)
        self.K[:count].copy_(K, non_blocking=True)
        if self.graph is None:
            return self._run()[:count].cpu()
        self.graph.replay()
        self.read.copy_(self.output, non_blocking=True)
        torch.cuda.current_stream(images.device).synchronize()
        return self.read[:count].clone()


class Engine:
    """What `SMOPE.predict` asks for tables; threads take turns."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self._weights = [*network.parameters(), *network.buffers()]
        self.fast: bool | None = None  # None: on a GPU
        self._programs: OrderedDict[Key, Program] = OrderedDict()  # the one used last at the end
        self._asked: Counter[Key] = Counter()
        self._refused = False
        self._pool: Any = None
        self._state: Any = None  # what the programs hold: the weights' versions and the meshes
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and other processes: without what was recorded, which belongs to a device and a lock."""
        return {"network": self.network, "fast": self.fast}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["network"])  # type: ignore[misc]  # as made anew
        self.fast = state["fast"]

    def forget(self) -> None:
        """Let go of all that was recorded, as when the meshes change."""
        with self._lock:
            self._clear(None)

    def __call__(self, images: Tensor, K: Tensor, tokens: Tokens, top_k: int) -> Tensor:
        """images [B, 3, H, W] on the device, uint8 or 0..1, K [B, 3, 3] pixels -> table [B, P, 21] on the
        CPU"""
        fast = images.is_cuda if self.fast is None else self.fast
        if not fast or self._refused:
            return find_table(self.network, images, K.to(images.device), tokens, top_k).cpu()
        with self._lock:
            parts = zip(images.split(LARGEST_BATCH), K.split(LARGEST_BATCH), strict=True)
            return torch.cat([self._part(part, intrinsics, tokens, top_k) for part, intrinsics in parts])

    def _part(self, images: Tensor, K: Tensor, tokens: Tokens, top_k: int) -> Tensor:
        self._forget_if_changed(tokens)
        # Batches are filled up to powers of two, so that the last one of a run does not cost a graph.
        size = 1 << (len(images) - 1).bit_length()
        key = ((size, *images.shape[1:]), images.dtype, top_k)
        program = self._programs.get(key)
        if program is None:
            self._asked[key] += 1
            if len(self._programs) >= KEPT and self._asked[key] < PATIENCE:
                return self._plain(images, K, tokens, top_k)
            program = self._make(key, images, K, tokens, top_k)
            if program is None:
                return find_table(self.network, images, K.to(images.device), tokens, top_k).cpu()
            if len(self._programs) >= KEPT:
                self._programs.popitem(last=False)
            self._programs[key] = program
        self._programs.move_to_end(key)
        return program(images, K)

    def _plain(self, images: Tensor, K: Tensor, tokens: Tokens, top_k: int) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            return find_table(self.network, images, K.to(images.device), tokens, top_k).cpu()

    def _make(self, key: Key, images: Tensor, K: Tensor, tokens: Tokens, top_k: int) -> Program | None:
        started = time.perf_counter()
        if images.is_cuda and self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        filled = [images.new_zeros(key[0]), torch.eye(3).repeat(key[0][0], 1, 1)]
        for whole, part in zip(filled, (images, K), strict=True):
            whole[: len(part)] = part
            whole[len(part) :] = part[:1]
        try:
            program = Program(
                lambda pictures, intrinsics: find_table(self.network, pictures, intrinsics, tokens, top_k),
                filled[0],
                filled[1].to(images.device),
                self._pool,
            )
        except (NotRecordable, RuntimeError) as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            self._refused = True
            log.warning(
                "the network cannot run as a recorded graph (%s); it runs eagerly in float32, which is "
                "slower. Set model.fast = False to choose that without this warning",
                error,
            )
            return None
        batch, _, height, width = key[0]
        log.info(
            "made the fast pass for %d image(s) of %dx%d and %d meshes in %.1f s, once a shape; "
            "model.fast = False goes without",
            batch,
            width,
            height,
            len(tokens),
            time.perf_counter() - started,
        )
        return program

    def _forget_if_changed(self, tokens: Tokens) -> None:
        """Recorded graphs hold weights and meshes as constants."""
        first = self._weights[0].data_ptr() if self._weights else 0
        state = (tokens, first, sum(tensor._version for tensor in self._weights))
        if state != self._state:
            self._clear(state)

    def _clear(self, state: Any) -> None:
        self._programs.clear()
        self._asked.clear()
        self._pool = None  # its memory goes with the last graph
        self._state = state
