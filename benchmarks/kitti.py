"""Score street weights on everything that they were not trained on, and rebuild the tables of kitti.md.

    SMOPE_DATA=... python benchmarks/kitti.py --step NAME --model kitti3d [--renders 500] [--assets FILE]
    python benchmarks/kitti.py --tables

Four sets: the frames of measure.txt; LabelImg3D's, with its own focal length and centre; the track of train
that the recipe holds out; and renders of streets with a seed far from training's, the held-out track behind a
part of them. The record of a step goes to benchmarks/kitti/NAME.json, from which alone the tables are made;
that of the bundled weights also lies beside them as scores.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from smope import SMOPE, hub
from smope.data.items import Batch
from smope.data.kitti import CLASS_IDS, KittiDataset
from smope.data.labelimg3d import LabelImg3DScene
from smope.evaluate import report
from smope.evaluate.street import StreetFrame, confusion, street_scores
from smope.evaluate.street_sources import kitti_streets, record_streets, rendered_streets
from smope.scenes.assets import SceneAssets
from smope.train.fit import objects_of, read_dataset
from smope.train.recipe import Recipe, load_recipe
from smope.train.streets import street_assets, street_stream_of

ROOT = Path(__file__).resolve().parent
CLASSES = list(CLASS_IDS)
SEED = 7_654_321
BATCH = 4
# Heading -> key of a class's scores; those with an interval show it.
COLUMNS = {
    "AP2D@.5": "AP_2d_50_moderate", "AP2D@.7": "AP_2d_70_moderate", "AOS@.5": "AOS_50_moderate",
    "BEV@.5": "AP_bev_50_moderate", "BEV@.7": "AP_bev_70_moderate", "3D@.5": "AP_3d_50_moderate",
    "3D@.7": "AP_3d_70_moderate", "recall": "recall", "recall 20-30 px": "recall_low",
    "depth": "depth_error", "yaw": "yaw_error_deg", "corner IoU": "corner_iou",
}  # fmt: skip
log = logging.getLogger(__name__)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", action="store_true", help="rebuild the tables only")
    parser.add_argument("--step", help="name of the record")
    parser.add_argument("--model", default="kitti3d", help="a bundled name or a folder")
    parser.add_argument("--renders", type=int, default=500)
    parser.add_argument("--recipe", type=Path, default=ROOT.parent / "recipes" / "kitti3d.toml")
    parser.add_argument("--assets", type=Path, help="scene assets, if they are prepared")
    parser.add_argument("--device", help="cpu, cuda; a GPU where there is one")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not given.tables:
        if not given.step:
            parser.error("--step NAME or --tables")
        record = measured(given)
        file = ROOT / "kitti" / f"{given.step}.json"
        file.parent.mkdir(exist_ok=True)
        report.write_scores(file, record)
    rebuild(ROOT / "kitti.md")


def measured(given: argparse.Namespace) -> dict[str, Any]:
    model = SMOPE.from_pretrained(given.model, device=given.device)
    plan = load_recipe(given.recipe)
    root = Path(os.environ["SMOPE_DATA"]) / "kitti"
    measure = KittiDataset(root, "measure")
    train = KittiDataset(root, "train")
    track = [name for name in train.records if name.startswith(plan.data.held_out)]
    sets = {
        "measure": kitti_streets(model, measure, list(measure.records)),
        "labelimg3d": record_streets(model, list(LabelImg3DScene(root / "labelimg3d"))),
        "track": kitti_streets(model, train, track),
    }
    if given.renders:
        batches = islice(renders(plan, given.assets, model.device), -(-given.renders // BATCH))
        sets["renders"] = rendered_streets(model, batches, [*plan.data.meshes])[: given.renders]
    together = [frame for frames in sets.values() for frame in frames]
    return {
        "command": f"python benchmarks/kitti.py --step {given.step} --model {Path(given.model).name} "
        f"--renders {given.renders}",
        "weights_sha256": report.file_sha256(hub.resolve(given.model) / hub.WEIGHTS_FILE),
        **report.circumstances(model.device),
        "sets": {name: scored(frames, name) for name, frames in sets.items()},
        "confusion": confusion(together, CLASSES),
    }


def scored(frames: Sequence[StreetFrame], name: str) -> dict[str, Any]:
    log.info("%s: %d images", name, len(frames))
    # Many renders need no interval, and counting them at every score takes long.
    scores = street_scores(frames, CLASSES, draws=0 if name == "renders" else 200)
    return {"images": len(frames), "objects": scores, "confusion": confusion(frames, CLASSES)}


def renders(plan: Recipe, assets: Path | None, device: torch.device) -> Iterator[Batch]:
    """Streets of the recipe, over frames of the held-out track alone."""
    objects = objects_of(None, None, None, plan.data)
    records = read_dataset(plan.data, objects, sized=True) or []
    kept_out = [record for record in records if record.key.startswith(plan.data.held_out)]
    ready = street_assets(objects, plan.data) if assets is None else SceneAssets.load(assets)
    data = replace(plan.data, held_out=())
    with street_stream_of(plan, data, kept_out, ready, SEED, BATCH, device=device) as stream:
        yield from stream


def rebuild(page: Path) -> None:
    """Put the tables of all records between the page's marks."""
    records = {file.stem: json.loads(file.read_text()) for file in sorted((ROOT / "kitti").glob("*.json"))}
    text = page.read_text(encoding="utf-8")
    parts = {"steps": steps_table(records), "confusion": confusion_table(records)}
    for name, table in parts.items():
        marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        text = marks.sub(lambda m, table=table: m[1] + table + "\n" + m[2], text)
    page.write_text(text, encoding="utf-8")


def steps_table(records: Mapping[str, Any]) -> str:
    if not records:
        return "Nothing measured yet."
    lines = [
        "| step | set | class | objects | " + " | ".join(COLUMNS) + " |",
        "| --- " * (4 + len(COLUMNS)) + "|",
    ]
    for step, record in records.items():
        for name, part in record["sets"].items():
            for kind, row in part["objects"].items():
                if row.get("objects"):
                    cells = [_cell(row, key) for key in COLUMNS.values()]
                    lines.append(
                        f"| {step} | {name} | {kind} | {row['objects']} | " + " | ".join(cells) + " |"
                    )
        lines.append(
            f"| | | {record['device']}, {record['date'][:10]} | | " + " | " * (len(COLUMNS) - 1) + " |"
        )
    return "\n".join(lines)


def confusion_table(records: Mapping[str, Any]) -> str:
    """Of the newest record, all sets together."""
    if not records:
        return "Nothing measured yet."
    newest = max(records.values(), key=lambda record: record["date"])
    columns = list(next(iter(newest["confusion"].values())))
    lines = ["| is \\ called | " + " | ".join(columns) + " |", "| --- " * (1 + len(columns)) + "|"]
    lines += [
        f"| {k} | " + " | ".join(str(row[c]) for c in columns) + " |"
        for k, row in newest["confusion"].items()
    ]
    return "\n".join(lines)


def _cell(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    interval = row.get("intervals", {}).get(key)
    return f"{value:.3f}" + (f" ({interval[0]:.2f}-{interval[1]:.2f})" if interval else "")


if __name__ == "__main__":
    main()
