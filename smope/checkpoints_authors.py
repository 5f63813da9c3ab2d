"""Checkpoints of the authors' trainer and of Deformable DETR: their keys and settings in our terms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from smope.networks.smope_paper import SmopePaper, SmopePaperConfig


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says what is wrong with it."""


# Theirs -> ours, the first pattern that matches; `detr.` before the detector's keys is optional, as their
# code leaves it out where poses are switched off.
_KEYS: tuple[tuple[str, str], ...] = (
    (r"backbone\.0\.body\.", r"detector.backbone."),
    (r"input_proj\.", r"detector.input_proj."),
    (r"query_embed\.", r"detector.query_embed."),
    (r"transformer\.level_embed$", r"detector.level_embed"),
    (r"transformer\.reference_points\.", r"detector.reference_points."),
    (r"transformer\.encoder\.layers\.(\d+)\.(linear[12])\.", r"detector.encoder.\1.feed_forward.\2."),
    (r"transformer\.encoder\.layers\.(\d+)\.norm2\.", r"detector.encoder.\1.feed_forward.norm."),
    (r"transformer\.encoder\.layers\.(\d+)\.", r"detector.encoder.\1."),
    (r"transformer\.decoder\.layers\.(\d+)\.(linear[12])\.", r"detector.decoder.\1.feed_forward.\2."),
    (r"transformer\.decoder\.layers\.(\d+)\.norm3\.", r"detector.decoder.\1.feed_forward.norm."),
    (r"transformer\.decoder\.layers\.(\d+)\.", r"detector.decoder.\1."),
    (r"(?:transformer\.decoder\.)?class_embed\.(\d+)\.", r"detector.class_heads.\1."),
    (r"(?:transformer\.decoder\.)?bbox_embed\.(\d+)\.", r"detector.box_heads.\1."),
    (r"transformer\.enc_output\.", r"detector.proposal."),
    (r"transformer\.enc_output_norm\.", r"detector.proposal_norm."),
    (r"transformer\.pos_trans\.", r"detector.proposal_query."),
    (r"transformer\.pos_trans_norm\.", r"detector.proposal_query_norm."),
    (r"model_3d_net\.subnet_vert\.", r"mesh_encoder.points_branch."),
    (r"model_3d_net\.subnet_normal\.", r"mesh_encoder.normals_branch."),
    (r"model_3d_net\.subnet_vert_normal\.", r"mesh_encoder.fuse."),
    (r"model_3d_net\.subnet_decoder_samples\.", r"mesh_decoder.offsets."),
    (r"model_3d_net\.subnet_decoder_scale\.", r"mesh_decoder.scale."),
    (r"model_3d_net\.subnet_decoder_center\.", r"mesh_decoder.centre."),
    (r"bbox_attention\.q_linear\.", r"attention.query."),
    (r"bbox_attention\.k_linear\.", r"attention.key."),
    (r"pose_head\.l1\.", r"pose_head.project."),
    (r"pose_head\.g1\.", r"pose_head.norm."),
    (r"pose_head\.l2\.", r"pose_head.class_tower."),
    (r"pose_head\.l3\.", r"pose_head.class_out."),
    (r"pose_head\.l4\.", r"pose_head.pose_tower."),
    (r"pose_head\.l5\.", r"pose_head.pose_out."),
)


def our_key(key: str) -> str | None:
    """The name in `SmopePaper` of what the authors and Deformable DETR call `key`; None if there is none."""
    for pattern, replacement in _KEYS:
        if found := re.match(r"(?:module\.)?(?:detr\.)?" + pattern, key):
            return found.expand(replacement) + key[found.end() :]
    return None


def our_state(state: Mapping[str, Tensor], network: SmopePaper) -> dict[str, Tensor]:
    """The authors' state dict under our names, every key used. Heads that they list once a layer though all
    layers share one must be equal."""
    wanted = network.state_dict()
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        ours = our_key(key)
        if ours is not None and ours not in wanted:
            # Without box refinement, heads 1, 2, ... are head 0 under further names.
            ours = re.sub(r"^(detector\.(?:class|box)_heads)\.\d+\.", r"\1.0.", ours)
        if ours is None or ours not in wanted:
            raise CheckpointError(f"{key}: not a part of the authors' network as its other keys describe it")
        if tensor.shape != wanted[ours].shape:
            raise CheckpointError(
                f"{key}: shape {tuple(tensor.shape)} given, {tuple(wanted[ours].shape)} expected"
            )
        if ours in found and not torch.equal(found[ours], tensor):
            raise CheckpointError(f"{key}: differs from the tensor it shares; the checkpoint is damaged")
        found[ours] = tensor
    missing = [key for key in wanted if key not in found]
    if missing:
        raise CheckpointError(f"{len(missing)} tensors are missing, among them {missing[:3]}")
    return found


def config_from_args(arguments: Mapping[str, Any], state: Mapping[str, Tensor]) -> SmopePaperConfig:
    """Sizes from the tensors, and from the trainer's arguments what no tensor shows."""
    ours = {our_key(key): tensor for key, tensor in state.items()}

    def shape(name: str) -> torch.Size:
        if name not in ours:
            raise CheckpointError(f"no tensor for {name}; is this a checkpoint of the authors' network?")
        return ours[name].shape

    def count(name: str) -> int:
        pattern = re.compile(re.escape(name) + r"\.(\d+)\.")
        numbers = [int(m.group(1)) for key in ours if key and (m := pattern.match(key))]
        return max(numbers, default=-1) + 1

    levels, width = shape("detector.level_embed")
    heads = int(arguments["nheads"])
    two_stage = "detector.proposal.weight" in ours
    poses = "pose_head.project.weight" in ours
    encoder, decoder = count("detector.encoder"), count("detector.decoder")

    def points(layer: str) -> int:
        return shape(f"detector.{layer}.attention_weights.weight")[0] // (heads * levels)

    settings: dict[str, Any] = {}
    if poses:
        settings["surface_points"] = shape("mesh_encoder.points_branch.0.weight")[1] // 3
        settings["template_vertices"] = shape("mesh_decoder.offsets.2.weight")[0] // 3
    return SmopePaperConfig(
        width=width,
        heads=heads,
        levels=levels,
        encoder_points=points("encoder.0.self_attn"),
        decoder_points=points("decoder.0.cross_attn"),
        encoder_layers=encoder,
        decoder_layers=decoder,
        hidden=shape("detector.encoder.0.feed_forward.linear1.weight")[0],
        dropout=float(arguments["dropout"]),
        queries=int(arguments["num_queries"]) if two_stage else shape("detector.query_embed.weight")[0],
        classes=shape("detector.class_heads.0.weight")[0] - 1,
        dilated=bool(arguments["dilation"]),
        box_refine=bool(arguments["with_box_refine"]),
        two_stage=two_stage,
        poses=poses,
        **settings,
    )
