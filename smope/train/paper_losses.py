"""The authors' loss: detection (L_D), rebuilt meshes (L_M) and poses (L_P), under their names.

`objective="paper-verbatim"` computes what their code computes. `objective="paper"` mends these defects of it:

* Quaternions come scalar last, but their point loss reads them scalar first, so it compares other rotations
  than those meant, while the rotation loss and their evaluation read them scalar last. Mended: scalar last.
* Double cover: q and -q are one rotation, yet the L1 between them counted. Mended: the nearer sign counts.
* Softmax twice: the cross-entropy of the mesh was taken of probabilities, which bounds it away from 0 and
  starves it of gradient. Mended: taken of the logits.
* The pose and the points were those of the mesh that the network holds likeliest, so a wrong class trained
  the pose of the wrong mesh towards the truth. Mended: those of the target's mesh.
* A batch without objects failed in the pose terms, and divided the class term by 1e-7. Mended: the pose terms
  are 0, and the divisor is at least 1.
* In two stages the proposals had weights but no losses, so nothing taught the first stage. Mended: they are
  matched and trained like a layer.
* A fixed device in the middle of the loss failed on a CPU. Everything stays where the outputs are.
* Evaluation ran in training mode: dropout was active, and norms over the meshes used the batch and changed
  their running values. That is not of the loss: here `evaluate` and `predict` call `eval()`.

Left as theirs, because their weights were chosen with it: scale and centre errors are divided by the number
of meshes twice, and the matching counts classes by a sigmoid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import roma
import torch
import torch.nn.functional as F
from torch import Tensor

from smope.geometry.boxes import cxcywh_to_xyxy, paired_giou
from smope.networks.paper_meshes import DecodedMeshes
from smope.networks.paper_pose import PaperPoses
from smope.networks.smope_paper import PaperOutputs
from smope.paper_surfaces import normalised, sample_surface, surface_points
from smope.train import paper_meshes as terms
from smope.train.matcher import MatchCosts
from smope.train.paper_matcher import Match, match_images

PaperObjectiveName = Literal["paper", "paper-verbatim"]
Parts = dict[str, Tensor]
# mesh index, "target" or "pred", vertices, faces -> faces and barycentric weights of surface samples
Sampler = Callable[[int, str, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class PaperWeights:
    """Weights of the parts, by the authors' names; the defaults are theirs for KITTI-3D."""

    loss_ce: float = 1.0
    loss_bbox: float = 5.0
    loss_giou: float = 2.0
    model3d_scales: float = 8.0
    model3d_centers: float = 4.0
    model3d_points: float = 100.0
    pose_6dof_class: float = 0.5
    pose_6dof_add: float = 3.0  # of the translation, despite its name
    pose_6dof_fps_points_3d: float = 1.0
    pose_6dof_rotation: float = 3.0
    chamfer: float = 1.0  # within model3d_points, as the next three
    edge: float = 1.0
    normal: float = 0.01
    laplacian: float = 0.1
    match: MatchCosts = MatchCosts(label=2.0, l1=5.0, giou=2.0)  # noqa: RUF009 - frozen
    focal_alpha: float = 0.25  # of "no object"
    focal_gamma: float = 2.0
    meshes: tuple[float, ...] = ()  # of each mesh in pose_6dof_class; empty: all alike

    @staticmethod
    def kitti3d() -> PaperWeights:
        """Their classes tram, car, truck, van, pedestrian, the rarer the heavier."""
        return PaperWeights(meshes=(0.567, 0.008, 0.284, 0.114, 0.027))

    @staticmethod
    def linemod() -> PaperWeights:
        """Their nine objects, alike."""
        return PaperWeights(
            model3d_scales=120.0,
            model3d_centers=50.0,
            model3d_points=50.0,
            pose_6dof_add=10.0,
            pose_6dof_fps_points_3d=50.0,
        )


@dataclass(frozen=True, eq=False)
class ImageTruth:
    """The N objects of one image."""

    labels: Tensor  # [N] class of the detector, 0 where it knows one
    boxes: Tensor  # [N, 4] cxcywh in 0..1 of the padded image
    meshes: Tensor  # [N] index of the mesh
    translations: Tensor  # [N, 3] metres
    quaternions: Tensor  # [N, 4] (x, y, z, w)


