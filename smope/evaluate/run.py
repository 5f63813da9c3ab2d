"""A model, or a file of results, over a whole data set: predictions, the result file, scores.json."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from smope.data.bop import Estimate
from smope.data.kitti import (
    CLASS_IDS,
    KittiDataset,
    KittiLabel,
    read_labels,
    write_labels,
)
from smope.data.records import Record
from smope.evaluate import report
from smope.evaluate.bop import Pairing
from smope.evaluate.kitti import Frame, kitti_scores
from smope.evaluate.rows import box_scores, median, score_row
from smope.evaluate.sets import PoseSet, load_pose_set
from smope.evaluate.street import StreetFrame, confusion, street_scores
from smope.evaluate.street_sources import labels_found

if TYPE_CHECKING:
    from smope.model import SMOPE
    from smope.poses import Poses

logger = logging.getLogger(__name__)

FORMATS = ("bop", "linemod", "labelimg3d", "kitti")

# What the table shows of KITTI's scores; scores.json has all.
KITTI_COLUMNS = (
    *(f"AP_{metric}_{name}" for metric in ("2d", "bev", "3d") for name in ("easy", "moderate", "hard")),
    *(f"AOS_{name}" for name in ("easy", "moderate", "hard")),
    *("AP_2d_50_moderate", "AOS_50_moderate", "AP_bev_50_moderate", "AP_3d_50_moderate"),
    *("recall", "depth_error", "yaw_error_deg", "corner_iou"),
)

# Recall is measured, so all that the network can offer is asked for.
_THRESHOLD = 0.0
_TOP_K = 64


def evaluate_dataset(
    dataset_dir: str | Path,
    format: str = "bop",
    model: SMOPE | str | Path | None = None,
    csv: str | Path | None = None,
    out: str | Path | None = None,
    limit: int | None = None,
    device: torch.device | str | None = None,
    batch: int = 1,
    split: str | None = None,
) -> dict[str, Any]:
    """Score `model` (an object, a bundled name or a folder), or the results at `csv`, on a data set.

    `format` is "bop", "linemod" (a data folder such as data/02), "labelimg3d" (a scene) or "kitti". `csv`
    is a BOP'19 file; for "labelimg3d" also a scene's folder with predicted annotations; for "kitti" a
    folder of result files. `split` is a part of the set in the format's own words; `limit` takes the first
    images only. Targets of a BOP set are those that test_targets_bop19.json lists; of another split, or where
    there is no list, all instances of which a tenth is visible. Returns what `out`/scores.json holds, and
    under "table" the scores as text. With `out` and a model the predictions are written too, in the form that
    `csv` takes.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r} given; known: {', '.join(FORMATS)}")
    if (model is None) == (csv is None):
        raise ValueError("a model or results (csv) expected, one of the two")
    if batch < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch {batch} and limit {limit} given, at least 1 expected")
    root = Path(dataset_dir)
    results = None if csv is None else Path(csv)
    loaded, source = (None, {"csv": Path(csv).name}) if csv is not None else _model(model, device)
    folder = None if out is None else Path(out)
    if format == "kitti":
        scored, columns = _kitti(KittiDataset(root, split), loaded, results, folder, limit, batch)
    else:
        pose_set = load_pose_set(root, format, split).first(limit)
        scored, columns = _poses(pose_set, loaded, results, folder, source, batch), report.POSE_COLUMNS
    scores: dict[str, Any] = {
        "dataset": root.resolve().name,
        "format": format,
        **source,
        "command": _command(root, format, split, source, limit, batch),
        **report.circumstances("cpu" if loaded is None else loaded.device),
        **scored,
    }
    if folder is not None:
        report.write_scores(folder / "scores.json", scores)
    rows = {
        name: {**row, **scores.get("streets", {}).get(name, {})} for name, row in scores["objects"].items()
    }
    rows |= {"all": scores["all"]} if "all" in scores else {}
    return {**report.plain(scores), "table": report.format_table(rows, columns)}


def _poses(
    pose_set: PoseSet,
    model: SMOPE | None,
    results: Path | None,
    out: Path | None,
    source: Mapping[str, str],
    batch: int,
) -> dict[str, Any]:
    """Scores of poses against known meshes."""
    if model is not None:
        estimates = predict_estimates(model, pose_set, batch)
        if out is not None:
            pose_set.write_results(out, source["model"], estimates)
    else:
        assert results is not None
        estimates = [e for e in pose_set.read_results(results) if (e.scene_id, e.im_id) in pose_set.records]
    pairings = pose_set.pairings(estimates)
    by_name: dict[str, list[Pairing]] = {}
    for pairing in pairings:
        by_name.setdefault(pose_set.names[pairing.target.obj_id], []).append(pairing)
    has_boxes = all(e.box_xyxy is not None for e in estimates)
    boxes = box_scores(pairings, estimates, pose_set.names) if estimates and has_boxes else {}
    times = {(e.scene_id, e.im_id): e.time for e in estimates if e.time >= 0}
    return {
        "images": len(pose_set.records),
        "seconds_an_image_median": median(times.values()),
        "all": score_row(pairings, boxes.get("all")),
        "objects": {name: score_row(group, boxes.get(name)) for name, group in by_name.items()},
    }


