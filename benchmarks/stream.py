"""Many images: how many a second of `model.stream` and of a results file, beside the network's; and memory.

    python benchmarks/stream.py --images 2000 --soak 20000 --soak-seconds 60 --out benchmarks/stream.md

The files are JPEGs of the bundled picture at 640x480, made on the spot, each shifted by some pixels.
"network" is the pass that `predict` runs, on images that lie on the device, "predict" from decoded images
in memory to poses, "stream" from files to poses, "file" from files to lines of JSON, each over the same
batches for --images images or --seconds seconds, whichever is less. The soak is "file" again, over --soak
images (64 files again and again) or until --soak-seconds: this process's memory, and the device's, are told
some twenty times; they must not grow.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path

import torch
from PIL import Image, ImageChops

from smope import SMOPE
from smope.defaults import LOWEST_SCORE, TOP_K
from smope.images import load_image
from smope.results_file import ResultsFile, result_line

DEMO = Path(__file__).parent.parent / "smope" / "assets" / "demo.png"
READINGS = 20  # of memory, in the soak


@dataclass
class Soak:
    images: int = 0
    seconds: float = 0.0
    readings: list[tuple[int, float, float]] = field(default_factory=list)  # images, MiB here, MiB on the GPU

    def growth(self) -> float:
        """MiB of this process per 1000 images, by least squares; the first quarter, of filling caches, is not
        counted."""
        late = self.readings[len(self.readings) // 4 :]
        count = torch.tensor([float(reading[0]) for reading in late]).double()
        memory = torch.tensor([reading[1] for reading in late]).double()
        count = count - count.mean()
        return float(1000 * (count * (memory - memory.mean())).sum() / count.square().sum().clamp(min=1))


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


def reserved(device: torch.device) -> float:
    """MiB that PyTorch holds on the device."""
    return torch.cuda.memory_reserved(device) / 2**20 if device.type == "cuda" else 0.0


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rate(work: Iterator[int], device: torch.device, seconds: float) -> float:
    """Images a second; `work` says how many each step did, and its first step warms up."""
    next(work)
    finish(device)
    start, done = time.perf_counter(), 0
    for count in work:
        done += count
        if time.perf_counter() - start > seconds:
            break
    finish(device)
    work.close()  # type: ignore[attr-defined]
    return done / (time.perf_counter() - start)


def to_file(
    model: SMOPE, sources: Iterator[Path], out: Path, batch: int, workers: int | None
) -> Iterator[int]:
    """A line an image; gives 1 for each."""
    with ResultsFile(out, "benchmark") as results:
        for one in model.stream(sources, batch_size=batch, workers=workers):
            assert one.poses is not None, one.error
            results.add(result_line(f"{one.index}.jpg", "benchmark", one.poses))
            yield 1


def rates(
    model: SMOPE, paths: list[Path], folder: Path, given: argparse.Namespace
) -> Iterator[tuple[str, float]]:
    device, batch = model.device, given.batch
    batches = max(2, given.images // batch)
    decoded = [load_image(path) for path in islice(cycle(paths), batch)]
    images = [picture.to(device) for picture in decoded]
    K = torch.tensor(model.config.K).expand(batch, 3, 3)

    def sources() -> Iterator[Path]:
        return islice(cycle(paths), batches * batch)

    def network() -> Iterator[int]:
        assert model._tokens is not None
        for _ in range(batches):
            with torch.no_grad():
                model._engine(images, K, model._tokens, TOP_K, LOWEST_SCORE)
            yield batch

    def predict() -> Iterator[int]:
        for _ in range(batches):
            yield len(model.predict(decoded))

    def stream() -> Iterator[int]:
        for one in model.stream(sources(), batch_size=batch, workers=given.workers):
            assert one.poses is not None, one.error
            yield 1

    def file() -> Iterator[int]:
        return to_file(model, sources(), folder / "results.jsonl", batch, given.workers)

    for work in (network, predict, stream, file):
        yield work.__name__, rate(work(), device, given.seconds)


def soak(model: SMOPE, paths: list[Path], folder: Path, given: argparse.Namespace) -> Soak:
    done = Soak()
    gc.collect()
    every, start = max(1, given.soak // READINGS), time.perf_counter()
    due = given.soak_seconds / READINGS  # seconds: where time will end it, readings go by time
    work = to_file(model, islice(cycle(paths), given.soak), folder / "soak.jsonl", given.batch, given.workers)
    for _ in work:
        done.images += 1
        done.seconds = time.perf_counter() - start
        if done.images % every == 0 or done.seconds >= due * (len(done.readings) + 1):
            done.readings.append((done.images, resident(), reserved(model.device)))
        if done.seconds > given.soak_seconds:
            break
    work.close()  # type: ignore[attr-defined]
    return done


def page(given: argparse.Namespace, device: str, found: dict[str, float], soaked: Soak | None) -> str:
    lines = [
        f"# Many images on {device}",
        "",
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, torch {torch.__version__}, {os.cpu_count()} cores, "
        f"weights `{given.model}`, JPEGs of 640x480, batches of {given.batch}, "
        f"{given.workers or 'as many as by default'} decoding threads. Load average at the end: "
        f"{os.getloadavg()[0]:.1f}. `python benchmarks/stream.py` makes this page.",
        "",
        "| | images/s | of the network's |",
        "| --- | ---: | ---: |",
    ]
    said = {
        "network": "the network alone, images on the device",
        "predict": "`predict`, images decoded in memory",
        "stream": "`model.stream`, from files",
        "file": "files to lines of a results file",
    }
    lines += [f"| {said[n]} | {r:.1f} | {100 * r / found['network']:.0f} % |" for n, r in found.items()]
    if soaked is not None:
        here = " ".join(f"{reading[1]:.0f}" for reading in soaked.readings)
        there = " ".join(f"{reading[2]:.0f}" for reading in soaked.readings)
        lines += [
            "",
            f"Soak: {soaked.images} of {given.soak} images in {soaked.seconds:.0f} s "
            f"({soaked.images / soaked.seconds:.1f} a second). Resident memory, MiB, at "
            f"{len(soaked.readings)} moments: {here}; {soaked.growth():+.2f} MiB per 1000 images after the "
            "first quarter.",
        ]
        if any(reading[2] for reading in soaked.readings):
            lines += ["", f"Held on the GPU, MiB, at the same moments: {there}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="lmo")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=2000, help="of each rate")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each rate, at the most")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--soak", type=int, default=0, help="images; 0 for none")
    parser.add_argument("--soak-seconds", type=float, default=float("inf"))
    parser.add_argument("--out", type=Path, help="write the page here too")
    given = parser.parse_args()
    model = SMOPE.from_pretrained(given.model, device=given.device)
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "a CPU"
    with tempfile.TemporaryDirectory() as folder:
        paths = make_files(Path(folder), 64)
        found: dict[str, float] = {}
        for what, images in rates(model, paths, Path(folder), given):
            print(f"{what:8} {images:9.1f} images/s", flush=True)
            found[what] = images
        soaked = soak(model, paths, Path(folder), given) if given.soak else None
    text = page(given, name, found, soaked)
    print(text)
    if given.out:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
