"""What a model's scores lose, and to what: put the truth in for one part of each pose and score again.

python tools/what_is_lost.py DATASET [--model lmo] [--predictions FILE]

DATASET is in BOP's form. Of each target the best-scored detection is taken, as BOP does. Its pose falls
apart into rotation, depth, and lateral shift (the ray through the projected centre of the bounding box); a
part is replaced by that of the true pose, of symmetric ones by the nearest in rotation. Markdown tables are
printed. It measures; it is no means of choosing thresholds or weights by photos that they are judged on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import ConvexHull
from scipy.spatial.transform import Rotation

from smope.data.records import Annotation, Record
from smope.evaluate import pose_errors
from smope.evaluate.bop import MSPD_PIXELS, MSSD_SHARES, ObjectGeometry
from smope.evaluate.report import markdown_table, spearman
from smope.evaluate.sets import PoseSet, load_pose_set
from smope.geometry.boxes import cxcywh_to_xyxy, paired_iou
from smope.images import load_image
from smope.model import SMOPE
from smope.network_inputs import mesh_inputs, pad_to_multiple
from smope.networks.outputs import take
from smope.networks.pose_head import unit_to_pixels
from smope.networks.rivals import shifted_scores
from smope.networks.smope_s import SmopeS

Array = NDArray[np.float64]
Key = tuple[int, int]
Shape = tuple[ObjectGeometry, Array]  # and the corners of its convex hull

PAIRS = 64  # of query and mesh an image, as `smope evaluate` asks for
FORCED = 8  # queries a target, nearest to its true box, that are made to name its mesh
DISTANCES = (0.0, 0.6, 0.8, 1.0, 1.2, 2.0)  # metres
VISIBLE = (0.0, 0.3, 0.6, 0.8, 0.95, 1.01)  # shares
TURNS = (0, 5, 10, 20, 45, 90, 181)  # degrees
PARTS = (
    *("nothing", "rotation", "depth", "depth, as far as the box's size", "lateral"),
    *("rotation + depth", "rotation + lateral", "all but rotation"),
)
RANKED = ("by score", "least sigma, rotation", "least sigma, translation", "score over sigma")
ORACLES = ("best box of its class", "best box of all", "best pose of its class", "best pose of all")
SCORES = ("AR_MSSD", "AR_MSPD", "ADD(-S)")
MEDIANS = ("rotation", "depth", "depth, signed", "lateral px", "box IoU")


@torch.no_grad()
def look(model: SMOPE, record: Record, truths: Sequence[Annotation]) -> dict[str, Any]:
    """Every pair that `predict` would weigh, then `FORCED` pairs a target; poses of every layer."""
    network, names = model.network, list(model.objects)
    if not isinstance(network, SmopeS):
        raise ValueError(f"{type(network).__name__} given; only smope-s has pairs and layers to look into")
    inputs = mesh_inputs(list(model.objects.values()), network.config.surface_points, network.config.anchors)
    meshes = network.encode_meshes(inputs)
    images = pad_to_multiple(load_image(record.image_path)[None].float() / 255)
    size = (images.shape[-1], images.shape[-2])
    features = network.encode_image(images)
    found = network.detect(features, meshes)
    chances = found.logits[-1].sigmoid()  # [1, Q, M]
    corners = unit_to_pixels(cxcywh_to_xyxy(found.boxes[-1]).unflatten(-1, (2, 2)), size).flatten(-2)[0]
    score, named = chances[0].max(-1)
    queries = [score.topk(min(PAIRS, len(score))).indices]
    labels = [named[queries[0]]]
    for truth in truths:
        box = torch.from_numpy(np.asarray(truth.box_xyxy)).float()
        queries.append(paired_iou(corners, box.expand_as(corners))[0].topk(FORCED).indices)
        labels.append(torch.full((FORCED,), names.index(truth.name)))
    query, label = torch.cat(queries)[None], torch.cat(labels)[None]
    K = torch.from_numpy(record.K).float()[None]
    boxes = take(found.boxes[-1], query)
    pairs, direct = network.direct_poses(take(found.queries[-1], query), boxes, label, meshes, K, size)
    poses, _ = network.refine_poses(pairs, direct.poses[0], boxes, label, meshes, K, size, features)
    scores = chances[0, query[0], label[0]]
    if poses.score_shift is not None:
        scores = shifted_scores(scores, poses.score_shift[0])
    return {
        "label": label[0].numpy(),
        "score": scores.numpy(),
        "box": corners[query[0]].numpy(),
        "sigma": poses.log_sigma[0].clamp(-6, 3).exp().numpy(),  # radians, diameters
        "rotation": np.stack([p.rotation[0].double().numpy() for p in poses.poses]),  # [L, P, 3, 3]
        "centre": np.stack([p.translation[0].double().numpy() for p in poses.poses]),  # [L, P, 3]
    }


@dataclass(frozen=True, eq=False)
class Case:
    """One target and what was found of it."""

    truth: Annotation
    errors: dict[str, Array]  # variant -> [3] MSSD over the diameter, MSPD in pixels, ADD(-S) over d.
    facts: dict[str, float] = field(default_factory=dict)  # of the best-scored detection; empty if missed


def replaced(R: Array, t: Array, true_R: Array, true_t: Array, size: float) -> dict[str, tuple[Array, Array]]:
    """The pose (R, t) of the centred mesh with each of `PARTS` from the true one.

    `size` is that of the found box over the true one's: a box too large by a tenth is one too near by that.
    """
    deep, aside = t * (true_t[2] / t[2]), true_t * (t[2] / true_t[2])
    moved = [(R, t), (true_R, t), (R, deep), (R, t * size), (R, aside), (true_R, deep), (true_R, aside)]
    return dict(zip(PARTS, [*moved, (R, true_t)], strict=True))


def pose_of(R: Array, t: Array, middle: Array) -> Array:
    """[4, 4] in the mesh's own frame from rotation and centre; `middle` [3] is the centre in that frame."""
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = R, t - R @ middle
    return T


