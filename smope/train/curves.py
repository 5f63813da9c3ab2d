"""Losses and scores of a run: a CSV, a picture of it, TensorBoard, and a record of the run in JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smope.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch.utils.tensorboard import SummaryWriter

Row = dict[str, float]

_AXES = ("minutes", "step")


class Curves:
    """Rows of numbers over the run's minutes and steps; not all rows have all columns.

    Columns that begin with `score/` are evaluations, all others come from training.
    """

    def __init__(self, folder: Path, resume_at: int | None = None, tensorboard: bool = False) -> None:
        """Start anew, or with `resume_at` keep what an earlier piece wrote up to that step."""
        self.folder = folder
        self.csv, self.png = folder / "curves.csv", folder / "curves.png"
        self.rows: list[Row] = []
        if resume_at is not None and self.csv.exists():
            self.rows = [row for row in read_rows(self.csv) if row["step"] <= resume_at]
        self._board: SummaryWriter | None = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_at)

    def add(self, minutes: float, step: int, values: Mapping[str, float]) -> None:
        self.rows.append({"minutes": round(minutes, 4), "step": step, **values})
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name if "/" in name else f"train/{name}", value, step)

    def write(self) -> None:
        """Put all rows into curves.csv."""
        columns = list(_AXES)
        for row in self.rows:
            columns += [name for name in row if name not in columns]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            writer.writerow({name: _short(value) for name, value in row.items()})
        write_atomically(self.csv, text.getvalue().encode())
        if self._board is not None:
            self._board.flush()

    def draw(self, title: str = "") -> None:
        """Put the curves into curves.png: losses, then the scores, over minutes."""
        from matplotlib import colormaps
        from matplotlib.figure import Figure

        names = sorted({name for row in self.rows for name in row} - set(_AXES))
        scores = [name for name in names if name.startswith("score/")]
        losses = [name for name in names if name.startswith("loss")]
        if not losses and not scores:
            return
        panels = [group for group in (losses, scores) if group]
        figure = Figure(figsize=(8 * len(panels), 5), layout="constrained")
        for index, group in enumerate(panels):
            axes: Axes = figure.add_subplot(1, len(panels), index + 1)
            for place, name in enumerate(group):
                points = [(r["minutes"], r[name]) for r in self.rows if name in r and math.isfinite(r[name])]
                if points:
                    axes.plot(
                        *zip(*points, strict=True),
                        label=name.removeprefix("score/"),
                        color=colormaps["tab20"](place % 20),
                        linestyle="-" if place < 20 else "--",
                        marker="." if group is scores else None,
                        linewidth=1.2,
                    )
            axes.set_xlabel("minutes")
            if group is losses and any(r.get(n, 0.0) > 0 for r in self.rows for n in group):
                axes.set_yscale("symlog", linthresh=0.1)  # likelihood terms go below 0
            axes.grid(alpha=0.3)
            if axes.lines:  # none where no value of the group was finite
                axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.suptitle(title)
        write_atomically(self.png, lambda path: figure.savefig(path, format="png", dpi=110))

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def read_rows(path: Path) -> list[Row]:
    """The rows of a curves.csv, without their empty cells."""
    with path.open(newline="", encoding="utf-8") as stream:
        return [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(stream)]


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write run.json; JSON has no NaN, so what is not finite becomes null."""

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: clean(entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(entry) for entry in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    write_atomically(path, (json.dumps(clean(record), indent=2, allow_nan=False) + "\n").encode())
