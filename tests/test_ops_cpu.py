"""The C++ kernel for CPUs, and the bags of samples where there is none, against the definition in float64;
when the kernel is compiled, and when each is taken."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from smope.ops import bags, build, ms_deform_attn
from smope.ops.cpu_forms import cpu_forms
from smope.ops.library import ms_deform_attn_operator
from smope.ops.ms_deform_attn import Shapes, ms_deform_attn_torch

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX", "g++").split()[0]
needs_compiler = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs {COMPILER}")
PYRAMID = ((9, 11), (5, 6), (3, 3))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache that holds the kernel."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOPE_CACHE", str(cache))
        build.build_cpu()
    yield cache
    build._cpu.clear()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, seen by what looks like a new process."""
    monkeypatch.setenv("SMOPE_CACHE", str(tmp_path))
    monkeypatch.delenv("SMOPE_MSDA", raising=False)
    known = dict(build._cpu)
    build._cpu.clear()
    yield tmp_path
    build._cpu.clear()
    build._cpu.update(known)


def inputs(
    shapes: Shapes = PYRAMID,
    batch: int = 2,
    queries: int = 40,
    heads: int = 3,
    channels: int = 32,
    points: int = 4,
    sides: int = 2,
) -> list[Tensor]:
    """value, reference, offsets, logits; about a third of the points lie outside."""
    g = torch.Generator().manual_seed(channels + points)
    cells, levels = sum(h * w for h, w in shapes), len(shapes)
    return [
        torch.randn(batch, cells, heads, channels, generator=g),
        torch.rand(batch, queries, levels, sides, generator=g),
        torch.randn(batch, queries, heads, levels, points, 2, generator=g) * 3,
        torch.randn(batch, queries, heads, levels, points, generator=g) * 2,
    ]


CASES = {
    "default": {},
    "boxes": {"sides": 4},
    "16 channels": {"channels": 16},
    "64 channels": {"channels": 64, "points": 1},
    "13 channels, 5 points": {"channels": 13, "points": 5, "sides": 4},
    "one cell, one point": {"shapes": ((1, 1),), "heads": 1, "channels": 8, "points": 1},
}


