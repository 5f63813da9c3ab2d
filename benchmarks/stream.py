"""Many images: how many a second of `model.stream` and of a results file, beside the network's; and memory.

    python benchmarks/stream.py --images 2000 --batch 16 --device cuda

The files are JPEGs of the bundled picture at 640x480, each shifted by some pixels. "network" is its forward
pass on tensors that lie on the device, "predict" from decoded images in memory to poses, "stream" from files
to poses, "file" from files to lines of JSON, each over the same batches. Memory is this process's, after each
tenth of the images of the last: it must not grow with them. --images 20000 is the soak.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import torch
from PIL import Image, ImageChops

from smope import SMOPE
from smope.architectures import find
from smope.images import load_image
from smope.results_file import ResultsFile, result_line

DEMO = Path(__file__).parent.parent / "smope" / "assets" / "demo.png"


def make_files(folder: Path, count: int) -> list[Path]:
    with Image.open(DEMO) as opened:
        picture = opened.convert("RGB")
    paths = [folder / f"{i:04}.jpg" for i in range(count)]
    for i, path in enumerate(paths):
        ImageChops.offset(picture, 7 * i, 3 * i).save(path, quality=92)
    return paths


def resident() -> float:
    """MiB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rate(work: Iterator[int], device: torch.device) -> float:
    """Images a second; `work` says how many each step did, and its first step warms up."""
    next(work)
    finish(device)
    start, done = time.perf_counter(), sum(work)
    finish(device)
    return done / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="lmo")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int)
    given = parser.parse_args()
    model = SMOPE.from_pretrained(given.model, device=given.device)
    device, batch = model.device, given.batch
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads, batch {batch}")
    batches = max(2, given.images // batch)

    with tempfile.TemporaryDirectory() as folder:
        paths = make_files(Path(folder), min(64, batch * batches))
        decoded = [load_image(path) for path in islice(cycle(paths), batch)]
        images = torch.stack(decoded).to(device).float() / 255
        K = torch.tensor(model.config.K, device=device).expand(batch, 3, 3)

        def network() -> Iterator[int]:
            assert model._tokens is not None
            for _ in range(batches):
                find(model.network, images, K, model._tokens, 32)
                yield batch

        def predict() -> Iterator[int]:
            for _ in range(batches):
                yield len(model.predict(decoded))

        def stream() -> Iterator[int]:
            sources = islice(cycle(paths), batches * batch)
            for one in model.stream(sources, batch_size=batch, workers=given.workers):
                assert one.poses is not None, one.error
                yield 1

        memory: list[float] = []

        def file() -> Iterator[int]:
            sources = islice(cycle(paths), batches * batch)
            with ResultsFile(Path(folder) / "results.jsonl", "benchmark") as results:
                for one in model.stream(sources, batch_size=batch, workers=given.workers):
                    assert one.poses is not None, one.error
                    results.add(result_line(f"{one.index}.jpg", "benchmark", one.poses))
                    if (one.index + 1) % max(1, batches * batch // 10) == 0:
                        memory.append(resident())
                    yield 1

        for work in (network, predict, stream, file):
            print(f"{work.__name__:8} {rate(work(), device):9.1f} images/s", flush=True)
    print(f"memory after each tenth of {batches * batch} images, MiB: {' '.join(f'{m:.0f}' for m in memory)}")


if __name__ == "__main__":
    main()