@dataclass(frozen=True, eq=False)
class MeshTruth:
    """The M meshes, normalised, and what normalised them."""

    vertices: tuple[Tensor, ...]  # [V, 3] each
    faces: tuple[Tensor, ...]  # [F, 3] each
    scales: Tensor  # [M, 1]
    centres: Tensor  # [M, 3]
    key_points: Tensor  # [M, K, 3] in the meshes' own frames

    @staticmethod
    def of(vertices: Sequence[Tensor], faces: Sequence[Tensor], key_points: int = 8) -> MeshTruth:
        """`vertices` [V, 3] each, metres, in the own frames"""
        moved, scales, centres = zip(*(normalised(v) for v in vertices), strict=True)
        chosen = torch.stack([terms.key_points(v, key_points) for v in vertices])
        return MeshTruth(moved, tuple(faces), torch.stack(scales), torch.stack(centres), chosen)

    def to(self, device: torch.device | str) -> MeshTruth:
        return MeshTruth(
            tuple(v.to(device) for v in self.vertices),
            tuple(f.to(device) for f in self.faces),
            self.scales.to(device),
            self.centres.to(device),
            self.key_points.to(device),
        )


@dataclass(frozen=True, eq=False)
class Predictions:
    """What the loss looks at."""

    logits: Tensor  # [L, B, Q, classes + 1]
    boxes: Tensor  # [L, B, Q, 4]
    meshes: DecodedMeshes | None = None
    poses: PaperPoses | None = None
    proposal_logits: Tensor | None = None  # [B, S, classes + 1]
    proposal_boxes: Tensor | None = None  # [B, S, 4]

    @staticmethod
    def of(outputs: PaperOutputs) -> Predictions:
        found, proposals = outputs.detections, outputs.detections.proposals
        return Predictions(
            found.logits,
            found.boxes,
            outputs.meshes,
            outputs.poses,
            None if proposals is None else proposals.logits,
            None if proposals is None else proposals.raw_boxes.sigmoid(),
        )

    def float(self) -> Predictions:
        """In float32, whatever mixed precision made of them."""
        poses, meshes = self.poses, self.meshes
        return Predictions(
            self.logits.float(),
            self.boxes.float(),
            None if meshes is None else DecodedMeshes(*(t.float() for t in meshes)),
            None if poses is None else PaperPoses(*(t.float() for t in vars(poses).values())),
            None if self.proposal_logits is None else self.proposal_logits.float(),
            None if self.proposal_boxes is None else self.proposal_boxes.float(),
        )


