"""The definition of deformable attention, the operator around it, and (on a GPU) the kernels against it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from smope.ops import ms_deform_attn, ms_deform_attn_core
from smope.ops.library import ms_deform_attn_operator
from smope.ops.ms_deform_attn import ms_deform_attn_torch

ROOT = Path(__file__).parents[1]
SHAPES = ((4, 5), (2, 3), (1, 1))
CELLS = 27


def inputs(
    batch: int = 2, queries: int = 6, sides: int = 2, kind: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    """value, reference, offsets, logits; 2 heads x 8, 3 levels, 2 points; many points lie outside."""
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, CELLS, 2, 8, generator=g).to(kind),
        torch.rand(batch, queries, 3, sides, generator=g),
        torch.randn(batch, queries, 2, 3, 2, 2, generator=g) * 2,
        torch.randn(batch, queries, 2, 3, 2, generator=g),
    ]


def by_hand(*tensors: Tensor) -> Any:
    """The formula in loops over queries, heads, levels and points, with numpy alone."""
    value, reference, offsets, logits = (t.double().numpy() for t in tensors)
    batch, queries, heads, levels, points, _ = offsets.shape
    result = np.zeros((batch, queries, heads, value.shape[3]))
    for b, q, h in np.ndindex(batch, queries, heads):
        weights = np.exp(logits[b, q, h]) / np.exp(logits[b, q, h]).sum()
        start = 0
        for level in range(levels):
            rows, columns = SHAPES[level]
            image = value[b, start : start + rows * columns, h].reshape(rows, columns, -1)
            start += rows * columns
            for p in range(points):
                where, shift = reference[b, q, level], offsets[b, q, h, level, p]
                if len(where) == 2:
                    x, y = where * (columns, rows) + shift - 0.5
                else:
                    x, y = (where[:2] + shift / points * where[2:] / 2) * (columns, rows) - 0.5
                for row in (int(np.floor(y)), int(np.floor(y)) + 1):
                    for column in (int(np.floor(x)), int(np.floor(x)) + 1):
                        if 0 <= row < rows and 0 <= column < columns:
                            near = (1 - abs(y - row)) * (1 - abs(x - column))
                            result[b, q, h] += weights[level, p] * near * image[row, column]
    return result.reshape(batch, queries, -1)


@pytest.mark.parametrize("sides", [2, 4], ids=["points", "boxes"])
def test_definition_is_the_formula(sides: int) -> None:
    value, *rest = inputs(sides=sides)
    got = ms_deform_attn(value, SHAPES, *rest)
    np.testing.assert_allclose(got.numpy(), by_hand(value, *rest), rtol=1e-4, atol=1e-5)


def test_the_centre_of_a_cell_reads_that_cell() -> None:
    value = torch.arange(20.0).view(1, 20, 1, 1).expand(1, 20, 1, 8)
    centre = torch.tensor([2.5 / 5, 1.5 / 4]).view(1, 1, 1, 2)  # column 2, row 1 of 5 x 4 cells
    got = ms_deform_attn(value, ((4, 5),), centre, torch.zeros(1, 1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 1, 1))
    torch.testing.assert_close(got, torch.full((1, 1, 8), 7.0))


@pytest.mark.parametrize("sides", [2, 4], ids=["points", "boxes"])
def test_gradcheck(sides: int) -> None:
    leaves = [t.double().requires_grad_() for t in inputs(batch=1, queries=2, sides=sides)]

    def run(value: Tensor, *rest: Tensor) -> Tensor:
        return ms_deform_attn(value, SHAPES, *rest)

    assert torch.autograd.gradcheck(run, leaves, eps=1e-7, atol=1e-5)


def test_core_gives_the_authors_values() -> None:
    folder = os.environ.get("SMOPE_FIXTURES")
    if folder is None and os.environ.get("SMOPE_DATA"):
        folder = str(Path(os.environ["SMOPE_DATA"]).parent / "fixtures")
    if folder is None:
        pytest.skip("set SMOPE_FIXTURES (or SMOPE_DATA, beside it) to the folder with authors_parity/ops.npz")
    stored = np.load(Path(folder) / "authors_parity" / "ops.npz")
    want = {k.removeprefix("msda."): torch.from_numpy(stored[k]) for k in stored if k.startswith("msda.")}
    leaves = [want[k].requires_grad_() for k in ("value", "locations", "weights")]
    shapes = tuple((int(h), int(w)) for h, w in want["spatial_shapes"])
    output = ms_deform_attn_core(leaves[0], shapes, *leaves[1:])
    torch.testing.assert_close(output, want["output"], rtol=1e-5, atol=1e-6)
    output.backward(want["grad_output"])
    for leaf, name in zip(leaves, ("value", "locations", "weights"), strict=True):
        torch.testing.assert_close(leaf.grad, want[f"grad_{name}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("batch", "queries"), [(0, 4), (2, 0)])
def test_nothing_in_nothing_out(batch: int, queries: int) -> None:
    value, *rest = inputs(batch=batch, queries=queries)
    value.requires_grad_()
    output = ms_deform_attn(value, SHAPES, *rest)
    assert output.shape == (batch, queries, 16)
    output.sum().backward()
    assert value.grad is not None
    assert not value.grad.any()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_values_are_summed_in_float32(kind: torch.dtype) -> None:
    value, *rest = inputs(kind=kind)
    got = ms_deform_attn(value, SHAPES, *rest)
    assert got.dtype == kind
    want = by_hand(value, *rest)
    assert (
        np.abs(got.double().numpy() - want).max()
        <= 2 ** (-8 if kind == torch.bfloat16 else -11) * np.abs(want).max()
    )


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda v, r, o, a: (v[:, :-1], r, o, a), "26 cells"),
        (lambda v, r, o, a: (v, r[..., :1], o, a), "reference"),
        (lambda v, r, o, a: (v, r, o[:, :-1], a), "offsets"),
        (lambda v, r, o, a: (v, r, o, a[:, :, :1]), "logits"),
        (lambda v, r, o, a: (v[0], r, o, a), "expected"),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(broken, message: str) -> None:  # type: ignore[no-untyped-def]
    value, *rest = broken(*inputs())
    with pytest.raises(ValueError, match=message):
        ms_deform_attn(value, SHAPES, *rest)


@pytest.mark.parametrize("sides", [2, 4], ids=["points", "boxes"])
@pytest.mark.parametrize("with_reference", [False, True])
def test_operator_gives_the_definition_and_its_gradients(sides: int, with_reference: bool) -> None:
    leaves = inputs(sides=sides)
    for leaf, wanted in zip(leaves, (True, with_reference, True, True), strict=True):
        leaf.requires_grad_(wanted)
    wanted_leaves = [leaf for leaf in leaves if leaf.requires_grad]
    found = []
    for run in (ms_deform_attn_torch, ms_deform_attn_operator):
        output = run(leaves[0], SHAPES, *leaves[1:])
        found.append([output, *torch.autograd.grad(output.square().sum(), wanted_leaves)])
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_operator_keeps_torch_librarys_rules() -> None:
    value, *rest = [leaf.requires_grad_() for leaf in inputs()]
    flat = [side for shape in SHAPES for side in shape]
    torch.library.opcheck(torch.ops.smope.ms_deform_attn.default, (value, flat, *rest))


def test_torch_compile_takes_operator_and_definition_whole() -> None:
    leaves = [leaf.requires_grad_() for leaf in inputs()]
    for run in (ms_deform_attn_operator, ms_deform_attn):
        compiled = torch.compile(
            lambda v, *t, run=run: run(v, SHAPES, *t), fullgraph=True, backend="aot_eager"
        )
        want, got = run(leaves[0], SHAPES, *leaves[1:]), compiled(*leaves)
        torch.testing.assert_close(got, want)
        for a, b in zip(
            torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_export_holds_the_definition() -> None:
    class Layer(torch.nn.Module):
        def forward(self, value: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
            return ms_deform_attn(value, SHAPES, reference, offsets, logits)

    args = tuple(inputs())
    program = torch.export.export(Layer(), args)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any("grid_sampler" in name for name in names)
    assert not any("smope" in name for name in names)
    torch.testing.assert_close(program.module()(*args), Layer()(*args))


def test_importing_compiles_nothing() -> None:
    code = "import sys, smope.ops; sys.exit('torch.utils.cpp_extension' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_the_gpu() -> None:
    """All types, odd shapes, determinism, graphs, compile, autocast: see benchmarks/msda.py."""
    result = subprocess.run(
        [sys.executable, "benchmarks/msda.py", "--check"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
