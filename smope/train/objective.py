"""The default training objective: network + batch with its truth -> one number and its parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from smope.data.items import UNKNOWN, Batch
from smope.geometry.boxes import cxcywh_to_xyxy, paired_iou, share_inside, xyxy_to_cxcywh
from smope.geometry.projection import project
from smope.geometry.rotations import geodesic_angle
from smope.geometry.solve import invert_intrinsics
from smope.geometry.stretch import size_factor
from smope.network_inputs import surface_table
from smope.networks.mesh_encoder import MeshInputs
from smope.networks.outputs import PairOutputs, PoseEstimate, Regions, TrainingOutputs, take, take_layers
from smope.networks.pose_head import ImageSize, focal_length, pixels_to_unit
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
from smope.train.rescore import rescore_loss
from smope.train.strangers import Strangers


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
    scale: float = 2.0  # logarithms of the three factors, where they are predicted
    offsets: float = 2.0  # where refinement sends the anchors
    visibility: float = 1.0
    sigma: float = 0.1
    # Of which poses, times the weights above: the queries' own, those fitted to what a region shows, and
    # refinement's, which are handed out. tools/loss_shares.py says how hard each pulls at the network.
    direct: float = 1.0
    fitted: float = 1.0
    refined: float = 1.0
    mesh: float = 0.5
    regions: float = 1.0  # what the cells of each square see
    coordinates: float = 1.0
    colour_dropout: float = 0.2  # share of meshes shown to the network without their colours
    faint: float = 0.3  # poses of objects less visible than this count in proportion
    rescore: float = 1.0  # what a closer look makes of scores, where the network takes one ...
    rivals: int = 6  # ... and of how many wrong pairs of each image
    strangers: int = 0  # meshes registered beside the known ones at each step, which no image holds

    def weight(self, part: str) -> float:
        """Of a part by its name, as "depth/refined": what it measures, and of which poses."""
        measured, _, poses = part.partition("/")
        factors = {"direct": self.direct, "region": self.fitted, "refined": self.refined}
        weight: float = getattr(self, measured)
        return weight * factors.get(poses, 1.0)


_IGNORED_SHARE = 0.5  # a box of which so much lies in an ignored area is not judged


class Objective:
    """Called with the network and a batch; returns the total loss and its parts, all on the device."""

    def __init__(
        self,
        objects: Sequence[ObjectModel],
        config: LossConfig | None = None,
        strangers: Strangers | None = None,
    ) -> None:
        self.config = config or LossConfig()
        if self.config.strangers and strangers is None:
            raise ValueError(
                f"loss.strangers = {self.config.strangers} given without other meshes to take them from; "
                "name a folder of clutter, or set it to 0"
            )
        self.strangers = strangers
        self.matcher = HungarianMatcher()
        self.table = ObjectTable.of(objects)
        self.surfaces = torch.stack([surface_table(o) for o in objects])  # [M, P, 10]

    def __call__(self, network: SmopeS, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        parts = self.parts(network, batch)
        weighted = [self.config.weight(name) * value for name, value in parts.items()]
        return torch.stack(weighted).sum(), {name: value.detach() for name, value in parts.items()}

    def parts(self, network: SmopeS, batch: Batch) -> dict[str, Tensor]:
        """Each part by its name, not yet weighed, with its gradients"""
        device = batch.images.device
        if self.surfaces.device != device:
            self.table, self.surfaces = self.table.to(device), self.surfaces.to(device)
            self.strangers = self.strangers and self.strangers.to(device)
        height, width = batch.images.shape[-2:]
        boxes = xyxy_to_cxcywh(_in_unit(batch.boxes_xyxy, (width, height)))
        boxes = torch.cat([boxes[..., :2].clamp(0, 1), boxes[..., 2:].clamp(1e-3, 1)], -1)
        targets = Targets(batch.labels, boxes)
        ignored = None if batch.ignored is None else _in_unit(batch.ignored, (width, height))
        if not network.config.predict_scale:
            batch = replace(batch, scale=None)
        elif batch.scale is None:
            batch = replace(batch, scale=torch.ones_like(batch.T_CO[..., :3, 3]))
        views = self.mesh_views(network.config.surface_points, network.config.anchors)
        outputs = network.forward_training(
            batch.images, batch.K, views, targets, self.matcher, self.config.rivals
        )
        with torch.autocast(device.type, enabled=False):
            parts = {
                **self.detection_losses(outputs, targets, ignored),
                **self.pose_losses(outputs, batch),
                **self.mesh_losses(outputs),
            }
            if outputs.rivals is not None:
                parts["rescore"] = rescore_loss(outputs, outputs.rivals, targets)
            if batch.instance is not None and batch.depth is not None and outputs.coordinates is not None:
                parts["coordinates"] = self.coordinate_loss(outputs.coordinates.float(), batch)
        return parts

    def mesh_views(self, surface_points: int, anchor_count: int) -> MeshInputs:
        """Another sample of each surface at every step: other points, a little noise, now and then no
        colours; strangers, if any, come last."""
        surfaces, diameters = self.surfaces, self.table.diameters
        if self.strangers is not None:
            more, sizes = self.strangers.draw(self.config.strangers)
            surfaces, diameters = torch.cat([surfaces, more]), torch.cat([diameters, sizes])
        meshes, points, _ = surfaces.shape
        device = surfaces.device
        order = torch.rand(meshes, points, device=device).argsort(1)
        chosen = order[:, :surface_points, None].expand(-1, -1, 10)
        surface = surfaces.gather(1, chosen).clone()
        surface[..., :3] += 0.002 * torch.randn_like(surface[..., :3])
        gain = 1 + 0.2 * (torch.rand(meshes, 1, 1, device=device) - 0.5)
        shown = (torch.rand(meshes, 1, 1, device=device) >= self.config.colour_dropout).float()
        surface[..., 6:9] = (surface[..., 6:9] * gain).clamp(0, 1)
        surface[..., 6:] = surface[..., 6:] * shown
        # The first points of the farthest-point order cover the surface; half of the steps take others.
        spread = (
            order.clone() if torch.rand(()) < 0.5 else torch.arange(points, device=device).expand(meshes, -1)
        )
        anchors = surfaces.gather(1, spread[:, :anchor_count, None].expand(-1, -1, 10))[..., :9]
        anchors = torch.cat([anchors[..., :6], anchors[..., 6:] * shown], -1)
        return MeshInputs(surface, diameters, anchors)

    def detection_losses(
        self, outputs: TrainingOutputs, targets: Targets, ignored: Tensor | None = None
    ) -> dict[str, Tensor]:
        """L_D, summed over the decoder layers and the encoder's proposals, a matched object; ignored
        [B, I, 4] xyxy are areas, in 0..1, where a box that matches nothing is not wrong."""
        found, match = outputs.detections, outputs.match.clamp(min=0)
        present = targets.labels >= 0
        count = present.sum().clamp(min=1)
        labels, skip = targets.labels.clamp(min=0), found.denoising
        truth = (targets.boxes, present)
        decoded = self.matched_losses(
            found.logits[:, :, skip:], found.boxes[:, :, skip:], match[:-1], labels, *truth, ignored
        )
        proposed = self.matched_losses(
            found.proposal_logits[None, ..., None],
            found.proposal_boxes[None],
            match[-1:],
            torch.zeros_like(labels),
            *truth,
            ignored,
        )
        names = ("label", "l1", "giou")
        parts = {n: (a + b) / count for n, a, b in zip(names, decoded, proposed, strict=True)}
        if skip:
            groups = skip // labels.shape[1]
            noised = self.matched_losses(
                found.logits[:, :, :skip],
                found.boxes[:, :, :skip],
                torch.arange(skip, device=labels.device).expand(len(found.logits), len(labels), -1),
                labels.repeat(1, groups),
                targets.boxes.repeat(1, groups, 1),
                present.repeat(1, groups),
                only_matched=True,
            )
            shared = count * groups
            # Not `parts |= ...` here and below: torch 2.5 compiles none.
            parts.update({f"{n}/denoising": value / shared for n, value in zip(names, noised, strict=True)})
        return parts

    def matched_losses(
        self,
        logits: Tensor,
        boxes: Tensor,
        match: Tensor,
        labels: Tensor,
        truth: Tensor,
        present: Tensor,
        ignored: Tensor | None = None,
        only_matched: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of the class, L1 and GIoU losses.

        logits [L, B, Q, M], boxes [L, B, Q, 4], match [L, B, N] query of each slot, labels [B, N],
        truth [B, N, 4], present [B, N]. A matched query is to be as sure as its box is good (IoU).
        """
        chosen = take_layers(boxes, match)  # [L, B, N, 4]
        iou = paired_iou(cxcywh_to_xyxy(chosen.detach()), cxcywh_to_xyxy(truth))[0] * present
        quality = torch.zeros_like(logits, dtype=torch.float32).flatten(2)
        quality = quality.scatter_reduce(2, match * logits.shape[-1] + labels, iou.float(), "amax")
        label = varifocal(logits.flatten(2), quality)
        if ignored is not None and ignored.shape[1]:  # a batch may have no such area
            area = share_inside(cxcywh_to_xyxy(boxes.detach())[..., None, :], ignored[None, :, None])
            judged = area.amax(-1) < _IGNORED_SHARE  # [L, B, Q]
            judged = judged.float().scatter_reduce(2, match, present.float().expand_as(match), "amax")
            label = label.unflatten(-1, logits.shape[-2:]) * judged[..., None]
        if only_matched:
            label = label.unflatten(-1, logits.shape[-2:]) * present[..., None]
        l1, giou = box_loss(chosen, truth)
        return label.sum(), (l1 * present).sum(), (giou * present).sum()

    def pose_losses(self, outputs: TrainingOutputs, batch: Batch) -> dict[str, Tensor]:
        """L_P of the direct estimates, summed over the decoder layers, and of each estimate after them."""
        slots, layers = outputs.pair_slots, len(outputs.match) - 1
        labels = take(batch.labels, slots).clamp(min=0)
        visible = take(batch.visibility, slots)
        weight = outputs.pair_valid * (visible / self.config.faint).clamp(max=1.0)
        truth = PairTruth.of(self.table, batch.labels, batch.T_CO, slots, batch.K, batch.scale)
        every = (labels.repeat(layers, 1), weight.repeat(layers, 1))  # once a decoder layer
        direct = self.pose_errors(outputs.direct.poses[0], truth.repeat(layers), *every)
        gap = (outputs.direct.visibility_logit.float().sigmoid() - visible.repeat(layers, 1)).abs()
        parts = {f"{name}/direct": layers * value for name, value in direct.items()}
        parts["visibility/direct"] = layers * masked_mean(gap, every[1])

        looked, *moved = outputs.refined.poses[1:]
        count = looked.rotation.shape[1]
        slots, labels, visible = slots[:, :count], labels[:, :count], visible[:, :count]
        weight = weight[:, :count]
        truth = PairTruth.of(self.table, batch.labels, batch.T_CO, slots, batch.K, batch.scale)
        region = self.pose_errors(looked, truth, labels, weight)
        parts.update({f"{name}/region": value for name, value in region.items()})
        gap = (outputs.refined.visibility_logit.float().sigmoid() - visible).abs()
        parts["visibility/region"] = masked_mean(gap, weight)
        if moved:
            refined = [self.pose_errors(pose, truth, labels, weight) for pose in moved]
            sent = [masked_mean(self.offset_error(pose, truth, outputs, labels), weight) for pose in moved]
            parts.update({f"{n}/refined": torch.stack([e[n] for e in refined]).sum() for n in refined[0]})
            parts["offsets"] = torch.stack(sent).sum()
        parts["sigma"] = masked_mean(self.sigma_loss(outputs.refined, truth, labels), weight)
        if batch.instance is not None and batch.depth is not None:
            parts.update(self.region_losses(outputs.regions, looked, truth, batch, slots, weight))
        return parts

    def region_losses(
        self,
        regions: Regions,
        pose: PoseEstimate,
        truth: PairTruth,
        batch: Batch,
        slots: Tensor,
        weight: Tensor,
    ) -> dict[str, Tensor]:
        """Of each cell of a pair's square: does it see the pair's object, and where on it; of poses that look
        alike, the one nearest to the prediction says where."""
        assert batch.instance is not None
        assert batch.depth is not None
        height, width = batch.depth.shape[-2:]
        u, v = regions.pixels.round().long().flatten(1, 3).unbind(-1)  # [B, P n n]
        inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)
        index = v.clamp(0, height - 1) * width + u.clamp(0, width - 1)
        shape = regions.pixels.shape[1:4]
        depth = batch.depth.flatten(1).gather(1, index).unflatten(1, shape)
        instance = batch.instance.flatten(1).gather(1, index).unflatten(1, shape)
        known = instance != UNKNOWN
        seen = known & (instance == slots[..., None, None] + 1) & inside.unflatten(1, shape)

        pixels = torch.stack([u, v, torch.ones_like(u)], -1).float()
        rays = pixels @ invert_intrinsics(batch.K).transpose(-1, -2)  # [B, P n n, 3]
        points = rays.unflatten(1, shape) * depth[..., None]  # metres
        target = truth.nearest(pose.rotation)
        diameters = self.table.diameters[take(batch.labels, slots).clamp(min=0)]
        points = (points - target.translation[..., None, None, :]).flatten(2, 3) @ target.rotation
        if target.scale is not None:  # cells say the place on the registered mesh
            points = points / target.scale[..., None, :]
        wanted = (points / diameters[..., None, None]).unflatten(2, shape[1:])
        where = (regions.surface[..., :3] - wanted).abs().sum(-1)
        on_object = F.binary_cross_entropy_with_logits(
            regions.surface[..., 3], seen.float(), reduction="none"
        )
        cells = weight[..., None, None]
        return {
            "regions/where": 4 * masked_mean(where, seen * cells),
            "regions/seen": masked_mean(on_object, cells * known),
        }

    def pose_errors(
        self, pose: PoseEstimate, truth: PairTruth, labels: Tensor, weight: Tensor
    ) -> dict[str, Tensor]:
        """Rotation, projected centre and depth apart, and all together on the points; over the diameter."""
        target = truth.nearest(pose.rotation)
        diameters, points = self.stretched(labels, target.scale, target.scale)
        shown = points if pose.scale is None else self.stretched(labels, pose.scale, target.scale)[1]
        apparent = apparent_size(truth.K, diameters, target)
        moved = shown @ pose.rotation.transpose(-1, -2) - points @ target.rotation.transpose(-1, -2)
        moved = moved + ((pose.translation - target.translation) / diameters[..., None])[..., None, :]
        depth, true_depth = (p.translation[..., 2].clamp(min=1e-2).log() for p in (pose, target))
        errors = {
            "rotation": model_point_distance(pose.rotation, target.rotation, points),
            "centre": ((pose.centre - target.centre) / apparent[..., None]).abs().sum(-1).clamp(max=5.0),
            "depth": (depth - true_depth).abs(),
            "points": moved.norm(dim=-1).mean(-1).clamp(max=10.0),
        }
        if pose.scale is not None and target.scale is not None:
            errors["scale"] = (pose.scale.log() - target.scale.log()).abs().sum(-1)
        return {name: masked_mean(values, weight) for name, values in errors.items()}

    def stretched(self, labels: Tensor, scale: Tensor | None, size: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sizes [B, P] of objects with factors `size` [B, P, 3], metres, and over them the surface points
        [B, P, A, 3] stretched by `scale`."""
        diameters, points = self.table.diameters[labels], self.table.points[labels]
        if scale is None or size is None:
            return diameters, points
        factor = size_factor(size)
        return diameters * factor, points * (scale / factor[..., None])[..., None, :]

    def offset_error(
        self, pose: PoseEstimate, truth: PairTruth, outputs: TrainingOutputs, labels: Tensor
    ) -> Tensor:
        """[B, P] mean error of where refinement sends the anchors; those over a diameter off do not count"""
        assert pose.offsets is not None
        assert pose.anchors_uv is not None
        target = truth.nearest(pose.rotation)
        anchors = outputs.meshes.anchors[labels][..., :3] * self.table.diameters[labels][..., None, None]
        if target.scale is not None:
            anchors = anchors * target.scale[..., None, :]
        diameters = self.stretched(labels, target.scale, target.scale)[0]
        uv = project(anchors @ target.rotation.transpose(-1, -2) + target.translation[..., None, :], truth.K)
        wanted = (uv - pose.anchors_uv) / apparent_size(truth.K, diameters, target)[..., None, None]
        near = wanted.norm(dim=-1) < 1.0
        return ((pose.offsets - wanted).abs().sum(-1) * near).mean(-1)

    def sigma_loss(self, pairs: PairOutputs, truth: PairTruth, labels: Tensor) -> Tensor:
        pose = pairs.poses[-1]
        target = truth.nearest(pose.rotation)
        diameters = self.stretched(labels, target.scale, target.scale)[0]
        rotation = geodesic_angle(pose.rotation, target.rotation)
        translation = (pose.translation - target.translation).norm(dim=-1) / diameters
        errors = torch.stack([rotation, translation], -1).clamp(max=10.0)
        return laplace_nll(pairs.log_sigma.float().clamp(-6, 3), errors).sum(-1)

    def mesh_losses(self, outputs: TrainingOutputs) -> dict[str, Tensor]:
        """L_M of the known meshes: points by the chamfer distance, scale and centre by L1."""
        rebuilt, surface, known = outputs.rebuilt, self.surfaces[..., :3], len(self.surfaces)
        size = (rebuilt.log_diameter[:known].float() - self.table.diameters.log()).abs()
        centre = (rebuilt.centre[:known].float() - surface.mean(1)).abs().sum(-1)
        return {
            "mesh/points": chamfer(rebuilt.points[:known], surface).mean() * 10,
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
        known = batch.instance[:, 4::8, 4::8][..., :height, :width] != UNKNOWN
        label = torch.where(seen >= 0, seen, 0)
        plain = (seen >= 0) & ~self.table.symmetric[label]
        where = (predicted[:, :3] - coordinates).abs().sum(1)
        on_object = F.binary_cross_entropy_with_logits(predicted[:, 3], (seen >= 0).float(), reduction="none")
        return 4 * masked_mean(where, plain) + masked_mean(on_object, known)


def _in_unit(boxes_xyxy: Tensor, size: ImageSize) -> Tensor:
    """[..., 4] pixels -> 0..1 of the image"""
    return pixels_to_unit(boxes_xyxy.unflatten(-1, (2, 2)), size).flatten(-2)


def apparent_size(K: Tensor, diameters: Tensor, pose: PoseEstimate) -> Tensor:
    """[B, P] pixels that the diameter spans at the pose's depth; K [B, 3, 3], diameters [B, P] metres"""
    return focal_length(K)[:, None] * diameters / pose.translation[..., 2].clamp(min=0.05)