class PaperCriterion:
    """Predictions and truth -> the total and its parts before they are weighted."""

    def __init__(
        self, meshes: MeshTruth, weights: PaperWeights, objective: PaperObjectiveName = "paper"
    ) -> None:
        if objective not in ("paper", "paper-verbatim"):
            raise ValueError(f"objective {objective!r} given, 'paper' or 'paper-verbatim' expected")
        if weights.meshes and len(weights.meshes) != len(meshes.vertices):
            raise ValueError(
                f"{len(weights.meshes)} weights given for {len(meshes.vertices)} meshes; one each expected"
            )
        self.meshes, self.weights, self.verbatim = meshes, weights, objective == "paper-verbatim"

    def __call__(
        self, found: Predictions, truth: Sequence[ImageTruth], sampler: Sampler
    ) -> tuple[Tensor, Parts]:
        layers = len(found.logits)
        match: list[Match] = []
        parts: Parts = {}
        for layer in [*range(layers - 1), layers - 1]:
            match = self.match(found.logits[layer], found.boxes[layer], truth)
            suffix = "" if layer == layers - 1 else f"_{layer}"
            losses = self.detection_losses(found.logits[layer], found.boxes[layer], truth, match)
            if suffix:
                losses.pop("class_error")
            parts.update({name + suffix: value for name, value in losses.items()})
        if found.meshes is not None:
            parts.update(self.mesh_losses(found.meshes, sampler))
        if found.poses is not None:
            parts.update(self.pose_losses(found.poses, truth, match))
        if found.proposal_logits is not None and found.proposal_boxes is not None and not self.verbatim:
            parts.update(self.proposal_losses(found.proposal_logits, found.proposal_boxes, truth))
        return self.total(parts), parts

    def total(self, parts: Parts) -> Tensor:
        """The weighted sum; parts without a weight are there to be looked at only."""
        weighted = []
        for name, value in parts.items():
            stem, _, layer = name.rpartition("_")
            weight = getattr(self.weights, stem if layer.isdigit() or layer == "enc" else name, None)
            if weight is not None:
                weighted.append(weight * value)
        return torch.stack(weighted).sum()

    def match(self, logits: Tensor, boxes: Tensor, truth: Sequence[ImageTruth]) -> list[Match]:
        labels, truths = [t.labels for t in truth], [t.boxes for t in truth]
        return match_images(logits, boxes, labels, truths, self.weights.match)

    def divisor(self, truth: Sequence[ImageTruth]) -> float:
        return max(float(sum(len(t.labels) for t in truth)), 1e-7 if self.verbatim else 1.0)

    def detection_losses(
        self, logits: Tensor, boxes: Tensor, truth: Sequence[ImageTruth], match: list[Match]
    ) -> Parts:
        """L_D of one layer: logits [B, Q, K], boxes [B, Q, 4]"""
        image, query = _flat(match)
        labels = torch.cat([t.labels[target] for t, (_, target) in zip(truth, match, strict=True)])
        target_boxes = torch.cat([t.boxes[target] for t, (_, target) in zip(truth, match, strict=True)])
        nothing = logits.shape[-1] - 1
        wanted = torch.full(logits.shape[:2], nothing, device=logits.device)
        wanted[image, query] = labels
        log_p = logits.log_softmax(-1)
        focused = log_p * (1 - log_p.exp()) ** self.weights.focal_gamma
        weight = logits.new_ones(nothing + 1)
        weight[nothing] = self.weights.focal_alpha
        divisor = self.divisor(truth)
        chosen = boxes[image, query]
        giou = paired_giou(cxcywh_to_xyxy(chosen), cxcywh_to_xyxy(target_boxes))
        guess = logits.argmax(-1)
        wrong = (guess[image, query] != labels).float()
        counts = torch.tensor([len(t.labels) for t in truth], device=logits.device)
        return {
            "loss_ce": F.nll_loss(focused.flatten(0, 1), wanted.flatten(), weight, reduction="sum") / divisor,
            "class_error": 100 * wrong.sum() / max(len(labels), 1),
            "loss_bbox": (chosen - target_boxes).abs().sum() / divisor,
            "loss_giou": (1 - giou).sum() / divisor,
            "cardinality_error": ((guess != nothing).sum(1) - counts).abs().float().mean(),
        }

    def proposal_losses(self, logits: Tensor, boxes: Tensor, truth: Sequence[ImageTruth]) -> Parts:
        """The first of two stages, trained like a layer; it tells objects from nothing, not their class"""
        plain = [
            ImageTruth(torch.zeros_like(t.labels), t.boxes, t.meshes, t.translations, t.quaternions)
            for t in truth
        ]
        losses = self.detection_losses(logits, boxes, plain, self.match(logits, boxes, plain))
        return {f"{name}_enc": losses[name] for name in ("loss_ce", "loss_bbox", "loss_giou")}

    def mesh_terms(self, meshes: DecodedMeshes, sampler: Sampler) -> Parts:
        """[M] each: the deformed icosphere against the meshes, and its smoothness"""
        template = _template(meshes.offsets.shape[1]).to(meshes.offsets.device)
        vertices = template.vertices + meshes.offsets
        distance = []
        for i, (target, faces) in enumerate(zip(self.meshes.vertices, self.meshes.faces, strict=True)):
            there = surface_points(target, faces, *sampler(i, "target", target, faces))
            sample = sampler(i, "pred", vertices[i], template.faces)
            here = surface_points(vertices[i], template.faces, *sample)
            distance.append(terms.chamfer(there, here))
        return {
            "chamfer": torch.stack(distance),
            "edge": terms.edge_length(vertices, template),
            "normal": terms.normal_consistency(vertices, template),
            "laplacian": terms.laplacian(vertices, template),
        }

    def mesh_losses(self, meshes: DecodedMeshes, sampler: Sampler) -> Parts:
        """L_M"""
        count = len(self.meshes.vertices)
        surface = self.mesh_terms(meshes, sampler)
        points = torch.stack([getattr(self.weights, name) * value for name, value in surface.items()]).sum(0)
        return {
            "model3d_scales": F.l1_loss(meshes.scales, self.meshes.scales) / count,
            "model3d_centers": F.l1_loss(meshes.centres, self.meshes.centres) / count,
            "model3d_points": points.mean(),
        }

    def pose_losses(self, poses: PaperPoses, truth: Sequence[ImageTruth], match: list[Match]) -> Parts:
        """L_P of the last layer"""
        image, query = _flat(match)
        if not len(image):
            if self.verbatim:
                raise ValueError("a batch without objects given: paper-verbatim cannot take it; use 'paper'")
            nothing = poses.poses.sum() * 0 + poses.class_logits.sum() * 0
            names = ("pose_6dof_class", "pose_6dof_add", "pose_6dof_fps_points_3d", "pose_6dof_rotation")
            return dict.fromkeys(names, nothing)
        pairs = list(zip(truth, match, strict=True))
        target = torch.cat([t.meshes[order] for t, (_, order) in pairs])
        translation = torch.cat([t.translations[order] for t, (_, order) in pairs])
        quaternion = torch.cat([t.quaternions[order] for t, (_, order) in pairs])

        scores = poses.probabilities if self.verbatim else poses.class_logits
        scores = scores[image, query]  # [N, M]
        weight = scores.new_tensor(self.weights.meshes) if self.weights.meshes else None
        mesh = scores.argmax(-1) if self.verbatim else target
        pose = poses.poses[image, query, mesh]  # [N, 7]
        points = self.meshes.key_points[mesh]  # [N, K, 3]
        moved = transformed(points, pose[:, 3:], pose[:, :3], self.verbatim)
        wanted = transformed(points, quaternion, translation, self.verbatim)
        rotation = (pose[:, 3:] - quaternion).abs().mean(-1)
        if not self.verbatim:
            rotation = torch.minimum(rotation, (pose[:, 3:] + quaternion).abs().mean(-1))
        return {
            "pose_6dof_class": F.cross_entropy(scores, target, weight),
            "pose_6dof_add": F.l1_loss(pose[:, :3], translation),
            "pose_6dof_fps_points_3d": F.l1_loss(moved, wanted),
            "pose_6dof_rotation": rotation.mean(),
        }


