"""`fit` on the scenes, network and loss of a recipe: images a second as a whole, and where the time goes.

    python benchmarks/fit.py recipes/lmo.toml --steps 30
    python benchmarks/fit.py recipes/lmo.toml --steps 30 --out benchmarks/fit.json --out benchmarks/fit.md

The loop is the library's own, from the first step to the last, scenes rendered beside it; the first
`--warmup` steps, in which kernels are compiled, are left out. The host's time of a part is what its Python
thread spends in it. The device's is what passes on its stream from the part's first launch to its last, so it
holds what the device waits for the host meanwhile. Parts are marked without waiting for the device. Copies to
the device go on a stream of their own, beside the steps; what of them is waited for is the renderer's part.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from smope.architectures import build_network
from smope.scenes import SceneStream
from smope.scenes.stream import _Feed
from smope.train import matcher as matching
from smope.train.choice import make_objective, network_config
from smope.train.distributed import joined
from smope.train.fit import PoseTask, objects_of, source_of
from smope.train.loop import Loop, LoopResult
from smope.train.recipe import Recipe, expand, load_recipe
from smope.train.start import begin

Function = Callable[..., Any]
# In the order of a step; those with two blanks are within the part above them.
PARTS = (
    "wait for the renderer",
    "light and compose",
    "forward and loss",
    "  costs of matching",
    "  assignment",
    "backward",
    "optimiser",
    "moving average",
)


class Clock:
    """Adds up what named parts take, on the host and on the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on = False
        self.host: dict[str, float] = defaultdict(float)  # seconds
        self._marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        first, began = self._mark(), time.perf_counter()
        yield
        seconds, last = time.perf_counter() - began, self._mark()
        if self.on:
            self.host[name] += seconds
            if first is not None and last is not None:
                self._marks.append((name, first, last))

    def timed(self, name: str, function: Function) -> Function:
        def call(*arguments: Any, **options: Any) -> Any:
            with self.part(name):
                return function(*arguments, **options)

        return call

    def on_device(self) -> dict[str, float]:
        """Milliseconds of each part; waits for the device"""
        self.wait()
        total: dict[str, float] = defaultdict(float)
        for name, first, last in self._marks:
            total[name] += first.elapsed_time(last)
        return total

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _mark(self) -> torch.cuda.Event | None:
        if not self.on or self.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class TimedLoop(Loop):
    """The library's loop with each part of a step marked."""

    clock: Clock
    first: int  # the step that the clock starts with
    last: int
    seconds: float = 0.0
    first_step_seconds: float = 0.0  # most of which is compiling

    def time_steps(self, first: int, last: int) -> None:
        """Those after `first`, until `last` is done"""
        self.clock, self.first, self.last = Clock(self.ranks.device), first, last

    def run(self) -> LoopResult:
        result = super().run()
        if result.interrupted:
            raise KeyboardInterrupt("interrupted before the last step: there is nothing to report")
        return result

    def _one_step(self, batch: Any, progress: float, waited: float) -> float:
        if self.state.step == self.first:
            self.clock.wait()
            if self.clock.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.clock.device)
            self.clock.on, self._began = True, time.perf_counter()
        began = time.perf_counter()
        with self.clock.part("whole step"):
            rate = super()._one_step(batch, progress, waited)
        if self.state.step == 1:
            self.clock.wait()
            self.first_step_seconds = time.perf_counter() - began
        if self.state.step == self.last:
            self.clock.wait()
            self.seconds = time.perf_counter() - self._began
            self.clock.on = False
        return rate


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments_of(__doc__)
    parser.add_argument("--steps", type=int, default=30, help="that are timed")
    parser.add_argument("--out", type=Path, action="append", default=[], help="add a row: .json or .md")
    options = parser.parse_args(arguments)
    row = measure(options)
    print(json.dumps(row, indent=1))
    for path in options.out:
        add_row(path, row)
    return row


