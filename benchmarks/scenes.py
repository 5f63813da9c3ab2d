"""Scenes a second: sampling alone, drawing alone, light and camera alone, the whole stream; peak memory.

Drawing and the whole stream are measured for each rasteriser that the device has; `--objects` makes assets of
a folder of PLY files in place of `--assets`.

python benchmarks/scenes.py --assets assets.npz --device cuda --workers 14 --batch-size 64
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smope.objects import ObjectModel
from smope.scenes import SceneAssets, SceneStream, build_assets
from smope.scenes.stream import image_seed
from smope.scenes.workers import RawBatch, WorkerPool, make_one


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--assets", type=Path, help="file written by prepare_assets")
    source.add_argument("--objects", type=Path, help="folder of PLY files, the known objects")
    parser.add_argument("--unit", default="mm", help="of --objects")
    parser.add_argument("--clutter", type=Path, help="folder of PLY files in metres, with --objects")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--rasterisers", nargs="+", choices=["cuda", "opengl"])
    options = parser.parse_args()
    device = torch.device(options.device)
    opened = partial(
        SceneStream,
        (),
        assets=_assets(options),
        device=device,
        workers=options.workers,
        batch_size=options.batch_size,
    )
    chosen = options.rasterisers or (["cuda", "opengl"] if device.type == "cuda" else ["opengl"])
    record: dict[str, Any] = {
        "device": _name(device),
        "workers": options.workers,
        "batch": options.batch_size,
    }
    with opened(rasteriser=chosen[0]) as stream:
        record["sample_only_images_s"] = round(_pooled(stream, options.batches, pictures=False), 1)
        record |= _finish_only(stream, options.batches)
    for rasteriser in chosen:
        with opened(rasteriser=rasteriser) as stream:
            part = _kernel_only(stream, options.batches) if rasteriser == "cuda" else {}
            if rasteriser == "opengl":
                part["sample_and_draw_images_s"] = round(_pooled(stream, options.batches, pictures=True), 1)
            record[rasteriser] = part | _whole(stream, options.batches)
    record["peak_host_MiB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(json.dumps(record, indent=1))


def _assets(options: argparse.Namespace) -> SceneAssets:
    if options.assets:
        return SceneAssets.load(options.assets)
    objects = [
        ObjectModel.from_mesh(path.stem, path, options.unit) for path in sorted(options.objects.glob("*.ply"))
    ]
    clutter = sorted(options.clutter.rglob("*.ply")) if options.clutter else []
    return build_assets(objects, clutter, None, max_clutter=60)


def _pooled(stream: SceneStream, batches: int, pictures: bool) -> float:
    """Images a second out of the worker processes, `batches` after two to warm up."""
    pool = WorkerPool(
        stream._sampler,
        stream._workers,
        stream.batch_size,
        partial(image_seed, 0),
        pictures=pictures,
        device_index=stream._index,
    )
    try:
        for _ in range(2):
            _take(pool)
        start = time.perf_counter()
        for _ in range(batches):
            _take(pool)
        return stream.batch_size * batches / (time.perf_counter() - start)
    finally:
        pool.close()


def _take(pool: WorkerPool) -> None:
    taken = pool.take()
    assert taken is not None
    pool.free(taken[1])


def _finish_only(stream: SceneStream, batches: int) -> dict[str, float]:
    """Light, camera and labels of a batch that lies on the device."""
    drawn = stream.rasterise(0)
    seconds = _timed(stream.device, lambda: stream.finish(0, drawn), batches)
    return {
        "light_and_camera_ms_a_batch": round(1e3 * seconds, 2),
        "light_and_camera_images_s": round(stream.batch_size / seconds, 1),
    }


def _kernel_only(stream: SceneStream, batches: int) -> dict[str, float]:
    """The kernel on tables that lie on the device, over batches of different scenes."""
    tables: list[dict[str, Tensor]] = []
    for number in range(4):
        raw = RawBatch.empty(stream.batch_size, stream.config, shared=False, pictures=False)
        for image, arrays in enumerate(raw.images()):
            make_one(stream._sampler, None, image_seed(0, number, image), arrays)
        tables.append({name: tensor.to(stream.device) for name, tensor in raw.arrays.items()})
    turn = iter(range(1_000_000))
    seconds = _timed(stream.device, lambda: stream.draw(tables[next(turn) % len(tables)]), batches)
    start = time.perf_counter()
    for table in tables:
        stream.draw(table)
    host = (time.perf_counter() - start) / len(tables)
    return {
        "draw_only_ms_a_batch": round(1e3 * seconds, 3),
        "draw_only_images_s": round(stream.batch_size / seconds, 1),
        "draw_only_host_ms_a_batch": round(1e3 * host, 3),  # how long the caller is held up
    }


def _whole(stream: SceneStream, batches: int) -> dict[str, float]:
    """Finished batches as training gets them, once those made ahead during the warm-up are used up."""
    if stream.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(stream.device)
    iterator = iter(stream)
    for _ in islice(iterator, 12):
        pass
    _wait(stream.device)
    start = time.perf_counter()
    for _ in islice(iterator, batches):
        pass
    _wait(stream.device)
    rates = {"stream_images_s": round(stream.batch_size * batches / (time.perf_counter() - start), 1)}
    if stream.device.type == "cuda":
        rates["peak_device_MiB"] = round(torch.cuda.max_memory_allocated(stream.device) / 2**20)
    return rates


def _timed(device: torch.device, run: Callable[[], object], repeats: int) -> float:
    """Seconds a call, after two to warm up."""
    for _ in range(2):
        run()
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    _wait(device)
    return (time.perf_counter() - start) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    main()