def transformed(points: Tensor, quaternion: Tensor, translation: Tensor, verbatim: bool) -> Tensor:
    """[N, K, 3] points, turned by [N, 4] quaternions of any length and moved by [N, 3]"""
    return points @ rotation_matrix(quaternion, verbatim).mT + translation[:, None]


def rotation_matrix(quaternion: Tensor, verbatim: bool = False) -> Tensor:
    """[..., 4] (x, y, z, w) of any length -> [..., 3, 3]

    Verbatim reads (w, x, y, z) and goes by Rodrigues' formula about an axis that is short by 1e-6 / angle,
    as the library that the authors used does.
    """
    if not verbatim:
        return roma.unitquat_to_rotmat(F.normalize(quaternion, dim=-1))
    unit = F.normalize(roma.quat_wxyz_to_xyzw(quaternion), dim=-1)
    turn = roma.unitquat_to_rotvec(unit)
    angle = turn.norm(dim=-1)[..., None, None]
    axis = turn / (angle[..., 0] + 1e-6)
    unity = torch.eye(3, device=axis.device, dtype=axis.dtype).expand(*axis.shape[:-1], 3, 3)
    cross = torch.linalg.cross(axis[..., None, :].expand_as(unity), unity).mT  # cross @ v is axis x v
    outer = axis[..., :, None] * axis[..., None, :]
    return angle.cos() * unity + (1 - angle.cos()) * outer + angle.sin() * cross


def random_sampler(count: int, generator: torch.Generator | None = None) -> Sampler:
    """New samples at every call."""

    def sample(mesh: int, which: str, vertices: Tensor, faces: Tensor) -> tuple[Tensor, Tensor]:
        return sample_surface(vertices, faces, count, generator)

    return sample


def _flat(match: list[Match]) -> tuple[Tensor, Tensor]:
    """Images [N] and queries [N] of all matches"""
    image = torch.cat([torch.full_like(query, i) for i, (query, _) in enumerate(match)])
    return image, torch.cat([query for query, _ in match])


def _template(vertices: int) -> terms.Template:
    """The icosphere with so many vertices."""
    for level in range(8):
        if 10 * 4**level + 2 == vertices:
            return terms.icosphere(level)
    raise ValueError(f"{vertices} vertices given; an icosphere has 10 * 4^n + 2 of them, such as 642 or 2562")
