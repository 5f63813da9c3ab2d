"""Measure a model's parts: visibility, sigma, rebuilt meshes, meshes registered anew, other lenses, several
instances of one object.

    python -m smope.tools.measure_parts MODEL DATASET_DIR [--write] [--limit N] [--only PART ...]

MODEL is a bundled name or a folder, DATASET_DIR a BOP data set with `models` (as trained on) and
`models_eval` (other vertices, no colours). Prints the figures beside their bounds; `--write` puts them into
the model's scores.json under "parts" and leaves the rest of that file as it is.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh
from numpy.typing import ArrayLike, NDArray

from smope import hub
from smope.data.bop import Estimate
from smope.evaluate import report
from smope.evaluate.bop import ObjectGeometry, pair_targets
from smope.evaluate.rows import score_row
from smope.evaluate.run import predict_estimates
from smope.evaluate.sets import PoseSet, load_pose_set
from smope.meshes import load_mesh
from smope.model import SMOPE
from smope.network_inputs import mesh_inputs
from smope.networks.smope_s import SmopeS
from smope.scenes import SceneAssets, build_assets
from smope.tools.lens_pairs import lens_pairs
from smope.tools.several import find_several

Array = NDArray[Any]

PARTS = ("photos", "rebuilt", "lenses", "several")
ORIGIN = (0.3, -0.2, 0.1)  # metres: where the shuffled meshes' origin is moved to
SURFACE_SAMPLES = 50_000  # neighbours then lie some 0.3 % of the diameter apart
CHAMFER = (
    "mean of both directions: (mean distance of the rebuilt points to 50000 points drawn evenly from the "
    "mesh + mean distance of those to the rebuilt points) / 2, percent of the mesh's diameter"
)
AGAINST = "|change of the mean of AR_MSSD and AR_MSPD| against the meshes in the checkpoint, same photos"

# (where in "parts", what is asked for, the bound, whether it is the least value)
BOUNDS: tuple[tuple[str, str, float, bool], ...] = (
    ("photos.visibility_mae", "visibility, mean error", 0.12, False),
    ("photos.visibility_spearman", "visibility, Spearman", 0.5, True),
    ("photos.sigma_rotation_spearman", "sigma against rotation error, Spearman", 0.4, True),
    ("photos.sigma_translation_spearman", "sigma against translation error, Spearman", 0.4, True),
    ("photos.shuffled.change", "AR change, shuffled, in metres, origin moved", 0.005, False),
    ("photos.models_eval.change", "AR change, models_eval", 0.05, False),
    ("rebuilt.worst.chamfer_percent", "rebuilt points, chamfer, worst object, % of diameter", 5.0, False),
    ("rebuilt.worst.scale_error_percent", "rebuilt scale, worst object, %", 2.0, False),
    ("lenses.focal_scales.0.7.ratio", "depth error at 0.7 of the focal length, ratio", 1.5, False),
    ("lenses.focal_scales.1.4.ratio", "depth error at 1.4 of the focal length, ratio", 1.5, False),
    ("several.several.found", "found among others of their kind, share", 0.9, True),
)


def chamfer_percent(points: ArrayLike, surface: ArrayLike, diameter: float) -> float:
    """The chamfer distance of points [P, 3] and [Q, 3], mean of both directions, percent of the diameter."""
    from scipy.spatial import KDTree

    a, b = np.asarray(points, np.float64), np.asarray(surface, np.float64)
    both = KDTree(b).query(a)[0].mean() + KDTree(a).query(b)[0].mean()
    return float(100 * both / 2 / diameter)


def shuffled(mesh: trimesh.Trimesh, seed: int) -> trimesh.Trimesh:
    """The same surface with vertices, faces and the corners of faces in another order; colours go along."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(mesh.vertices))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    faces = place[mesh.faces][rng.permutation(len(mesh.faces))]
    turns = (np.arange(3) + rng.integers(0, 3, (len(faces), 1))) % 3
    visual: Any = mesh.visual
    colours = visual.vertex_colors[order] if visual.kind == "vertex" else None
    return trimesh.Trimesh(
        mesh.vertices[order], np.take_along_axis(faces, turns, 1), vertex_colors=colours, process=False
    )