@needs_compiler
@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernel_gives_the_definition_and_its_gradients(
    compiled: Path, case: dict[str, int], with_reference: bool
) -> None:
    shapes = case.get("shapes", PYRAMID)
    leaves = inputs(**case)
    found = []
    for run, kind in ((ms_deform_attn_operator, torch.float32), (ms_deform_attn_torch, torch.float64)):
        copies = [
            leaf.to(kind, copy=True).requires_grad_(i != 1 or with_reference) for i, leaf in enumerate(leaves)
        ]
        output = run(copies[0], shapes, *copies[1:])
        wanted = [leaf for leaf in copies if leaf.requires_grad]
        found.append([output, *torch.autograd.grad(output.square().sum(), wanted)])
    for got, want in zip(*found, strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() <= 2e-5 * want.norm() + 1e-6


@needs_compiler
def test_kernel_is_what_runs_and_threads_do_not_change_it(compiled: Path) -> None:
    leaves = [leaf.requires_grad_() for leaf in inputs(queries=300)]
    assert build.loaded_cpu_kernel() is not None
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            output = ms_deform_attn(leaves[0], PYRAMID, *leaves[1:])
            assert "ms_deform_attn" in str(output.grad_fn)
            found.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bags_give_the_definition(case: dict[str, int]) -> None:
    shapes, leaves = case.get("shapes", PYRAMID), inputs(**case)  # type: ignore[arg-type]
    got = bags.forward(leaves[0], shapes, *leaves[1:])
    want = ms_deform_attn_torch(leaves[0].double(), shapes, *(leaf.double() for leaf in leaves[1:]))
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_bags_do_not_read_what_lies_far_outside_or_is_no_number() -> None:
    value, reference, offsets, logits = inputs()
    value.fill_(1.0)
    offsets[0] = torch.tensor([1e30, -1e30])
    offsets[1, :20], offsets[1, 20:] = float("nan"), float("inf")
    assert bags.forward(value, PYRAMID, reference, offsets, logits).abs().max() == 0


def test_bags_are_taken_where_asked_for_without_kernel_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    real = bags.forward

    def spied(*args: Any) -> Tensor:
        taken.append(1)
        return real(*args)

    monkeypatch.setenv("SMOPE_MSDA", "torch")
    monkeypatch.setattr(bags, "forward", spied)
    leaves = inputs()
    with cpu_forms():
        ms_deform_attn(leaves[0], PYRAMID, *leaves[1:])
        assert not taken
        with torch.no_grad():
            ms_deform_attn(leaves[0].double(), PYRAMID, *leaves[1:])
            assert not taken
            ms_deform_attn(leaves[0], PYRAMID, *leaves[1:])
            assert taken
            nothing = [leaf[:, :0] for leaf in leaves[1:]]
            assert ms_deform_attn(leaves[0], PYRAMID, *nothing).shape == (2, 0, 96)
    with torch.no_grad():
        ms_deform_attn(leaves[0], PYRAMID, *leaves[1:])
    assert len(taken) == 1


@needs_compiler
def test_points_far_outside_and_not_numbers_are_not_read(compiled: Path) -> None:
    value, reference, offsets, logits = inputs()
    value.fill_(1.0)
    offsets[0] = torch.tensor([1e30, -1e30])
    offsets[1] = float("nan")
    assert ms_deform_attn_operator(value, PYRAMID, reference, offsets, logits).abs().max() == 0


@needs_compiler
@pytest.mark.parametrize(
    "change",
    [lambda t: t.double(), lambda t: t.bfloat16()],
    ids=["float64", "bfloat16"],
)
def test_other_types_take_the_definition(compiled: Path, change) -> None:  # type: ignore[no-untyped-def]
    leaves = [change(leaf) for leaf in inputs()]
    got = ms_deform_attn(leaves[0], PYRAMID, *leaves[1:])
    assert torch.equal(got, ms_deform_attn_torch(leaves[0], PYRAMID, *leaves[1:]))


@needs_compiler
def test_compiled_graphs_hold_the_operator_and_exported_ones_the_definition(compiled: Path) -> None:
    """With torch 2.11 every compiled graph held the definition: Dynamo took itself to be exporting."""

    class Layer(torch.nn.Module):
        def forward(self, value: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
            return ms_deform_attn(value, PYRAMID, reference, offsets, logits)

    graphs: list[list[str]] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    args = tuple(inputs())
    for dynamic in (None, True):
        torch._dynamo.reset()
        torch.compile(Layer(), backend=keep, fullgraph=True, dynamic=dynamic)(*args)
        assert any("smope.ms_deform_attn" in name for name in graphs[-1]), graphs[-1]
        assert not any("grid_sample" in name for name in graphs[-1])
    for strict in (False, True):
        program = torch.export.export(Layer(), args, strict=strict)
        names = [str(node.target) for node in program.graph.nodes]
        assert any("grid_sampler" in name for name in names)
        assert not any("smope" in name for name in names)


@needs_compiler
def test_it_is_compiled_only_when_asked_to(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = inputs()
    ms_deform_attn(leaves[0], PYRAMID, *leaves[1:])
    assert list(cache.iterdir()) == []
    assert "smope build" in build.status()["cpu"]

    build._cpu.clear()
    monkeypatch.setenv("SMOPE_MSDA", "torch")
    ms_deform_attn(leaves[0], PYRAMID, *leaves[1:])
    assert list(cache.iterdir()) == []

    monkeypatch.setenv("SMOPE_MSDA", "cpu")
    ms_deform_attn(leaves[0], PYRAMID, *leaves[1:])
    [library] = cache.rglob("*.so")
    assert str(library) in build.status()["cpu"]


@needs_compiler
def test_what_was_built_is_taken_by_default_and_never_built_twice(
    compiled: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOPE_CACHE", str(compiled))
    monkeypatch.setenv("CXX", "false")  # a compiler that fails
    assert build.cpu_kernel_ready()
    build._cpu.clear()
    assert build.build_cpu().is_relative_to(compiled)


@needs_compiler
def test_processes_that_build_at_once_end_with_one_library(cache: Path) -> None:
    code = "from smope.ops import build; print(build.build_cpu())"
    started = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = {process.communicate()[0] for process in started}
    assert all(process.returncode == 0 for process in started)
    assert said == {f"{next(cache.rglob('*.so'))}\n"}
    assert {path.suffix for path in cache.rglob("*") if path.is_file()} == {".so", ".lock"}


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_a_failed_build_says_what_to_do_and_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, compiler: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(build.KernelUnavailable, match=rf"{compiler}.*Remedy.*OpenMP.*CXX.*SMOPE_CACHE"):
        build.build_cpu()
    assert not list(cache.rglob("*.so"))
    leaves = inputs()
    ms_deform_attn(leaves[0], PYRAMID, *leaves[1:])  # auto goes on without it


def test_a_library_that_does_not_load_is_told_once(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = build._cpu_target()
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"not a library")
    for _ in range(2):
        assert not build.cpu_kernel_ready()
        build._cpu.clear()
    [told] = [record.message for record in caplog.records]
    assert "could not be loaded" in told
    assert str(broken.parent) in told
    build._told.clear()


def test_a_cache_that_cannot_be_written_is_told_and_the_cuda_path_goes_on(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch.utils import cpp_extension

    (cache / "file").write_text("")
    monkeypatch.setenv("SMOPE_CACHE", str(cache / "file"))  # no folder can be made below a file
    monkeypatch.setattr(build, "_nvcc", lambda: "/cuda/bin/nvcc")
    monkeypatch.setattr(build, "_architectures", lambda: ["90"])
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "/cuda")
    monkeypatch.setattr(ctypes, "CDLL", lambda path: pytest.fail("nothing was compiled"))
    kernel = build.Kernel(8, 32, 4, 4, torch.float32, torch.float32)
    build.load_binding.cache_clear()
    assert not build.kernel_ready(kernel)
    assert "SMOPE_CACHE" in caplog.text
    with pytest.raises(build.KernelUnavailable, match="SMOPE_CACHE"):
        build.build_cpu()
    build._results.pop(kernel)
    build._told.clear()
