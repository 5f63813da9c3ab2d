"""Rebuild the tables of scores in README.md, the model cards, docs/ and benchmarks/ from committed records.

    python tools/update_tables.py           # rewrites them
    python tools/update_tables.py --check   # changes nothing; fails if one is stale

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`. Its figures come from
`benchmarks/peers.json`, from `benchmarks/predict.json`, which `benchmarks/predict.py` wrote, and from the
`scores.json` of the bundled weights, which must be of the very file of weights that lies beside it: `smope
evaluate` wrote it or, for streets, `benchmarks/kitti.py`. Those of a training run come from the `run.json`
and `curves.csv` that `smope fit` wrote.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import hashlib
import json
import re
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_HELD_OUT = {  # column of curves.csv -> heading
    "AR_MSSD": "AR_MSSD",
    "AR_MSPD": "AR_MSPD",
    "box_IoU": "box IoU",
    "found": "found",
    "visibility_error": "visibility error",
    "depth_error": "depth error",
}
_STREET = {  # key of a class's scores in a record of benchmarks/kitti.py -> heading
    "AP_2d_50_moderate": "2D AP@0.5",
    "AOS_50_moderate": "AOS",
    "AP_3d_50_moderate": "3D AP@0.5",
    "recall": "recall",
    "depth_error": "depth error",
    "yaw_error_deg": "yaw error",
}
_STREET_SETS = {"measure": "KITTI, frames not trained on", "renders": "renders"}
_BLOCK = re.compile(r"(<!-- table: (?P<name>[\w -]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


class StaleError(Exception):
    """The committed files contradict each other; the message says which and what to run."""


@dataclass(frozen=True)
class BundledModel:
    """What one folder of `smope/weights` says of itself."""

    folder: Path
    config: dict[str, Any]
    scores: dict[str, Any]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def weights(self) -> Path:
        return self.folder / "model.safetensors"

    @property
    def card(self) -> Path:
        return self.folder / "MODEL_CARD.md"

    @property
    def licence(self) -> str:
        """As the card's front matter has it."""
        found = re.search(r"^license: *(\S+)", self.card.read_text(encoding="utf-8"), re.MULTILINE)
        if not found:
            raise StaleError(f"{self.card}: no line `license: ...` in its front matter")
        return found[1]

    @property
    def is_street(self) -> bool:
        return "sets" in self.scores

    @property
    def parameters(self) -> int:
        """Learned numbers of the network; what is stored of its meshes and running statistics are none."""
        with self.weights.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        return sum(
            prod(entry["shape"])
            for key, entry in header.items()
            if not key.startswith(("objects.", "__metadata__"))
            and not key.endswith((".running_mean", ".running_var", ".num_batches_tracked"))
        )


def bundled_models(root: Path) -> list[BundledModel]:
    """Every model under smope/weights, its scores checked to be those of its file of weights."""
    models = []
    for config in sorted((root / "smope" / "weights").glob("*/config.json")):
        scores_file = config.parent / "scores.json"
        if not scores_file.is_file():
            raise StaleError(f"{scores_file}: missing; `smope evaluate` or benchmarks/kitti.py writes it")
        model = BundledModel(config.parent, _read(config), _read(scores_file))
        digest = hashlib.sha256(model.weights.read_bytes()).hexdigest()
        if model.scores.get("weights_sha256") != digest:
            raise StaleError(
                f"{scores_file}: not of the weights beside it; score them anew and put the record there"
            )
        models.append(model)
    return models


def models_table(root: Path) -> list[str]:
    """The bundled models: what they find, how large they are, under which licence."""
    rows = []
    for model in bundled_models(root):
        size = model.weights.stat().st_size / 2**20
        objects = ", ".join(model.config["objects"])
        rows.append(
            [f"`{model.name}`", objects, f"{model.parameters / 1e6:.1f} M", f"{size:.1f} MiB", model.licence]
        )
    return _table(["model", "finds", "parameters", "file", "licence"], rows)


def lmo_table(root: Path) -> list[str]:
    """Our scores on LM-O and those of others."""
    rows = []
    for model in bundled_models(root):
        if model.scores.get("dataset") == "lmo":
            scores = {**model.scores["all"], "seconds": model.scores.get("seconds_an_image_median")}
            where = f"`scores.json`; {model.scores['device']}"
            rows.append(
                [
                    f"**smope `{model.name}`**",
                    "one pass, renders only",
                    *_figures(scores, model.scores["images"], where),
                ]
            )
    rows += [
        [row["method"], row["kind"], *_figures(row, row["photos"], row["source"])]
        for row in _read(root / "benchmarks" / "peers.json")["rows"]
    ]
    return _table(
        ["method", "kind", "photos", "AR_MSSD", "AR_MSPD", "ADD(-S) 0.1d", "found", "s an image", "from"],
        rows,
    )


