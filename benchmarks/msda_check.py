"""Correctness of the CUDA kernels: every type and awkward shape against float64 (msda.py --check)."""

from __future__ import annotations

import torch
from msda_cases import NAMES, SMALL, Inputs, errors, gradients, make_inputs, relative

from smope.ops import ms_deform_attn
from smope.ops.ms_deform_attn import Shapes, ms_deform_attn_torch


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

    flat = [side for shape in SMALL for side in shape]
    rules = ("test_schema", "test_autograd_registration", "test_faketensor")
    operator = torch.ops.smope.ms_deform_attn.default
    found_rules = torch.library.opcheck(operator, (args[0], flat, *args[2:]), test_utils=rules)
    judge("torch.library's rules", set(found_rules.values()) == {"SUCCESS"}, str(found_rules))
    node = ms_deform_attn(*args).grad_fn
    name = node.name() if node is not None else "none"
    del node  # it holds the leaves to this stream, which the graph below may not touch
    judge("autograd in C++", "smope::Attention" in name, name)

    compiled = torch.compile(lambda *t: ms_deform_attn(t[0], SMALL, *t[1:]), fullgraph=True)
    got = gradients(lambda v, s, *t: compiled(v, *t), x)
    judge("torch.compile", all(relative(a, b.double()) < 1e-4 for a, b in zip(got, wanted, strict=True)))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradients(ms_deform_attn, x)
    graph.replay()
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
