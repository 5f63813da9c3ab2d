"""Multi-scale deformable attention (Zhu et al., Deformable DETR, ICLR 2021, eq. 3).

`ms_deform_attn_torch` is the definition, in plain PyTorch, on any device and in any floating type; it is what
torch.export and ONNX see. `ms_deform_attn` is the same function by the fastest path at hand.

Names: B batch, S cells of all levels together, H heads, D channels a head, Q queries, L levels, P points of
each level.
"""

from __future__ import annotations

import os
import sys
from operator import index

import torch
import torch.nn.functional as F
from torch import Tensor

from smope.ops import bags, build
from smope.ops.cpu_forms import takes_cpu_form

Shapes = tuple[tuple[int, int], ...]


def ms_deform_attn(
    value: Tensor, spatial_shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """Attend, for every query and head, to L*P bilinear samples. Returns [B, Q, H*D] in value's type.

    value           [B, S, H, D]; the levels' cells one after another, row by row
    spatial_shapes  ((h, w), ...) of the L levels, Python integers
    reference       [B, Q, L, 2] point (x, y), or [B, Q, L, 4] box (cx, cy, w, h); 0..1 of the level's extent
    offsets         [B, Q, H, L, P, 2]; cells of the level for points, P-ths of half a box side for boxes
    logits          [B, Q, H, L, P]; softmaxed over L*P here

    SMOPE_MSDA=auto takes a kernel where one can be had: CUDA's on a GPU, compiled at its first use, and on
    the CPU the C++ one if `smope build` has compiled it. =cuda and =cpu insist on theirs for the tensors of
    that device, =torch never takes one. `predict` on a CPU without one sums bags of samples
    (`smope/ops/bags.py`). Exported graphs (torch.export, ONNX) hold the plain definition.
    """
    check_arguments(value, spatial_shapes, reference, offsets, logits)
    if not _exporting():
        # Here, because that module needs this one.
        from smope.ops.library import ms_deform_attn_operator, offset_dtype

        kind = offset_dtype(value.dtype, offsets.dtype, logits.dtype)
        # A kernel is for these sizes alone; `index` fixes them where torch.compile takes shapes as symbols.
        sizes = (index(value.shape[2]), index(value.shape[3]), index(logits.shape[3]), index(logits.shape[4]))
        if _takes_kernel(value.device.type, *sizes, value.dtype, kind):
            return ms_deform_attn_operator(value, spatial_shapes, reference, offsets, logits)
        if all(takes_cpu_form(t) and t.numel() for t in (value, reference, offsets, logits)):
            return bags.forward(value, spatial_shapes, reference, offsets, logits)
    return ms_deform_attn_torch(value, spatial_shapes, reference, offsets, logits)


def _takes_kernel(
    device: str, heads: int, head: int, levels: int, points: int, value: torch.dtype, offset: torch.dtype
) -> bool:
    mode = os.environ.get("SMOPE_MSDA", "auto")
    if mode not in ("auto", "cuda", "cpu", "torch"):
        raise ValueError(f"SMOPE_MSDA={mode!r}: expected auto, cuda, cpu or torch")
    if mode == "torch" or device not in ("cuda", "cpu"):
        return False
    if device == "cpu":
        return value == torch.float32 and build.cpu_kernel_ready(insist=mode == "cpu")
    kernel = build.kernel_for(heads, head, levels, points, value, offset)
    if kernel is not None:
        return build.kernel_ready(kernel, insist=mode == "cuda")
    if mode == "cuda":
        raise build.KernelUnavailable(
            f"SMOPE_MSDA=cuda, but no kernel exists for {heads} heads of {head} channels, {levels} levels, "
            f"{value} values and {offset} offsets: expected a head size that is a multiple of "
            "8 up to 128, at most 32 levels and float32, float16 or bfloat16; use SMOPE_MSDA=auto"
        )
    return False


def _exporting() -> bool:
    if torch.jit.is_tracing():  # as ONNX's older exporter does; its newer one exports
        return True
    if hasattr(torch.compiler, "is_exporting"):
        return torch.compiler.is_exporting()
    # Torch before 2.7 has no such word. Read as plain Python (see below), this one is true in
    # torch.export alone, and there only where it does not go by way of Dynamo, which then knows.
    if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export():
        return True
    dynamo = sys.modules.get("torch._dynamo.symbolic_convert")
    tracer = getattr(dynamo.tls, "current_tx", None) if dynamo else None
    return bool(getattr(tracer, "export", False))


# torch.compile asks both once, while it traces, and runs them instead of reading them: Dynamo of torch 2.11
# reads `torch.compiler.is_exporting()` as True whether it exports or not, so every compiled graph would hold
# the definition. (As torch.compiler.assume_constant_result does; but calling that here would import
# torch._dynamo, two seconds for those who never compile.)
_takes_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]  # functions take any
_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]  # functions take any