def streets_table(root: Path) -> list[str]:
    """How well streets are read, class by class."""
    return [line for model in bundled_models(root) if model.is_street for line in _street_lines(model)]


def card_table(model: BundledModel) -> list[str]:
    """A model's scores, object by object."""
    if model.is_street:
        return _street_lines(model)
    rows = [
        [
            name,
            str(row["targets"]),
            *_shown(row),
            _number(row.get("box_AP"), "{:.3f}"),
            _number(row.get("visibility_mae"), "{:.3f}"),
        ]
        for name, row in {**model.scores["objects"], "all": model.scores["all"]}.items()
    ]
    heading = [
        "object",
        "targets",
        "AR_MSSD",
        "AR_MSPD",
        "ADD(-S) 0.1d",
        "found",
        "box AP",
        "visibility error",
    ]
    said = (
        f"{model.scores['images']} photos of `{model.scores['dataset']}`, {model.scores['date'][:10]}, "
        f"{model.scores['device']}, torch {model.scores['torch']}: `{model.scores['command']}`"
    )
    return [*_table(heading, rows), "", said]


def _street_lines(model: BundledModel) -> list[str]:
    rows = [
        [where, name, str(row["objects"]), *(_street_cell(row, key) for key in _STREET)]
        for key, where in _STREET_SETS.items()
        for name, row in model.scores["sets"][key]["objects"].items()
        if row["objects"]
    ]
    images = ", ".join(f"{model.scores['sets'][key]['images']} of `{key}`" for key in _STREET_SETS)
    said = (
        f"Moderate objects; images: {images}; {model.scores['date'][:10]}, {model.scores['device']}, torch "
        f"{model.scores['torch']}: `{model.scores['command']}`"
    )
    return [*_table(["images", "class", "objects", *_STREET.values()], rows), "", said]


def _street_cell(row: dict[str, Any], key: str) -> str:
    """A figure with its 5th and 95th percentile, where there are a few objects to draw anew."""
    form = {"depth_error": "{:.1%}", "yaw_error_deg": "{:.1f} deg"}.get(key, "{:.2f}")
    if row[key] is None or row[key] != row[key]:
        return ""
    ends = row.get("intervals", {}).get(key) if row["objects"] > 2 else None
    span = f" ({' to '.join(form.format(end).removesuffix(' deg') for end in ends)})" if ends else ""
    return form.format(row[key]) + span


def speed_table(root: Path) -> list[str]:
    """Of `benchmarks/predict.py`: image to poses on a GPU, and the peer's detector alone"""
    record = _read(root / "benchmarks" / "predict.json")
    named = {
        ("smope-s", "fast"): "**smope `lmo`**, image to poses, as by default",
        ("smope-s", "eager"): "smope `lmo`, image to poses, `fast = False`",
        ("smope-paper", "fast"): "the authors' network, untrained, image to poses",
    }
    rows = []
    for row in record["main"]:
        name = named.get((row["network"], row["way"]))
        if name is None and row["network"].startswith("transformers"):
            name = f"transformers' Deformable DETR, boxes alone, {row['way']}"
        if name is not None:
            rate = f"{row['batch'] / row['median']:.0f}"
            rows.append([name, str(row["batch"]), f"{1e3 * row['median']:.2f}", rate])
    source = f"{record['date']}, {record['device']}, torch {record['torch']}, {record['size']}"
    lines = _table(["", "images a call", "ms a call", "images/s"], rows)
    return [*lines, "", f"{source}: `python benchmarks/predict.py`"]


def training_table(record: Path) -> list[str]:
    """Scores on held-out renders as training went on."""
    pieces = _read(record / "run.json")["pieces"]
    batch = pieces[-1]["images"] / (pieces[-1]["last_step"] - pieces[-1]["first_step"])
    rows = []
    with (record / "curves.csv").open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            if line["score/AR"]:
                minutes, processes = float(line["minutes"]), pieces[-1]["processes"]
                figures = [float(line[f"score/{key}"]) for key in _HELD_OUT]
                images = round(int(line["step"]) * batch)
                heading = [f"{minutes:.1f}", f"{minutes * processes:.1f}", f"{images:,}"]
                rows.append([*heading, *(f"{figure:.3f}" for figure in figures)])
    return _table(["minutes", "GPU minutes", "images", *_HELD_OUT.values()], rows)


