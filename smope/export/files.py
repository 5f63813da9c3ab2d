"""Writing the exported network, and beside it the meshes that it looks for."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from smope.atomic import atomic_path
from smope.export.network import OUTPUTS, ExportError, PlainNetwork, mesh_tensors
from smope.files import write_atomically
from smope.model import SMOPE
from smope.networks.smope_s import SmopeS

Format = Literal["onnx", "pt2"]
OPSET = 20  # GridSample came with 16, its names of modes as now with 20


def export_model(
    model: SMOPE, out: str | Path, format: Format, size: tuple[int, int] | None = None, top_k: int = 32
) -> Path:
    """Write the network to `out` and the registered meshes to NAME.meshes.npz, whose path it gives.

    `size` (width, height) of the photos is by default that of the weights. Inputs are `images` uint8
    [B, H, W, 3] RGB, `K` [B, 3, 3] in their pixels, and the arrays of the file of meshes, for which others of
    the same number may stand in; outputs are those of `PlainNetwork`. B is free.
    """
    if TorchVersion(torch.__version__) < "2.6":
        raise ExportError(
            f"torch {torch.__version__} given, whose exporter cannot slice lists of modules; one later than "
            "2.5 expected (smope's tests run with 2.13)"
        )
    out = Path(out)
    width, height = size or model.config.image_size
    if not (32 <= width <= 8192 and 32 <= height <= 8192):
        raise ExportError(f"size {width}x{height} given, 32x32 to 8192x8192 expected")
    if top_k < 1:
        raise ExportError(f"top_k {top_k} given, at least 1 expected")
    if model.device.type != "cpu" or not isinstance(model.network, SmopeS):
        raise ExportError(
            'the default network (smope-s) on the CPU can be exported: load it with device="cpu"'
        )
    meshes = mesh_tensors(model)
    network = PlainNetwork(model.network, top_k).eval()
    # Two images: torch.export takes a 1 for a constant.
    given = (
        torch.zeros(2, height, width, 3, dtype=torch.uint8),
        torch.tensor(model.config.K).expand(2, 3, 3).clone(),
        *meshes.values(),
    )
    batch = {0: torch.export.Dim("batch", min=1, max=1024)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporters, about torch
        program = torch.export.export(
            network, given, dynamic_shapes=(batch, batch, tuple({} for _ in meshes)), strict=False
        )
        if format == "pt2":
            with atomic_path(out) as temporary:
                torch.export.save(program, temporary)
        else:
            _write_onnx(program, given, list(meshes), out)
    beside = out.with_suffix(".meshes.npz")
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in meshes.items()}
    arrays |= {"names": np.array(list(model.objects)), "size": np.array([width, height])}
    with atomic_path(beside) as temporary:
        np.savez(temporary, **arrays)
    return beside


def _write_onnx(
    program: torch.export.ExportedProgram, given: tuple[Tensor, ...], meshes: list[str], out: Path
) -> None:
    from onnx_ir.passes import common
    from onnxscript import optimizer

    written = torch.onnx.export(
        program,
        given,
        input_names=["images", "K", *meshes],
        output_names=list(OUTPUTS),
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
        optimize=False,
    )
    assert written is not None
    # What pays of that optimisation, in a second or two; its search for patterns takes minutes and leaves a
    # file that runs about as fast.
    optimizer.fold_constants(written.model)
    common.RemoveUnusedNodesPass()(written.model)
    common.CommonSubexpressionEliminationPass()(written.model)
    write_atomically(out, lambda temporary: written.save(temporary, external_data=False))
