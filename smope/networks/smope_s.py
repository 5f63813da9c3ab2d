"""smope-s, the default network: image + intrinsics + mesh tokens -> detections and poses in one pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smope.geometry.stretch import size_factor, stretched_anchors
from smope.networks.attention3d import MeshAttention, MeshSimilarity
from smope.networks.backbone import build_backbone
from smope.networks.deformable import (
    MLP,
    CellProjection,
    DecoderLayer,
    EncoderLayer,
    inverse_sigmoid,
    zero_last,
)
from smope.networks.denoising import attention_mask, noised_boxes
from smope.networks.mesh_decoder import MeshDecoder
from smope.networks.mesh_encoder import MeshEncoder, MeshInputs, MeshTokens
from smope.networks.outputs import (
    Detections,
    Features,
    PairOutputs,
    PoseEstimate,
    Regions,
    TrainingOutputs,
    take,
    take_layers,
)
from smope.networks.pose_head import ImageSize, PoseHead, resized
from smope.networks.position import Shapes, box_embedding, cell_centres, pyramid_positions
from smope.networks.refine import PoseMaps, PoseRefiner
from smope.networks.regions import RegionReader
from smope.networks.rivals import Rivals, choose_rivals, shifted_scores


@dataclass(frozen=True)
class SmopeSConfig:
    backbone: Literal["efficientnet_lite2", "resnet50v2"] = "efficientnet_lite2"
    width: int = 256
    heads: int = 8
    points: int = 4
    encoder_layers: int = 3
    encoder_hidden: int = 512
    decoder_layers: int = 4
    decoder_hidden: int = 1024
    queries: int = 100
    mesh_tokens: int = 32
    surface_points: int = 1024
    region_cells: int = 16  # a side of the grid that is read around each box
    region_blocks: int = 6  # convolutions over that grid
    anchors: int = 64
    refine_layers: int = 2
    refine_steps: int = 3  # past the layers, the last one again
    rebuilt_points: int = 512
    denoising_groups: int = 3
    rescore: bool = False  # lower the scores of what looks wrong from close by
    predict_scale: bool = False  # also three factors on the registered mesh, where instances differ in size


@dataclass(frozen=True, eq=False)
class Targets:
    """What the truth tells the network in training: which object is where, in 0..1 of the image."""

    labels: Tensor  # [B, N] int64, -1 for an empty slot
    boxes: Tensor  # [B, N, 4] cxcywh


@dataclass(frozen=True, eq=False)
class Found:
    """The best pairs of query and mesh of each image, best first by the detector alone."""

    scores: Tensor  # [B, P] 0..1, after a closer look where the network takes one
    labels: Tensor  # [B, P]
    boxes: Tensor  # [B, P, 4] cxcywh in 0..1
    pairs: PairOutputs


Matcher = Callable[[Detections, Targets], Tensor]


class SmopeS(nn.Module):
    levels = 3  # strides 8, 16, 32

    def __init__(self, config: SmopeSConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        self.backbone = build_backbone(c.backbone)
        channels = self.backbone.channels
        self.input_proj = nn.ModuleList(CellProjection(n, c.width) for n in channels[1:])
        self.level_embed = nn.Parameter(torch.randn(self.levels, c.width) * 0.1)
        deformable = (c.width, c.heads, self.levels, c.points)
        self.encoder = nn.ModuleList(
            EncoderLayer(*deformable, c.encoder_hidden) for _ in range(c.encoder_layers)
        )
        self.proposal = nn.Sequential(nn.Linear(c.width, c.width), nn.LayerNorm(c.width))
        self.proposal_score = nn.Linear(c.width, 1)
        self.proposal_box = zero_last(MLP(c.width, c.width, 4, 3))
        nn.init.constant_(self.proposal_score.bias, -4.0)

        self.box_position = MLP(2 * c.width, c.width, c.width, 2)
        self.decoder = nn.ModuleList(
            DecoderLayer(*deformable, c.decoder_hidden) for _ in range(c.decoder_layers)
        )
        self.box_heads = nn.ModuleList(
            zero_last(MLP(c.width, c.width, 4, 3)) for _ in range(c.decoder_layers)
        )

        self.mesh_encoder = MeshEncoder(c.width, c.mesh_tokens)
        self.mesh_decoder = MeshDecoder(c.width, c.rebuilt_points)
        self.similarity = MeshSimilarity(c.width)
        self.mesh_attention = MeshAttention(c.width, c.heads)
        self.pose_head = PoseHead(c.width, c.predict_scale)
        self.pose_maps = PoseMaps(c.width, channels[0])
        self.region_reader = RegionReader(c.width, self.pose_maps.channels, c.region_cells, c.region_blocks)
        self.refiners = nn.ModuleList(
            PoseRefiner(c.width, self.pose_maps.channels) for _ in range(c.refine_layers)
        )
        self.rescorer = MLP(c.width, c.width // 2, 1, 2) if c.rescore else None
        self.coordinates = nn.Conv2d(
            c.width, 4, 1
        )  # a target in training only: where on its mesh each cell looks

    def encode_meshes(self, inputs: MeshInputs) -> MeshTokens:
        return self.mesh_encoder(inputs)

    def forward(
        self, images: Tensor, K: Tensor, meshes: MeshTokens, top_k: int = 32, lowest: float = 0.0
    ) -> Found:
        """images [B, 3, H, W] in 0..1 with H and W multiples of 32, K [B, 3, 3] pixels

        Pairs that score below `lowest` in every image of the batch may be left out, whose number then
        depends on what is seen: not for graphs.
        """
        features = self.encode_image(images)
        detections = self.detect(features, meshes)
        queries, boxes = detections.queries[-1], detections.boxes[-1]
        # Pairs are ranked, not queries by their best mesh: one more mesh must not take another's query.
        scores = detections.logits[-1].sigmoid().flatten(1)  # [B, Q M]
        scores, best = scores.topk(min(top_k, queries.shape[1]), dim=1)
        if lowest > 0:  # one pair stays, as not all operators take none
            count = max(1, scores.shape[1] - int((scores < lowest).sum(1).min()))
            scores, best = scores[:, :count], best[:, :count]
        labels, query = best % len(meshes), best // len(meshes)
        boxes = take(boxes, query)
        size = (images.shape[-1], images.shape[-2])
        pairs, direct = self.direct_poses(take(queries, query), boxes, labels, meshes, K, size)
        found, _ = self.refine_poses(pairs, direct.poses[0], boxes, labels, meshes, K, size, features)
        if found.score_shift is not None:
            scores = shifted_scores(scores.float(), found.score_shift)
        return Found(scores, labels, boxes, found)

    def forward_training(
        self,
        images: Tensor,
        K: Tensor,
        inputs: MeshInputs,
        targets: Targets,
        matcher: Matcher,
        rivals: int = 0,
    ) -> TrainingOutputs:
        """The same way with the truth at hand: denoising queries, and poses of the matched queries only; with
        `rescore` also of so many `rivals`, for their scores."""
        meshes = self.mesh_encoder(inputs)
        features = self.encode_image(images)
        detections = self.detect(features, meshes, targets)
        match = matcher(detections, targets)  # [L + 1, B, N]

        layers, batch, slots = match.shape[0] - 1, *targets.labels.shape
        groups = detections.denoising // slots
        noised = torch.arange(detections.denoising, device=images.device).expand(layers, batch, -1)
        index = torch.cat([match[:-1].clamp(min=0) + detections.denoising, noised], -1)  # [L, B, P]
        pair_slots = torch.arange(slots, device=images.device).repeat(1 + groups).expand(batch, -1)  # [B, P]
        labels = take(targets.labels, pair_slots)
        known = labels.clamp(min=0)
        size = (images.shape[-1], images.shape[-2])
        # All decoder layers at once, as one batch of L * B; refinement follows the last one alone.
        queries = take_layers(detections.queries, index).flatten(0, 1)
        boxes = take_layers(detections.boxes, index).detach().flatten(0, 1)
        pairs, direct = self.direct_poses(
            queries, boxes, known.repeat(layers, 1), meshes, K.repeat(layers, 1, 1), size
        )
        # Of the last layer, and of the denoising groups the first alone: reading regions is most of the cost.
        last, kept = slice((layers - 1) * batch, None), slice(slots * (1 + min(groups, 1)))
        begun = (pairs[last, kept], direct.poses[0].pairs(last, kept), boxes[last, kept], known[:, kept])
        chosen = None
        if self.rescorer is not None and rivals:
            chosen, more = self._rivals(detections, targets, rivals, meshes, K, size)
            begun = (
                torch.cat([begun[0], more[0]], 1),
                begun[1].joined(more[1]),
                torch.cat([begun[2], more[2]], 1),
                torch.cat([begun[3], more[3]], 1),
            )
        refined, regions = self.refine_poses(*begun, meshes, K, size, features)
        if chosen is not None and refined.score_shift is not None:
            chosen = replace(chosen, score_shift=refined.score_shift[:, kept.stop :])
            refined = refined.pairs(slice(None), kept)
            regions = Regions(regions.pixels[:, kept], regions.surface[:, kept])
        return TrainingOutputs(
            detections=detections,
            meshes=meshes,
            rebuilt=self.mesh_decoder(meshes.embedding),
            features=features,
            match=match,
            direct=direct,
            refined=refined,
            regions=regions,
            pair_slots=pair_slots,
            pair_valid=labels >= 0,
            rivals=chosen,
            coordinates=self.coordinates(features.level(0)),
        )

    def encode_image(self, images: Tensor) -> Features:
        height, width = images.shape[-2:]
        if height % 32 or width % 32:
            raise ValueError(f"image of {width}x{height} given; pad width and height to multiples of 32")
        fine, *pyramid = self.backbone(images)
        shapes: Shapes = tuple((x.shape[-2], x.shape[-1]) for x in pyramid)
        memory = torch.cat([layer(x) for layer, x in zip(self.input_proj, pyramid, strict=True)], 1)
        level = torch.cat([e.expand(h * w, -1) for e, (h, w) in zip(self.level_embed, shapes, strict=True)])
        positions = (pyramid_positions(shapes, self.config.width, images.device) + level)[None]
        centres = cell_centres(shapes, images.device)[None, :, None]
        # Once for all layers: kernels read it as it lies.
        reference = centres.expand(images.shape[0], -1, self.levels, -1).contiguous()
        for layer in self.encoder:
            memory = layer(memory, positions, reference, shapes)
        return Features(memory, shapes, fine)

    def detect(self, features: Features, meshes: MeshTokens, targets: Targets | None = None) -> Detections:
        """Choose proposals among the cells, then refine them as queries: of all layers in training, else of
        the last. Which meshes are registered changes the logits alone, never the queries or boxes."""
        output = self.proposal(features.memory)  # [B, S, C]
        scores = self.proposal_score(output)[..., 0]
        best = scores.topk(self.config.queries, dim=1).indices  # [B, Q]
        chosen = take(output, best)
        raw = self.proposal_box(chosen).float() + self._raw_cell_boxes(features.shapes, best)
        boxes = raw.sigmoid()
        proposal_boxes, proposal_logits = boxes, take(scores, best).float()

        queries, reference, blocked, denoising = chosen.detach(), boxes.detach(), None, 0
        if targets is not None and self.config.denoising_groups:
            noised = noised_boxes(targets.labels, targets.boxes, self.config.denoising_groups)
            content = take(output, self._cell_of(features.shapes, noised)).detach()
            queries, reference = torch.cat([content, queries], 1), torch.cat([noised, reference], 1)
            denoising = noised.shape[1]
            blocked = attention_mask(
                self.config.denoising_groups, targets.labels.shape[1], best.shape[1], noised.device
            )

        if targets is not None and torch.is_grad_enabled():
            queries.requires_grad_()  # as the later layers' do: else the first is compiled apart
        all_queries, all_boxes = [], []
        for layer, box_head in zip(self.decoder, self.box_heads, strict=True):
            positions = self.box_position(box_embedding(reference, self.config.width // 2))
            levels = reference[:, :, None].expand(-1, -1, self.levels, -1)
            queries = layer(queries, positions, levels, features.memory, features.shapes, blocked)
            boxes = (box_head(queries).float() + inverse_sigmoid(reference)).sigmoid()
            reference = boxes.detach()
            all_queries.append(queries)
            all_boxes.append(boxes)
        # Without targets the last layer alone: nothing reads the others.
        given = targets is not None
        stacked, boxes = (torch.stack(x) if given else x[-1][None] for x in (all_queries, all_boxes))
        logits = self.similarity(stacked, meshes)
        return Detections(stacked, boxes, logits, proposal_boxes, proposal_logits, denoising)

    def direct_poses(
        self, queries: Tensor, boxes: Tensor, labels: Tensor, meshes: MeshTokens, K: Tensor, size: ImageSize
    ) -> tuple[Tensor, PairOutputs]:
        """queries [B, P, C], boxes [B, P, 4], labels [B, P] -> pair features [B, P, C], and their poses"""
        pairs = self.mesh_attention(queries, labels, meshes)
        return pairs, self.pose_head(pairs, boxes, meshes.diameters[labels], K, size)

    def _rivals(
        self,
        detections: Detections,
        targets: Targets,
        count: int,
        meshes: MeshTokens,
        K: Tensor,
        size: ImageSize,
    ) -> tuple[Rivals, tuple[Tensor, PoseEstimate, Tensor, Tensor]]:
        """Chosen rivals, without their shifts yet, and what refinement begins with: pair features, poses,
        boxes, labels."""
        own = slice(detections.denoising, None)
        logits, boxes = detections.logits[-1][:, own], detections.boxes[-1][:, own].detach()
        query, label, logit = choose_rivals(logits, boxes, targets.labels, targets.boxes, count)
        boxes = take(boxes, query)
        queries = take(detections.queries[-1][:, own], query)
        pairs, direct = self.direct_poses(queries, boxes, label, meshes, K, size)
        return Rivals(logit, torch.zeros_like(logit)), (pairs, direct.poses[0], boxes, label)

    def refine_poses(
        self,
        pairs: Tensor,
        direct: PoseEstimate,
        boxes: Tensor,
        labels: Tensor,
        meshes: MeshTokens,
        K: Tensor,
        size: ImageSize,
        features: Features,
    ) -> tuple[PairOutputs, Regions]:
        """Add the pose that fits what the box's square shows, and one a step of refinement; visibility and
        uncertainty are said anew by what was seen."""
        maps = self.pose_maps(features)
        anchors, diameters = meshes.anchors[labels], meshes.diameters[labels]
        looked, pairs, regions = self.region_reader(direct, pairs, boxes, maps, diameters, K, size)
        visibility = self.pose_head.visibility(pairs)[..., 0]
        poses = [direct, looked]
        start, scale = looked.detach(), self.pose_head.scale(pairs)
        if scale is not None:  # from here on the mesh is stretched as the region says
            start, fixed = resized(start, scale.detach()), scale.detach()
            anchors, diameters = stretched_anchors(anchors, fixed), diameters * size_factor(fixed)
        for step in range(self.config.refine_steps):
            refiner = self.refiners[min(step, len(self.refiners) - 1)]
            pose, pairs = refiner(start, pairs, maps, anchors, diameters, K, size)
            poses.append(replace(pose, scale=scale))
            start = pose.detach()
        shift = None
        if self.rescorer is not None:
            shift = -F.softplus(self.rescorer(pairs)[..., 0].float() - 4.0)  # at first hardly a shift
        return PairOutputs(tuple(poses), visibility, self.pose_head.log_sigma(pairs), shift), regions

    def _raw_cell_boxes(self, shapes: Shapes, index: Tensor) -> Tensor:
        """[B, Q, 4] the box each cell starts from, before the sigmoid: its centre, and a size that doubles
        with the level"""
        centres = cell_centres(shapes, index.device)
        sizes = torch.cat([centres.new_full((h * w,), 0.06 * 2**i) for i, (h, w) in enumerate(shapes)])
        height, width = shapes[0]
        aspect = (width / height) ** 0.5
        boxes = torch.cat([centres, sizes[:, None] / aspect, sizes[:, None] * aspect], -1)  # [S, 4]
        return inverse_sigmoid(boxes)[index]

    def _cell_of(self, shapes: Shapes, boxes: Tensor) -> Tensor:
        """[B, Q] the cell at stride 16 that holds each box's centre"""
        start = shapes[0][0] * shapes[0][1]
        h, w = shapes[1]
        x = (boxes[..., 0] * w).long().clamp(0, w - 1)
        y = (boxes[..., 1] * h).long().clamp(0, h - 1)
        return start + y * w + x
