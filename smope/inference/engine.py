"""Runs the network on batches: as it is, or as a recorded graph in 16 bits of each shape that comes."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smope.architectures import Network, Tokens
from smope.inference.fuse import fuse
from smope.inference.kernels import Kernel
from smope.inference.record import NotRecordable, record
from smope.inference.simplify import simplify
from smope.networks.recorded import whole_steps
from smope.ops.cpu_forms import cpu_forms
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
        self,
        function: Callable[[Tensor, Tensor], Tensor],
        images: Tensor,
        K: Tensor,
        kind: torch.dtype,
        pool: Any = None,
    ) -> None:
        """images [B, 3, H, W] on the device, K [B, 3, 3] on the CPU; `kind` is what a GPU computes in. `pool`
        is the memory that a CUDA graph works in; graphs that take turns may share one."""
        self.kind = kind
        self.images = images.contiguous()
        self.K = K.clone()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output: Tensor | None = None
        if images.is_cuda:
            self.K = self.K.pin_memory()
        self.kernels: list[Kernel] = []  # of our own
        if not images.is_cuda:
            self._record(function, own=False, cudnn=False)
            return
        # Neither kernels of our own nor cuDNN's fused convolutions are to be had on every machine.
        for own, cudnn in ((True, True), (True, False), (False, True), (False, False)):
            try:
                self._record(function, own, cudnn)
                self._warm_up()
                break
            except (RuntimeError, AttributeError, ImportError, OSError) as error:
                if not (own or cudnn) or isinstance(error, (NotRecordable, torch.cuda.OutOfMemoryError)):
                    raise
                log.info("the fast pass without %s: %s", _left_out(own, cudnn), error)
        self._capture(pool)

    def _record(self, function: Callable[[Tensor, Tensor], Tensor], own: bool, cudnn: bool) -> None:
        device = self.images.device.type

        def pass_of(images: Tensor, K: Tensor) -> Tensor:
            return function(images.contiguous(memory_format=torch.channels_last), K)

        with (
            torch.autocast(device, self.kind, enabled=device == "cuda"),
            whole_steps(own),
        ):
            self.module = record(pass_of, (self.images, self.K.to(self.images.device)))
        if own:
            self.kernels = fuse(self.module, cudnn)
        else:
            simplify(self.module, cudnn)

    def _run(self) -> Tensor:
        with torch.autocast(self.images.device.type, enabled=False):  # the graph holds its own casts
            output = self.module(self.images, self.K.to(self.images.device, non_blocking=True))
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
        output = self._run()
        self.output = torch.empty(output.shape, dtype=output.dtype, pin_memory=True)
        # Other threads may go on using the device meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self.output.copy_(self._run(), non_blocking=True)
        self.graph = graph

    def start(self, images: Sequence[Tensor], K: Tensor) -> None:
        """The pass of the first images; a smaller batch leaves the rest of the graph's as it was."""
        torch.stack(list(images), out=self.images[: len(images)])
        self.K[: len(K)] = K
        if self.graph is not None:
            self.graph.replay()

    def table(self, count: int) -> Tensor:
        """What came out for the first `count` images, on the CPU"""
        if self.graph is None:
            return self._run()[:count].cpu()
        assert self.output is not None
        torch.cuda.current_stream(self.images.device).synchronize()
        return self.output[:count].clone()


def _left_out(own: bool, cudnn: bool) -> str:
    return "cuDNN's fused convolutions or kernels of its own" if own and cudnn else "kernels of its own"