def nearest_truth(R: Array, T_CO: Array, symmetries: Array) -> Array:
    """[4, 4] the true pose, among the symmetric ones, nearest in rotation to R."""
    alike = T_CO @ symmetries
    return alike[np.einsum("ij,sij->s", R, alike[:, :3, :3]).argmax()]


def errors_of(poses: Array, truth: Annotation, record: Record, shape: ObjectGeometry) -> Array:
    """[V, 3] of the poses [V, 4, 4]"""
    exact = truth.T_CO[None]
    mssd = pose_errors.mssd(poses, exact, shape.points, shape.symmetries) / shape.diameter
    mspd = pose_errors.mspd(poses, exact, record.K, shape.points, shape.symmetries) * 640 / record.size[0]
    add = pose_errors.add_s(poses, exact, shape.points, shape.symmetric) / shape.diameter
    return np.stack([mssd, mspd, add], -1)


def judge(
    truth: Annotation,
    record: Record,
    seen: dict[str, Any],
    own: NDArray[Any],
    forced: range,
    middle: Array,
    shape: Shape,
) -> Case:
    """Errors of all variants of one target; `own` are its mesh's pairs, `forced` those made for it."""
    geometry, corners = shape
    every = np.concatenate([own, np.array(forced)])
    R, t, score, sigma = seen["rotation"], seen["centre"], seen["score"], seen["sigma"]
    true_box = np.asarray(truth.box_xyxy)
    boxes = torch.from_numpy(seen["box"]).double()
    overlap = paired_iou(boxes, torch.from_numpy(true_box).expand_as(boxes))[0].numpy()
    poses = {p: pose_of(R[-1, p], t[-1, p], middle) for p in every.tolist()}
    far = pose_errors.mssd(np.stack(list(poses.values())), truth.T_CO[None], corners, geometry.symmetries)
    picks = {"best box of all": every[overlap[every].argmax()], "best pose of all": every[far.argmin()]}
    variants, facts = {}, {}
    if len(own):
        top = own[score[own].argmax()]
        near = own[score[own] >= 0.5 * score[top]]  # sigma says nothing of pairs that are no detections
        best = [
            top,
            *(near[sigma[near, i].argmin()] for i in (0, 1)),
            own[(score[own] / sigma[own].sum(-1)).argmax()],
        ]
        best += [own[overlap[own].argmax()], own[far[: len(own)].argmin()]]
        picks |= dict(zip([*RANKED, *ORACLES[::2]], best, strict=True))
        true = nearest_truth(R[-1, top], truth.T_CO, geometry.symmetries)
        true_R, true_t = true[:3, :3], true[:3, :3] @ middle + true[:3, 3]
        found_t, found_box = t[-1, top], seen["box"][top]
        size = float(np.prod((found_box[2:] - found_box[:2]) / (true_box[2:] - true_box[:2])) ** 0.5)
        for name, pose in replaced(R[-1, top], found_t, true_R, true_t, size).items():
            variants[name] = pose_of(*pose, middle)
        variants |= {f"layer {i}": pose_of(R[i, top], t[i, top], middle) for i in range(len(R))}
        turn = np.degrees(Rotation.from_matrix(R[-1, top] @ true_R.T).as_rotvec())
        in_plane = abs(turn @ true_t) / np.linalg.norm(true_t)
        uv, true_uv = ((p @ record.K.T)[:2] / p[2] for p in (found_t, true_t))
        facts = {
            "turn": np.linalg.norm(turn),  # degrees
            "in plane": in_plane,  # its part about the ray, and the rest
            "out of plane": np.sqrt(max(turn @ turn - in_plane**2, 0)),
            "depth": np.log(found_t[2] / true_t[2]),
            "size": np.log(size),
            "lateral": np.linalg.norm(uv - true_uv),  # pixels
            "overlap": overlap[top],
            "shift": np.linalg.norm(found_t - true_t) / geometry.diameter,
            "said turn": np.degrees(sigma[top, 0]),
            "said shift": sigma[top, 1],
        }
    variants |= {name: poses[int(pick)] for name, pick in picks.items()}
    apart = {T.tobytes(): T for T in variants.values()}  # many are one and the same
    errors = dict(zip(apart, errors_of(np.stack(list(apart.values())), truth, record, geometry), strict=True))
    return Case(
        truth, {n: errors[T.tobytes()] for n, T in variants.items()}, {n: float(x) for n, x in facts.items()}
    )


