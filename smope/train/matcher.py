"""Hungarian matching of queries to objects (Carion et al. 2020, DETR, eq. 1; classification cost as in
Deformable DETR)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from smope.geometry.boxes import cxcywh_to_xyxy, paired_giou
from smope.networks.outputs import Detections
from smope.networks.smope_s import Targets


@dataclass(frozen=True)
class MatchCosts:
    label: float = 2.0
    l1: float = 5.0
    giou: float = 2.0


class HungarianMatcher:
    """All layers and images in one cost tensor, one copy to the CPU, one assignment problem each."""

    def __init__(self, costs: MatchCosts | None = None) -> None:
        self.costs = costs or MatchCosts()

    def __call__(self, detections: Detections, targets: Targets) -> Tensor:
        """-> [L + 1, B, N] the query of each object slot, counted behind the denoising ones, -1 for empty
        slots; the last row is the encoder's proposals."""
        return self.start(detections, targets)()

    @torch.no_grad()
    def start(self, detections: Detections, targets: Targets) -> Callable[[], Tensor]:
        """Send the costs on their way to the CPU; what is called later waits for them, and matches.

        Work that is launched in between keeps the device busy while the CPU matches.
        """
        table, empty = self.cost_table(detections, targets), (targets.labels < 0)[None]
        if not table.is_cuda:
            return lambda: assign(table).masked_fill(empty, -1)
        pinned = torch.empty(table.shape, pin_memory=True).copy_(table, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()

        def finish() -> Tensor:
            arrival(arrived)
            match = assign(pinned).pin_memory().to(table.device, non_blocking=True)
            return match.masked_fill(empty, -1)

        return finish

    def cost_table(self, detections: Detections, targets: Targets) -> Tensor:
        """[L + 1, B, Q, N] float32"""
        skip = detections.denoising
        labels = targets.labels.clamp(min=0)
        layers, _, queries, _ = detections.logits[:, :, skip:].shape
        index = labels[None, :, None, :].expand(layers, -1, queries, -1)
        logits = detections.logits[:, :, skip:].gather(-1, index)  # [L, B, Q, N]
        proposals = detections.proposal_logits[None, ..., None].expand(1, -1, -1, labels.shape[1])
        cost = self.costs.label * _focal_cost(torch.cat([logits, proposals]).float())

        boxes = torch.cat([detections.boxes[:, :, skip:], detections.proposal_boxes[None]])[:, :, :, None]
        truth = targets.boxes[None, :, None]  # [1, B, 1, N, 4]
        cost = cost + self.costs.l1 * (boxes - truth).abs().sum(-1)
        cost = cost - self.costs.giou * paired_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(truth))
        # An empty slot costs the same everywhere, so it changes no other slot's match.
        empty = (targets.labels < 0)[None, :, None, :]
        return cost.float().masked_fill(empty, 0.0).nan_to_num(1e4, 1e4, 1e4)


def arrival(event: torch.cuda.Event) -> None:
    """Wait for the costs."""
    event.synchronize()


def assign(table: Tensor) -> Tensor:
    """[L, B, Q, N] costs on the CPU -> [L, B, N] each slot's query in the cheapest assignment"""
    layers, images, queries, slots = table.shape
    # With no more slots than queries every slot is matched, and scipy returns the slots in order.
    chosen = [linear_sum_assignment(one.T)[1] for one in table.numpy().reshape(-1, queries, slots)]
    return torch.from_numpy(np.stack(chosen)).view(layers, images, slots)


def _focal_cost(logits: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    p = logits.sigmoid()
    positive = alpha * (1 - p) ** gamma * -(p + 1e-8).log()
    negative = (1 - alpha) * p**gamma * -(1 - p + 1e-8).log()
    return positive - negative