class Engine:
    """What `SMOPE.predict` asks for tables; threads take turns."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self._weights = [*network.parameters(), *network.buffers()]
        self.fast: bool | None = None  # None: on a GPU
        self.kind = torch.float16  # eight times nearer to float32 than bfloat16, at the same speed
        self._programs: OrderedDict[Key, Program] = OrderedDict()  # the one used last at the end
        self._asked: Counter[Key] = Counter()
        self._refused = False
        self._pool: Any = None
        self._tokens: Tokens | None = None  # what the programs hold: these meshes
        self._seen: Any = None  # and weights of these versions
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and other processes: without what was recorded, which belongs to a device and a lock."""
        return {"network": self.network, "fast": self.fast}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Engine.__init__(self, state["network"])
        self.fast = state["fast"]

    def forget(self) -> None:
        """Let go of all that was recorded, as when the meshes change."""
        with self._lock:
            self._clear()

    def __call__(
        self, images: Sequence[Tensor], K: Tensor, tokens: Tokens, top_k: int, lowest: float = 0.0
    ) -> Tensor:
        """images B x [3, H, W] on the device, uint8 or 0..1, K [B, 3, 3] pixels on the CPU -> table
        [B, P, 24] on the CPU; pairs that score below `lowest` may be missing"""
        fast = images[0].is_cuda if self.fast is None else self.fast
        if not fast or self._refused:
            return self._eager(images, K, tokens, top_k, lowest)
        with self._lock:
            starts = range(0, len(images), LARGEST_BATCH)
            parts = [
                self._part(images[i : i + LARGEST_BATCH], K[i : i + LARGEST_BATCH], tokens, top_k)
                for i in starts
            ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _part(self, images: Sequence[Tensor], K: Tensor, tokens: Tokens, top_k: int) -> Tensor:
        if tokens is not self._tokens:
            self._clear()
            self._tokens = tokens
        # Batches are filled up to powers of two, so that the last one of a run does not cost a graph.
        size = 1 << (len(images) - 1).bit_length()
        key = ((size, *images[0].shape), images[0].dtype, top_k)
        if (program := self._programs.get(key)) is not None:
            program.start(images, K)
        # A look at each weight takes a while, in which the device is at work already.
        versions = self._versions()
        if versions != self._seen:
            if program is not None:
                program.table(0)  # wait for the one in flight
            self._clear()
            self._seen, program = versions, None
        if program is None:
            self._asked[key] += 1
            if len(self._programs) >= KEPT and self._asked[key] < PATIENCE:
                with torch.autocast(images[0].device.type, self.kind, enabled=images[0].is_cuda):
                    return self._eager(images, K, tokens, top_k)
            program = self._make(key, images, K, tokens, top_k)
            if program is None:
                return self._eager(images, K, tokens, top_k)
            if len(self._programs) >= KEPT:
                self._programs.popitem(last=False)
            self._programs[key] = program
            program.start(images, K)
        self._programs.move_to_end(key)
        table = program.table(len(images))
        if self.kind == torch.float16 and images[0].is_cuda and not np.isfinite(table.numpy()).all():
            log.warning("a number of this network does not fit into float16: it runs in bfloat16 from now on")
            self.kind = torch.bfloat16
            self._clear()
            return self._part(images, K, tokens, top_k)
        return table

    def _eager(
        self, images: Sequence[Tensor], K: Tensor, tokens: Tokens, top_k: int, lowest: float = 0.0
    ) -> Tensor:
        whole = torch.stack(list(images))
        on_cpu = whole.device.type == "cpu"
        if on_cpu:  # convolutions of oneDNN, and the products after them, read such maps as they are
            whole = whole.contiguous(memory_format=torch.channels_last)
        else:  # to know how many are left, the host would wait for the device
            lowest = 0.0
        with cpu_forms(on_cpu):
            return find_table(self.network, whole, K.to(whole.device), tokens, top_k, lowest).cpu()

    def _make(
        self, key: Key, images: Sequence[Tensor], K: Tensor, tokens: Tokens, top_k: int
    ) -> Program | None:
        started = time.perf_counter()
        if images[0].is_cuda and self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        missing = key[0][0] - len(images)
        try:
            program = Program(
                lambda pictures, intrinsics: find_table(self.network, pictures, intrinsics, tokens, top_k),
                torch.stack([*images, *[images[0]] * missing]),
                torch.cat([K, K[:1].expand(missing, -1, -1)]),
                self.kind,
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

    def _versions(self) -> tuple[int, int]:
        """Changes where a weight does: recorded graphs hold weights and meshes as constants."""
        first = self._weights[0].data_ptr() if self._weights else 0
        return first, sum([tensor._version for tensor in self._weights])

    def _clear(self) -> None:
        self._programs.clear()
        self._asked.clear()
        self._pool = None  # its memory goes with the last graph