def judge_all(pose_set: PoseSet, model: SMOPE, seen: dict[Key, dict[str, Any]]) -> list[Case]:
    cases, names = [], list(model.objects)
    # The vertex moved furthest is a corner of the hull, so that is enough to find the pose of least MSSD.
    geometries = {i: pose_set.geometry(i) for i in pose_set.names if pose_set.names[i] in names}
    shapes = {i: (g, g.points[ConvexHull(g.points).vertices]) for i, g in geometries.items()}
    for key, record in pose_set.records.items():
        for n, truth in enumerate(targets_of(pose_set, key)):
            forced = range(PAIRS + n * FORCED, PAIRS + (n + 1) * FORCED)
            own = np.flatnonzero(seen[key]["label"][:PAIRS] == names.index(truth.name))
            middle = model.objects[truth.name].centre.double().numpy()
            cases.append(judge(truth, record, seen[key], own, forced, middle, shapes[truth.object_id or 0]))
    return cases


def targets_of(pose_set: PoseSet, key: Key) -> list[Annotation]:
    """The annotations asked for, the most visible one where an object stands there more than once."""
    wanted = [t.obj_id for t in pose_set.targets if (t.scene_id, t.im_id) == key]
    every = sorted(pose_set.records[key].annotations, key=lambda a: -a.visibility)
    return [next(a for a in every if a.object_id == obj_id) for obj_id in wanted]


def recalls(cases: Sequence[Case], variant: str) -> list[str]:
    """AR_MSSD, AR_MSPD, ADD(-S) at 0.1 d"""
    errors = np.stack([case.errors.get(variant, np.full(3, np.inf)) for case in cases])
    shares = (errors[:, :1] < MSSD_SHARES).mean(), (errors[:, 1:2] < MSPD_PIXELS).mean()
    return [f"{shares[0]:.3f}", f"{shares[1]:.3f}", f"{(errors[:, 2] < 0.1).mean():.1%}"]


def medians(cases: Sequence[Case]) -> list[str]:
    found = [c.facts for c in cases if c.facts]
    middle = {name: np.median([f[name] for f in found]) for name in ("turn", "depth", "lateral", "overlap")}
    deep = np.median([abs(f["depth"]) for f in found])
    shown = [f"{middle['turn']:.1f}", f"{deep:.1%}", f"{middle['depth']:+.1%}", f"{middle['lateral']:.1f}"]
    return [*shown, f"{middle['overlap']:.2f}"]


