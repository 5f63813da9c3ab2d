"""`smope export`: the network as one file for other runtimes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from smope.cli import common
from smope.cli.common import UsageError


@dataclass(frozen=True)
class Export:
    """Write the network as ONNX or by torch.export, and its meshes beside it (see docs/deploy.md)."""

    model: Positional[str]
    """A bundled name, a folder, or a Hugging Face id."""
    format: Literal["onnx", "pt2"] = "onnx"
    """onnx, or pt2 for torch.export.load."""
    size: str | None = None
    """WIDTHxHEIGHT of the photos it will be given, by default that of the weights."""
    top_k: int = 32
    """Objects it gives for a photo."""
    out: Path | None = None
    """Where it goes; by default NAME_WIDTHxHEIGHT.onnx or .pt2."""

    def run(self) -> None:
        size = None
        if self.size is not None:
            width, _, height = self.size.partition("x")
            if not (width.isdecimal() and height.isdecimal()):
                raise UsageError(f"--size {self.size} given, WIDTHxHEIGHT expected, such as 640x480")
            size = (int(width), int(height))
        from smope.export import export_model

        start = time.perf_counter()
        model = common.load_model(self.model, "cpu")
        width_px, height_px = size or model.config.image_size
        out = self.out or Path(f"{Path(self.model).name}_{width_px}x{height_px}.{self.format}")
        meshes = export_model(model, out, self.format, size, self.top_k)
        seconds = time.perf_counter() - start
        print(f"the network is in {out}, the meshes it looks for are in {meshes} ({seconds:.0f} s)")
