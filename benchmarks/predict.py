"""`SMOPE.predict` on a GPU, eager and fast, beside transformers' Deformable DETR; JSON, Markdown and a plot.

    python benchmarks/predict.py --out DIR                    all tables; DIR/predict.json and DIR/predict.md
    python benchmarks/predict.py --out DIR --scores DATASET   also AR of the fast path against eager float32
    python benchmarks/predict.py --out DIR --finish [--scores DATASET]
                                                  score and draw what a run has left, on any machine

Times are medians of whole calls, from uint8 images on the GPU to `Poses` on the CPU, by the host's clock,
which waits for the GPU before and after; default arguments, the bundled weights' own camera. The peer is the
detector alone, on images that are ready as float tensors, to its raw output on the GPU: no poses.
"The authors' network" is `smope-paper` with its defaults and random weights: time does not depend on them.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from predict_page import WAYS, page, plot

from smope import SMOPE
from smope.architectures import build_network
from smope.config import ModelConfig
from smope.networks.paper_find import PaperTokens
from smope.networks.smope_paper import SmopePaperConfig


def main() -> None:
    options = parse()
    if options.finish:
        finish(options)
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "repeats": options.repeats,
        "size": options.size,
        "main": [],
        "sweep": [],
    }

    def write() -> None:
        (options.out / "predict.json").write_text(json.dumps(record, indent=1) + "\n")
        (options.out / "predict.md").write_text(page(record))

    def rows(place: str, found: Iterator[dict[str, Any]]) -> None:
        for row in found:
            record[place].append(row)
            write()

    # What is asked for first comes first, and each row is written at once: a run that is cut off has it.
    steps: dict[str, Callable[[], None]] = {
        "smope-s": lambda: rows("main", main_rows(default_model(options), "smope-s", options)),
        "smope-paper": lambda: rows("main", main_rows(paper_model(options), "smope-paper", options)),
        "kernels": lambda: record.update(kernels=kernels(options)),
        "scores": lambda: record.update(scores=scores(options)),
        "peer": lambda: rows("main", peer_rows(options)),
        "sweep": lambda: rows("sweep", sweep(options)),
    }
    for name, step in steps.items():
        if name in options.skip or (name == "scores" and not options.scores):
            continue
        started = time.perf_counter()
        try:
            step()
        except Exception as error:  # whatever one step dies of, the others are to be had
            logging.exception("%s failed", name)
            record.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"[:400]
        record.setdefault("seconds", {})[name] = time.perf_counter() - started
        free()
        write()
    print(page(record))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("predict_out"), help="folder of the results")
    parser.add_argument("--model", default="lmo", help="a bundled name, a folder or a Hugging Face id")
    parser.add_argument("--size", default="640x480", help="of the images, WxH")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scores", type=Path, metavar="DATASET", help="a BOP data set")
    parser.add_argument("--limit", type=int, help="photos of it at most")
    parser.add_argument(
        "--skip",
        nargs="+",
        default=[],
        choices=("smope-s", "smope-paper", "kernels", "scores", "peer", "sweep"),
    )
    parser.add_argument("--finish", action="store_true", help="measure nothing: score and draw DIR's files")
    return parser.parse_args()


def default_model(options: argparse.Namespace) -> SMOPE:
    model = SMOPE.from_pretrained(options.model, device=options.device)
    model.config = at_size(model.config, _size(options.size))
    return model


def at_size(config: ModelConfig, size: tuple[int, int]) -> ModelConfig:
    """As weights of that size would have it: images of another size are brought to the trained one."""
    scale = size[0] / config.image_size[0]
    K = tuple(tuple(v * scale for v in row) if i < 2 else row for i, row in enumerate(config.K))
    return replace(config, image_size=size, K=K)


def paper_model(options: argparse.Namespace) -> SMOPE:
    """The authors' network with random weights and tokens, and the meshes and camera of the bundled model."""
    bundled = default_model(options)
    torch.manual_seed(0)
    config = SmopePaperConfig(classes=len(bundled.objects))
    network = build_network(config).eval().to(options.device)
    tokens = {
        name: PaperTokens(torch.randn(1, config.width), model.centre[None])
        for name, model in bundled.objects.items()
    }
    described = replace(bundled.config, architecture="smope-paper", network=config)
    return SMOPE(network, described, bundled.objects, tokens)


