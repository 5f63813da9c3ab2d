"""Scores of a BOP'19 result: average recalls, and the older recalls beside them.

Hodan et al., "BOP Challenge 2020 on 6D Object Localization", section 2: of each target the `inst_count`
estimates of the highest score are taken; for each threshold they are matched, best score first, to the
nearest true pose that is below the threshold and still free; recall is the share of target
instances matched.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from smope.data.bop import BopDataset, BopScene, Estimate, IntArray, Target
from smope.data.reading import DataError
from smope.data.records import Annotation, Record
from smope.evaluate import pose_errors
from smope.evaluate.pose_errors import FloatArray
from smope.software_raster import rasterise

MSSD_SHARES = np.arange(1, 11) * 0.05  # of the diameter
MSPD_PIXELS = np.arange(1, 11) * 5.0  # at an image width of 640
VSD_SHARES = np.arange(1, 11) * 0.05  # of the diameter (tau), and of the visible surface (threshold)
VSD_DELTA = 0.015  # metres


@dataclass(frozen=True, eq=False)
class ObjectGeometry:
    """What scoring knows of an object; metres."""

    points: FloatArray  # [V, 3]
    faces: IntArray  # [F, 3]
    diameter: float
    symmetries: FloatArray  # [S, 4, 4]

    @property
    def symmetric(self) -> bool:
        return len(self.symmetries) > 1


@dataclass(frozen=True, eq=False)
class Pairing:
    """One target: its estimates (best first) against its true instances, every error of every pair."""

    target: Target
    record: Record
    estimates: list[Estimate]  # E
    truths: list[Annotation]  # G
    diameter: float
    errors: dict[str, FloatArray] = field(repr=False)  # [E, G], or [E, G, taus] for vsd


def geometries(dataset: BopDataset, obj_ids: Iterable[int]) -> dict[int, ObjectGeometry]:
    out = {}
    for obj_id in sorted(set(obj_ids)):
        if obj_id not in dataset.models_info:
            raise DataError(dataset.models_folder / "models_info.json", None, f"object {obj_id} is missing")
        info = dataset.models_info[obj_id]
        points, faces = dataset.mesh(obj_id)
        out[obj_id] = ObjectGeometry(
            points=points,
            faces=faces,
            diameter=float(info["diameter"]) / 1000,
            symmetries=pose_errors.symmetry_transforms(info, unit=0.001),
        )
    return out


def pair_targets(
    targets: Sequence[Target],
    estimates: Iterable[Estimate],
    scenes: dict[int, BopScene],
    objects: dict[int, ObjectGeometry],
) -> list[Pairing]:
    """Each target with its best estimates and their errors."""
    by_target: dict[tuple[int, int, int], list[Estimate]] = defaultdict(list)
    for estimate in estimates:
        by_target[estimate.scene_id, estimate.im_id, estimate.obj_id].append(estimate)

    pairings = []
    for target in targets:
        scene = scenes[target.scene_id]
        if target.im_id not in scene.records:
            raise DataError(
                scene.folder / "scene_camera.json", None, f"image {target.im_id} of a target is missing"
            )
        record = scene.records[target.im_id]
        truths = [a for a in record.annotations if a.object_id == target.obj_id]
        if len(truths) < target.inst_count:
            raise DataError(
                scene.folder / "scene_gt.json",
                f"image {target.im_id}",
                f"object {target.obj_id}: {target.inst_count} target instance(s), {len(truths)} annotated",
            )
        # Where more are annotated than asked for, the most visible ones are meant.
        truths = sorted(truths, key=lambda a: -a.visibility)[: target.inst_count]
        found = by_target[target.scene_id, target.im_id, target.obj_id]
        found = sorted(found, key=lambda e: -e.score)[: target.inst_count]
        geometry = objects[target.obj_id]
        errors = _errors(found, truths, record, geometry)
        pairings.append(Pairing(target, record, found, truths, geometry.diameter, errors))
    return pairings


def match(errors: FloatArray, threshold: float) -> list[tuple[int, int]]:
    """(estimate, truth) index pairs: rows of `errors` [E, G] in order, each with its nearest free truth."""
    free = set(range(errors.shape[1]))
    matched = []
    for e, row in enumerate(errors):
        below = [g for g in free if row[g] < threshold]
        if below:
            g = min(below, key=lambda g: row[g])
            free.remove(g)
            matched.append((e, g))
    return matched


def recall(pairings: Sequence[Pairing], name: str, threshold: float, relative: str = "") -> float:
    """Share of target instances matched; `relative` "diameter" or "width" (/640) scales the threshold."""
    hits = 0
    for pairing in pairings:
        unit = {"": 1.0, "diameter": pairing.diameter, "width": pairing.record.size[0] / 640}[relative]
        hits += len(match(pairing.errors[name], threshold * unit))
    return hits / sum(pairing.target.inst_count for pairing in pairings)


def bop_scores(pairings: Sequence[Pairing]) -> dict[str, float]:
    """Average recalls and classic recalls, in 0..1, of these pairings (one object's or all)."""
    scores = {
        "AR_MSSD": float(np.mean([recall(pairings, "mssd", t, "diameter") for t in MSSD_SHARES])),
        "AR_MSPD": float(np.mean([recall(pairings, "mspd", t, "width") for t in MSPD_PIXELS])),
    }
    if all("vsd" in pairing.errors for pairing in pairings):
        scores["AR_VSD"] = float(
            np.mean([_vsd_recall(pairings, i, t) for i in range(10) for t in VSD_SHARES])
        )
    scores["AR"] = float(np.mean(list(scores.values())))  # BOP's, where VSD is among them
    scores["ADD(-S)"] = recall(pairings, "add_s", 0.1, "diameter")
    scores["projection_5px"] = recall(pairings, "projection", 5.0)
    scores["5cm5deg"] = recall(pairings, "cm_deg", 1.0)
    instances = sum(pairing.target.inst_count for pairing in pairings)
    scores["found"] = sum(len(nearest_pairs(pairing)) for pairing in pairings) / instances
    return scores


def nearest_pairs(pairing: Pairing) -> list[tuple[int, int]]:
    """(estimate, truth) pairs by MSSD without any threshold: what each estimate is held against."""
    return match(pairing.errors["mssd"], np.inf)


def _vsd_recall(pairings: Sequence[Pairing], tau: int, threshold: float) -> float:
    hits = sum(len(match(pairing.errors["vsd"][:, :, tau], threshold)) for pairing in pairings)
    return hits / sum(pairing.target.inst_count for pairing in pairings)


def _errors(
    estimates: Sequence[Estimate], truths: Sequence[Annotation], record: Record, geometry: ObjectGeometry
) -> dict[str, FloatArray]:
    est = np.stack([e.T_CO for e in estimates])[:, None] if estimates else np.empty((0, 1, 4, 4))
    gt = np.stack([a.T_CO for a in truths])[None]
    points, symmetries = geometry.points, geometry.symmetries
    errors = {
        "mssd": pose_errors.mssd(est, gt, points, symmetries),
        "mspd": pose_errors.mspd(est, gt, record.K, points, symmetries),
        "add_s": pose_errors.add_s(est, gt, points, geometry.symmetric),
        "projection": pose_errors.projection_error(est, gt, record.K, points, symmetries),
        "rotation_deg": pose_errors.rotation_error(est, gt, symmetries),
        "translation_m": pose_errors.translation_error(est, gt, symmetries),
    }
    # One number for the pair of conditions, below 1 where both hold.
    errors["cm_deg"] = np.maximum(errors["translation_m"] / 0.05, errors["rotation_deg"] / 5)
    scene = record.depth()
    if scene is not None:
        at_est = [_render(T, record, geometry) for T in est[:, 0]]
        at_gt = [_render(T, record, geometry) for T in gt[0]]
        constants = (record.K, VSD_DELTA, VSD_SHARES, geometry.diameter)
        vsd = [[pose_errors.vsd(e, g, scene, *constants) for g in at_gt] for e in at_est]
        errors["vsd"] = np.array(vsd).reshape(len(estimates), len(truths), len(VSD_SHARES))
    return errors


def _render(T_CO: FloatArray, record: Record, geometry: ObjectGeometry) -> FloatArray:
    """[H, W] depth of the object, 0 where it is not seen."""
    points = pose_errors.transform(T_CO, geometry.points)
    raster = rasterise(pose_errors.project(record.K, points), points[:, 2], geometry.faces, record.size)
    return np.where(raster.mask, raster.depth, 0.0)
