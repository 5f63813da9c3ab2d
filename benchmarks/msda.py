"""Deformable attention: our kernel, grid_sample and every peer that imports, on the same tensors in one run.

    python benchmarks/msda.py --check         correctness alone, exit status 1 on a failure
    python benchmarks/msda.py --quick         our kernel alone, few repeats
    python benchmarks/msda.py --out FILE      the whole table as Markdown (and printed)
    python benchmarks/msda.py --json FILE     the same figures as JSON
    python benchmarks/msda.py --variants      our kernel compiled with other settings, side by side
    python benchmarks/msda.py --profile bf16  a few calls of each case, for a profiler to look at

Times start from logits and offsets (what a layer has), so a peer that wants locations and weights pays
for them. Every time is the median of replays of a CUDA graph that runs through several sets of inputs,
together larger than the L2 cache, divided by their number; "eager" is the median of single calls between
CUDA events. Locations are as in a trained network: pixel centres (encoder) or random points (decoder)
and N(0, 2 cells). Errors are relative L2 against float64 on the same, already rounded tensors.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from msda_cases import CASES, NAMES, Case, Exact, Inputs, Operator, errors, gradients, make_inputs
from msda_check import check
from msda_peers import implementations

from smope.ops import build, ms_deform_attn

Kinds = tuple[torch.dtype, torch.dtype]  # of value and of offsets
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SECONDS = 0.25  # of repeats, for one figure
# Settings of the kernels' sources to try, by the cases that they concern: what nvcc is told.
VARIANTS: dict[str, list[str]] = {
    "as it is": [],
    "training encoder: tile 3 blocks": ["-DSMOPE_TILE_BLOCKS=3"],
    "encoder: forward 3 blocks": ["-DSMOPE_FORWARD_BLOCKS=3"],
    "encoder: forward 5 blocks": ["-DSMOPE_FORWARD_BLOCKS=5"],
    "decoder: split in 8": ["-DSMOPE_SPLIT=8"],
    "decoder: never gathered": ["-DSMOPE_GATHER_BATCH=1073741824"],
    "decoder: always gathered": ["-DSMOPE_GATHER_BATCH=1"],
    "decoder: gathered by 4 blocks": ["-DSMOPE_GATHER_BATCH=1", "-DSMOPE_GATHER_BLOCKS=4"],
    "decoder: gathered by 16 blocks": ["-DSMOPE_GATHER_BATCH=1", "-DSMOPE_GATHER_BLOCKS=16"],
}


def concerns(setting: str, case: Case) -> bool:
    return ":" not in setting or setting.split(":")[0] in case.name


# ------------------------------------------------ times
def graph_ms(work: Callable[[Inputs], object], sets: list[Inputs], seconds: float = SECONDS) -> float:
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
    return median_ms(graph.replay, seconds) / len(sets)


def median_ms(work: Callable[[], object], seconds: float = SECONDS) -> float:
    def once() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    work()
    estimate = max(once(), once())
    return statistics.median(once() for _ in range(max(5, min(50, int(seconds * 1e3 / estimate)))))


def make_sets(case: Case, kinds: Kinds) -> list[Inputs]:
    """As many sets of inputs as together exceed the L2 cache several times."""
    first = make_inputs(case.shapes, case.batch, case.queries, *kinds)
    size = sum(t.numel() * t.element_size() for t in (*first.leaves, first.grad))
    count = max(1, min(16, -(-256 * 2**20 // size)))
    more = [make_inputs(case.shapes, case.batch, case.queries, *kinds, seed=seed) for seed in range(1, count)]
    return [first, *more]


def run_forward(operator: Operator, x: Inputs) -> None:
    with torch.no_grad():
        operator(x.value, x.shapes, x.reference, x.offsets, x.logits)


def measure(operator: Operator, sets: list[Inputs], known: dict[int, Exact]) -> dict[str, float]:
    row: dict[str, float] = errors(operator, sets[0], known=known)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = gradients(operator, sets[0])
    row["peak MB"] = (torch.cuda.max_memory_allocated() - before) / 1e6
    del result
    row["forward"] = graph_ms(lambda x: run_forward(operator, x), sets)
    row["both"] = graph_ms(lambda x: gradients(operator, x), sets)
    row["eager forward"] = median_ms(lambda: run_forward(operator, sets[0]))
    row["eager both"] = median_ms(lambda: gradients(operator, sets[0]))
    return row


# ------------------------------------------------ tables
HEADER = (
    "| implementation | value | offsets | forward ms | forward + backward ms | eager ms | eager f+b ms "
    "| peak MB | output | value grad | offsets grad | all points | logits grad |\n" + "| --- " * 13 + "|"
)


def line(name: str, kinds: Kinds, row: dict[str, float], case: Case | None) -> str:
    """A row of the table; `case`: whose targets to judge it by."""

    def timed(key: str, at_most: float | None) -> str:
        text = f"{row[key]:.4f}"
        return (
            text if at_most is None else f"{text} ({'meets' if row[key] <= at_most else 'misses'} {at_most})"
        )

    targets = case.targets.get(FP32 if kinds[0] == FP32 else BF16) if case else None
    eager = case.eager if case and kinds[0] == FP32 else None
    cells = [name, NAMES[kinds[0]], NAMES[kinds[1]]]
    cells += [timed(key, targets[i] if targets else None) for i, key in enumerate(("forward", "both"))]
    cells += [
        timed(key, eager[i] if eager else None) for i, key in enumerate(("eager forward", "eager both"))
    ]
    cells += [f"{row['peak MB']:.0f}"]
    cells += [f"{row[key]:.2g}" for key in ("output", "value", "offsets", "offsets, all", "logits")]
    return "| " + " | ".join(cells) + " |"


def kinds_of(case: Case, name: str, quick: bool) -> list[Kinds]:
    if "training" in case.name:
        return [(BF16, BF16)]
    pairs = [(FP32, FP32), (BF16, BF16)]
    if not quick:
        pairs += [(FP16, FP16)]
        pairs += [(BF16, FP32)] if name == "smope" else []  # peers widen offsets anyway
    return pairs


def benchmark(quick: bool, only: str) -> tuple[list[str], list[dict[str, object]]]:
    """The Markdown report and the same figures as records."""
    report = [
        f"Device: {torch.cuda.get_device_name()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}",
        "",
    ]
    records: list[dict[str, object]] = []
    operators = {"smope": ms_deform_attn} if quick else implementations()
    for case in CASES:
        if only not in case.name:
            continue
        levels = len(case.shapes)
        report += [
            f"### {case.name}, batch {case.batch}, 8 heads x 32, {levels} levels, 4 points",
            "",
            HEADER,
        ]
        print(*report[-3:], sep="\n")
        pairs = {kinds: None for name in operators for kinds in kinds_of(case, name, quick)}
        for kinds in pairs:
            sets, known = make_sets(case, kinds), dict[int, Exact]()
            for name, operator in operators.items():
                if kinds not in kinds_of(case, name, quick):
                    continue
                record: dict[str, object] = {
                    "case": case.name,
                    "implementation": name,
                    "kinds": [NAMES[k] for k in kinds],
                }
                try:
                    row = measure(operator, sets, known)
                except Exception as error:  # a peer's limits are a result, too
                    if name == "smope":
                        raise
                    reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
                    record["fails"] = reason
                    labels = " | ".join(NAMES[k] for k in kinds)
                    report.append(f"| {name} | {labels} | fails: {reason} |" + " |" * 9)
                else:
                    record |= row
                    report.append(line(name, kinds, row, case if name == "smope" else None))
                records.append(record)
                print(report[-1], flush=True)
                torch.cuda.empty_cache()
        report.append("")
    return report, records


# ------------------------------------------------ our kernel's settings
def kernel_for(case: Case, kinds: Kinds) -> build.Kernel:
    return build.Kernel(8, 32, len(case.shapes), 4, *kinds)


def compile_ahead(only: str, quick: bool, settings: list[str]) -> None:
    """Every kernel of the table with each of the settings, in as many processes."""
    wanted = {
        (str(len(case.shapes)), *(NAMES[k] for k in kinds), name)
        for case in CASES
        for kinds in kinds_of(case, "smope", quick)
        for name in settings
        if only in case.name and concerns(name, case)
    }
    command = [sys.executable, __file__, "--compile"]
    jobs = [subprocess.Popen([*command, "binding"])]
    jobs += [subprocess.Popen([*command, *what]) for what in sorted(wanted)]
    failures = [job.args for job in jobs if job.wait() != 0]
    if failures:
        raise SystemExit(f"not compiled: {failures}")


def compile_one(what: list[str]) -> None:
    if what == ["binding"]:
        build.load_binding()
        return
    kinds = {name: kind for kind, name in NAMES.items()}
    levels, value, offset, name = what
    variant_library(build.Kernel(8, 32, int(levels), 4, kinds[value], kinds[offset]), VARIANTS[name])


def variant_library(kernel: build.Kernel, flags: list[str]) -> Path:
    sources = [build.SOURCES / "ms_deform_attn.cu", *sorted(build.SOURCES.glob("*.cuh"))]
    told = [*kernel.defines, "-O3", *flags, *build.architecture_flags()]
    return build.compiled_library(kernel.label + ("_variant" if flags else ""), sources, told)


def use_variant(kernel: build.Kernel, flags: list[str]) -> None:
    """From here on the operator runs the kernel compiled with these settings."""
    build.kernel_ready(kernel, insist=True)  # so that the operator takes kernels
    build.register(kernel, ctypes.CDLL(str(variant_library(kernel, flags))))


def compare_variants(only: str, names: list[str]) -> list[str]:
    """Forward and forward + backward of each setting, ms, one column a case."""
    cases = [case for case in CASES if only in case.name]
    columns = [(case, kinds) for case in cases for kinds in kinds_of(case, "smope", quick=True)]
    table: dict[str, list[str]] = {name: [] for name in names}
    for case, kinds in columns:
        sets, known = make_sets(case, kinds), dict[int, Exact]()
        for name, cells in table.items():
            if not concerns(name, case):
                cells.append("")
                continue
            use_variant(kernel_for(case, kinds), VARIANTS[name])
            found = errors(ms_deform_attn, sets[0], known=known)
            worst = max(found[key] for key in ("output", "value", "logits"))
            forward = graph_ms(lambda x: run_forward(ms_deform_attn, x), sets, 0.1)
            both = graph_ms(lambda x: gradients(ms_deform_attn, x), sets, 0.1)
            cells.append(f"{forward:.4f} / {both:.4f} ({worst:.0e})")
        torch.cuda.empty_cache()
    heads = [f"{case.name}, {NAMES[kinds[0]]}" for case, kinds in columns]
    lines = ["| setting | " + " | ".join(heads) + " |", "| --- " * (1 + len(heads)) + "|"]
    return lines + [f"| {name} | " + " | ".join(cells) + " |" for name, cells in table.items()]


def profile(only: str, kind: torch.dtype) -> None:
    for case in CASES:
        if only in case.name and (kind, kind) in kinds_of(case, "smope", quick=True):
            x = make_inputs(case.shapes, case.batch, case.queries, kind, kind)
            gradients(ms_deform_attn, x)
            torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = {name: kind for kind, name in NAMES.items()}
    parser.add_argument("--check", action="store_true", help="correctness alone")
    parser.add_argument("--quick", action="store_true", help="our kernel alone")
    parser.add_argument("--variants", nargs="*", metavar="NAME", help="our kernel with other settings (all)")
    parser.add_argument("--profile", choices=kinds, help="a call of each case in this type")
    parser.add_argument("--case", default="", help="only the cases whose name contains this")
    parser.add_argument("--out", type=Path, help="write the table here")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--compile", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "no GPU: nothing to measure (tests/test_ops_kernel_on_host.py runs the kernels' source on a CPU)"
        )
        return 1
    os.environ.setdefault(
        "SMOPE_MSDA", "cuda"
    )  # here a kernel that cannot be had is an error, not a slow path
    if options.compile:
        compile_one(options.compile)
        return 0
    if options.check:
        return 0 if check() else 1
    if options.profile:
        profile(options.case, kinds[options.profile])
        return 0
    chosen = (options.variants or list(VARIANTS)) if options.variants is not None else ["as it is"]
    compile_ahead(options.case, options.quick or options.variants is not None, chosen)
    if options.variants is not None:
        report = compare_variants(options.case, chosen)
        records: list[dict[str, object]] = []
        print(*report, sep="\n")
    else:
        report, records = benchmark(options.quick, options.case)
    if options.out:
        options.out.write_text("\n".join(report) + "\n")
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