def binned(cases: Sequence[Case], of: Callable[[Case], float], edges: Sequence[float]) -> list[list[str]]:
    groups = [(f"{a:g}-{b:.2g}", [c for c in cases if a <= of(c) < b]) for a, b in pairwise(edges)]
    return [[n, str(len(g)), *recalls(g, "nothing"), *medians(g)] for n, g in groups if g]


def depth_row(cases: Sequence[Case]) -> list[str]:
    depth, size = np.array([(c.facts["depth"], c.facts["size"]) for c in cases if c.facts]).T
    shares = [f"{(depth > 0).mean():.0%}", f"{(abs(depth) < 0.02).mean():.0%}", f"{np.median(size):+.1%}"]
    return [f"{np.median(depth):+.1%}", *shares, f"{spearman(depth, size):+.2f}"]


def turn_row(cases: Sequence[Case]) -> list[str]:
    counts = np.histogram([c.facts["turn"] for c in cases if c.facts], TURNS)[0]
    small = [c.facts for c in cases if c.facts and c.facts["turn"] < 45]
    return [str(n) for n in counts] + [
        f"{np.median([f[k] for f in small]):.1f}" for k in ("in plane", "out of plane")
    ]


def reliability(cases: Sequence[Case], name: str) -> list[list[str]]:
    """A fifth of the targets a row, by the error that the network expected of them."""
    pairs = np.array(sorted((c.facts[f"said {name}"], c.facts[name]) for c in cases if c.facts))
    numbers = [(*part.mean(0), np.median(part[:, 1])) for part in np.array_split(pairs, 5)]
    return [[str(n), *(f"{x:.3g}" for x in row)] for n, row in enumerate(numbers, 1)]


def tables(cases: Sequence[Case]) -> str:
    """All of them as Markdown."""
    names = sorted({c.truth.name for c in cases})
    groups = {name: [c for c in cases if c.truth.name == name] for name in names} | {"all": list(cases)}
    layers = sorted({v for c in cases for v in c.errors if v.startswith("layer")})
    variants = (*PARTS, *layers, *ORACLES)
    parts = [
        section(
            f"{kind} with the truth in place of a part",
            ["", *groups],
            [[v, *(recalls(g, v)[i] for g in groups.values())] for v in variants],
        )
        for i, kind in enumerate(SCORES)
    ]
    chosen = [[v, *recalls(cases, v)] for v in (*layers, *RANKED, *ORACLES)]
    columns = ["", "targets", *SCORES, *MEDIANS]
    parts += [
        section("Layers (0 is the direct head), and which pair stands for a target", ["", *SCORES], chosen),
        section("Distance in metres", columns, binned(cases, lambda c: float(c.truth.T_CO[2, 3]), DISTANCES)),
        section("Visible share", columns, binned(cases, lambda c: c.truth.visibility, VISIBLE)),
        section(
            "Object",
            columns,
            [[n, str(len(g)), *recalls(g, "nothing"), *medians(g)] for n, g in groups.items()],
        ),
        section(
            "Depth, found over true",
            ["", "median", "too far", "within 2 %", "box's size", "correlation of the two"],
            [[n, *depth_row(g)] for n, g in groups.items()],
        ),
        section(
            "Rotation errors in degrees; medians of those below 45",
            ["", *(f"{a}-{min(b, 180)}" for a, b in pairwise(TURNS)), "in plane", "out of plane"],
            [[n, *turn_row(g)] for n, g in groups.items()],
        ),
        *(
            section(f"Sigma, {unit}", ["fifth", "said", "mean error", "median"], reliability(cases, name))
            for name, unit in (("turn", "degrees"), ("shift", "diameters"))
        ),
    ]
    return "\n".join(parts)


def section(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f"{title}:\n\n{markdown_table(heads, rows)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--model", default="lmo", help="a bundled name or a folder")
    parser.add_argument("--predictions", type=Path, help="what was found: read if it exists, else written")
    options = parser.parse_args()
    pose_set = load_pose_set(options.dataset, "bop")
    model = SMOPE.from_pretrained(options.model, device="cpu")
    if options.predictions is not None and options.predictions.is_file():
        seen = torch.load(options.predictions, weights_only=False)
    else:
        seen = {key: look(model, r, targets_of(pose_set, key)) for key, r in pose_set.records.items()}
        if options.predictions is not None:
            torch.save(seen, options.predictions)
    print(tables(judge_all(pose_set, model, seen)))


if __name__ == "__main__":
    main()
