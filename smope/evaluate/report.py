"""From scores to what people read and machines compare: rank correlation, the table, scores.json."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

import smope
from smope.atomic import atomic_path

POSE_COLUMNS = {  # key in the scores -> (heading, format)
    "targets": ("targets", "{:d}"),
    "found": ("found", "{:.1%}"),
    "AR_VSD": ("AR_VSD", "{:.4f}"),
    "AR_MSSD": ("AR_MSSD", "{:.4f}"),
    "AR_MSPD": ("AR_MSPD", "{:.4f}"),
    "AR": ("AR", "{:.4f}"),
    "ADD(-S)": ("ADD(-S)", "{:.2%}"),
    "projection_5px": ("proj 5px", "{:.2%}"),
    "5cm5deg": ("5cm5deg", "{:.2%}"),
    "box_AP": ("box AP", "{:.4f}"),
    "visibility_mae": ("vis. err", "{:.3f}"),
}


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Rank correlation, ties at their mean rank; NaN for fewer than two values or a constant."""
    ranks = [_ranks(np.asarray(x, np.float64)) for x in (a, b)]
    if len(ranks[0]) < 2 or any(np.ptp(r) == 0 for r in ranks):
        return float("nan")
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def format_table(
    rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, tuple[str, str]] = POSE_COLUMNS
) -> str:
    """A text table of those columns of which any row has a value; a missing value is a dash."""
    shown = [key for key in columns if any(row.get(key) is not None for row in rows.values())]
    lines = [["", *(columns[key][0] for key in shown)]]
    for name, row in rows.items():
        cells = (row.get(key) for key in shown)
        lines.append([name, *(_cell(columns[key][1], c) for key, c in zip(shown, cells, strict=True))])
    return align(lines)


def align(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns: the first to the left, the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = (
        [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    )
    return "\n".join("  ".join(cells) for cells in padded)


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lines without a last newline"""
    return "\n".join("| " + " | ".join(line) + " |" for line in (heads, ["---"] * len(heads), *rows))


def circumstances(device: torch.device | str) -> dict[str, Any]:
    """What a reader needs to know to repeat a run: device, date, versions."""
    return {
        "device": device_name(device),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "smope": smope.__version__,
    }


def device_name(device: torch.device | str) -> str:
    kind = torch.device(device)
    if kind.type == "cuda":
        return torch.cuda.get_device_name(kind)
    return f"{kind.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_scores(path: Path, scores: Mapping[str, Any]) -> None:
    """scores.json; a value that is not a number (nothing to average) becomes null."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(plain(scores), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def plain(value: Any) -> Any:
    """`value` with NaN as None, floats at eight significant digits, and JSON's types only."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.8g}") if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _cell(form: str, value: Any) -> str:
    return "-" if value is None or (isinstance(value, float) and math.isnan(value)) else form.format(value)
