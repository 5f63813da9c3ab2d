"""A training step of a recipe under the profiler: which part launches how much, and which kernels take long.

    python benchmarks/fit_kernels.py recipes/lmo.toml
    python benchmarks/fit_kernels.py recipes/lmo.toml --compile backbone encoder.0 --out page.md

First `--steps` steps are timed as `benchmarks/fit.py` does, then one is profiled.

A kernel belongs to the part whose code launched it; one of the backward pass to the part whose operation it
differentiates. Parts lie within one another (the detector holds its decoder layers): what is counted for a
part is what the parts within it leave over. The profiler slows the host down, so times on the host are left
to `benchmarks/fit.py`.
"""

from __future__ import annotations

import bisect
import fnmatch
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fit import TimedLoop, arguments_of, planned, prepared, result, wrapping
from fit import marked as timed
from fit import page as row_page
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from smope.scenes import SceneStream
from smope.train import meter
from smope.train.recipe import load_recipe

MODULES = (
    *("backbone", "input_proj.*", "encoder.*", "proposal", "proposal_box", "box_position", "decoder.*"),
    *("box_heads.*", "mesh_encoder", "mesh_decoder", "similarity", "mesh_attention", "pose_head"),
    *("pose_maps", "region_reader", "refiners.*", "coordinates"),
)
METHODS = ("encode_image", "detect", "direct_poses", "refine_poses")
LOSSES = ("mesh_views", "detection_losses", "pose_losses", "region_losses", "mesh_losses", "coordinate_loss")
MARK, REST = "part: ", "the rest"
KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")


class ProfiledLoop(TimedLoop):
    """The library's loop, one step of which, with the next batch, runs under the profiler."""

    at: int
    trace: Path
    profiler: profile | None = None

    def _one_step(self, batch: Any, progress: float, waited: float) -> float:
        on_gpu = self.ranks.device.type == "cuda"
        if self.state.step in (self.at, self.at + 1) and on_gpu:
            torch.cuda.synchronize()
        if self.state.step == self.at:
            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
            self.profiler = profile(activities=kinds)
            self.profiler.start()
        elif self.profiler is not None:
            self.profiler.stop()
            self.profiler.export_chrome_trace(str(self.trace))
            self.profiler = None
        return super()._one_step(batch, progress, waited)


@contextmanager
def marked(loop: TimedLoop, objective: Any) -> Iterator[None]:
    """Let every part announce itself to the profiler, until the end of the context."""
    with wrapping() as wrap:

        def mark(owner: Any, name: str, part: str) -> None:
            wrap(owner, name, partial(announced, part))

        for name, module in parts_of(loop.model):
            mark(module, "forward" if module._compiled_call_impl is None else "_compiled_call_impl", name)
        for name in METHODS:
            mark(loop.model, name, name)
        for name in LOSSES:
            mark(objective, name, name)
        mark(objective, "matcher", "matching")
        mark(loop.optimiser, "step", "optimiser")
        mark(loop.ema, "update", "moving average")
        mark(meter.Meter, "add", "meter")
        mark(SceneStream, "finish", "light and compose")
        yield


