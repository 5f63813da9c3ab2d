"""A model, or a file of results, over a whole data set: predictions, the result file, scores.json."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from smope.data.bop import LINEMOD_NAMES, BopDataset, Estimate, Target, read_bop_csv, write_bop_csv
from smope.data.records import Record
from smope.evaluate import report
from smope.evaluate.bop import Pairing, bop_scores, geometries, nearest_pairs, pair_targets
from smope.evaluate.boxes import ImageBoxes, box_ap

if TYPE_CHECKING:
    from smope.model import SMOPE
    from smope.poses import Poses

logger = logging.getLogger(__name__)

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
) -> dict[str, Any]:
    """Score `model` (an object, a bundled name or a folder) or the results in `csv` on a data set.

    Returns what `out`/scores.json holds, and under "table" the scores as text. With `out` and a model the
    predictions are written too, in the BOP'19 form. `limit` takes the first images only.
    """
    if format != "bop":
        raise ValueError(f"format {format!r} given; known: 'bop'")
    if (model is None) == (csv is None):
        raise ValueError("evaluate_dataset: pass either a model or a csv file of results")
    dataset = BopDataset(Path(dataset_dir))
    targets = _limited(dataset.targets, limit)
    scenes = {scene_id: dataset.scene(scene_id) for scene_id in sorted({t.scene_id for t in targets})}
    images = list(dict.fromkeys((t.scene_id, t.im_id) for t in targets))

    if csv is not None:
        wanted = set(images)
        estimates = [e for e in read_bop_csv(csv) if (e.scene_id, e.im_id) in wanted]
        source: dict[str, Any] = {"csv": Path(csv).name}
        used: torch.device | str = "cpu"
    else:
        loaded, source = _model(model, device)
        records = [scenes[scene_id].records[im_id] for scene_id, im_id in images]
        estimates = predict_records(loaded, records, dataset, batch)
        used = loaded.device

    pairings = pair_targets(targets, estimates, scenes, geometries(dataset, {t.obj_id for t in targets}))
    by_name: dict[str, list[Pairing]] = {}
    for pairing in pairings:
        by_name.setdefault(dataset.names[pairing.target.obj_id], []).append(pairing)
    boxes = _box_scores(pairings, estimates, dataset.names) if csv is None else {}
    objects = {name: _row(group, boxes.get(name)) for name, group in by_name.items()}
    scores: dict[str, Any] = {
        "dataset": dataset.root.resolve().name,
        "format": format,
        "images": len(images),
        **source,
        "command": _command(dataset.root, format, source, limit, batch),
        **report.circumstances(used),
        "seconds_an_image_median": _median_seconds(estimates),
        "all": _row(pairings, boxes.get("all")),
        "objects": objects,
    }
    if out is not None:
        if csv is None:
            write_bop_csv(Path(out) / f"smope_{source['model']}-test.csv", estimates)
        report.write_scores(Path(out) / "scores.json", scores)
    return {**report.plain(scores), "table": report.format_table({**objects, "all": scores["all"]})}


def predict_records(
    model: SMOPE, records: Sequence[Record], dataset: BopDataset, batch: int = 1
) -> list[Estimate]:
    """Every prediction of `model` on these images, as rows of a BOP result; other objects are left out.

    One pass an image. The time is that from the image's file to poses on the CPU, after one warm-up.
    """
    ids = {name: obj_id for obj_id, name in dataset.names.items()}
    ids.update({f"obj_{obj_id:06d}": obj_id for obj_id in dataset.names})
    if set(dataset.names) <= set(LINEMOD_NAMES):
        ids.update({LINEMOD_NAMES[obj_id]: obj_id for obj_id in dataset.names})
    estimates: list[Estimate] = []
    unknown: set[str] = set()
    for start in _progress(range(0, len(records), batch), "images"):
        part = records[start : start + batch]
        if start == 0:
            _timed_predict(model, part)
        found, seconds = _timed_predict(model, part)
        for record, poses in zip(part, found, strict=True):
            unknown |= set(poses.names) - set(ids)
            estimates.extend(_estimates(record, poses, ids, seconds / len(part)))
    if unknown and not estimates:
        raise ValueError(
            f"the model's objects {sorted(unknown)} are none of the data set's, "
            f"{sorted(dataset.names.values())}; name those in models_eval/names.json, as {{object id: name}}"
        )
    if unknown:
        logger.warning("predicted objects that the data set does not know are left out: %s", sorted(unknown))
    return estimates


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
                time=seconds,
                box_xyxy=arrays["boxes_xyxy"][n].astype(np.float64),
                visibility=float(arrays["visibility"][n]),
                sigma=(float(arrays["sigma"][n, 0]), float(arrays["sigma"][n, 1])),
            )


def _row(pairings: Sequence[Pairing], boxes: Mapping[str, float] | None) -> dict[str, Any]:
    """All scores of one object, or of all."""
    pairs = [(p, e, g) for p in pairings for e, g in nearest_pairs(p)]
    row: dict[str, Any] = {
        "targets": sum(p.target.inst_count for p in pairings),
        **bop_scores(pairings),
        "rotation_deg_median": _median(p.errors["rotation_deg"][e, g] for p, e, g in pairs),
        "translation_mm_median": _median(1000 * p.errors["translation_m"][e, g] for p, e, g in pairs),
    }
    if boxes is not None:
        row |= {f"box_{key}": value for key, value in boxes.items()}
    return row | _self_assessment(pairs)


def _self_assessment(pairs: Sequence[tuple[Pairing, int, int]]) -> dict[str, float]:
    """How right the model is about what it sees of an object and about its own errors; all found targets."""
    scores: dict[str, float] = {}
    seen = [(p.estimates[e].visibility, p.truths[g].visibility) for p, e, g in pairs]
    if seen and all(said is not None for said, _ in seen):
        said, true = np.array(seen, np.float64).T
        scores["visibility_mae"] = float(np.abs(said - true).mean())
        scores["visibility_spearman"] = report.spearman(said, true)
    sigmas = [p.estimates[e].sigma for p, e, _ in pairs]
    if sigmas and all(sigma is not None for sigma in sigmas):
        expected = np.array(sigmas, np.float64)
        for column, name in enumerate(("rotation_deg", "translation_m")):
            errors = [float(p.errors[name][e, g]) for p, e, g in pairs]
            scores[f"sigma_{name.split('_')[0]}_spearman"] = report.spearman(expected[:, column], errors)
    return scores


def _box_scores(
    pairings: Sequence[Pairing], estimates: Iterable[Estimate], names: Mapping[int, str]
) -> dict[str, dict[str, float]]:
    """Box AP by object name. Annotated instances that are no targets neither count nor harm."""
    predicted: dict[tuple[int, int, int], list[Estimate]] = {}
    for e in estimates:
        predicted.setdefault((e.scene_id, e.im_id, e.obj_id), []).append(e)
    targets = {(p.target.scene_id, p.target.im_id, p.target.obj_id): p for p in pairings}
    records = {(p.target.scene_id, p.target.im_id): p.record for p in pairings}

    classes: dict[str, list[ImageBoxes]] = {}
    for obj_id in sorted({p.target.obj_id for p in pairings}):
        images = classes.setdefault(names[obj_id], [])
        for (scene_id, im_id), record in records.items():
            key = (scene_id, im_id, obj_id)
            annotated = [a for a in record.annotations if a.object_id == obj_id]
            wanted = targets[key].truths if key in targets else []
            boxed = [a for a in annotated if a.box_xyxy is not None]
            if annotated and not any(a in wanted for a in boxed):
                continue  # here but no target, or outside the frame: its true box is not to be relied on
            found = predicted.get(key, [])
            images.append(
                ImageBoxes(
                    truth=_stack([a.box_xyxy for a in boxed]),
                    predicted=_stack([e.box_xyxy for e in found]),
                    scores=np.array([e.score for e in found], np.float64),
                    ignore=np.array([a not in wanted for a in boxed], bool),
                )
            )
    return box_ap(classes)


def _stack(boxes: Sequence[Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array(boxes, np.float64).reshape(-1, 4)


def _model(
    model: SMOPE | str | Path | None, device: torch.device | str | None
) -> tuple[SMOPE, dict[str, Any]]:
    """The model, and its name and the checksum of its weights for scores.json."""
    if isinstance(model, (str, Path)):
        from smope import hub
        from smope.model import SMOPE

        folder = hub.resolve(model)
        named = {
            "model": Path(model).name,
            "weights_sha256": report.file_sha256(folder / "model.safetensors"),
        }
        return SMOPE.from_pretrained(model, device=device), named
    assert model is not None
    return model, {"model": str(getattr(model, "name", None) or "model")}


def _command(root: Path, format: str, source: Mapping[str, Any], limit: int | None, batch: int) -> str:
    """The command line that repeats the run, with names in place of this machine's paths."""
    parts = ["smope", "evaluate", root.resolve().name, "--format", format]
    parts += ["--csv", source["csv"]] if "csv" in source else ["--model", source["model"]]
    parts += [] if limit is None else ["--limit", str(limit)]
    parts += [] if batch == 1 else ["--batch", str(batch)]
    return " ".join(parts)


def _limited(targets: Sequence[Target], limit: int | None) -> list[Target]:
    images = list(dict.fromkeys((t.scene_id, t.im_id) for t in targets))[:limit]
    kept = set(images)
    return [t for t in targets if (t.scene_id, t.im_id) in kept]


def _median(values: Iterable[float]) -> float:
    listed = list(values)
    return float(np.median(listed)) if listed else float("nan")


def _median_seconds(estimates: Sequence[Estimate]) -> float:
    """Over images; NaN where times are not given."""
    times = {(e.scene_id, e.im_id): e.time for e in estimates if e.time >= 0}
    return _median(times.values())


def _progress(items: Sequence[Any], what: str) -> Iterable[Any]:
    from rich.console import Console
    from rich.progress import track

    return track(items, description=what, console=Console(stderr=True), transient=True)
