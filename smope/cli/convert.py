"""`smope convert`: models of the authors' trainer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from smope.cli import common
from smope.cli.common import Units, UsageError


@dataclass(frozen=True)
class Convert:
    """Turn a checkpoint of the authors' trainer into a model folder; nothing in the file is run."""

    checkpoint: Positional[Path]
    """A file such as checkpoint0123.pth."""
    out: Positional[Path]
    """Folder of the model."""
    meshes: tuple[Path, ...] | None = None
    """The meshes it was trained on: files, or folders of them, named as the checkpoint names them."""
    units: Units | None = None
    """Of the meshes; required with them."""
    device: str | None = "cpu"
    """cpu, cuda, cuda:1, ..."""

    def run(self) -> None:
        from smope.model import SMOPE

        if self.checkpoint.suffix != ".pth":
            raise UsageError(f"{self.checkpoint}: a .pth file of the authors' trainer expected")
        meshes = None if self.meshes is None else common.mesh_files(self.meshes)
        model = SMOPE.from_pretrained(self.checkpoint, device=self.device, meshes=meshes, units=self.units)
        model.save_pretrained(self.out)
        print(f"{', '.join(model.objects)}: the model is in {self.out}")
