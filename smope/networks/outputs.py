"""What the networks return."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from smope.networks.mesh_decoder import RebuiltMeshes
from smope.networks.mesh_encoder import MeshTokens
from smope.networks.position import Shapes
from smope.networks.rivals import Rivals


@dataclass(frozen=True, eq=False)
class Features:
    """An encoded image."""

    memory: Tensor  # [B, S, C] tokens of all levels in turn
    shapes: Shapes
    fine: Tensor  # [B, C4, H / 4, W / 4] backbone features

    def cells(self, index: int) -> Tensor:
        """[B, h w, C] the tokens of one level"""
        start = sum(h * w for h, w in self.shapes[:index])
        h, w = self.shapes[index]
        return self.memory[:, start : start + h * w]

    def level(self, index: int) -> Tensor:
        """[B, C, h, w] the tokens of one level as a picture"""
        return self.cells(index).transpose(1, 2).unflatten(-1, self.shapes[index])


@dataclass(frozen=True, eq=False)
class Detections:
    """Queries after each decoder layer; boxes as cx, cy, w, h in 0..1 of the padded image."""

    queries: Tensor  # [L, B, Q, C]
    boxes: Tensor  # [L, B, Q, 4]
    logits: Tensor  # [L, B, Q, M] similarity to each mesh
    proposal_boxes: Tensor  # [B, K, 4] of the chosen encoder tokens
    proposal_logits: Tensor  # [B, K]
    denoising: int = 0  # how many queries at the front are noised copies of the truth


@dataclass(frozen=True, eq=False)
class PoseEstimate:
    """Poses of pairs (query, mesh), of the mesh centred on its bounding box, in the camera frame."""

    rotation: Tensor  # [B, P, 3, 3]
    translation: Tensor  # [B, P, 3] metres
    centre: Tensor  # [B, P, 2] projected centre, pixels
    offsets: Tensor | None = (
        None  # [B, P, A, 2] where the anchors should move, in units of the apparent diameter
    )
    offset_weights: Tensor | None = None  # [B, P, A] 0..1
    anchors_uv: Tensor | None = None  # [B, P, A, 2] where the anchors stood, pixels
    scale: Tensor | None = None  # [B, P, 3] along the mesh's own axes; None where it is not predicted

    def pairs(self, images: slice, pairs: slice) -> PoseEstimate:
        """Those pairs of those images"""
        values: dict[str, Tensor | None] = {field.name: getattr(self, field.name) for field in fields(self)}
        own = {name: value[images, pairs] for name, value in values.items() if value is not None}
        return PoseEstimate(**own)

    def joined(self, other: PoseEstimate) -> PoseEstimate:
        """A direct estimate with the pairs of another behind its own"""
        mine, its = self.scale, other.scale
        return PoseEstimate(
            torch.cat([self.rotation, other.rotation], 1),
            torch.cat([self.translation, other.translation], 1),
            torch.cat([self.centre, other.centre], 1),
            scale=None if mine is None or its is None else torch.cat([mine, its], 1),
        )

    def detach(self) -> PoseEstimate:
        return PoseEstimate(
            self.rotation.detach(),
            self.translation.detach(),
            self.centre.detach(),
            scale=None if self.scale is None else self.scale.detach(),
        )


@dataclass(frozen=True, eq=False)
class PairOutputs:
    """Poses and what goes with them: the direct estimate first, then by the region, then one a refinement
    layer."""

    poses: tuple[PoseEstimate, ...]
    visibility_logit: Tensor  # [B, P]
    log_sigma: Tensor  # [B, P, 2] log expected error: rotation in radians, translation over the diameter
    score_shift: Tensor | None = None  # [B, P] <= 0: what a closer look adds to the logit of the score

    def pairs(self, images: slice, pairs: slice) -> PairOutputs:
        """Those pairs of those images"""
        poses = tuple(pose.pairs(images, pairs) for pose in self.poses)
        shift = None if self.score_shift is None else self.score_shift[images, pairs]
        return PairOutputs(poses, self.visibility_logit[images, pairs], self.log_sigma[images, pairs], shift)


@dataclass(frozen=True, eq=False)
class Regions:
    """What was seen in the squares around the boxes of pairs, n x n cells each."""

    pixels: Tensor  # [B, P, n, n, 2] middles of the cells
    surface: (
        Tensor  # [B, P, n, n, 4] place on the centred mesh over the diameter, and the logit of being on it
    )


@dataclass(frozen=True, eq=False)
class TrainingOutputs:
    """All that the losses look at."""

    detections: Detections
    meshes: MeshTokens
    rebuilt: RebuiltMeshes
    features: Features
    match: Tensor  # [L + 1, B, N] query of each slot, a decoder layer each, then the proposals; -1 for none
    direct: PairOutputs  # [L * B, P]: all decoder layers; pairs are the matched ones, then the denoising ones
    refined: PairOutputs  # [B, R]: the first R pairs of the last layer, with the poses that come after
    regions: Regions  # [B, R]
    pair_slots: Tensor  # [B, P] object slot of each pair
    pair_valid: Tensor  # [B, P] bool
    rivals: Rivals | None = None  # where scores are shifted
    coordinates: Tensor | None = None  # [B, 4, h, w] object coordinates and visibility logit at stride 8


def take(x: Tensor, index: Tensor) -> Tensor:
    """[B, Q, ...] and [B, P] -> [B, P, ...]"""
    shape = (*index.shape, *x.shape[2:])
    return x.gather(1, index.reshape(*index.shape, *[1] * (x.dim() - 2)).expand(shape))


def take_layers(x: Tensor, index: Tensor) -> Tensor:
    """[L, B, Q, ...] and [L, B, P] -> [L, B, P, ...]"""
    return torch.stack([take(a, i) for a, i in zip(x, index, strict=True)])