def arguments_of(description: str | None) -> argparse.ArgumentParser:
    """What every benchmark of a training step is told."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--warmup", type=int, default=8, help="steps before those that are measured")
    parser.add_argument("--batch-size", type=int, help="default: the recipe's")
    parser.add_argument("--workers", type=int, help="default: the recipe's")
    parser.add_argument("--compile", nargs="*", help="submodules to compile; default: the recipe's")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    return parser


def measure(options: argparse.Namespace) -> dict[str, Any]:
    plan = planned(load_recipe(options.recipe), options, options.warmup + options.steps)
    with prepared(plan, options.device, TimedLoop) as (loop, objective):
        loop.time_steps(options.warmup, options.warmup + options.steps)
        with marked(loop, objective):
            loop.run()
        return result(options, plan, loop)


SomeLoop = TypeVar("SomeLoop", bound=Loop)


@contextmanager
def prepared(plan: Recipe, device: str | None, kind: type[SomeLoop]) -> Iterator[tuple[SomeLoop, Any]]:
    """The loop of a recipe with its first weights, and its objective."""
    with joined(device) as ranks, tempfile.TemporaryDirectory() as out:
        objects = objects_of(None, None, None, plan.data)
        source, _ = source_of(objects, None, None, None, plan, ranks)
        config = network_config(plan, None)
        objective = make_objective(plan, objects, config, source.clutter)
        torch.manual_seed(plan.run.seed)
        loop = kind(
            build_network(config),
            PoseTask(objective, objects, ()),
            source.stream,
            plan.optim,
            plan.run,
            Path(out),
            ranks,
        )
        backbone = expand(plan.data.backbone) if plan.data.backbone else None
        begin(loop, None, backbone, False, False)
        yield loop, objective


def planned(plan: Recipe, options: argparse.Namespace, steps: int) -> Recipe:
    """The recipe, as long as the benchmark and with nothing written or scored meanwhile."""
    given = {
        "batch_size": options.batch_size,
        "workers": options.workers,
        "compile": None if options.compile is None else tuple(options.compile),
    }
    run = replace(
        plan.run,
        max_minutes=None,
        max_steps=steps,
        piece_minutes=None,
        eval_minutes=0.0,
        eval_images=0,
        save_seconds=1e9,
        tensorboard=False,
        progress_bar=False,
        **{key: value for key, value in given.items() if value is not None},
    )
    return replace(plan, run=run)


@contextmanager
def marked(loop: TimedLoop, objective: Any) -> Iterator[None]:
    """Let every part tell the clock of itself, until the end of the context."""
    with wrapping() as wrap:

        def mark(owner: Any, name: str, part: str) -> None:
            wrap(owner, name, partial(loop.clock.timed, part))

        renderer = "wait for the renderer"
        mark(_Feed, "get", renderer)
        mark(SceneStream, "rasterise", renderer)  # without workers
        mark(SceneStream, "finish", "light and compose")
        mark(loop.step_module, "forward", "forward and loss")
        if isinstance(getattr(objective, "matcher", None), matching.HungarianMatcher):
            mark(objective.matcher, "cost_table", "  costs of matching")
            mark(matching, "assign", "  assignment")
        mark(torch.Tensor, "backward", "backward")
        mark(loop.optimiser, "step", "optimiser")
        mark(loop.ema, "update", "moving average")
        yield


@contextmanager
def wrapping() -> Iterator[Callable[[Any, str, Callable[[Function], Function]], None]]:
    """Gives what wraps a function of an object, class or module, until the end of the context."""
    kept: list[tuple[Any, str, Any, bool]] = []

    def wrap(owner: Any, name: str, wrapper: Callable[[Function], Function]) -> None:
        kept.append((owner, name, owner.__dict__.get(name), name in owner.__dict__))
        setattr(owner, name, wrapper(getattr(owner, name)))

    try:
        yield wrap
    finally:
        for owner, name, value, own in reversed(kept):
            if own:
                setattr(owner, name, value)
            else:
                delattr(owner, name)


def result(options: argparse.Namespace, plan: Recipe, loop: TimedLoop) -> dict[str, Any]:
    steps, device = options.steps, loop.ranks.device
    on_device = loop.clock.on_device()
    on_gpu = device.type == "cuda"
    kind = torch.cuda.get_device_name(device) if on_gpu else device.type
    parts = {
        name: {
            "host_ms": round(loop.clock.host[name] / steps * 1e3, 2),
            "device_ms": round(on_device[name] / steps, 2) if on_gpu else None,
        }
        for name in (*PARTS, "whole step")
        if name in loop.clock.host
    }
    return {
        "date": datetime.date.today().isoformat(),
        "device": kind,
        "torch": str(torch.__version__),
        "recipe": options.recipe.name,
        "batch": plan.run.batch_size,
        "workers": plan.run.workers,
        "compile": list(plan.run.compile),
        "steps": steps,
        "images_s": round(steps * plan.run.batch_size / loop.seconds, 1),
        "step_ms": round(loop.seconds / steps * 1e3, 2),
        "first_step_s": round(loop.first_step_seconds, 1),
        "peak_device_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 2) if on_gpu else None,
        "parameters": parameters(loop.model),
        "parts": parts,
    }


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def add_row(path: Path, row: dict[str, Any]) -> None:
    """To a list in a JSON file, or as one more table to a Markdown page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        rows = json.loads(path.read_text()) if path.exists() else []
        path.write_text(json.dumps([*rows, row], indent=1) + "\n")
        return
    before = path.read_text() if path.exists() else "# fit: images a second, and where the time goes\n"
    path.write_text(before + page(row))


def page(row: dict[str, Any]) -> str:
    compiled = ", ".join(row["compile"]) or "nothing"
    memory = f", peak memory {row['peak_device_gib']} GiB" if row["peak_device_gib"] is not None else ""
    lines = [
        f"\n## {row['images_s']} images/s: {row['device']}, {row['date']}\n",
        f"`{row['recipe']}`, torch {row['torch']}, batch {row['batch']}, {row['workers']} rendering "
        f"processes, compiled: {compiled}; {row['steps']} steps of {row['step_ms']} ms, the first "
        f"{row['first_step_s']} s{memory}.\n",
        "| part | host, ms a step | device, ms a step |",
        "| --- | ---: | ---: |",
    ]
    for name, part in row["parts"].items():
        shown = name.replace("  ", "&nbsp;&nbsp;")
        device = "" if part["device_ms"] is None else part["device_ms"]
        lines.append(f"| {shown} | {part['host_ms']} | {device} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
