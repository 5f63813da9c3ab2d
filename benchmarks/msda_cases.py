"""Inputs as in a trained network, and errors against float64, for msda.py and msda_check.py.

Locations are pixel centres (encoder) or random points (decoder) and N(0, 2 cells).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from smope.ops.ms_deform_attn import Shapes, ms_deform_attn_torch, sampling_locations

LARGE: Shapes = ((100, 167), (50, 84), (25, 42), (13, 21))  # 800x1333
SMALL: Shapes = ((60, 80), (30, 40), (15, 20), (8, 10))  # 480x640
NETWORK: Shapes = SMALL[:3]  # of the default network
Operator = Callable[[Tensor, Shapes, Tensor, Tensor, Tensor], Tensor]
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    shapes: Shapes
    batch: int
    queries: int | None  # None: one a cell (encoder)
    targets: dict[torch.dtype, tuple[float, float]]  # ms at most, forward and forward + backward
    eager: tuple[float, float] | None = None  # the same of single calls in fp32


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
    Case("decoder 300 at 800x1333, batch 1", LARGE, 1, 300, {torch.float32: (0.007, 0.030)}, (0.030, 0.17)),
    Case("training encoder 480x640, 3 levels", NETWORK, 64, None, {}),
    Case("training decoder 130 at 480x640, 3 levels", NETWORK, 64, 130, {}),
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


def gradients(operator: Operator, x: Inputs) -> list[Tensor]:
    output = operator(x.value, x.shapes, x.reference, x.offsets, x.logits)
    return [output.detach(), *torch.autograd.grad(output, x.leaves, x.grad)]


Exact = tuple[list[Tensor], Tensor]


def exact(x: Inputs) -> Exact:
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


def errors(
    operator: Operator, x: Inputs, deterministic: bool = False, known: dict[int, Exact] | None = None
) -> dict[str, float]:
    """Relative L2 errors over the first and last image, whose float64 results are kept in `known`."""
    result: dict[str, float] = {}
    known = {} if known is None else known
    torch.use_deterministic_algorithms(deterministic)
    whole = gradients(operator, x)
    torch.use_deterministic_algorithms(False)  # grid_sample has no deterministic backward
    for index in sorted({0, x.value.shape[0] - 1}):
        if index not in known:
            known[index] = exact(x.image(index))
        want, clear = known[index]
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
