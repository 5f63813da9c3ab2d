"""Scenes a second: rasterising alone, light and camera alone, and the whole stream; peak memory.

python benchmarks/scenes.py --assets assets.npz --device cuda --workers 14 --batch-size 32
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from itertools import islice

import torch

from smope.scenes import SceneStream
from smope.scenes.workers import WorkerPool


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--assets", required=True, help="file written by prepare_assets")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=20)
    options = parser.parse_args()
    device = torch.device(options.device)
    record: dict[str, object] = {
        "device": _name(device),
        "workers": options.workers,
        "batch": options.batch_size,
    }

    def open_stream(workers: int) -> SceneStream:
        return SceneStream.from_assets(
            options.assets, device=device, workers=workers, batch_size=options.batch_size
        )

    with open_stream(0) as stream:
        raw = stream.rasterise(0)
        start = time.perf_counter()
        stream.rasterise(1)
        record["rasterise_in_process_images_s"] = options.batch_size / (time.perf_counter() - start)
        moved = {name: tensor.to(device) for name, tensor in raw.arrays.items()}
        stream.finish(0, moved)
        _wait(device)
        repeats = max(2, options.batches // 4)
        start = time.perf_counter()
        for number in range(repeats):
            stream.finish(number, moved)
        _wait(device)
        seconds = (time.perf_counter() - start) / repeats
        record["light_and_camera_ms_a_batch"] = 1e3 * seconds
        record["light_and_camera_images_s"] = options.batch_size / seconds
    with open_stream(options.workers) as stream:
        pool = WorkerPool(
            stream._sampler, options.workers, options.batch_size, _seed, device_index=device.index
        )
        _free(pool)
        start = time.perf_counter()
        for _ in range(options.batches):
            _free(pool)
        record["rasterise_images_s"] = options.batch_size * options.batches / (time.perf_counter() - start)
        pool.close()
        batches = iter(stream)
        for _ in islice(batches, 3):
            pass
        _wait(device)
        start = time.perf_counter()
        for _ in islice(batches, options.batches):
            pass
        _wait(device)
        record["together_images_s"] = options.batch_size * options.batches / (time.perf_counter() - start)
    record["peak_host_MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if device.type == "cuda":
        record["peak_device_MiB"] = torch.cuda.max_memory_allocated(device) / 2**20
    print(json.dumps(record, indent=1))


def _free(pool: WorkerPool) -> None:
    taken = pool.take()
    assert taken is not None
    pool.free(taken[1])


def _seed(number: int, image: int) -> tuple[int, ...]:
    return (0, number, 0, image)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    main()