def moved_symmetries(info: Mapping[str, Any], shift: ArrayLike, scale: float) -> dict[str, Any]:
    """An entry of models_info.json for the mesh scaled by `scale` and then moved by `shift`."""
    by = np.asarray(shift, np.float64)
    entry: dict[str, Any] = {}
    if "symmetries_discrete" in info:
        entry["symmetries_discrete"] = []
        for flat in info["symmetries_discrete"]:
            motion = np.array(flat, np.float64).reshape(4, 4)
            motion[:3, 3] = scale * motion[:3, 3] + by - motion[:3, :3] @ by
            entry["symmetries_discrete"].append(motion.reshape(-1).tolist())
    if "symmetries_continuous" in info:
        entry["symmetries_continuous"] = [
            {"axis": turn["axis"], "offset": (scale * np.asarray(turn["offset"]) + by).tolist()}
            for turn in info["symmetries_continuous"]
        ]
    return entry


def moved_back(estimates: Sequence[Estimate], shift: ArrayLike) -> list[Estimate]:
    """Poses of meshes that were moved by `shift` in their own frame, as poses of the meshes as they were."""
    motion = np.eye(4)
    motion[:3, 3] = shift
    return [replace(e, T_CO=e.T_CO @ motion) for e in estimates]


def measure_rebuilt(model: SMOPE, meshes: Mapping[str, trimesh.Trimesh]) -> dict[str, Any]:
    """The 3D decoder against the meshes, in metres and their own frames."""
    network = model.network
    if not isinstance(network, SmopeS):
        raise TypeError(f"a model of smope-s expected, {type(network).__name__} given")
    objects = {name: model.objects[name] for name in meshes}
    inputs = mesh_inputs(list(objects.values()), network.config.surface_points, network.config.anchors).to(
        model.device
    )
    with torch.no_grad():
        rebuilt = network.mesh_decoder(network.encode_meshes(inputs).embedding)
    points, sizes = rebuilt.points.double().cpu().numpy(), rebuilt.log_diameter.double().exp().tolist()
    rows = {}
    for index, (name, known) in enumerate(objects.items()):
        surface, _ = trimesh.sample.sample_surface(meshes[name], SURFACE_SAMPLES, seed=0)
        placed = points[index] * known.diameter + known.centre.double().numpy()
        rows[name] = {
            "chamfer_percent": chamfer_percent(placed, surface, known.diameter),
            "scale_error_percent": 100 * abs(sizes[index] / known.diameter - 1),
        }
    worst = {key: max(row[key] for row in rows.values()) for key in next(iter(rows.values()))}
    return {"chamfer_definition": CHAMFER, "points": points.shape[1], "worst": worst, "objects": rows}


def measure_photos(model: SMOPE, pose_set: PoseSet) -> dict[str, Any]:
    """Self-assessment on the photos, and what other files of the same objects change; `model` ends up as it
    came."""
    own = dict(model.objects)
    geometry = {t.obj_id: pose_set.geometry(t.obj_id) for t in pose_set.targets}
    base = _scores(pose_set, predict_estimates(model, pose_set), geometry)
    by_name = pose_set.ids
    ids = {name: by_name[name] for name in own}

    info = _models_info(pose_set.root / "models")
    meshes = {}
    for name, obj_id in ids.items():
        mesh = shuffled(_read(pose_set.root / "models", obj_id), seed=obj_id)
        meshes[name] = mesh.apply_scale(0.001).apply_translation(ORIGIN)
    symmetries = {name: moved_symmetries(info[obj_id], ORIGIN, 0.001) for name, obj_id in ids.items()}
    model.register_meshes(meshes, units="m", symmetries=symmetries)
    anew = _scores(pose_set, moved_back(predict_estimates(model, pose_set), ORIGIN), geometry)

    info = _models_info(pose_set.root / "models_eval")
    files = {name: _file(pose_set.root / "models_eval", obj_id) for name, obj_id in ids.items()}
    model.register_meshes(files, units="mm", symmetries={name: info[obj_id] for name, obj_id in ids.items()})
    plain = _scores(pose_set, predict_estimates(model, pose_set), geometry)
    model.register_meshes(list(own))
    return {
        "images": len(pose_set.records),
        **{key: value for key, value in base.items() if key.startswith(("AR", "visibility", "sigma"))},
        "change_definition": AGAINST,
        "shuffled": {"units": "m", "origin_m": ORIGIN, **_change(anew, base)},
        "models_eval": {"units": "mm", **_change(plain, base)},
    }


