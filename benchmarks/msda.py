"""Deformable attention: our kernel, grid_sample and every peer that imports, on the same tensors in one run.

    python benchmarks/msda.py --check       correctness alone, exit status 1 on a failure
    python benchmarks/msda.py --quick       two cases, few repeats
    python benchmarks/msda.py --out FILE    the whole table as Markdown (and printed)

Times start from logits and offsets (what a layer has), so a peer that wants locations and weights pays
for them. Every time is the median of replays of a CUDA graph that runs through several sets of inputs,
together larger than the L2 cache, divided by their number; "eager" is the median of single calls between
CUDA events. Locations are as in a trained network: pixel centres (encoder) or random points (decoder)
and N(0, 2 cells). Errors are relative L2 against float64 on the same, already rounded tensors.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smope.ops import ms_deform_attn
from smope.ops.ms_deform_attn import Shapes, ms_deform_attn_torch, sampling_locations, softmaxed

LARGE: Shapes = ((100, 167), (50, 84), (25, 42), (13, 21))  # 800x1333
SMALL: Shapes = ((60, 80), (30, 40), (15, 20), (8, 10))  # 480x640
Operator = Callable[[Tensor, Shapes, Tensor, Tensor, Tensor], Tensor]
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    shapes: Shapes
    batch: int
    queries: int | None  # None: one a cell (encoder)
    targets: dict[torch.dtype, tuple[float, float]]  # ms at most, forward and forward + backward


CASES = [
    Case("encoder 800x1333", LARGE, 8, None, {torch.float32: (0.70, 2.6), torch.bfloat16: (0.45, 2.2)}),
    Case("encoder 480x640", SMALL, 8, None, {torch.float32: (0.20, 0.75), torch.bfloat16: (0.14, 0.65)}),
    Case(
        "decoder 300 at 800x1333",
        LARGE,
        8,
        300,
        {torch.float32: (0.026, 0.13), torch.bfloat16: (0.020, 0.11)},
    ),
    Case("decoder 300 at 800x1333, batch 1", LARGE, 1, 300, {torch.float32: (0.007, 0.030)}),
]


@dataclasses.dataclass
class Inputs:
    shapes: Shapes
    value: Tensor
    reference: Tensor
    offsets: Tensor
    logits: Tensor
    grad: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [self.value, self.offsets, self.logits]

    def image(self, index: int) -> Inputs:
        kept = [
            t[index : index + 1] for t in (self.value, self.reference, self.offsets, self.logits, self.grad)
        ]
        return Inputs(self.shapes, *[t.detach().requires_grad_(t.requires_grad) for t in kept])


def make_inputs(
    shapes: Shapes,
    batch: int,
    queries: int | None,
    kind: torch.dtype,
    offset_kind: torch.dtype | None = None,
    heads: int = 8,
    head: int = 32,
    points: int = 4,
    boxes: bool = False,
    seed: int = 0,
) -> Inputs:
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int, like: torch.dtype) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).to(like)

    levels, cells = len(shapes), sum(h * w for h, w in shapes)
    if queries is None:
        centres = [
            torch.stack(
                torch.meshgrid((torch.arange(w) + 0.5) / w, (torch.arange(h) + 0.5) / h, indexing="xy"), -1
            ).view(-1, 2)
            for h, w in shapes
        ]
        reference = torch.cat(centres).cuda()[None, :, None].expand(batch, cells, levels, 2).contiguous()
        queries = cells
    else:
        reference = torch.rand(batch, queries, 1, 2, device="cuda", generator=generator)
        reference = reference.expand(-1, -1, levels, -1).contiguous()
    if boxes:
        sides = torch.rand(reference.shape, device="cuda", generator=generator) * 0.3 + 0.02
        reference = torch.cat([reference, sides], -1)
    small = offset_kind or kind
    return Inputs(
        shapes,
        normal(batch, cells, heads, head, like=kind).requires_grad_(),
        reference,
        (normal(batch, queries, heads, levels, points, 2, like=torch.float32) * 2).to(small).requires_grad_(),
        normal(batch, queries, heads, levels, points, like=small).requires_grad_(),
        normal(batch, queries, heads * head, like=kind),
    )


# ------------------------------------------------ implementations
def from_locations(core: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor], whole: bool) -> Operator:
    """An operator that takes ready locations and weights; `whole`: in float32, for peers without 16 bit."""

    def run(value: Tensor, shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        sizes, starts = level_tensors(shapes)
        locations = sampling_locations(shapes, reference, offsets.float())
        weights = softmaxed(logits.float())
        if whole:
            return core(value.float(), sizes, starts, locations, weights).to(value.dtype)
        return core(value, sizes, starts, locations, weights.to(value.dtype))

    return run


_level_tensors: dict[Shapes, tuple[Tensor, Tensor]] = {}


def level_tensors(shapes: Shapes) -> tuple[Tensor, Tensor]:
    if shapes not in _level_tensors:
        sizes = torch.tensor(shapes, device="cuda")
        _level_tensors[shapes] = sizes, torch.cat([sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]])
    return _level_tensors[shapes]


def peers() -> dict[str, Operator]:
    """Every peer that imports here, by name."""
    found: dict[str, Operator] = {}

    def attempt(name: str, module: str, build: Callable[[Any], Operator]) -> None:
        try:
            found[name] = build(importlib.import_module(module))
        except Exception as error:  # a peer may fail to import in any way; say so and go on
            reason = str(error).splitlines()[0] if str(error) else ""
            print(f"not run: {name} ({type(error).__name__}: {reason})")

    attempt(
        "torch-ms-deform-attn", "torch_ms_deform_attn", lambda m: from_locations(m.ms_deform_attn, whole=True)
    )
    for backend in ("TRITON", "CUDA"):
        attempt(f"deformops {backend}", "deformops.registry", functools.partial(deformops, backend))
    attempt("DCNv4 FlashDeformAttn", "DCNv4.functions", flash_deform_attn)
    return found


def deformops(backend: str, module: Any) -> Operator:
    chosen = getattr(module.Backend, backend)
    return from_locations(functools.partial(module.msda, backend=chosen), whole=False)


def flash_deform_attn(module: Any) -> Operator:
    function = module.FlashDeformAttnFunction

    def run(value: Tensor, shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        sizes, starts = level_tensors(shapes)
        locations = sampling_locations(shapes, reference, offsets.float())
        joined = torch.cat([locations.flatten(3), logits.float().flatten(3)], -1).to(value.dtype)
        return function.apply(value, sizes, starts, joined, 64, offsets.shape[4])

    return run


def implementations() -> dict[str, Operator]:
    return {"smope": ms_deform_attn, "grid_sample (PyTorch)": ms_deform_attn_torch, **peers()}


# ------------------------------------------------ errors
def gradients(operator: Operator, x: Inputs) -> list[Tensor]:
    output = operator(x.value, x.shapes, x.reference, x.offsets, x.logits)
    return [output.detach(), *torch.autograd.grad(output, x.leaves, x.grad)]


def exact(x: Inputs) -> tuple[list[Tensor], Tensor]:
    """Output and gradients in float64, and which points lie further than 1e-3 cell from a cell border."""
    wide = Inputs(
        x.shapes, *[t.detach().double() for t in (x.value, x.reference, x.offsets, x.logits, x.grad)]
    )
    for leaf in wide.leaves:
        leaf.requires_grad_()
    with torch.no_grad():
        sizes = torch.tensor([(w, h) for h, w in x.shapes], dtype=torch.float64, device="cuda")[:, None, :]
        cells = sampling_locations(x.shapes, wide.reference, wide.offsets) * sizes - 0.5
        clear = ((cells - cells.round()).abs() > 1e-3).all(-1)
    return gradients(ms_deform_attn_torch, wide), clear


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))


def errors(operator: Operator, x: Inputs, deterministic: bool = False) -> dict[str, float]:
    """Relative L2 errors over the first and last image."""
    result: dict[str, float] = {}
    torch.use_deterministic_algorithms(deterministic)
    whole = gradients(operator, x)
    torch.use_deterministic_algorithms(False)  # grid_sample has no deterministic backward
    for index in sorted({0, x.value.shape[0] - 1}):
        want, clear = exact(x.image(index))
        got = [t[index : index + 1] for t in whole]
        found = {
            "output": relative(got[0], want[0]),
            "value": relative(got[1], want[1]),
            "offsets": relative(got[2][clear], want[2][clear]),
            "offsets, all": relative(got[2], want[2]),
            "logits": relative(got[3], want[3]),
            "left out": 1 - float(clear.double().mean()),
        }
        result = {key: max(result.get(key, 0.0), error) for key, error in found.items()}
    return result


# ------------------------------------------------ times
def graph_ms(work: Callable[[Inputs], object], sets: list[Inputs], repeats: int) -> float:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for x in sets:
            work(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x in sets:
            work(x)
    return median_ms(graph.replay, repeats) / len(sets)


def median_ms(work: Callable[[], object], repeats: int) -> float:
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def measure(
    operator: Operator, case: Case, kind: torch.dtype, offset_kind: torch.dtype, quick: bool
) -> dict[str, float]:
    first = make_inputs(case.shapes, case.batch, case.queries, kind, offset_kind)
    size = sum(t.numel() * t.element_size() for t in (*first.leaves, first.grad))
    count = max(1, min(16, -(-256 * 2**20 // size)))
    sets = [first] + [
        make_inputs(case.shapes, case.batch, case.queries, kind, offset_kind, seed=seed)
        for seed in range(1, count)
    ]
    repeats = 10 if quick else 30

    def forward(x: Inputs) -> None:
        with torch.no_grad():
            operator(x.value, x.shapes, x.reference, x.offsets, x.logits)

    row: dict[str, float] = errors(operator, first)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = gradients(operator, first)
    row["peak MB"] = (torch.cuda.max_memory_allocated() - before) / 1e6
    del result
    row["forward"] = graph_ms(forward, sets, repeats)
    row["both"] = graph_ms(lambda x: gradients(operator, x), sets, repeats)
    row["eager forward"] = median_ms(lambda: forward(first), repeats)
    row["eager both"] = median_ms(lambda: gradients(operator, first), repeats)
    return row


HEADER = (
    "| implementation | value | offsets | forward ms | forward + backward ms | eager ms | eager f+b ms "
    "| peak MB | output | value grad | offsets grad | all points | logits grad |\n" + "| --- " * 13 + "|"
)


def line(
    name: str,
    kind: torch.dtype,
    offset_kind: torch.dtype,
    row: dict[str, float],
    targets: tuple[float, float] | None,
) -> str:
    def timed(key: str, target: float | None) -> str:
        text = f"{row[key]:.4f}"
        return text if target is None else f"{text} ({'meets' if row[key] <= target else 'misses'} {target})"

    at_most = targets or (None, None)
    cells = [name, NAMES[kind], NAMES[offset_kind], timed("forward", at_most[0]), timed("both", at_most[1])]
    cells += [f"{row['eager forward']:.4f}", f"{row['eager both']:.4f}", f"{row['peak MB']:.0f}"]
    cells += [f"{row[key]:.2g}" for key in ("output", "value", "offsets", "offsets, all", "logits")]
    return "| " + " | ".join(cells) + " |"


def benchmark(quick: bool, only: str | None, own: bool) -> list[str]:
    device = torch.cuda.get_device_name()
    report = [f"Device: {device}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}", ""]
    pairs = [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ]
    pairs += [] if quick else [(torch.float16, torch.float16)]
    operators = {"smope": ms_deform_attn} if own else implementations()
    for case in CASES[1:3] if quick and only is None else CASES:
        if only is not None and only not in case.name:
            continue
        report += [f"### {case.name}, batch {case.batch}, 8 heads x 32, 4 levels, 4 points", "", HEADER]
        print(*report[-3:], sep="\n")
        for name, operator in operators.items():
            for kind, offset_kind in pairs:
                targets = case.targets.get(torch.float32 if kind == torch.float32 else torch.bfloat16)
                try:
                    row = measure(operator, case, kind, offset_kind, quick)
                except Exception as error:  # a peer's limits are a result, too
                    if name == "smope":
                        raise
                    reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
                    report.append(
                        f"| {name} | {NAMES[kind]} | {NAMES[offset_kind]} | fails: {reason} |" + " |" * 9
                    )
                else:
                    report.append(line(name, kind, offset_kind, row, targets if name == "smope" else None))
                print(report[-1], flush=True)
                torch.cuda.empty_cache()
        report.append("")
    return report


# ------------------------------------------------ correctness
def check() -> bool:
    """Every type and awkward shape against float64, and the ways in which a program may call the operator."""
    fine = True

    def judge(name: str, passed: bool, detail: str = "") -> None:
        nonlocal fine
        fine &= passed
        print(f"{'ok    ' if passed else 'FAILED'} {name} {detail}", flush=True)

    odd: Shapes = ((7, 9), (1, 5), (3, 1), (1, 1))
    types = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)]
    plans = [("480x640", SMALL, 2, None, 8, 32, 4, False), ("boxes", SMALL, 2, 300, 8, 32, 4, True)]
    plans += [("odd shapes", odd, 3, 37, 8, 32, 4, False), ("head 24", odd[:2], 1, 5, 3, 24, 3, False)]
    plans += [
        ("head 128", odd[:2], 2, 65, 2, 128, 3, True),
        ("head 8, 12 points", odd[:1], 2, 33, 1, 8, 12, False),
    ]
    for name, shapes, batch, queries, heads, head, points, boxes in plans:
        for kind, offset_kind in types if head == 32 else types[:1]:
            x = make_inputs(shapes, batch, queries, kind, offset_kind, heads, head, points, boxes)
            limit = 5e-6 if kind == torch.float32 else 5e-3
            for mode in ("fast", "deterministic"):
                found = errors(ms_deform_attn, x, mode == "deterministic")
                passed = all(found[key] <= limit for key in ("output", "value", "offsets", "logits"))
                label = f"{name}, {NAMES[kind]}/{NAMES[offset_kind]}, {mode}"
                judge(label, passed, " ".join(f"{key} {error:.1e}" for key, error in found.items()))

    x = make_inputs(SMALL, 2, 300, torch.float32, boxes=True)
    wanted = gradients(ms_deform_attn, x)
    torch.use_deterministic_algorithms(True)
    runs = [gradients(ms_deform_attn, x) for _ in range(3)]
    torch.use_deterministic_algorithms(False)
    judge(
        "deterministic runs agree bit for bit",
        all(torch.equal(a, b) for r in runs for a, b in zip(r, runs[0], strict=True)),
    )

    reference = x.reference.clone().requires_grad_()
    args = (x.value, SMALL, reference, x.offsets, x.logits)
    (own,) = torch.autograd.grad(ms_deform_attn(*args), reference, x.grad)
    wide = [t.detach().double().requires_grad_() for t in (x.value, reference, x.offsets, x.logits)]
    (want,) = torch.autograd.grad(ms_deform_attn_torch(wide[0], SMALL, *wide[1:]), wide[1], x.grad.double())
    # Points on a cell border flip in float32: a few cells' gradients differ whatever is done.
    judge("gradient of reference", relative(own, want) < 5e-3, f"{relative(own, want):.1e}")

    compiled = torch.compile(lambda *t: ms_deform_attn(t[0], SMALL, *t[1:]), fullgraph=True)
    got = gradients(lambda v, s, *t: compiled(v, *t), x)
    judge("torch.compile", all(relative(a, b.double()) < 1e-4 for a, b in zip(got, wanted, strict=True)))

    graph_ms(lambda y: gradients(ms_deform_attn, y), [x], 1)
    judge("CUDA graph", True)

    for batch, queries in ((0, 5), (2, 0)):
        y = make_inputs(odd, batch, queries, torch.float32)
        judge(f"batch {batch}, {queries} queries", not gradients(ms_deform_attn, y)[1].any())

    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = make_inputs(SMALL, 2, 300, torch.bfloat16, torch.float32)
        judge("autocast", gradients(ms_deform_attn, y)[0].dtype == torch.bfloat16)

    view = torch.randn(2 * 6380 * 8 * 32 + 1, device="cuda")[1:].view(
        2, 6380, 8, 32
    )  # not on a 16-byte border
    y = Inputs(SMALL, view, x.reference, x.offsets, x.logits, x.grad)
    got_view = ms_deform_attn(view, SMALL, x.reference, x.offsets, x.logits)
    judge(
        "a view off the 16-byte grid", torch.equal(got_view, ms_deform_attn(view.clone(), SMALL, *args[2:]))
    )
    return fine


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="correctness alone")
    parser.add_argument("--quick", action="store_true", help="two cases, few repeats")
    parser.add_argument("--own", action="store_true", help="our kernel alone")
    parser.add_argument("--case", help="only the cases whose name contains this")
    parser.add_argument("--out", type=Path, help="write the table here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "no GPU: nothing to measure (tests/test_ops_kernel_on_host.py runs the kernels' source on a CPU)"
        )
        return 1
    os.environ.setdefault(
        "SMOPE_MSDA", "cuda"
    )  # here a kernel that cannot be had is an error, not a slow path
    if options.check:
        return 0 if check() else 1
    report = benchmark(options.quick, options.case, options.own)
    if options.out:
        options.out.write_text("\n".join(report) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