def announced(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        with record_function(MARK + part):
            return function(*arguments, **options)

    return call


def parts_of(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Submodules that are parts of their own; within a compiled one there are none."""
    compiled: list[str] = []
    for name, module in network.named_modules():
        if any(name.startswith(f"{above}.") for above in compiled):
            continue
        if module._compiled_call_impl is not None:
            compiled.append(name)
        if name in compiled or any(
            fnmatch.fnmatch(name, p) and name.count(".") == p.count(".") for p in MODULES
        ):
            yield name, module


@dataclass
class Part:
    """What one part of a step does in one of the passes."""

    operations: int = 0  # called from Python or from the engine of gradients, not from another operation
    launches: int = 0
    microseconds: float = 0.0  # of its kernels


@dataclass
class Profiled:
    parts: dict[tuple[str, str], Part] = field(default_factory=lambda: defaultdict(Part))  # by part and pass
    kernels: dict[tuple[str, str, str], Part] = field(default_factory=lambda: defaultdict(Part))  # and name


def read_trace(path: Path) -> Profiled:
    """A trace of PyTorch's profiler, each operation and kernel with the part that it belongs to."""
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("ph") == "X"]
    marks: dict[Any, Spans] = defaultdict(Spans)
    nodes: dict[Any, Spans] = defaultdict(Spans)  # of the engine of gradients
    forward: dict[Any, tuple[Any, float]] = {}  # sequence number -> thread and time of the operation
    for event in events:
        name, thread, kind = event["name"], event["tid"], event.get("cat")
        if kind == "user_annotation" and name.startswith(MARK):
            marks[thread].add(event, name.removeprefix(MARK))
        elif kind == "cpu_op" and name.startswith("autograd::engine::evaluate_function"):
            nodes[thread].add(event, event["args"].get("Sequence number"))
        elif kind == "cpu_op" and not event["args"].get("Fwd thread id"):  # not within the engine
            number = event["args"].get("Sequence number", -1)
            # Of operations within one another the last to begin made the node.
            if number >= 0 and (number not in forward or event["ts"] > forward[number][1]):
                forward[number] = (thread, event["ts"])
    for spans in (*marks.values(), *nodes.values()):
        spans.sort()

    def part_at(thread: Any, when: float) -> tuple[str, str]:
        number = nodes[thread].at(when) if thread in nodes else None
        if number is None:
            return (marks[thread].at(when) or REST) if thread in marks else REST, "forward"
        if number not in forward:
            return REST, "backward"
        thread, when = forward[number]
        return (marks[thread].at(when) or REST) if thread in marks else REST, "backward"

    found = Profiled()
    launched = {}
    for event in events:
        kind = event.get("cat")
        if kind in ("cuda_runtime", "cuda_driver"):
            launched[event["args"].get("correlation")] = (event["tid"], event["ts"])
    for event in topmost(e for e in events if e.get("cat") == "cpu_op"):
        found.parts[part_at(event["tid"], event["ts"])].operations += 1
    for event in events:
        if event.get("cat") not in KERNELS:
            continue
        where = launched.get(event["args"].get("correlation"))
        key = (REST, "forward") if where is None else part_at(*where)
        for part in (found.parts[key], found.kernels[*key, event["name"]]):
            part.launches += 1
            part.microseconds += event["dur"]
    return found


class Spans:
    """Stretches of time within one another on one thread, each with a word."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float, Any]] = []

    def add(self, event: dict[str, Any], word: Any) -> None:
        self._spans.append((event["ts"], event["ts"] + event["dur"], word))

    def sort(self) -> None:
        self._spans.sort(key=lambda span: span[0])
        self._starts = [span[0] for span in self._spans]

    def at(self, when: float) -> Any:
        """The word of the innermost stretch that holds this moment"""
        for start, end, word in reversed(self._spans[: bisect.bisect_right(self._starts, when)]):
            if start <= when <= end:
                return word
        return None


def topmost(events: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Those within no other of their thread, but for the engine's nodes, whose children count"""
    ends: dict[Any, float] = defaultdict(lambda: -1.0)
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        if event["name"].startswith("autograd::engine") or "Backward" in event["name"]:
            continue
        if event["ts"] >= ends[event["tid"]]:
            ends[event["tid"]] = event["ts"] + event["dur"]
            yield event


def page(found: Profiled, title: str, rows: int) -> str:
    passes = ("forward", "backward")
    parts = sorted({name for name, _ in found.parts})
    empty = Part()
    table = {n: [found.parts.get((n, p), empty) for p in passes] for n in parts}
    parts.sort(key=lambda n: (-sum(p.microseconds for p in table[n]), -sum(p.operations for p in table[n])))
    total = [
        Part(*(sum(getattr(table[n][i], k) for n in parts) for k in Part.__annotations__)) for i in (0, 1)
    ]
    lines = [
        f"\n### {title}\n",
        "| part | ops forward | backward | launches forward | backward | device ms forward | backward |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, (first, second) in [*((n, table[n]) for n in parts), ("**together**", total)]:
        counts = f"{first.operations} | {second.operations} | {first.launches} | {second.launches}"
        lines.append(
            f"| {name} | {counts} | {first.microseconds / 1e3:.2f} | {second.microseconds / 1e3:.2f} |"
        )
    lines += ["\n| kernel | part | pass | calls | ms |", "| --- | --- | --- | ---: | ---: |"]
    costly = sorted(found.kernels.items(), key=lambda item: -item[1].microseconds)[:rows]
    for (part, which, name), kernel in costly:
        shown = name.replace("|", "/")[:110]
        lines.append(
            f"| `{shown}` | {part} | {which} | {kernel.launches} | {kernel.microseconds / 1e3:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> Profiled:
    parser = arguments_of(__doc__)
    parser.add_argument("--steps", type=int, default=30, help="that are timed")
    parser.add_argument("--rows", type=int, default=40, help="kernels to list")
    parser.add_argument("--out", type=Path, help="a Markdown page to add to")
    options = parser.parse_args(arguments)
    last = options.warmup + options.steps
    plan = planned(load_recipe(options.recipe), options, last + 4)
    with (
        prepared(plan, options.device, ProfiledLoop) as (loop, objective),
        tempfile.TemporaryDirectory() as out,
    ):
        loop.time_steps(options.warmup, last)
        loop.at, loop.trace = last + 2, Path(out) / "trace.json"
        with timed(loop, objective), marked(loop, objective):
            loop.run()
        found = read_trace(loop.trace)
        row = result(options, plan, loop)
    text = row_page(row) + page(found, "One step under the profiler", options.rows)
    print(text)
    if options.out is not None:
        with options.out.open("a") as file:
            file.write(text)
    return found


if __name__ == "__main__":
    main()
