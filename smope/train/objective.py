"""The default training objective: network + batch with its truth -> one number and its parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from smope.data.items import Batch
from smope.geometry.boxes import cxcywh_to_xyxy, paired_iou, xyxy_to_cxcywh
from smope.geometry.rotations import geodesic_angle
from smope.network_inputs import surface_table
from smope.networks.mesh_encoder import MeshInputs
from smope.networks.outputs import PairOutputs, PoseEstimate, TrainingOutputs, take
from smope.networks.pose_head import focal_length
from smope.networks.refine import project
from smope.networks.smope_s import SmopeS, Targets
from smope.objects import ObjectModel
from smope.train.losses import (
    box_loss,
    chamfer,
    laplace_nll,
    masked_mean,
    model_point_distance,
    varifocal,
)
from smope.train.matcher import HungarianMatcher
from smope.train.pose_targets import ObjectTable, PairTruth


@dataclass(frozen=True)
class LossConfig:
    """Weights of the parts; distances are in diameters, pixels in apparent diameters."""

    label: float = 1.0
    l1: float = 5.0
    giou: float = 2.0
    rotation: float = 4.0
    centre: float = 4.0
    depth: float = 3.0
    points: float = 1.0  # rotation and translation together, in the camera
    offsets: float = 2.0  # where refinement sends the anchors
    visibility: float = 1.0
    sigma: float = 0.1
    mesh: float = 0.5
    coordinates: float = 1.0
    colour_dropout: float = 0.2  # share of meshes shown to the network without their colours
    faint: float = 0.3  # poses of objects less visible than this count in proportion


class Objective:
    """Called with the network and a batch; returns the total loss and its parts, all on the device."""

    def __init__(self, objects: Sequence[ObjectModel], config: LossConfig | None = None) -> None:
        self.config = config or LossConfig()
        self.matcher = HungarianMatcher()
        self.table = ObjectTable.of(objects)
        self.surfaces = torch.stack([surface_table(o) for o in objects])  # [M, P, 10]

    def __call__(self, network: SmopeS, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        device = batch.images.device
        if self.surfaces.device != device:
            self.table, self.surfaces = self.table.to(device), self.surfaces.to(device)
        height, width = batch.images.shape[-2:]
        scale = batch.images.new_tensor([width, height, width, height])
        # Pixel centres stand at whole numbers, so the image spans -0.5 to size - 0.5.
        boxes = xyxy_to_cxcywh((batch.boxes_xyxy + 0.5) / scale)
        boxes = torch.cat([boxes[..., :2].clamp(0, 1), boxes[..., 2:].clamp(1e-3, 1)], -1)
        targets = Targets(batch.labels, boxes)
        views = self.mesh_views(network.config.surface_points, network.config.anchors)
        outputs = network.forward_training(batch.images, batch.K, views, targets, self.matcher)
        with torch.autocast(device.type, enabled=False):
            parts = {
                **self.detection_losses(outputs, targets),
                **self.pose_losses(outputs, batch),
                **self.mesh_losses(outputs),
            }
            if batch.instance is not None and batch.depth is not None and outputs.coordinates is not None:
                parts["coordinates"] = self.coordinate_loss(outputs.coordinates.float(), batch)
        weighted = [getattr(self.config, name.split("/")[0]) * value for name, value in parts.items()]
        return torch.stack(weighted).sum(), {name: value.detach() for name, value in parts.items()}

    def mesh_views(self, surface_points: int, anchor_count: int) -> MeshInputs:
        """Another sample of each surface at every step: other points, a little noise, now and then no
        colours."""
        meshes, points, _ = self.surfaces.shape
        device = self.surfaces.device
        order = torch.rand(meshes, points, device=device).argsort(1)
        chosen = order[:, :surface_points, None].expand(-1, -1, 10)
        surface = self.surfaces.gather(1, chosen).clone()
        surface[..., :3] += 0.002 * torch.randn_like(surface[..., :3])
        gain = 1 + 0.2 * (torch.rand(meshes, 1, 1, device=device) - 0.5)
        shown = (torch.rand(meshes, 1, 1, device=device) >= self.config.colour_dropout).float()
        surface[..., 6:9] = (surface[..., 6:9] * gain).clamp(0, 1)
        surface[..., 6:] = surface[..., 6:] * shown
        # The first points of the farthest-point order cover the surface; half of the steps take others.
        spread = (
            order.clone() if torch.rand(()) < 0.5 else torch.arange(points, device=device).expand(meshes, -1)
        )
        anchors = self.surfaces.gather(1, spread[:, :anchor_count, None].expand(-1, -1, 10))[..., :9]
        anchors = torch.cat([anchors[..., :6], anchors[..., 6:] * shown], -1)
        return MeshInputs(surface, self.table.diameters, anchors)

    def detection_losses(self, outputs: TrainingOutputs, targets: Targets) -> dict[str, Tensor]:
        found = outputs.detections
        present = targets.labels >= 0
        count = present.sum().clamp(min=1)
        labels = targets.labels.clamp(min=0)
        skip, layers = found.denoising, len(found.logits)
        parts = {}

        match = outputs.match.clamp(min=0)
        quality_loss, l1_loss, giou_loss = [], [], []
        for layer in range(layers + 1):
            if layer < layers:
                logits, boxes = found.logits[layer][:, skip:], found.boxes[layer][:, skip:]
                meaning = labels
            else:
                logits, boxes = found.proposal_logits[..., None], found.proposal_boxes
                meaning = torch.zeros_like(labels)
            chosen = take(boxes, match[layer])
            iou = paired_iou(cxcywh_to_xyxy(chosen.detach()), cxcywh_to_xyxy(targets.boxes))[0] * present
            quality = torch.zeros_like(logits.flatten(1), dtype=torch.float32)
            quality = quality.scatter_reduce(
                1, match[layer] * logits.shape[-1] + meaning, iou.float(), "amax"
            )
            quality_loss.append(varifocal(logits.flatten(1), quality).sum() / count)
            l1, giou = box_loss(chosen, targets.boxes)
            l1_loss.append((l1 * present).sum() / count)
            giou_loss.append((giou * present).sum() / count)
        parts["label"] = torch.stack(quality_loss).sum()
        parts["l1"], parts["giou"] = torch.stack(l1_loss).sum(), torch.stack(giou_loss).sum()

        if skip:
            groups = skip // labels.shape[1]
            logits, boxes = found.logits[:, :, :skip], found.boxes[:, :, :skip]
            truth, known = targets.boxes.repeat(1, groups, 1)[None], present.repeat(1, groups)[None]
            meaning = labels.repeat(1, groups)[None].expand(layers, -1, -1)
            iou = paired_iou(cxcywh_to_xyxy(boxes.detach()), cxcywh_to_xyxy(truth))[0] * known
            quality = torch.zeros_like(logits, dtype=torch.float32).scatter(
                -1, meaning[..., None], iou[..., None]
            )
            l1, giou = box_loss(boxes, truth)
            shared = count * groups
            parts["label/denoising"] = (varifocal(logits, quality) * known[..., None]).sum() / shared
            parts["l1/denoising"] = (l1 * known).sum() / shared
            parts["giou/denoising"] = (giou * known).sum() / shared
        return parts

    def pose_losses(self, outputs: TrainingOutputs, batch: Batch) -> dict[str, Tensor]:
        slots = outputs.pair_slots
        truth = PairTruth.of(self.table, batch.labels, batch.T_CO, slots, batch.K)
        labels = take(batch.labels, slots).clamp(min=0)
        visible = take(batch.visibility, slots)
        weight = outputs.pair_valid * (visible / self.config.faint).clamp(max=1.0)
        diameters = self.table.diameters[labels]
        points = self.table.points[labels]
        sums: dict[str, list[Tensor]] = {}

        def note(name: str, values: Tensor) -> None:
            sums.setdefault(name, []).append(masked_mean(values, weight))

        for layer, pairs in enumerate(outputs.layer_pairs):
            final = layer == len(outputs.layer_pairs) - 1
            for stage, pose in enumerate(pairs.poses):
                name = f"/{'refined' if stage else 'direct'}"
                target = truth.nearest(pose.rotation)
                apparent = (
                    focal_length(batch.K)[:, None] * diameters / target.translation[..., 2].clamp(min=0.05)
                )
                note("rotation" + name, model_point_distance(pose.rotation, target.rotation, points))
                off = (pose.centre - target.centre) / apparent[..., None]
                note("centre" + name, off.abs().sum(-1).clamp(max=5.0))
                depth = (
                    pose.translation[..., 2].clamp(min=1e-2).log()
                    - target.translation[..., 2].clamp(min=1e-2).log()
                )
                note("depth" + name, depth.abs())
                moved = (points @ (pose.rotation - target.rotation).transpose(-1, -2)) + (
                    (pose.translation - target.translation) / diameters[..., None]
                )[..., None, :]
                note("points" + name, moved.norm(dim=-1).mean(-1).clamp(max=10.0))
                if pose.offsets is not None:
                    note(
                        "offsets",
                        self.offset_error(pose, target, outputs, labels, diameters, apparent, batch.K),
                    )
            note("visibility", (pairs.visibility_logit.float().sigmoid() - visible).abs())
            if final:
                note("sigma", self.sigma_loss(pairs, truth, diameters))
        return {name: torch.stack(values).sum() for name, values in sums.items()}

    def offset_error(
        self,
        pose: PoseEstimate,
        target: PoseEstimate,
        outputs: TrainingOutputs,
        labels: Tensor,
        diameters: Tensor,
        apparent: Tensor,
        K: Tensor,
    ) -> Tensor:
        """[B, P] mean error of where refinement sends the anchors, far ones counted as one apparent
        diameter"""
        assert pose.offsets is not None
        assert pose.anchors_uv is not None
        anchors = outputs.meshes.anchors[labels][..., :3] * diameters[..., None, None]
        truth = project(anchors @ target.rotation.transpose(-1, -2) + target.translation[..., None, :], K)
        wanted = (truth - pose.anchors_uv) / apparent[..., None, None]
        near = wanted.norm(dim=-1) < 1.0
        error = (pose.offsets - wanted).abs().sum(-1)
        return (error * near).mean(-1)

    def sigma_loss(self, pairs: PairOutputs, truth: PairTruth, diameters: Tensor) -> Tensor:
        pose = pairs.poses[-1]
        target = truth.nearest(pose.rotation)
        rotation = geodesic_angle(pose.rotation, target.rotation)
        translation = (pose.translation - target.translation).norm(dim=-1) / diameters
        errors = torch.stack([rotation, translation], -1).clamp(max=10.0)
        return laplace_nll(pairs.log_sigma.float().clamp(-6, 3), errors).sum(-1)

    def mesh_losses(self, outputs: TrainingOutputs) -> dict[str, Tensor]:
        """L_M: points by the chamfer distance, scale and centre by L1."""
        rebuilt, surface = outputs.rebuilt, self.surfaces[..., :3]
        size = (rebuilt.log_diameter.float() - self.table.diameters.log()).abs()
        centre = (rebuilt.centre.float() - surface.mean(1)).abs().sum(-1)
        return {
            "mesh/points": chamfer(rebuilt.points, surface).mean() * 10,
            "mesh/scale": size.mean(),
            "mesh/centre": centre.mean(),
        }

    def coordinate_loss(self, predicted: Tensor, batch: Batch) -> Tensor:
        """Each cell at stride 8 says whether it looks at an object, and where on it; symmetric objects are
        left out of the second, since a cell cannot know which of the alike places it sees."""
        assert batch.instance is not None
        assert batch.depth is not None
        coordinates, seen = batch.surface_at_stride(8, self.table.centres, self.table.diameters)
        height, width = predicted.shape[-2:]
        coordinates, seen = coordinates[..., :height, :width], seen[..., :height, :width]
        label = torch.where(seen >= 0, seen, 0)
        plain = (seen >= 0) & ~self.table.symmetric[label]
        where = (predicted[:, :3] - coordinates).abs().sum(1)
        mask = F.binary_cross_entropy_with_logits(predicted[:, 3], (seen >= 0).float())
        return 4 * masked_mean(where, plain) + mask