def _kitti(
    dataset: KittiDataset,
    model: SMOPE | None,
    results: Path | None,
    out: Path | None,
    limit: int | None,
    batch: int,
) -> tuple[dict[str, Any], Mapping[str, tuple[str, str]]]:
    """KITTI's own scores; predictions go to `out`/data, a file an image."""
    names = list(dataset.records)[:limit]
    found: dict[str, list[KittiLabel]] = {}
    seconds: list[float] = []
    if model is not None:
        for record, poses, taken in predictions(model, [dataset.records[name] for name in names], batch):
            seconds.append(taken)
            found[record.key] = labels_found(poses, dataset.P2[record.key], record.size)
            if out is not None:
                write_labels(out / "data" / f"{record.key}.txt", found[record.key])
    else:
        assert results is not None
        found = {name: [label for _, label in read_labels(results / f"{name}.txt")] for name in names}
    frames = [Frame(dataset.labels[name], found[name]) for name in names]
    present = {label.type for frame in frames for label in frame.truth}
    classes = sorted(name for name in (*CLASS_IDS, "Cyclist") if name in present)
    table = kitti_scores(frames, classes)
    streets = [StreetFrame(name, f, dataset.P2[name]) for name, f in zip(names, frames, strict=True)]
    scored = {
        "images": len(names),
        "seconds_an_image_median": median(seconds),
        "objects": table,
        "streets": street_scores(streets, classes),
        "confusion": confusion(streets, list(CLASS_IDS)),
    }
    return scored, {key: (key.removeprefix("AP_"), "{:.4f}") for key in KITTI_COLUMNS}


def predict_estimates(model: SMOPE, pose_set: PoseSet, batch: int = 1) -> list[Estimate]:
    """Every prediction of `model` on the set's images; objects that the set does not know are left out."""
    ids = pose_set.ids
    estimates: list[Estimate] = []
    unknown: set[str] = set()
    for record, poses, seconds in predictions(model, list(pose_set.records.values()), batch):
        unknown |= set(poses.names) - set(ids)
        estimates.extend(_estimates(record, poses, ids, seconds))
    if unknown and not estimates:
        raise ValueError(
            f"the model's objects {sorted(unknown)} are none of the data set's, "
            f"{sorted(pose_set.names.values())}; name those in models_eval/names.json, as {{object id: name}}"
        )
    if unknown:
        logger.warning("predicted objects that the data set does not know are left out: %s", sorted(unknown))
    return estimates


def predictions(
    model: SMOPE, records: Sequence[Record], batch: int = 1
) -> Iterator[tuple[Record, Poses, float]]:
    """(record, what was found, seconds), one pass an image.

    The time is that from the image's file to poses on the CPU, after one warm-up; of a batch each image's
    share.
    """
    for start in _progress(range(0, len(records), batch), "images"):
        part = records[start : start + batch]
        if start == 0:
            _timed_predict(model, part)
        found, seconds = _timed_predict(model, part)
        for record, poses in zip(part, found, strict=True):
            yield record, poses, seconds / len(part)


def _timed_predict(model: SMOPE, records: Sequence[Record]) -> tuple[list[Poses], float]:
    start = time.perf_counter()
    found = model.predict(
        [record.image_path for record in records],
        K=[torch.from_numpy(record.K).float() for record in records],
        threshold=_THRESHOLD,
        top_k=_TOP_K,
    )
    found = [poses.to("cpu") for poses in found]  # waits for the device
    return found, time.perf_counter() - start


def _estimates(record: Record, poses: Poses, ids: Mapping[str, int], seconds: float) -> Iterator[Estimate]:
    arrays = poses.numpy()
    for n, name in enumerate(poses.names):
        if name in ids:
            yield Estimate(
                scene_id=record.scene_id,
                im_id=record.image_id,
                obj_id=ids[name],
                score=float(arrays["scores"][n]),
                T_CO=arrays["T_CO"][n].astype(np.float64),
                scale=arrays["scale"][n].astype(np.float64),
                time=seconds,
                box_xyxy=arrays["boxes_xyxy"][n].astype(np.float64),
                visibility=float(arrays["visibility"][n]),
                sigma=(float(arrays["sigma"][n, 0]), float(arrays["sigma"][n, 1])),
            )


def _model(
    model: SMOPE | str | Path | None, device: torch.device | str | None
) -> tuple[SMOPE, dict[str, str]]:
    """The model, and its name and the checksum of its weights for scores.json."""
    if isinstance(model, (str, Path)):
        from smope import hub
        from smope.model import SMOPE

        folder = hub.resolve(model)
        checksum = report.file_sha256(folder / hub.WEIGHTS_FILE)
        named = {"model": Path(model).name, "weights_sha256": checksum}
        return SMOPE.from_pretrained(model, device=device), named
    assert model is not None
    return model, {"model": "model"}


def _command(
    root: Path, format: str, split: str | None, source: Mapping[str, str], limit: int | None, batch: int
) -> str:
    """The command line that repeats the run, with names in place of this machine's paths."""
    parts = ["smope", "evaluate", root.resolve().name, "--format", format]
    parts += [] if split is None else ["--split", split]
    parts += ["--csv", source["csv"]] if "csv" in source else ["--model", source["model"]]
    parts += [] if limit is None else ["--limit", str(limit)]
    parts += [] if batch == 1 else ["--batch", str(batch)]
    return " ".join(parts)


def _progress(items: Sequence[int], what: str) -> Iterable[int]:
    from rich.console import Console
    from rich.progress import track

    return track(items, description=what, console=Console(stderr=True), transient=True)