def verdicts(parts: Mapping[str, Any]) -> list[tuple[str, float, float, bool]]:
    """(what, value, bound, whether it holds) of all the bounds whose part was measured."""
    lines = []
    for path, what, bound, least in BOUNDS:
        value: Any = parts
        for key in path.replace("0.7", "0,7").replace("1.4", "1,4").split("."):
            value = value.get(key.replace(",", ".")) if isinstance(value, Mapping) else None
        if value is not None:
            lines.append((what, float(value), bound, value >= bound if least else value <= bound))
    return lines


def add_to_scores(file: Path, parts: Mapping[str, Any]) -> None:
    """Put the measured parts under "parts" of scores.json; parts not measured now, and all else, stay."""
    scores = json.loads(file.read_text(encoding="utf-8"))
    scores["parts"] = {**scores.get("parts", {}), **parts}
    report.write_scores(file, scores)


def _scores(
    pose_set: PoseSet, estimates: Sequence[Estimate], geometry: Mapping[int, ObjectGeometry]
) -> dict[str, float]:
    row = score_row(pair_targets(pose_set.targets, estimates, pose_set.records, geometry), None)
    return {**row, "AR": (row["AR_MSSD"] + row["AR_MSPD"]) / 2}  # without VSD, also where there is depth


def _change(scores: Mapping[str, float], base: Mapping[str, float]) -> dict[str, float]:
    kept = {key: scores[key] for key in ("AR_MSSD", "AR_MSPD", "AR")}
    return {**kept, "change": abs(scores["AR"] - base["AR"])}


def _models_info(folder: Path) -> dict[int, dict[str, Any]]:
    entries = json.loads((folder / "models_info.json").read_text(encoding="utf-8"))
    return {int(key): entry for key, entry in entries.items()}


def _file(folder: Path, obj_id: int) -> Path:
    return folder / f"obj_{obj_id:06d}.ply"


def _read(folder: Path, obj_id: int) -> trimesh.Trimesh:
    return trimesh.load_mesh(_file(folder, obj_id), process=False)


def _assets(file: Path, model: SMOPE, dataset: Path, ids: Mapping[str, int]) -> SceneAssets:
    """Those of the file, or new ones from the folders beside the data set, as in the recipe."""
    if file.is_file():
        return SceneAssets.load(file)
    objects = [
        replace(known, mesh=load_mesh(_file(dataset / "models", ids[name]), "mm"))
        for name, known in model.objects.items()
    ]
    clutter = sorted((dataset.parent / "meshes" / "objects").rglob("*.ply"))
    return build_assets(objects, clutter, dataset.parent / "backgrounds")


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every bound measured holds, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m smope.tools.measure_parts", description="Measure what the parts of a model do."
    )
    parser.add_argument("model", metavar="MODEL", help="bundled name or folder")
    parser.add_argument("dataset", type=Path, metavar="DATASET_DIR", help="BOP data set")
    parser.add_argument("--write", action="store_true", help="put the figures into the model's scores.json")
    parser.add_argument("--limit", type=int, default=None, help="the first photos only")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure")
    parser.add_argument(
        "--scenes", type=int, default=288, help="rendered scenes; each through three lenses for that part"
    )
    parser.add_argument("--assets", type=Path, default=Path("runs/lmo_assets.npz"), help="scene assets")
    parser.add_argument("--device", default=None)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = hub.resolve(options.model)
    model = SMOPE.from_pretrained(options.model, device=options.device)
    pose_set = load_pose_set(options.dataset, "bop").first(options.limit)
    ids = pose_set.ids

    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "photos": lambda: measure_photos(model, pose_set),
        "rebuilt": lambda: measure_rebuilt(
            model,
            {name: load_mesh(_file(options.dataset / "models", ids[name]), "mm") for name in model.objects},
        ),
        "lenses": lambda: lens_pairs(
            model, _assets(options.assets, model, options.dataset, ids), options.scenes
        ),
        "several": lambda: find_several(
            model, _assets(options.assets, model, options.dataset, ids), options.scenes
        ),
    }
    parts = {name: measures[name]() for name in PARTS if name in options.only}
    sys.stdout.write(json.dumps(report.plain(parts), indent=1) + "\n")
    lines = verdicts(parts)
    for what, value, bound, holds in lines:
        sys.stdout.write(f"{'holds ' if holds else 'MISSED'} {value:10.5f}  bound {bound:g}  {what}\n")
    if options.write:
        add_to_scores(folder / "scores.json", parts)
    return 0 if all(holds for *_, holds in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