def pictures(count: int, size: tuple[int, int], device: str) -> list[torch.Tensor]:
    """uint8 [3, H, W] each: the bundled demo's picture, a few pixels further each time"""
    with resources.as_file(resources.files("smope") / "assets" / "demo.png") as path:
        array = np.array(Image.open(path).convert("RGB").resize(size))
    image = torch.from_numpy(array).permute(2, 0, 1).to(device)
    return [image.roll(3 * i, -1).contiguous() for i in range(count)]


def main_rows(model: SMOPE, name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    size = _size(options.size)
    for way in WAYS:
        model._engine.forget()
        free()
        model.fast = way == "fast"
        for batch in options.batches:
            images = pictures(batch, size, options.device)
            given: Any = images if batch > 1 else images[0]
            yield {
                "network": name,
                "way": way,
                "batch": batch,
                "meshes": len(model.objects),
                **measure(lambda given=given: model.predict(given), options),
                "found": [len(p) for p in model.predict(images)][:4],
            }


def measure(
    function: Callable[[], Any], options: argparse.Namespace, repeats: int | None = None
) -> dict[str, Any]:
    """Seconds of the first call and of later ones, and the most memory that the later ones held, MiB."""
    first = seconds(function, options.device)
    function()
    with peak(options.device) as held:
        times = [seconds(function, options.device) for _ in range(repeats or options.repeats)]
    return {"first": first, "median": statistics.median(times), "least": min(times), "MiB": held["MiB"]}


def seconds(function: Callable[[], Any], device: str) -> float:
    wait(device)
    start = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - start


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


@contextmanager
def peak(device: str) -> Iterator[dict[str, float]]:
    """Of the device's memory, weights and the graphs' own pools included"""
    held = {"MiB": float("nan")}
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    yield held
    if device.startswith("cuda"):
        # A CUDA graph's memory is reserved, not allocated, between its replays.
        held["MiB"] = max(torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved()) / 2**20


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def kernels(options: argparse.Namespace) -> dict[str, Any]:
    """The fast pass alone: the GPU's time of a replay, how many kernels it has, and the longest of them."""
    from torch.profiler import ProfilerActivity, profile

    found: dict[str, Any] = {}
    for name, make in (("smope-s", default_model), ("smope-paper", paper_model)):
        model = make(options)
        model.fast = True
        for batch in options.batches:
            images = pictures(batch, _size(options.size), options.device)
            model.predict(images)
            program = list(model._engine._programs.values())[-1]
            entry: dict[str, Any] = {"recorded": len(program.module.graph.nodes)}
            if program.graph is not None:
                entry["replay_ms"] = _replay_ms(program.graph)
                with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                    program.graph.replay()
                    torch.cuda.synchronize()
                rows = [e for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
                rows.sort(key=lambda e: -e.self_device_time_total)
                entry["kernels"] = sum(e.count for e in rows)
                entry["busy_ms"] = sum(e.self_device_time_total for e in rows) / 1e3
                entry["longest"] = [
                    [e.key[:110], e.count, round(e.self_device_time_total / 1e3, 4)] for e in rows[:40]
                ]
            found[f"{name}, batch {batch}"] = entry
        del model, program
        free()
    return found


def _replay_ms(graph: torch.cuda.CUDAGraph, repeats: int = 20) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    begin.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / repeats


def peer_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """transformers' Deformable DETR: ResNet-50, 6+6 layers, 300 queries, random weights."""
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(out_features=["stage2", "stage3", "stage4"])
    config = DeformableDetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone
    )
    detector = DeformableDetrForObjectDetection(config).eval().to(options.device)
    width, height = _size(options.size)
    for kind in ("float32", "TF32", "bfloat16"):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = kind == "TF32"
        for batch in options.batches:
            images = torch.rand(batch, 3, height, width, device=options.device)

            def run(images: torch.Tensor = images, narrow: bool = kind == "bfloat16") -> None:
                with (
                    torch.inference_mode(),
                    torch.autocast(options.device.split(":")[0], torch.bfloat16, enabled=narrow),
                ):
                    detector(pixel_values=images)

            row = measure(run, options, 10)
            yield {"network": "transformers' DeformableDetr (no poses)", "way": kind, "batch": batch, **row}
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True


def sweep(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time and memory of the default network's fast path against one quantity at a time."""
    model = default_model(options)
    plain, size = model.config, _size(options.size)

    def row(what: str, value: Any, model: SMOPE, batch: int, size: tuple[int, int]) -> dict[str, Any]:
        model._engine.forget()
        free()
        model.fast = True
        images = pictures(batch, size, options.device)
        measured = measure(lambda: model.predict(images), options, 10)
        return {"what": what, "value": value, "batch": batch, **measured}

    for batch in (1, 2, 4, 8, 16, 32):
        yield row("batch", batch, model, batch, size)
    for width, height in ((320, 256), (640, 480), (960, 736), (1280, 960)):
        model.config = at_size(plain, (width, height))
        for batch in (1, 8):
            yield row("image", f"{width}x{height}", model, batch, (width, height))
    model.config = plain
    known, tokens = dict(model.objects), dict(model._token_of)
    names = list(known)
    for count in (1, 8, 64, 512):
        # Copies under other names: what a mesh costs does not depend on its shape.
        labels = {f"{names[i % len(names)]} {i}": names[i % len(names)] for i in range(count)}
        model._replace_objects(
            {label: known[name] for label, name in labels.items()},
            {label: tokens[name] for label, name in labels.items()},
        )
        for batch in (1, 8):
            yield row("meshes", count, model, batch, size)
    model._replace_objects(known, tokens)
    for queries in (50, 100, 300, 900):
        # The same weights: queries are chosen among cells and have none of their own.
        object.__setattr__(model.network.config, "queries", queries)
        for batch in (1, 8):
            yield row("queries", queries, model, batch, size)


def scores(options: argparse.Namespace) -> dict[str, Any]:
    """AR on real photos of both ways, and what the fast one loses."""
    from smope.evaluate import run
    from smope.evaluate.sets import load_pose_set

    run._progress = lambda items, what: items  # the log says what is going on
    model = default_model(options)
    pose_set = load_pose_set(options.scores, "bop", None).first(options.limit)
    for way in WAYS:
        model.fast = way == "fast"
        estimates = run.predict_estimates(model, pose_set, batch=8)
        pose_set.write_results(options.out / way, "lmo", estimates)
    return score_files(options)


def score_files(options: argparse.Namespace) -> dict[str, Any]:
    """Of the results that `scores` has written; needs scipy, which a GPU machine may lack."""
    from smope.evaluate.run import evaluate_dataset

    found: dict[str, Any] = {"dataset": options.scores.resolve().name}
    for way in WAYS:
        (file,) = sorted((options.out / way).glob("*.csv"))
        found[way] = evaluate_dataset(options.scores, csv=file, limit=options.limit)["all"]
    found["change"] = {
        key: found["fast"][key] - value
        for key, value in found["eager"].items()
        if isinstance(value, float) and isinstance(found["fast"].get(key), float)
    }
    return found


def finish(options: argparse.Namespace) -> None:
    """Score what was predicted elsewhere, and draw."""
    path = options.out / "predict.json"
    record = json.loads(path.read_text())
    if options.scores:
        record["scores"] = score_files(options)
        record.get("failed", {}).pop("scores", None)
    path.write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "predict.md").write_text(page(record))
    if record["sweep"]:
        plot(record, options.out / "predict.png")


def _size(text: str) -> tuple[int, int]:
    width, height = text.split("x")
    return int(width), int(height)


if __name__ == "__main__":
    main()
