"""`SMOPE.predict`: one image and several, cold and warm, with and without the kernel; a Markdown table.

    python benchmarks/predict_cpu.py                                 the CPU, or the GPU if there is one
    python benchmarks/predict_cpu.py --device cpu --threads 2 --out FILE

Each way of deformable attention runs in a process of its own, so that its first call is a cold one: loading
of the weights is counted apart, and what the kernel's first compile costs is in the first call with a fresh
cache. Warm times are medians, and the least beside them, of whole calls of `predict` from a picture in memory
to `Poses`; those of parts are of the network alone. The picture is the bundled demo's, resized as asked for.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

WAYS = {"cpu": ("torch", "cpu"), "cuda": ("torch", "cuda")}  # SMOPE_MSDA
NAMES = {"torch": "PyTorch's operators", "cpu": "C++ kernel", "cuda": "CUDA kernel"}
PARTS = ("backbone", "encoder", "decoder", "poses")


def main() -> None:
    options = parse()
    if options.way:
        print(json.dumps(measure(options)))
        return
    device = options.device or ("cuda" if _has_gpu() else "cpu")
    rows = [run_apart(way, device, options) for way in options.ways or WAYS[device.split(":")[0]]]
    text = table(rows, device, options)
    print(text)
    if options.out:
        options.out.write_text(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="lmo", help="a bundled name, a folder or a Hugging Face id")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument(
        "--ways", nargs="+", choices=("torch", "cpu", "cuda", "auto"), help="values of SMOPE_MSDA"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="images a call")
    parser.add_argument("--size", default="640x480", help="of the image, WxH")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, help="of the CPU; default: as torch has it")
    parser.add_argument("--out", type=Path, help="write the table here too")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_apart(way: str, device: str, options: argparse.Namespace) -> dict[str, Any]:
    """This script in a new process, told which way to go."""
    threads = {"OMP_NUM_THREADS": str(options.threads)} if options.threads else {}
    command = [sys.executable, __file__, "--way", way, "--device", device, "--model", options.model]
    command += ["--size", options.size, "--repeats", str(options.repeats)]
    command += ["--batches", *map(str, options.batches)]
    done = subprocess.run(
        command,
        env={**os.environ, **threads, "SMOPE_MSDA": way},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    begin = time.perf_counter()
    import torch
    from PIL import Image

    from smope import SMOPE

    imported = time.perf_counter()
    model = SMOPE.from_pretrained(options.model, device=options.device)
    loaded = time.perf_counter()
    width, height = map(int, options.size.split("x"))
    with resources.as_file(resources.files("smope") / "assets" / "demo.png") as path:
        picture = Image.open(path).convert("RGB").resize((width, height))

    def wait() -> None:
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)

    def seconds(function: Callable[[], Any]) -> float:
        wait()
        start = time.perf_counter()
        function()
        wait()
        return time.perf_counter() - start

    def warm(function: Callable[[], Any]) -> list[float]:
        function()
        times = [seconds(function) for _ in range(options.repeats)]
        return [statistics.median(times), min(times)]

    record: dict[str, Any] = {
        "way": options.way,
        "import": imported - begin,
        "load": loaded - imported,
        "first": seconds(lambda: model.predict(picture, fov=60)),
        "found": len(model.predict(picture, fov=60)),
        "meshes": len(model.objects),
        "predict": {n: warm(partial(model.predict, [picture] * n, fov=60)) for n in options.batches},
        "parts": parts(model, picture, warm),
        "peak_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "name": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else _processor(),
        "load_average": os.getloadavg()[0],
    }
    if model.device.type == "cuda":
        record["peak_device_MiB"] = torch.cuda.max_memory_allocated(model.device) / 2**20
    return record


def parts(model: Any, picture: Any, warm: Callable[[Callable[[], Any]], list[float]]) -> dict[str, Any]:
    """Times of the network's parts as `predict` runs them; each part starts where those before it end."""
    import torch

    from smope.defaults import LOWEST_SCORE, TOP_K
    from smope.images import load_image
    from smope.ops.cpu_forms import cpu_forms

    network, meshes, device = model.network, model._tokens, model.device
    width, height = (side // 32 * 32 for side in picture.size)
    image = load_image(picture.resize((width, height)), device)[None].float() / 255.0
    K = torch.tensor([[[width, 0, width / 2], [0, width, height / 2], [0, 0, 1.0]]], device=device)
    on_cpu = device.type == "cpu"
    if on_cpu:
        image = image.contiguous(memory_format=torch.channels_last)
    lowest = LOWEST_SCORE if on_cpu else 0.0
    with torch.inference_mode(), cpu_forms(on_cpu):
        features = network.encode_image(image)
        times = {
            "backbone": warm(lambda: network.backbone(image)),
            "encoder": warm(lambda: network.encode_image(image)),
            "decoder": warm(lambda: network.detect(features, meshes)),
            "poses": warm(lambda: network(image, K, meshes, TOP_K, lowest)),
        }
    # What was timed together with parts before it is told without them.
    for way in (0, 1):
        times["poses"][way] -= times["encoder"][way] + times["decoder"][way]
        times["encoder"][way] -= times["backbone"][way]
    return times


def table(rows: list[dict[str, Any]], device: str, options: argparse.Namespace) -> str:
    first = rows[0]
    lines = [
        f"# predict on {first['name']}",
        "",
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, torch {first['torch']}, device {device}, "
        f"{first['threads']} threads, image {options.size}, {first['meshes']} meshes, weights "
        f"`{options.model}`, {options.repeats} repeats, float32. Load average at the end of each run: "
        + ", ".join(f"{row['load_average']:.1f}" for row in rows)
        + ". `python benchmarks/predict_cpu.py` makes this page.",
        "",
        "| deformable attention | images a call | first call, s | warm, ms a call: median (least) | "
        "images/s | peak memory, MiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        memory = f"{row['peak_MiB']:.0f}" + (
            f" + {row['peak_device_MiB']:.0f} on the GPU" if "peak_device_MiB" in row else ""
        )
        for count, (median, least) in row["predict"].items():
            cold = f"{row['first']:.2f}" if count == next(iter(row["predict"])) else ""
            lines.append(
                f"| {NAMES.get(row['way'], row['way'])} | {count} | {cold} | "
                f"{1e3 * median:.1f} ({1e3 * least:.1f}) | {int(count) / median:.2f} | {memory} |"
            )
    lines += [
        "",
        "Parts of the network for one image, ms, median; poses: 3D attention and refinement:",
        "",
        "| deformable attention | " + " | ".join(PARTS) + " |",
        "| --- |" + " ---: |" * len(PARTS),
    ]
    for row in rows:
        cells = [f"{1e3 * row['parts'][p][0]:.1f}" for p in PARTS]
        lines.append(f"| {NAMES.get(row['way'], row['way'])} | " + " | ".join(cells) + " |")
    before = ", ".join(f"{row['import']:.1f} + {row['load']:.1f} s" for row in rows)
    lines += ["", f"Before the first call, import and loading of the weights: {before}."]
    return "\n".join(lines) + "\n"


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _processor() -> str:
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.processor() or platform.machine())}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
