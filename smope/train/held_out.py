"""Scores on held-out images while training runs: the benchmark's errors, of each object's best detection.

All is computed on the device from the network's own output, so a few hundred images take seconds. `smope
evaluate` is the judge of the final model; this is for the curve over minutes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from smope.architectures import Network, encode_objects, find
from smope.data.items import Batch
from smope.geometry.boxes import cxcywh_to_xyxy, paired_iou
from smope.geometry.stretch import size_factor
from smope.networks.pose_head import unit_to_pixels
from smope.networks.smope_s import Found
from smope.objects import ObjectModel

log = logging.getLogger(__name__)

MIN_IOU = 0.5  # of the boxes, where a detection could be meant for several
MIN_VISIBILITY = 0.1  # of the silhouette: BOP's targets are at least so visible
POINTS = 512  # surface points an object, in farthest-point order
_SYMMETRY_STEP = 10.0  # degrees
_STEPS = torch.arange(1, 11, dtype=torch.float64)  # BOP'19: ten thresholds each


class HeldOut:
    """Truth and network output of some images, object by object, reduced to scores."""

    def __init__(
        self, objects: Sequence[ObjectModel], batches: Sequence[Batch], crowds: bool = False
    ) -> None:
        """`batches` stay where they are; without instances and depth they are small enough for the device.

        With `crowds` an image may show several instances of an object: a detection is then meant for the one
        that its box covers by half.
        """
        if not batches:
            raise ValueError("no held-out images given; an evaluation needs at least one batch")
        self.objects, self.batches, self.crowds = list(objects), list(batches), crowds
        device = batches[0].images.device
        self._points = [model.points[:POINTS].to(device) for model in objects]  # [V, 3] metres, own frame
        self._symmetries = [model.symmetries.transforms(_SYMMETRY_STEP).to(device) for model in objects]

    def scores(self, network: Network) -> dict[str, float]:
        """AR_MSSD, AR_MSPD, box IoU, visibility error, median depth error and share found; nothing where the
        images show nothing that can be scored, as a training does not end for want of a score."""
        device = self.batches[0].images.device
        tokens = encode_objects(network, self.objects, device)
        rows = []
        for batch in self.batches:
            found, _ = find(network, batch.images.float(), batch.K, tokens, 64)
            rows.append(self._errors(found, batch))
        table = torch.cat(rows).double().cpu()  # [T, 6]
        if not len(table):
            log.warning("no scores: no held-out image shows an object that is visible and alone of its kind")
            return {}
        mssd, mspd, iou, visibility, depth, score = table.unbind(1)
        width = self.batches[0].images.shape[-1]
        surface = (mssd[:, None] < 0.05 * _STEPS).double().mean()
        projection = (mspd[:, None] < 5.0 * _STEPS * width / 640).double().mean()
        seen = torch.isfinite(mssd)
        return {
            "AR": float((surface + projection) / 2),
            "AR_MSSD": float(surface),
            "AR_MSPD": float(projection),
            "box_IoU": float(iou.mean()),
            "found": float((score > 0.3).double().mean()),
            "visibility_error": float(visibility[seen].mean()) if seen.any() else 1.0,
            "depth_error": float(depth[seen].median()) if seen.any() else 1.0,
        }

    def _errors(self, found: Found, batch: Batch) -> Tensor:
        """[T, 6] of this batch's targets: MSSD over the size, MSPD in pixels, IoU, visibility error,
        relative depth error, score. A target without any detection has infinite errors."""
        same = batch.labels[:, :, None] == batch.labels[:, None, :]
        # With several instances of one object, which detection is meant for which is a question of its own.
        target = batch.present & (batch.visibility >= MIN_VISIBILITY) & (self.crowds | (same.sum(-1) == 1))
        image, slot = target.nonzero(as_tuple=True)  # [T] each
        labels = batch.labels[image, slot]
        size = (batch.images.shape[-1], batch.images.shape[-2])
        boxes = unit_to_pixels(cxcywh_to_xyxy(found.boxes).unflatten(-1, (2, 2)), size).flatten(-2)
        fits = found.labels[image] == labels[:, None]  # [T, P]
        if self.crowds:
            fits = fits & (paired_iou(boxes[image], batch.boxes_xyxy[image, slot][:, None])[0] > MIN_IOU)
        candidates = torch.where(fits, found.scores[image], -1.0)
        score, best = candidates.max(1)
        missed = score < 0

        pose = found.pairs.poses[-1]
        rotation, centre = pose.rotation[image, best].float(), pose.translation[image, best].float()
        truth, K = batch.T_CO[image, slot], batch.K[image]
        ones = torch.ones_like(centre)
        scale = ones if pose.scale is None else pose.scale[image, best].float()
        true_scale = ones if batch.scale is None else batch.scale[image, slot]
        mssd, mspd = torch.full_like(score, torch.inf), torch.full_like(score, torch.inf)
        for index, model in enumerate(self.objects):
            mine = labels == index
            moved = (self._points[index] - model.centre.to(rotation.device)) * scale[mine][:, None]
            estimate = moved @ rotation[mine].mT + centre[mine][:, None]  # [n, V, 3]
            affine = truth[mine] * torch.nn.functional.pad(true_scale[mine], (0, 1), value=1.0)[:, None]
            where = affine[:, None] @ self._symmetries[index]  # [n, S, 4, 4]
            true = self._points[index] @ where[..., :3, :3].mT + where[..., None, :3, 3]  # [n, S, V, 3]
            far = (estimate[:, None] - true).norm(dim=-1).amax(-1).amin(-1)
            pixels, true_pixels = _project(estimate, K[mine]), _project(true, K[mine][:, None])
            apart = (pixels[:, None] - true_pixels).norm(dim=-1).amax(-1).amin(-1)
            mssd[mine], mspd[mine] = far / (model.diameter * size_factor(true_scale[mine])), apart

        iou = paired_iou(boxes[image, best], batch.boxes_xyxy[image, slot])[0]
        visible = found.pairs.visibility_logit[image, best].sigmoid()
        middle = torch.stack([model.centre for model in self.objects]).to(centre.device)[labels] * true_scale
        true_depth = (truth[:, :3, :3] @ middle[..., None])[:, 2, 0] + truth[:, 2, 3]
        depth = (centre[:, 2] / true_depth - 1).abs()
        errors = torch.stack([mssd, mspd, depth], -1).masked_fill(missed[:, None], torch.inf)
        return torch.stack(
            [
                errors[:, 0],
                errors[:, 1],
                iou.masked_fill(missed, 0.0),
                (visible - batch.visibility[image, slot]).abs(),
                errors[:, 2],
                score.clamp(min=0.0),
            ],
            -1,
        )


def _project(points: Tensor, K: Tensor) -> Tensor:
    """[..., V, 3] camera points and [..., 3, 3] -> [..., V, 2] pixels; points behind the camera go far."""
    pixels = points @ K.mT
    return pixels[..., :2] / pixels[..., 2:].clamp(min=1e-4)
