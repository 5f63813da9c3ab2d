"""Deformable DETR (Zhu et al. 2021) as the authors' network has it: plain, with box refinement, or in two
stages. Batches are padded; padding is left out of every attention to the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smope.networks.deformable import (
    MLP,
    DecoderLayer,
    DeformableAttention,
    EncoderLayer,
    inverse_sigmoid,
    zero_last,
)
from smope.networks.outputs import take
from smope.networks.position import (
    Shapes,
    box_embedding,
    cell_centres,
    sine_embedding,
    unpadded_centres,
    valid_ratios,
)
from smope.networks.resnet import ResNet50


@dataclass(frozen=True)
class SmopePaperConfig:
    """The authors' settings; the defaults are theirs."""

    width: int = 256
    heads: int = 8
    levels: int = 4
    encoder_points: int = 4
    decoder_points: int = 4
    encoder_layers: int = 6
    decoder_layers: int = 6
    hidden: int = 1024
    dropout: float = 0.1
    queries: int = 300
    classes: int = 1  # object classes; one output more stands for "no object"
    dilated: bool = False  # the backbone's last stage at stride 16
    box_refine: bool = False
    two_stage: bool = False
    poses: bool = True  # without, only the detector is built
    surface_points: int = 6000
    template_vertices: int = 2562  # of the icosphere that is deformed
    # Meshes are centred on the mean of all vertices that their files list, not of those `load_mesh` keeps:
    listed_vertices: bool = False
    # What the annotations that it was trained on were off by, to be added to its outputs:
    depth_shift: float = 0.0  # metres, to every z
    box_shift: float = 0.0  # pixels, to the boxes' centres

    def __post_init__(self) -> None:
        if self.two_stage and not self.box_refine:
            raise ValueError(
                "two_stage without box_refine given: proposals need a box head of their own; "
                "set box_refine as well"
            )
        if self.levels < len(ResNet50.channels):
            raise ValueError(
                f"{self.levels} levels given, at least {len(ResNet50.channels)} expected: one a stage"
            )


@dataclass(frozen=True, eq=False)
class PaperMemory:
    """An encoded batch of images."""

    memory: Tensor  # [B, S, C] tokens of all levels in turn
    padding: Tensor  # [B, S] bool, True on padding
    ratios: Tensor  # [B, L, 2] share of each level's width and height that is image
    shapes: Shapes


@dataclass(frozen=True, eq=False)
class Proposals:
    """What the first stage makes of all tokens, and which of them become queries."""

    logits: Tensor  # [B, S, classes + 1]
    raw_boxes: Tensor  # [B, S, 4] before the sigmoid; infinite where a token can be no box
    chosen: Tensor  # [B, Q] int64, best first


@dataclass(frozen=True, eq=False)
class PaperDetections:
    """Queries after each decoder layer; boxes as cx, cy, w, h in 0..1 of the padded image."""

    image: PaperMemory
    queries: Tensor  # [L, B, Q, C]
    logits: Tensor  # [L, B, Q, classes + 1], the last column for "no object"
    boxes: Tensor  # [L, B, Q, 4]
    first_reference: Tensor  # [B, Q, 2 or 4]
    references: Tensor  # [L, B, Q, 2 or 4] after each layer
    proposals: Proposals | None = None


