"""SceneStream: endless batches of rendered training images."""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from queue import Empty, Full, Queue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from smope.data.items import Batch
from smope.scenes.assets import SceneAssets, build_assets
from smope.scenes.compose import BOARDS, SHEETS, TextureBank, compose, visibility
from smope.scenes.config import SceneConfig
from smope.scenes.degrade import CameraDraw, photograph
from smope.scenes.layout import unpack
from smope.scenes.raster_cuda import CudaRasteriser, kernel_or_none
from smope.scenes.rasterise import Rasteriser
from smope.scenes.sample import SceneSampler
from smope.scenes.workers import RawBatch, Sampler, WorkerPool, make_one

if TYPE_CHECKING:
    from smope.objects import ObjectModel

log = logging.getLogger(__name__)
Moved = tuple[int, dict[str, Tensor], "torch.cuda.Event | None"]


class SceneStream:
    """Endless iterable over `Batch`; batch i depends on `seed` and i alone, whoever draws it.

    `objects` become labels 0, 1, ... in their order. `workers` processes sample scenes (0: this one does);
    light, shadow and camera run in torch on `device`. On a CUDA device a kernel draws whole batches;
    elsewhere, or where it cannot be compiled, the workers draw with OpenGL. `rasteriser` insists on one of
    the two. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        objects: Sequence[ObjectModel],
        clutter: Sequence[Path] = (),
        backgrounds: Path | None = None,
        config: SceneConfig | None = None,
        seed: int = 0,
        workers: int = 0,
        device: torch.device | str = "cpu",
        batch_size: int = 8,
        start: int = 0,
        assets: SceneAssets | None = None,
        slots: int = 3,
        rasteriser: Literal["auto", "cuda", "opengl"] = "auto",
    ) -> None:
        self.config = config or SceneConfig()
        self.seed, self.batch_size, self.start = seed, batch_size, start
        self.device = torch.device(device)
        if (
            self.device.type == "cuda" and self.device.index is None
        ):  # the feeding thread has another current one
            self.device = torch.device("cuda", torch.cuda.current_device())
        assets = assets or build_assets(objects, clutter, backgrounds)
        self.names = tuple(mesh.name for mesh in assets.targets)
        self.bank = TextureBank.build(assets, self.device)
        self._sampler = self._new_sampler(assets)
        self._workers, self._slots = workers, slots
        self._index = self.device.index if self.device.type == "cuda" else None
        self._rasteriser: Rasteriser | None = None
        self._kernel = self._open_kernel(rasteriser)
        self._feeds: list[_Feed] = []

    @classmethod
    def from_assets(cls, path: Path | str, **options: Any) -> SceneStream:
        """A stream from a file that `prepare_assets` wrote; options as for the constructor."""
        return cls((), assets=SceneAssets.load(path), **options)

    def _new_sampler(self, assets: SceneAssets) -> Sampler:
        return SceneSampler(
            assets.targets,
            assets.clutter,
            self.config,
            len(assets.backgrounds),
            SHEETS,
            BOARDS,
            len(assets.environments),
        )

    def __iter__(self) -> Iterator[Batch]:
        return self.batches(self.start)

    def batches(self, first: int = 0) -> Generator[Batch, None, None]:
        """Batches `first`, `first` + 1, ...: a resumed run goes on where it was."""
        if self._workers == 0:
            number = first
            while True:
                yield self.batch(number)
                number += 1
        feed = _Feed(self, first)
        self._feeds.append(feed)
        try:
            while True:
                number, raw = feed.get()
                yield self.finish(number, raw)
        finally:
            feed.close()
            self._feeds.remove(feed)

    def batch(self, number: int) -> Batch:
        """Batch `number`, rasterised in this process."""
        return self.finish(number, self.rasterise(number))

    def rasterise(self, number: int) -> dict[str, Tensor]:
        """What `finish` takes of batch `number`, made in this process; on the device."""
        meshes = self._sampler.targets + self._sampler.clutter
        if self._kernel is None and self._rasteriser is None:
            self._rasteriser = Rasteriser(meshes, self.config, self._index)
        raw = RawBatch.empty(self.batch_size, self.config, shared=False, pictures=self._kernel is None)
        for image, arrays in enumerate(raw.images()):
            make_one(self._sampler, self._rasteriser, image_seed(self.seed, number, image), arrays)
        return self.draw({name: tensor.to(self.device) for name, tensor in raw.arrays.items()})

    def draw(self, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
        """What workers made, on the device, with pictures in place of draws; on the current stream."""
        return arrays if self._kernel is None else self._kernel.draw(arrays["draws"], arrays["rows"])

    def _open_kernel(self, rasteriser: str) -> CudaRasteriser | None:
        if rasteriser not in ("auto", "cuda", "opengl"):
            raise ValueError(f"rasteriser = {rasteriser!r}: 'auto', 'cuda' or 'opengl' expected")
        meshes = self._sampler.targets + self._sampler.clutter
        if rasteriser == "cuda":
            return CudaRasteriser(meshes, self.config, self.device)
        library = kernel_or_none() if rasteriser == "auto" and self.device.type == "cuda" else None
        return None if library is None else CudaRasteriser(meshes, self.config, self.device, library)

    @torch.no_grad()
    def finish(self, number: int, raw: dict[str, Tensor]) -> Batch:
        """Light, photograph and label a batch whose arrays are on the device."""
        scene = unpack(raw["rows"], self.config)
        composed = compose(
            raw["albedo"], raw["normal"], raw["depth"], raw["light"], scene, self.bank, self.config
        )
        camera = CameraDraw.sample((self.seed, number, 1), len(raw["rows"]), self.config, self.device)
        generator = torch.Generator(self.device).manual_seed(hash((self.seed, number)) & 0x7FFFFFFF)
        images = photograph(composed.radiance, camera, generator)
        tiles = raw["tiles"] > 127
        visible = visibility(composed.material, tiles, scene["boxes"])
        labels = scene["labels"].long()
        labels = torch.where(visible >= self.config.min_visibility, labels, torch.full_like(labels, -1))
        slot = composed.material.long()
        targets = slot <= self.config.max_targets
        kept = torch.cat([torch.zeros_like(labels[:, :1], dtype=torch.bool), labels >= 0], dim=1)
        rows = torch.arange(len(labels), device=slot.device)[:, None, None]
        shown = targets & kept[rows, torch.where(targets, slot, 0)]
        present = labels >= 0
        return Batch(
            images=images,
            K=scene["K"].clone(),
            labels=labels,
            T_CO=scene["T_CO"].clone(),
            boxes_xyxy=scene["boxes"].clone(),
            visibility=torch.where(present, visible, torch.zeros_like(visible)),
            instance=torch.where(shown, slot, 0).to(torch.uint8),
            depth=composed.depth,
            full_masks=tiles & present[:, :, None, None],
        )

    def close(self) -> None:
        """End workers and release the OpenGL context; calling it again does nothing."""
        for feed in list(self._feeds):
            feed.close()
        if self._rasteriser is not None:
            self._rasteriser.release()
            self._rasteriser = None

    def __enter__(self) -> SceneStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def image_seed(seed: int, number: int, image: int) -> tuple[int, ...]:
    """What image `image` of batch `number` is drawn from."""
    return (seed, number, 0, image)


class _Feed:
    """A thread that moves batches to the device and draws them there, ahead of use, on its own stream."""

    def __init__(self, stream: SceneStream, first: int) -> None:
        self._device, self._draw = stream.device, stream.draw
        pictures = stream._kernel is None
        self._pool = WorkerPool(
            stream._sampler,
            stream._workers,
            stream.batch_size,
            partial(image_seed, stream.seed),
            slots=stream._slots if pictures else 2 * stream._slots,  # scenes not yet drawn are small
            first=first,
            pictures=pictures,
            device_index=stream._index,
        )
        self._ready: Queue[Moved | BaseException] = Queue(maxsize=2)
        self._stop = threading.Event()
        self._pinned = self._pin()
        self._thread = threading.Thread(target=self._run, name="scene-feed", daemon=True)
        self._thread.start()

    def get(self) -> tuple[int, dict[str, Tensor]]:
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        number, arrays, moved = item
        if moved is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(moved)
            for tensor in arrays.values():
                tensor.record_stream(current)
        return number, arrays

    def close(self) -> None:
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._ready.get_nowait()
            except Empty:
                self._thread.join(0.1)
        self._unpin()
        self._pool.close()

    def _run(self) -> None:
        side = None
        try:
            side = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
            while not self._stop.is_set():
                taken = self._pool.take(self._stop.is_set)
                if taken is None:
                    return
                number, slot = taken
                arrays = self._pool.slots[slot].arrays
                if side is None:
                    copied = {name: tensor.clone() for name, tensor in arrays.items()}
                    item: Moved = (number, self._draw(copied), None)
                else:
                    with torch.cuda.stream(side):
                        moved = {name: t.to(self._device, non_blocking=True) for name, t in arrays.items()}
                        copies = torch.cuda.Event(blocking=True)
                        copies.record(side)
                        drawn = self._draw(moved)
                        event = torch.cuda.Event()
                        event.record(side)
                    copies.synchronize()  # before a worker overwrites the slot
                    item = (number, drawn, event)
                self._pool.free(slot)
                self._put(item)
        except BaseException as error:
            self._put(error)
        finally:
            if side is not None:  # the meshes may be freed once this thread has ended
                side.synchronize()

    def _put(self, item: Moved | BaseException) -> None:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.2)
            except Full:
                continue
            return

    def _pin(self) -> list[int]:
        """Register the shared memory with CUDA, so that copies run at full speed beside the training."""
        if self._device.type != "cuda":
            return []
        pinned = []
        runtime = torch.cuda.cudart()
        for slot in self._pool.slots:
            for tensor in slot.arrays.values():
                size = tensor.numel() * tensor.element_size()
                if int(runtime.cudaHostRegister(tensor.data_ptr(), size, 0)) == 0:
                    pinned.append(tensor.data_ptr())
        if not pinned:
            log.info("shared memory could not be pinned; copies to the GPU will be slower")
        return pinned

    def _unpin(self) -> None:
        while self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._pinned.pop())
