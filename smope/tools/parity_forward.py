"""What our network makes of a parity fixture's weights and images, under the names of the fixture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from smope.checkpoints_authors import config_from_args, our_key, our_state
from smope.networks.paper_meshes import MeshSurfaces
from smope.networks.smope_paper import PaperOutputs, SmopePaper, pad_batch

Values = dict[str, Tensor]


def traced(name: str) -> bool:
    """Whether the fixture has a line of statistics for this array too."""
    return name in ("memory", "attention") or name.startswith(
        ("backbone.", "input_proj.", "pos.", "encoder.", "decoder.", "hs.")
    )


def build(arguments: Mapping[str, Any], state: Mapping[str, Tensor], dtype: torch.dtype) -> SmopePaper:
    """Our network with the authors' weights, in evaluation mode."""
    config = config_from_args(arguments, state)
    network = SmopePaper(config)
    network.load_state_dict(our_state(state, network), strict=True)
    return network.to(dtype).eval()


@torch.no_grad()
def forward_values(network: SmopePaper, images: list[Tensor], surfaces: MeshSurfaces) -> Values:
    """Every array of pose.npz, refine.npz or two_stage.npz, whole."""
    batch, padding = pad_batch(images)
    calls: dict[str, tuple[Any, ...]] = {}
    with _recorded(network, calls):
        outputs = network(batch, padding, surfaces if network.config.poses else None)
    values: Values = {"mask": padding}
    values.update(_detector_values(network, outputs, calls))
    if network.config.poses:
        values.update(_pose_values(outputs, calls))
        values.update(_batch_norm_values(network, outputs.detections.queries[-1], surfaces))
    return values


@contextmanager
def _recorded(network: SmopePaper, calls: dict[str, tuple[Any, ...]]) -> Iterator[None]:
    """Note the arguments and the result of every module's call."""

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
            calls[name] = (*arguments, result)

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in network.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _detector_values(network: SmopePaper, outputs: PaperOutputs, calls: dict[str, tuple[Any, ...]]) -> Values:
    found, config = outputs.detections, network.config
    values: Values = {}
    for i, feature in enumerate(calls["detector.backbone"][-1]):
        values[f"backbone.{i}"] = feature
    for i in range(config.levels):
        values[f"input_proj.{i}"] = calls[f"detector.input_proj.{i}"][-1]

    _, positions, reference, shapes, padding, _ = calls["detector.encoder.0"]
    sizes = [h * w for h, w in shapes]
    for i, (h, w) in enumerate(shapes):
        level = positions.split(sizes, 1)[i] - network.detector.level_embed[i]
        values[f"pos.{i}"] = level.transpose(1, 2).unflatten(-1, (h, w))
        values[f"level_mask.{i}"] = padding.split(sizes, 1)[i].unflatten(-1, (h, w))
    values["spatial_shapes"] = torch.tensor(shapes)
    values["level_start_index"] = torch.tensor([sum(sizes[:i]) for i in range(len(sizes))])
    values["valid_ratios"] = found.image.ratios
    values["enc_reference_points"] = reference
    values["encoder.0.self_attn"] = calls["detector.encoder.0.self_attn"][-1]
    for i in range(config.encoder_layers):
        values[f"encoder.{i}"] = calls[f"detector.encoder.{i}"][-1]
    values["memory"] = found.image.memory

    values["decoder.0.self_attn"] = calls["detector.decoder.0.self_attn"][-1]
    values["decoder.0.cross_attn"] = calls["detector.decoder.0.cross_attn"][-1]
    values["init_reference"] = found.first_reference
    values["inter_references"] = found.references
    last = config.decoder_layers - 1
    for i in range(config.decoder_layers):
        values[f"hs.{i}"] = found.queries[i]
        prefix = "" if i == last else f"aux.{i}."
        values[f"{prefix}pred_logits"] = found.logits[i]
        values[f"{prefix}pred_boxes"] = found.boxes[i]
    if found.proposals is not None:
        content, position = calls["detector.decoder.0"][:2]
        values["two_stage.enc_class"] = found.proposals.logits
        values["two_stage.enc_coord_unact"] = found.proposals.raw_boxes
        values["two_stage.topk_index"] = found.proposals.chosen
        values["two_stage.query_pos"] = position
        values["two_stage.tgt"] = content
        values["enc_outputs.pred_boxes"] = found.proposals.raw_boxes.sigmoid()
    return values


def _pose_values(outputs: PaperOutputs, calls: dict[str, tuple[Any, ...]]) -> Values:
    assert outputs.features is not None
    assert outputs.meshes is not None
    assert outputs.attention is not None
    assert outputs.poses is not None
    batch = outputs.attention.shape[0]
    projected = calls["pose_head.project"][-1]  # [M, C]
    normed = calls["pose_head.norm"][-1][0].T  # [M, C]
    scores = outputs.detections.logits[-1].softmax(-1)[..., :-1]  # [B, Q, classes]
    return {
        "model3d.vert": calls["mesh_encoder.points_branch"][-1],
        "model3d.normal": calls["mesh_encoder.normals_branch"][-1],
        "model3d.feat": outputs.features,
        "pred_model_points": outputs.meshes.offsets,
        "pred_model_scales": outputs.meshes.scales,
        "pred_model_centers": outputs.meshes.centres,
        "attention": outputs.attention,
        "pose_head.l1": projected.expand(batch, -1, -1),
        "pose_head.g1": normed.expand(batch, -1, -1),
        "pose_head.class_logits": outputs.poses.class_logits,
        "pose_head.pose_raw": outputs.poses.raw,
        "pose_class": outputs.poses.probabilities,
        "pose_6dof": outputs.poses.poses,
        "post.scores": scores.amax(-1),
        "post.labels": scores.argmax(-1),
    }


def _batch_norm_values(network: SmopePaper, queries: Tensor, surfaces: MeshSurfaces) -> Values:
    """The pose part once more with its BatchNorm1d layers on the statistics of the meshes, dropout off."""
    norms = [module for module in network.mesh_encoder.modules() if isinstance(module, nn.BatchNorm1d)]
    for norm in norms:
        norm.train()
    features = network.encode_meshes(surfaces)
    network.eval()
    decoded = network.mesh_decoder(features)
    _, poses = network.estimate_poses(queries, features)
    values = {
        "model3d.feat": features,
        "pose_class": poses.probabilities,
        "pose_6dof": poses.poses,
        "pred_model_points": decoded.offsets,
        "pred_model_scales": decoded.scales,
        "pred_model_centers": decoded.centres,
    }
    state = network.state_dict()
    for branch in ("subnet_vert", "subnet_normal", "subnet_vert_normal"):
        for statistic in ("running_mean", "running_var"):
            ours = our_key(f"model_3d_net.{branch}.2.{statistic}")
            assert ours is not None
            values[f"{branch}.2.{statistic}_after"] = state[ours].clone()
    return {f"bn_batch.{name}": value for name, value in values.items()}
