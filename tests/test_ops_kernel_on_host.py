"""The CUDA kernels' own source, compiled by g++ over a stand-in for CUDA, against the definition in float64.

This runs every index, shuffle and reduction of the kernels on a machine without a GPU.
"""

from __future__ import annotations

import ctypes
import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from smope.ops.ms_deform_attn import ms_deform_attn_torch, sampling_locations

HEADS = 3
ROOT = Path(__file__).parents[1]
NAMES = {torch.float32: "float", torch.float16: "F16", torch.bfloat16: "BF16"}
OUTPUT_ERROR = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="needs g++ to compile the kernels for the CPU"
)


@dataclasses.dataclass(frozen=True)
class Variant:
    head: int
    shapes: tuple[tuple[int, int], ...]
    points: int
    value: torch.dtype
    offset: torch.dtype


VARIANTS = [
    Variant(32, ((9, 11), (5, 6), (3, 3), (1, 1)), 4, torch.float32, torch.float32),
    Variant(32, ((9, 11), (5, 6), (3, 3), (2, 1)), 4, torch.bfloat16, torch.bfloat16),
    Variant(32, ((9, 11), (5, 6), (3, 3), (2, 1)), 4, torch.float16, torch.float32),
    Variant(
        24, ((4, 7), (1, 5), (3, 1)), 3, torch.float32, torch.float32
    ),  # lanes without channels, points left over
    Variant(8, ((6, 5),), 1, torch.bfloat16, torch.float32),  # one lane, one point
    Variant(128, ((6, 5), (3, 2)), 3, torch.float32, torch.float32),  # fewer points than lanes
    Variant(64, ((7, 3), (3, 2), (2, 2)), 13, torch.float32, torch.float32),  # many points
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[Variant, ctypes.CDLL]:
    folder = tmp_path_factory.mktemp("kernels")
    jobs = {}
    for number, variant in enumerate(VARIANTS):
        target = folder / f"kernels{number}.so"
        command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC"]
        # Another kernel's stand-in has variables of the same names, not to become one in this process.
        command += ["-fno-gnu-unique", "-x", "c++", "-include"]
        command += [str(ROOT / "tests/cuda_on_host/cuda_on_host.hpp"), f"-DSMOPE_HEAD={variant.head}"]
        command += [
            f"-DSMOPE_HEADS={HEADS}",
            f"-DSMOPE_LEVELS={len(variant.shapes)}",
            f"-DSMOPE_POINTS={variant.points}",
        ]
        command += [f"-DSMOPE_VALUE={NAMES[variant.value]}", f"-DSMOPE_OFFSET={NAMES[variant.offset]}"]
        command += ["-DSMOPE_GATHER_BATCH=2"]  # gathers in every type, where queries are few
        command += [str(ROOT / "smope/_ext/ms_deform_attn.cu"), "-o", str(target)]
        jobs[variant] = (subprocess.Popen(command), target)
    for process, _ in jobs.values():
        assert process.wait() == 0, "the kernels do not compile for the CPU"
    return {variant: ctypes.CDLL(str(target)) for variant, (_, target) in jobs.items()}


@dataclasses.dataclass
class Case:
    shapes: tuple[tuple[int, int], ...]
    value: Tensor
    reference: Tensor
    offsets: Tensor
    logits: Tensor
    grad: Tensor


def make_case(variant: Variant, queries: int = 9, batch: int = 2, boxes: bool = False) -> Case:
    generator = torch.Generator().manual_seed(queries + 10 * batch + variant.head)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    levels, cells = len(variant.shapes), sum(h * w for h, w in variant.shapes)
    reference = torch.rand(batch, queries, levels, 4 if boxes else 2, generator=generator)
    offsets = normal(batch, queries, HEADS, levels, variant.points, 2) * 2
    return Case(
        variant.shapes,
        normal(batch, cells, HEADS, variant.head).to(variant.value),
        reference,
        offsets.to(variant.offset),
        normal(batch, queries, HEADS, levels, variant.points).to(variant.offset),
        normal(batch, queries, HEADS * variant.head).to(variant.value),
    )


def exact(case: Case, in_cells: bool) -> list[Tensor]:
    """Output and the gradients of value, offsets, logits in float64."""
    leaves = [t.double().requires_grad_() for t in (case.value, case.offsets, case.logits)]
    output = ms_deform_attn_torch(leaves[0], case.shapes, case.reference.double(), leaves[1], leaves[2])
    grads = list(torch.autograd.grad(output, leaves, case.grad.double()))
    if in_cells and case.reference.shape[-1] == 4:
        sizes = torch.tensor([(w, h) for h, w in case.shapes], dtype=torch.float64)[:, None, :]  # [L, 1, 2]
        per_offset = case.reference.double()[:, :, None, :, None, 2:] * 0.5 / case.offsets.shape[4] * sizes
        grads[1] = grads[1] / per_offset
    return [output.detach(), *grads]


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def problem(case: Case) -> list[object]:
    batch, queries, _, four = case.reference.shape
    flat = [side for shape in case.shapes for side in shape]
    shapes = (ctypes.c_int * len(flat))(*flat)
    tensors = [pointer(t) for t in (case.value, case.reference, case.offsets, case.logits)]
    return [batch, queries, int(four == 4), shapes, *tensors]


def run_forward(library: ctypes.CDLL, case: Case) -> Tensor:
    output = torch.full_like(case.grad, float("nan"))
    assert library.smope_msda_forward(*problem(case), pointer(output), None) == 0
    return output


def run_backward(
    library: ctypes.CDLL, case: Case, in_cells: bool = False, fixed: bool = False
) -> list[Tensor]:
    grad_value = torch.full_like(case.value, float("nan"))
    kind = torch.float32 if in_cells else case.offsets.dtype
    grad_offsets = torch.full_like(case.offsets, float("nan"), dtype=kind)
    grad_logits = torch.full_like(case.logits, float("nan"))
    largest = case.grad.abs().max().float().reshape(1) if fixed else None
    flat = [side for shape in case.shapes for side in shape]
    library.smope_msda_scratch.restype = ctypes.c_longlong
    size = library.smope_msda_scratch(*case.logits.shape[:2], (ctypes.c_int * len(flat))(*flat), int(fixed))
    sums = torch.full((size,), -7, dtype=torch.int8) if size else None
    outputs = [pointer(t) for t in (case.grad, grad_value, grad_offsets, grad_logits)]
    images = 1 if sums is not None else case.value.shape[0]
    rest = [int(in_cells), pointer(largest), pointer(sums), images, None]
    assert library.smope_msda_backward(*problem(case), *outputs, *rest) == 0
    return [grad_value, grad_offsets, grad_logits]


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))


