"""`smope evaluate`: scores on a data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from smope.cli import common


@dataclass(frozen=True)
class Evaluate:
    """Score a model, or a CSV of results, on a data set."""

    dataset_dir: Positional[Path]
    """Folder of the data set."""
    format: str = "bop"
    """Form of the data set: bop, linemod (a data folder such as data/02), labelimg3d or kitti."""
    split: str | None = None
    """Part of the data set in its format's own words; the test part, or all, by default."""
    model: str | None = None
    """A bundled name, a folder, or a Hugging Face id."""
    csv: Path | None = None
    """Results in place of a model: a file in BOP's form; of kitti a folder of result files; of labelimg3d
    also a folder of annotations."""
    out: Path | None = None
    """Folder for the CSV of predictions and scores.json."""
    limit: int | None = None
    """The first so many images only."""
    batch: int = 1
    """Images predicted at a time."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; a GPU where there is one."""

    def run(self) -> None:
        from smope.evaluate.run import evaluate_dataset

        if self.out is not None:
            common.check_folder(self.out)

        scores = evaluate_dataset(
            self.dataset_dir,
            format=self.format,
            split=self.split,
            model=self.model,
            csv=self.csv,
            out=self.out,
            limit=self.limit,
            device=self.device,
            batch=self.batch,
        )
        print(scores["table"])
