"""Scores of a BOP'19 result: average recalls, and the older recalls beside them.

Hodan et al., "BOP Challenge 2020 on 6D Object Localization", section 2: of each target the `inst_count`
estimates of the highest score are taken; for each threshold they are matched, best score first, to the
nearest true pose that is below the threshold and still free; recall is the share of target
instances matched.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from smope.data.bop import Estimate, IntArray, Target
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


def pair_targets(
    targets: Sequence[Target],
    estimates: Iterable[Estimate],
    records: Mapping[tuple[int, int], Record],
    objects: Mapping[int, ObjectGeometry],
) -> list[Pairing]:
    """Each target with its best estimates and their errors; `records` by scene and image id."""
    by_target: dict[tuple[int, int, int], list[Estimate]] = defaultdict(list)
    for estimate in estimates:
        by_target[estimate.scene_id, estimate.im_id, estimate.obj_id].append(estimate)

    pairings = []
    for target in targets:
        record = records[target.scene_id, target.im_id]
        truths = [a for a in record.annotations if a.object_id == target.obj_id]
        if len(truths) < target.inst_count:
            raise ValueError(
                f"{record.image_path}: {target.inst_count} targets of object {target.obj_id}, "
                f"{len(truths)} annotated"
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
    scores["ADD"] = recall(pairings, "add", 0.1, "diameter")
    scores["ADD(-S)"] = recall(pairings, "add_s", 0.1, "diameter")
    scores["projection_5px"] = recall(pairings, "projection", 5.0)
    scores["5cm5deg"] = recall(pairings, "cm_deg", 1.0)
    scores["exp_translation_with_misses"] = _exp_translation(pairings)
    instances = sum(pairing.target.inst_count for pairing in pairings)
    scores["found"] = sum(len(nearest_pairs(pairing)) for pairing in pairings) / instances
    return scores


def nearest_pairs(pairing: Pairing) -> list[tuple[int, int]]:
    """(estimate, truth) pairs by MSSD without any threshold: what each estimate is held against."""
    return match(pairing.errors["mssd"], np.inf)


def _exp_translation(pairings: Sequence[Pairing]) -> float:
    """Mean over all target instances of exp(-distance in metres), 0 for one that was missed.

    The translation score of SMOPE-Net's authors, whose code leaves the misses out.
    """
    found = [np.exp(-p.errors["translation_m"][e, g]) for p in pairings for e, g in nearest_pairs(p)]
    return float(np.sum(found) / sum(p.target.inst_count for p in pairings))


def _vsd_recall(pairings: Sequence[Pairing], tau: int, threshold: float) -> float:
    hits = sum(len(match(pairing.errors["vsd"][:, :, tau], threshold)) for pairing in pairings)
    return hits / sum(pairing.target.inst_count for pairing in pairings)


def _errors(
    estimates: Sequence[Estimate], truths: Sequence[Annotation], record: Record, geometry: ObjectGeometry
) -> dict[str, FloatArray]:
    est = np.stack([e.T_CO for e in estimates])[:, None] if estimates else np.empty((0, 1, 4, 4))
    gt = np.stack([a.T_CO for a in truths])[None]
    # Where objects are scaled their points go through the scale too; angles and distances do not.
    est_points = np.stack([_scaled(e) for e in estimates])[:, None] if estimates else est
    gt_points = np.stack([_scaled(a) for a in truths])[None]
    points, symmetries = geometry.points, geometry.symmetries
    errors = {
        "mssd": pose_errors.mssd(est_points, gt_points, points, symmetries),
        "mspd": pose_errors.mspd(est_points, gt_points, record.K, points, symmetries),
        "add": pose_errors.add(est_points, gt_points, points),
        "projection": pose_errors.projection_error(est_points, gt_points, record.K, points, symmetries),
        "rotation_deg": pose_errors.rotation_error(est, gt, symmetries),
        "translation_m": pose_errors.translation_error(est, gt, symmetries),
    }
    symmetric = geometry.symmetric
    errors["add_s"] = pose_errors.adi(est_points, gt_points, points) if symmetric else errors["add"]
    # One number for the pair of conditions, below 1 where both hold.
    errors["cm_deg"] = np.maximum(errors["translation_m"] / 0.05, errors["rotation_deg"] / 5)
    scene = record.depth()
    if scene is not None:
        at_est = [_render(T, record, geometry) for T in est_points[:, 0]]
        at_gt = [_render(T, record, geometry) for T in gt_points[0]]
        constants = (record.K, VSD_DELTA, VSD_SHARES, geometry.diameter)
        vsd = [[pose_errors.vsd(e, g, scene, *constants) for g in at_gt] for e in at_est]
        errors["vsd"] = np.array(vsd).reshape(len(estimates), len(truths), len(VSD_SHARES))
    return errors


def _scaled(item: Estimate | Annotation) -> FloatArray:
    """[4, 4] with the scale along the mesh's axes, which are the columns."""
    return item.T_CO * np.append(item.scale, 1.0)


def _render(T_CO: FloatArray, record: Record, geometry: ObjectGeometry) -> FloatArray:
    """[H, W] depth of the object, 0 where it is not seen."""
    points = pose_errors.transform(T_CO, geometry.points)
    raster = rasterise(pose_errors.project(record.K, points), points[:, 2], geometry.faces, record.size)
    return np.where(raster.mask, raster.depth, 0.0)
