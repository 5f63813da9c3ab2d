"""The pose that a pair is trained towards: of all poses that look the same, the one nearest to the
prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smope.geometry.projection import project
from smope.geometry.stretch import turned_scale
from smope.networks.outputs import PoseEstimate, take
from smope.objects import ObjectModel


@dataclass(frozen=True, eq=False)
class ObjectTable:
    """Geometry of M objects as tensors, centred on the bounding box."""

    centres: Tensor  # [M, 3] metres, in the mesh's own frame
    diameters: Tensor  # [M] metres
    points: Tensor  # [M, A, 3] surface points over the diameter
    covariance: Tensor  # [M, 3, 3] mean of p p^T
    symmetry_rotation: Tensor  # [M, S, 3, 3] padded with identities
    symmetry_shift: Tensor  # [M, S, 3] metres, of the centred mesh
    symmetric: Tensor  # [M] bool

    @staticmethod
    def of(objects: Sequence[ObjectModel], points: int = 128) -> ObjectTable:
        centres = torch.stack([o.centre for o in objects]).float()
        diameters = torch.tensor([o.diameter for o in objects])
        surface = torch.stack([(o.points[:points] - o.centre) / o.diameter for o in objects]).float()
        transforms = [o.symmetries.transforms() for o in objects]
        most = max(len(t) for t in transforms)
        padded = torch.stack([torch.cat([t, torch.eye(4).expand(most - len(t), 4, 4)]) for t in transforms])
        rotation, shift = padded[..., :3, :3], padded[..., :3, 3]
        # x -> R x + s in the own frame is x' -> R x' + (R c + s - c) for x' = x - c.
        shift = (rotation @ centres[:, None, :, None])[..., 0] + shift - centres[:, None]
        covariance = torch.einsum("mai,maj->mij", surface, surface) / surface.shape[1]
        many = torch.tensor([len(t) > 1 for t in transforms])
        return ObjectTable(centres, diameters, surface, covariance, rotation, shift, many)

    def to(self, device: torch.device | str) -> ObjectTable:
        return ObjectTable(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


@dataclass(frozen=True, eq=False)
class PairTruth:
    """Every acceptable pose of each pair, of the centred mesh."""

    rotations: Tensor  # [B, P, S, 3, 3]
    translations: Tensor  # [B, P, S, 3] metres
    covariance: Tensor  # [B, P, 3, 3]
    K: Tensor  # [B, 3, 3]
    scales: Tensor | None = None  # [B, P, S, 3] of the mesh along its own axes

    @staticmethod
    def of(
        table: ObjectTable,
        labels: Tensor,
        T_CO: Tensor,
        slots: Tensor,
        K: Tensor,
        scale: Tensor | None = None,
    ) -> PairTruth:
        """labels [B, N] with -1 for empty, T_CO [B, N, 4, 4] of the own frames, slots [B, P], scale
        [B, N, 3]"""
        labels = take(labels, slots).clamp(min=0)
        T = take(T_CO, slots)  # [B, P, 4, 4]
        rotation, turns = T[..., None, :3, :3], table.symmetry_rotation[labels]
        centre, shift, covariance = (
            table.centres[labels],
            table.symmetry_shift[labels],
            table.covariance[labels],
        )
        scales = None
        if scale is not None:
            stretch = take(scale, slots)  # [B, P, 3]
            scales = turned_scale(stretch, turns)
            centre, shift = centre * stretch, shift * stretch[..., None, :]
            covariance = covariance * stretch[..., None, :] * stretch[..., :, None]
        base = (T[..., :3, :3] @ centre[..., None])[..., 0] + T[..., :3, 3]
        moved = (rotation @ shift[..., None])[..., 0] + base[..., None, :]
        return PairTruth(rotation @ turns, moved, covariance, K, scales)

    def repeat(self, times: int) -> PairTruth:
        """The same truth for `times` layers, one after another in the batch"""
        return PairTruth(
            self.rotations.repeat(times, 1, 1, 1, 1),
            self.translations.repeat(times, 1, 1, 1),
            self.covariance.repeat(times, 1, 1, 1),
            self.K.repeat(times, 1, 1),
            None if self.scales is None else self.scales.repeat(times, 1, 1, 1),
        )

    def nearest(self, rotation: Tensor) -> PoseEstimate:
        """The acceptable pose whose rotation moves the surface least, in the mean square, from `rotation`."""
        with torch.no_grad():  # as a decorator it would end a graph of torch.compile
            change = rotation[..., None, :, :] - self.rotations  # [B, P, S, 3, 3]
            # mean |dR p|^2 = trace(dR C dR^T) with C = mean p p^T: no points needed.
            distance = ((change @ self.covariance[..., None, :, :]) * change).sum((-1, -2))
            best = distance.argmin(-1)[..., None]  # [B, P, 1]
            chosen = self.rotations.gather(2, best[..., None, None].expand(*best.shape, 3, 3))[:, :, 0]
            translation = self.translations.gather(2, best[..., None].expand(*best.shape, 3))[:, :, 0]
            scale = None
            if self.scales is not None:
                scale = self.scales.gather(2, best[..., None].expand(*best.shape, 3))[:, :, 0]
            return PoseEstimate(chosen, translation, project(translation, self.K), scale=scale)