class PaperDetector(nn.Module):
    def __init__(self, config: SmopePaperConfig) -> None:
        super().__init__()
        self.config = c = config
        self.backbone = ResNet50(c.dilated)
        self.backbone.freeze_early()
        channels = list(self.backbone.channels)
        extra = c.levels - len(channels)
        projections = [nn.Conv2d(n, c.width, 1) for n in channels]
        projections += [
            nn.Conv2d(channels[-1] if i == 0 else c.width, c.width, 3, 2, 1) for i in range(extra)
        ]
        self.input_proj = nn.ModuleList(
            nn.Sequential(conv, nn.GroupNorm(32, c.width)) for conv in projections
        )
        self.level_embed = nn.Parameter(torch.randn(c.levels, c.width))
        self.encoder = nn.ModuleList(
            EncoderLayer(c.width, c.heads, c.levels, c.encoder_points, c.hidden, c.dropout)
            for _ in range(c.encoder_layers)
        )
        self.decoder = nn.ModuleList(
            DecoderLayer(c.width, c.heads, c.levels, c.decoder_points, c.hidden, c.dropout)
            for _ in range(c.decoder_layers)
        )
        if c.two_stage:
            self.proposal = nn.Linear(c.width, c.width)
            self.proposal_norm = nn.LayerNorm(c.width)
            self.proposal_query = nn.Linear(2 * c.width, 2 * c.width)
            self.proposal_query_norm = nn.LayerNorm(2 * c.width)
        else:
            self.query_embed = nn.Embedding(c.queries, 2 * c.width)  # position, content
            self.reference_points = nn.Linear(c.width, 2)
        # Without refinement all layers share one head; in two stages the proposals have the last one.
        heads = c.decoder_layers + c.two_stage if c.box_refine else 1
        self.class_heads = nn.ModuleList(nn.Linear(c.width, c.classes + 1) for _ in range(heads))
        self.box_heads = nn.ModuleList(zero_last(MLP(c.width, c.width, 4, 3)) for _ in range(heads))
        self._reset()

    def _reset(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and name.startswith(("encoder", "decoder", "proposal", "input_proj")):
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module._reset()
        if not self.config.two_stage:
            nn.init.xavier_uniform_(self.reference_points.weight)
            nn.init.zeros_(self.reference_points.bias)
            # Boxes start small: a sigmoid of -2 is 0.12.
            first = self.box_heads[0]
            assert isinstance(first, MLP)
            last = first.layers[-1]
            assert isinstance(last, nn.Linear)
            nn.init.constant_(last.bias[2:], -2.0)
        for head in self.class_heads:
            assert isinstance(head, nn.Linear)
            nn.init.constant_(head.bias[:-1], -math.log(99.0))  # an object has 1 % at first

    def forward(self, images: Tensor, padding: Tensor) -> PaperDetections:
        """images [B, 3, H, W] normalised, padding [B, H, W] bool, True on padding"""
        encoded = self.encode(images, padding)
        if self.config.two_stage:
            queries, positions, reference, proposals = self._proposed_queries(encoded)
        else:
            queries, positions, reference = self._learned_queries(len(images))
            proposals = None
        return self._decode(encoded, queries, positions, reference, proposals)

    def encode(self, images: Tensor, padding: Tensor) -> PaperMemory:
        sources = self._project(self.backbone(images))
        shapes: Shapes = tuple((x.shape[-2], x.shape[-1]) for x in sources)
        paddings = [resize_padding(padding, shape) for shape in shapes]
        ratios = torch.stack([valid_ratios(p) for p in paddings], 1)  # [B, L, 2]
        memory = torch.cat([x.flatten(2).transpose(1, 2) for x in sources], 1)
        positions = torch.cat(
            [
                sine_embedding(unpadded_centres(p).flip(-1), self.config.width // 2).to(memory.dtype) + level
                for p, level in zip(paddings, self.level_embed, strict=True)
            ],
            1,
        )
        reference = self._cell_references(shapes, ratios)[:, :, None] * ratios[:, None]  # [B, S, L, 2]
        flat = torch.cat([p.flatten(1) for p in paddings], 1)
        for layer in self.encoder:
            memory = layer(memory, positions, reference, shapes, flat)
        return PaperMemory(memory, flat, ratios, shapes)

    def _project(self, features: Sequence[Tensor]) -> list[Tensor]:
        sources = [layer(x) for layer, x in zip(self.input_proj, features, strict=False)]
        # The first further level looks at the backbone's last output itself, not at its projection.
        for i, layer in enumerate(self.input_proj[len(features) :]):
            sources.append(layer(features[-1] if i == 0 else sources[-1]))
        return sources

    @staticmethod
    def _cell_references(shapes: Shapes, ratios: Tensor) -> Tensor:
        """[B, S, 2] centres of all cells, in 0..1 of the part of their level that is image"""
        centres = cell_centres(shapes, ratios.device).split([h * w for h, w in shapes])
        return torch.cat([c / ratios[:, i, None] for i, c in enumerate(centres)], 1)

    def _learned_queries(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        positions, queries = self.query_embed.weight.expand(batch, -1, -1).chunk(2, -1)
        return queries, positions, self.reference_points(positions).sigmoid()

    def _proposed_queries(self, encoded: PaperMemory) -> tuple[Tensor, Tensor, Tensor, Proposals]:
        anchors = self._anchor_boxes(encoded.shapes, encoded.ratios)  # [B, S, 4]
        usable = ((anchors > 0.01) & (anchors < 0.99)).all(-1) & ~encoded.padding
        raw_anchors = (anchors / (1 - anchors)).log().masked_fill(~usable[..., None], torch.inf)
        tokens = encoded.memory.masked_fill(~usable[..., None], 0.0)
        tokens = self.proposal_norm(self.proposal(tokens))
        logits = self.class_heads[-1](tokens)
        raw_boxes = self.box_heads[-1](tokens) + raw_anchors
        chosen = logits[..., 0].topk(self.config.queries, dim=1).indices
        boxes = take(raw_boxes, chosen).detach().sigmoid()
        embedded = box_embedding(boxes, self.config.width // 2).to(tokens.dtype)  # [B, Q, 2 C]
        positions, queries = self.proposal_query_norm(self.proposal_query(embedded)).chunk(2, -1)
        return queries, positions, boxes, Proposals(logits, raw_boxes, chosen)

    def _anchor_boxes(self, shapes: Shapes, ratios: Tensor) -> Tensor:
        """[B, S, 4] the box each cell starts from: 0.05 of the image at the finest level, doubling upwards"""
        centres = self._cell_references(shapes, ratios)
        sizes = torch.cat(
            [centres.new_full((h * w, 2), 0.05 * 2.0**level) for level, (h, w) in enumerate(shapes)]
        )
        return torch.cat([centres, sizes.expand_as(centres)], -1)

    def _decode(
        self,
        encoded: PaperMemory,
        queries: Tensor,
        positions: Tensor,
        reference: Tensor,
        proposals: Proposals | None,
    ) -> PaperDetections:
        first_reference = reference
        all_queries, all_logits, all_boxes, references = [], [], [], []
        for i, layer in enumerate(self.decoder):
            ratios = encoded.ratios.repeat(1, 1, reference.shape[-1] // 2)  # [B, L, 2 or 4]
            levels = reference[:, :, None] * ratios[:, None]
            queries = layer(
                queries, positions, levels, encoded.memory, encoded.shapes, padding=encoded.padding
            )
            head = i if self.config.box_refine else 0
            shift = self.box_heads[head](queries)
            start = F.pad(inverse_sigmoid(reference), (0, 4 - reference.shape[-1]))
            boxes = (shift + start).sigmoid()
            if self.config.box_refine:
                reference = boxes.detach()
            all_queries.append(queries)
            all_logits.append(self.class_heads[head](queries))
            all_boxes.append(boxes)
            references.append(reference)
        return PaperDetections(
            encoded,
            torch.stack(all_queries),
            torch.stack(all_logits),
            torch.stack(all_boxes),
            first_reference,
            torch.stack(references),
            proposals,
        )


def resize_padding(padding: Tensor, shape: tuple[int, int]) -> Tensor:
    """[B, H, W] bool -> [B, h, w], nearest: the source index is the floor of the index times the ratio"""
    return F.interpolate(padding[:, None].float(), size=shape, mode="nearest")[:, 0].bool()
