"""`smope fit`: training."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from tyro.conf import Positional


@dataclass(frozen=True)
class Fit:
    """Train from a recipe. Ctrl-C saves, and --resume goes on; under torchrun: torchrun -m smope fit ..."""

    recipe: Positional[Path]
    """A TOML file, such as recipes/lmo.toml."""
    out: Path = Path("runs/fit")
    """Folder of the run: checkpoints, curves, the model."""
    resume: bool = False
    """Go on from the newest checkpoint in the folder of the run."""
    init: str | None = None
    """Start from these weights: a bundled name, a folder, or a checkpoint."""
    continue_schedule: bool = False
    """With --init of a small checkpoint: the run stands where that one stood."""
    assets: Path | None = None
    """What `smope scenes prepare` wrote, in place of the recipe's."""
    backbone: Path | None = None
    """ImageNet weights of the backbone, in place of the recipe's."""
    max_minutes: float | None = None
    """Length of the whole run, over all its pieces, in place of the recipe's."""
    piece_minutes: float | None = None
    """Stop after so long, for a later --resume."""
    batch_size: int | None = None
    """Images a step and process, in place of the recipe's."""
    workers: int | None = None
    """Rendering processes, in place of the recipe's."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; a GPU where there is one."""

    def run(self) -> None:
        from smope.train.fit import fit

        options = {field.name: getattr(self, field.name) for field in fields(self)}
        print(f"the model is in {fit(**options)}")
