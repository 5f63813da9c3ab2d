"""What the closer look at pairs learns: to lower the scores of those that are named wrongly."""

from __future__ import annotations

import torch
from torch import Tensor

from smope.geometry.boxes import cxcywh_to_xyxy, paired_iou
from smope.networks.outputs import TrainingOutputs, take
from smope.networks.rivals import Rivals
from smope.networks.smope_s import Targets
from smope.train.losses import varifocal


def rescore_loss(outputs: TrainingOutputs, rivals: Rivals, targets: Targets) -> Tensor:
    """The class loss of the last layer's matched pairs and of the rivals, by what a closer look makes of
    their scores; the detector's own share of them learns by its own losses."""
    found, present = outputs.detections, targets.labels >= 0
    assert outputs.refined.score_shift is not None
    match, labels = outputs.match[-2].clamp(min=0) + found.denoising, targets.labels.clamp(min=0)
    boxes = take(found.boxes[-1].detach(), match)
    iou = paired_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets.boxes))[0]
    own = take(found.logits[-1].detach(), match).gather(2, labels[..., None])[..., 0].float()
    right = varifocal(own + outputs.refined.score_shift[:, : labels.shape[1]], iou) * present
    real = torch.isfinite(rivals.logit)
    wrong = varifocal(
        rivals.logit.masked_fill(~real, 0.0) + rivals.score_shift, torch.zeros_like(rivals.logit)
    )
    return (right.sum() + (wrong * real).sum()) / present.sum().clamp(min=1)