@pytest.mark.parametrize("queries", [3, 21], ids=["few queries", "more queries"])  # gathered, added up
@pytest.mark.parametrize("boxes", [False, True], ids=["points", "boxes"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_kernels_agree_with_the_definition(
    compiled: dict[Variant, ctypes.CDLL], variant: Variant, boxes: bool, queries: int
) -> None:
    case = make_case(variant, queries, boxes=boxes)
    tolerance = OUTPUT_ERROR[variant.value]
    grad_tolerance = max(OUTPUT_ERROR[variant.offset], 3e-5)
    want = exact(case, in_cells=boxes)
    assert relative(run_forward(compiled[variant], case), want[0]) < tolerance
    for fixed in (False, True):
        got = run_backward(compiled[variant], case, in_cells=boxes, fixed=fixed)
        assert relative(got[0], want[1]) < tolerance, f"gradient of value, fixed={fixed}"
        assert relative(got[1], want[2]) < grad_tolerance, f"gradient of offsets, fixed={fixed}"
        if variant.points * len(variant.shapes) > 1:
            assert relative(got[2], want[3]) < grad_tolerance, f"gradient of logits, fixed={fixed}"
        else:
            assert got[2].abs().max() == 0  # one point: its weight is 1 whatever its logit


ENCODER = ((26, 33), (13, 17), (7, 9), (1, 1))  # 1143 cells, so many queries: the tiled way of encoders


def encoder_case(variant: Variant, spread: float) -> Case:
    encoder = dataclasses.replace(variant, shapes=ENCODER)
    case = make_case(encoder, queries=sum(h * w for h, w in ENCODER), batch=1)
    centres = [
        torch.stack(
            torch.meshgrid((torch.arange(w) + 0.5) / w, (torch.arange(h) + 0.5) / h, indexing="xy"), -1
        )
        for h, w in ENCODER
    ]
    flat = torch.cat([c.reshape(-1, 2) for c in centres])
    case.reference = flat[None, :, None].expand(1, -1, len(ENCODER), -1).contiguous()
    case.offsets = (case.offsets.float() * spread).to(case.offsets.dtype)
    return case


@pytest.mark.parametrize(("number", "spread"), [(0, 1.0), (0, 10.0), (1, 1.0)], ids=str)
def test_tiles_of_an_encoder_sum_to_the_same(
    compiled: dict[Variant, ctypes.CDLL], number: int, spread: float
) -> None:
    variant = VARIANTS[number]
    case = encoder_case(variant, spread)
    want = exact(case, in_cells=False)
    library = compiled[variant]
    adds = ctypes.c_long.in_dll(library, "cuda_on_host_atomics")
    adds.value = 0
    got = run_backward(library, case)
    corners = case.logits.numel() * 4 * variant.head  # additions if every corner were added by itself
    assert adds.value < corners * (0.3 if spread == 1 else 1.0)
    tolerance = OUTPUT_ERROR[variant.value]
    assert relative(got[0], want[1]) < tolerance
    sizes = torch.tensor([(w, h) for h, w in ENCODER], dtype=torch.float64)[:, None, :]
    cells = sampling_locations(ENCODER, case.reference.double(), case.offsets.double()) * sizes - 0.5
    clear = ((cells - cells.round()).abs() > 1e-3).all(-1)  # on a cell's border the gradient has two values
    assert clear.double().mean() > 0.9
    assert relative(got[1][clear], want[2][clear]) < max(OUTPUT_ERROR[variant.offset], 3e-5)
    assert relative(got[2], want[3]) < max(OUTPUT_ERROR[variant.offset], 3e-5)