def ms_deform_attn_torch(
    value: Tensor, spatial_shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """The definition; arguments and result as in `ms_deform_attn`."""
    exact = compute_dtype(value)
    locations = sampling_locations(
        spatial_shapes, reference.to(exact), offsets.to(exact)
    )  # [B, Q, H, L, P, 2]
    return ms_deform_attn_core(value, spatial_shapes, locations, softmaxed(logits.to(exact)))


def softmaxed(logits: Tensor) -> Tensor:
    """Attention weights [B, Q, H, L, P], which sum to 1 over L*P."""
    return logits.flatten(3).softmax(-1).view(logits.shape)


def sampling_locations(spatial_shapes: Shapes, reference: Tensor, offsets: Tensor) -> Tensor:
    """Where to sample, 0..1 of each level's extent: [B, Q, H, L, P, 2]."""
    reference = reference[:, :, None, :, None, :]  # [B, Q, 1, L, 1, 2 | 4]
    if reference.shape[-1] == 4:
        points = offsets.shape[4]
        return reference[..., :2] + offsets / points * reference[..., 2:] * 0.5
    # Not copied from the host, which would have to wait, and could not while a CUDA graph is captured.
    sizes = torch.cat([offsets.new_full((1,), float(size)) for h, w in spatial_shapes for size in (w, h)])
    return reference + offsets / sizes.view(-1, 1, 2)


def ms_deform_attn_core(value: Tensor, spatial_shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of bilinear samples at ready locations. Returns [B, Q, H*D] in value's type.

    value [B, S, H, D], locations [B, Q, H, L, P, 2] in 0..1 (a cell's centre lies half a cell inside its
    border; zero outside the level), weights [B, Q, H, L, P].
    """
    batch, _, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    exact = compute_dtype(value)
    if (
        batch * queries * heads * channels == 0
    ):  # grid_sample refuses some empty tensors; keep the graph connected
        return (value.sum() + locations.sum() + weights.sum()).to(value.dtype) + value.new_zeros(
            batch, queries, heads * channels
        )
    grid = locations.to(exact) * 2 - 1  # grid_sample counts from -1 to 1
    result = torch.zeros((), dtype=exact, device=value.device)
    levels = value.split([h * w for h, w in spatial_shapes], dim=1)
    for level, (cells, (h, w)) in enumerate(zip(levels, spatial_shapes, strict=True)):
        image = cells.to(exact).permute(0, 2, 3, 1).reshape(batch * heads, channels, h, w)
        where = grid[:, :, :, level].transpose(1, 2).reshape(batch * heads, queries, points, 2)
        samples = F.grid_sample(image, where, mode="bilinear", padding_mode="zeros", align_corners=False)
        weight = weights[:, :, :, level].to(exact).transpose(1, 2).reshape(batch * heads, 1, queries, points)
        result = result + (samples * weight).sum(-1)  # [B*H, D, Q]
    result = result.view(batch, heads, channels, queries).permute(0, 3, 1, 2)
    return result.reshape(batch, queries, heads * channels).to(value.dtype)


def compute_dtype(value: Tensor) -> torch.dtype:
    """Locations and sums are in fp32 whatever the value's type: 16-bit locations cost 2 to 33 %."""
    return torch.promote_types(value.dtype, torch.float32)


def check_arguments(
    value: Tensor, spatial_shapes: Shapes, reference: Tensor, offsets: Tensor, logits: Tensor
) -> None:
    """Refuse shapes that do not belong together, saying which and what was expected."""
    if len(value.shape) != 4 or len(logits.shape) != 5:
        raise ValueError(
            f"ms_deform_attn: value has shape {tuple(value.shape)} and logits {tuple(logits.shape)}; "
            "expected [B, S, H, D] and [B, Q, H, L, P]"
        )
    batch, cells, heads, _ = value.shape
    attended = logits.shape
    _, queries, _, levels, points = attended
    if attended != (batch, queries, heads, len(spatial_shapes), points):
        raise ValueError(
            f"ms_deform_attn: logits have shape {tuple(logits.shape)}; with value {tuple(value.shape)} and "
            f"{len(spatial_shapes)} levels expected [{batch}, Q, {heads}, {len(spatial_shapes)}, P]"
        )
    if sum(h * w for h, w in spatial_shapes) != cells:
        raise ValueError(
            f"ms_deform_attn: value holds {cells} cells, but the levels {spatial_shapes} have "
            f"{sum(h * w for h, w in spatial_shapes)}; pass the levels' sizes as (height, width)"
        )
    if offsets.shape != (*attended, 2):
        raise ValueError(
            f"ms_deform_attn: offsets have shape {tuple(offsets.shape)}, expected {(*logits.shape, 2)}, "
            "that is logits' shape and (x, y)"
        )
    if reference.shape not in ((batch, queries, levels, 2), (batch, queries, levels, 4)):
        raise ValueError(
            f"ms_deform_attn: reference has shape {tuple(reference.shape)}, expected "
            f"[{batch}, {queries}, {levels}, 2] (points) or [{batch}, {queries}, {levels}, 4] (boxes)"
        )