def pieces_table(record: Path) -> list[str]:
    """How fast each piece of a training run was: over the whole of it, and in the median of its log."""
    with (record / "curves.csv").open(newline="") as file:
        logged = [(int(row["step"]), row.get("images_per_second")) for row in csv.DictReader(file)]

    def middle(piece: dict[str, Any]) -> float:
        within = [rate for step, rate in logged if piece["first_step"] < step <= piece["last_step"]]
        return median(float(rate) for rate in within if rate)

    rows = [
        [
            piece["started"][:16].replace("T", " "),
            f"{piece['processes']} x {piece['device']}",
            f"{piece['first_step']} to {piece['last_step']}",
            f"{piece['images']:,}",
            f"{piece['images_per_second']:.0f}",
            f"{middle(piece):.0f}",
            f"{piece['data_wait_share']:.0%}",
            f"{piece['device_memory_gib']:.1f} GiB",
        ]
        for piece in _read(record / "run.json")["pieces"]
    ]
    heading = ["started (UTC)", "GPUs", "steps", "images", "images/s", "median", "waited for scenes"]
    return _table([*heading, "memory a GPU"], rows)


def updated(text: str, tables: dict[str, Callable[[], list[str]]], where: Path) -> str:
    """`text` with every block filled anew."""

    def fill(match: re.Match[str]) -> str:
        if match["name"] not in tables:
            raise StaleError(f"{where}: unknown table {match['name']!r}; known: {', '.join(tables)}")
        return match[1] + "\n".join(tables[match["name"]]()) + "\n" + match[3]

    return _BLOCK.sub(fill, text)


def documents(root: Path) -> dict[Path, str]:
    """Each file with tables, and what it should say."""
    readme = root / "README.md"
    tables = {
        "models": lambda: models_table(root),
        "lmo": lambda: lmo_table(root),
        "streets": lambda: streets_table(root),
        "speed": lambda: speed_table(root),
    }
    result = {readme: updated(readme.read_text(encoding="utf-8"), tables, readme)}
    for model in bundled_models(root):
        text = model.card.read_text(encoding="utf-8")
        result[model.card] = updated(text, {"scores": lambda model=model: card_table(model)}, model.card)  # type: ignore[misc]
        if "<!-- table: scores -->" not in text:
            raise StaleError(f"{model.card}: no block `<!-- table: scores -->`")
    for record in sorted((root / "benchmarks").glob("*/*/run.json")):
        folder = record.parent
        name = folder.name if folder.parent.name == "lmo" else f"{folder.parent.name} {folder.name}"
        tables[f"training {name}"] = partial(training_table, folder)
        tables[f"pieces {name}"] = partial(pieces_table, folder)
    for page in (root / "benchmarks" / "training.md", root / "docs" / "own_objects.md"):
        if page.is_file():
            result[page] = updated(page.read_text(encoding="utf-8"), tables, page)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is stale")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository")
    options = parser.parse_args(arguments)
    stale = False
    try:
        wanted = documents(options.root)
    except StaleError as error:
        print(error, file=sys.stderr)
        return 1
    for path, text in wanted.items():
        before = path.read_text(encoding="utf-8")
        if text == before:
            continue
        if options.check:
            stale = True
            print(
                "\n".join(
                    difflib.unified_diff(
                        before.splitlines(), text.splitlines(), "committed", "rebuilt", "", "", 0, ""
                    )
                )
            )
            print(f"{path}: stale; run `python tools/update_tables.py`", file=sys.stderr)
        else:
            path.write_text(text, encoding="utf-8")
            print(f"{path}: updated")
    return int(stale)


def _figures(scores: dict[str, Any], photos: int, source: str) -> list[str]:
    return [str(photos), *_shown(scores), _number(scores.get("seconds"), "{:.3g}"), source]


def _shown(scores: dict[str, Any]) -> list[str]:
    formats = {"AR_MSSD": "{:.3f}", "AR_MSPD": "{:.3f}", "ADD(-S)": "{:.1%}", "found": "{:.1%}"}
    return [_number(scores.get(key), form) for key, form in formats.items()]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _table(heading: list[str], rows: list[list[str]]) -> list[str]:
    lines = [heading, ["---"] * len(heading), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


if __name__ == "__main__":
    sys.exit(main())
