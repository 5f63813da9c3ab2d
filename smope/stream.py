"""Many images through one model: decoded ahead in threads, predicted in batches in another, given in order.

Memory does not grow with the number of images: only so many are taken from the caller's iterable as keep the
threads at work, and what the caller does with a result (writing, drawing) overlaps with the next ones.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch import Tensor

from smope.camera import Camera, CameraError
from smope.camera_arguments import cameras_from
from smope.defaults import LOWEST_SCORE, TOP_K
from smope.images import ImageError, load_image
from smope.poses import Poses

if TYPE_CHECKING:
    from smope.model import SMOPE


@dataclass(frozen=True, eq=False)
class Streamed:
    """What became of one image: poses, or the reason why there are none."""

    index: int  # of the image among those given
    source: Any  # what was given for it
    poses: Poses | None
    error: ImageError | CameraError | None = None  # it cannot be read, or has no camera


@dataclass(frozen=True, eq=False)
class _Decoded:
    index: int
    source: Any
    picture: Tensor  # uint8 [3, H, W]
    camera: Camera


def stream(
    model: SMOPE,
    images: Iterable[Any],
    K: Any = None,
    fov: float | None = None,
    dist: Any = None,
    threshold: float = LOWEST_SCORE,
    top_k: int = TOP_K,
    batch_size: int | None = None,
    workers: int | None = None,
) -> Generator[Streamed, None, None]:
    """One `Streamed` an image, in their order; options as for `SMOPE.predict`, the camera one for all.

    An item of `images` is an image as `predict` takes it, or a pair of one and its own `Camera`. What cannot
    be read is given with its error and ends nothing. `batch_size` is how many images the network sees at once
    (16 on a GPU, 1 on a CPU), `workers` how many threads decode.
    """
    on_gpu = model.device.type == "cuda"
    batch_size = (16 if on_gpu else 1) if batch_size is None else batch_size
    workers = (min(8, _cores()) if on_gpu else min(2, _cores())) if workers is None else workers
    if batch_size < 1 or workers < 1:
        raise ValueError(f"batch_size {batch_size} and workers {workers} given, at least 1 expected")
    waiting = 2 + -(-2 * workers // batch_size)  # batches taken but not yet given back

    def decode(index: int, item: Any) -> _Decoded | Streamed:
        source, own = item if _has_camera(item) else (item, None)
        try:
            picture = load_image(source)
            camera = own or cameras_from([picture], K, fov, dist, model.config)[0]
            _check_size(picture, camera)
        except (ImageError, CameraError) as error:
            return Streamed(index, source, None, error)
        return _Decoded(index, source, picture, camera)

    def predict(batch: list[Future[_Decoded | Streamed]]) -> list[Streamed]:
        results = [future.result() for future in batch]
        sound = [one for one in results if isinstance(one, _Decoded)]
        found = model.predict(
            [one.picture for one in sound],
            K=[one.camera.K for one in sound],
            dist=[one.camera.dist for one in sound],
            threshold=threshold,
            top_k=top_k,
        )
        given = iter([Streamed(one.index, one.source, p) for one, p in zip(sound, found, strict=True)])
        return [one if isinstance(one, Streamed) else next(given) for one in results]

    numbered = iter(enumerate(images))
    decoders = ThreadPoolExecutor(workers, thread_name_prefix="smope-decode")
    network = ThreadPoolExecutor(1, thread_name_prefix="smope-predict")
    jobs: deque[Future[list[Streamed]]] = deque()
    try:
        while batch := [decoders.submit(decode, *one) for one in islice(numbered, batch_size)]:
            jobs.append(network.submit(predict, batch))
            if len(jobs) >= waiting:
                yield from jobs.popleft().result()
        while jobs:
            yield from jobs.popleft().result()
    finally:  # the caller may stop in the middle
        network.shutdown(wait=False, cancel_futures=True)
        decoders.shutdown(wait=True, cancel_futures=True)
        network.shutdown(wait=True)


def _has_camera(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Camera)


def _check_size(picture: Tensor, camera: Camera) -> None:
    size = (picture.shape[-1], picture.shape[-2])
    if camera.size != size:
        raise CameraError(
            f"the camera is of {camera.size[0]}x{camera.size[1]} pixels, the image of {size[0]}x{size[1]}; "
            "Camera.resize adapts one to a resized image"
        )


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
