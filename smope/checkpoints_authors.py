"""Checkpoints of the authors' trainer and of Deformable DETR: their files, keys and settings in our terms.

`read_checkpoint` gives the network's configuration and weights under our names and the meshes' names in the
order of the labels; `order_meshes` puts what a user gives into that order; `initialise_detector` takes what
it can from Deformable DETR and accounts for every tensor.
"""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeVar

import torch
from torch import Tensor

from smope.networks.smope_paper import SmopePaper, SmopePaperConfig

T = TypeVar("T")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says what is wrong with it."""


# Two fields of the trainer's arguments are `PosixPath`s. A pure path of that name stands in for it: it reads
# on every system, and under Python 3.13 too, which moved the class to another module.
_POSIX_PATHS = [
    type("PosixPath", (PurePosixPath,), {"__module__": module}) for module in ("pathlib", "pathlib._local")
]


@dataclass(frozen=True, eq=False)
class AuthorsCheckpoint:
    """What a file of the authors' trainer says."""

    config: SmopePaperConfig
    state: dict[str, Tensor]  # of `SmopePaper`
    mesh_names: tuple[str, ...]  # file names such as "car_001.obj", in the order of the labels
    dataset: str  # "KITTI3D" or "Linemod_preprocessed"
    epoch: int

    def network(self) -> SmopePaper:
        """With its weights, in evaluation mode."""
        network = SmopePaper(self.config)
        network.load_state_dict(self.state, strict=True)
        return network.eval()


def read_checkpoint(path: str | Path) -> AuthorsCheckpoint:
    """Read `checkpointNNNN.pth`. Nothing of the file is run: beside tensors and plain values only
    `argparse.Namespace` and `PosixPath` are let through.

    Sizes come from the tensors; the number of meshes leaves no trace in them and comes from the arguments.
    """
    content = load_pickle(path)
    missing = [key for key in ("model", "args") if key not in content]
    if missing:
        raise CheckpointError(
            f"{path}: no {' and '.join(map(repr, missing))} in it, but {sorted(map(str, content))}; a "
            "checkpoint of the authors' trainer has 'model', 'optimizer', 'lr_scheduler', 'epoch' and 'args'"
        )
    if not isinstance(content["args"], argparse.Namespace):
        raise CheckpointError(f"{path}: args is a {type(content['args']).__name__}, a Namespace expected")
    arguments, state = vars(content["args"]), _tensors(path, content["model"])
    try:
        config = config_from_args(arguments, state)
        with torch.device("meta"):  # names and shapes alone
            skeleton = SmopePaper(config)
        weights = our_state(state, skeleton)
        names = tuple(PureWindowsPath(str(name)).name for name in arguments["model_name"])
        count, dataset = int(arguments["model_class_num"]), str(arguments["dataset_name"])
    except KeyError as error:
        raise CheckpointError(f"{path}: args lack {error.args[0]!r}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if len(names) != count or len(set(names)) != count:
        raise CheckpointError(
            f"{path}: args name {len(names)} meshes {list(names)} with model_class_num {count}; "
            "as many different ones expected"
        )
    config = replace(config, listed_vertices=True)
    if dataset == "KITTI3D":
        # LabelImg3D writes z as if the camera stood at 0.51, where it stands at 0.52, and boxes in pixels
        # whose centres stand at whole numbers; the authors divided them by the size without the half pixel.
        config = replace(config, depth_shift=0.01, box_shift=0.5)
    return AuthorsCheckpoint(config, weights, names, dataset, int(content.get("epoch", -1)))


def load_pickle(path: str | Path) -> dict[str, Any]:
    """The dict in a .pth file, if it holds nothing but tensors, plain values and the two allowed classes."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    allowed: list[Any] = [argparse.Namespace, *_POSIX_PATHS]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path}: refused: it is damaged, no checkpoint, or holds objects other than tensors, plain "
            f"values, Namespace and PosixPath ({reason})"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: a {type(content).__name__} in it, a dict expected")
    return content


def _tensors(path: str | Path, state: Any) -> dict[str, Tensor]:
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: 'model' is not a dict of tensors")
    return {str(key): value for key, value in state.items()}


def order_meshes(wanted: Sequence[str], given: Mapping[str, T]) -> dict[str, T]:
    """The user's meshes in the checkpoint's order, under the user's names.

    "car_001.obj" is met by the names "car_001.obj", "car_001" and "car", whatever their case.
    """
    left = dict(given)
    found: dict[str, T] = {}
    missing = []
    for name in wanted:
        stem = PurePosixPath(name).stem
        spellings = {name.lower(), stem.lower(), re.sub(r"_\d+$", "", stem).lower()}
        matching = [key for key in left if key.lower() in spellings]
        if len(matching) == 1:
            found[matching[0]] = left.pop(matching[0])
        else:
            missing.append(name + (f" (given as {matching})" if matching else ""))
    if missing or left:
        raise CheckpointError(
            f"meshes {list(given)} given, {list(wanted)} expected, one each; "
            f"missing: {', '.join(missing) or 'none'}; surplus: {', '.join(left) or 'none'}"
        )
    return found


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


def _place(key: str, wanted: Mapping[str, Tensor]) -> str | None:
    """The one of our names in `wanted` that the authors' `key` stands for."""
    ours = our_key(key)
    if ours is not None and ours not in wanted:
        # Without box refinement, heads 1, 2, ... are head 0 under further names.
        ours = re.sub(r"^(detector\.(?:class|box)_heads)\.\d+\.", r"\1.0.", ours)
    return ours if ours in wanted else None


def our_state(state: Mapping[str, Tensor], network: SmopePaper) -> dict[str, Tensor]:
    """The authors' state dict under our names, every key used. Heads that they list once a layer though all
    layers share one must be equal."""
    wanted = network.state_dict()
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        ours = _place(key, wanted)
        if ours is None:
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
    ours = {name: tensor for key, tensor in state.items() if (name := our_key(key))}

    def shape(name: str) -> torch.Size:
        if name not in ours:
            raise CheckpointError(f"no tensor for {name}; is this a checkpoint of the authors' network?")
        return ours[name].shape

    def layers(name: str) -> int:
        return len({key.split(".")[2] for key in ours if key.startswith(f"detector.{name}.")})

    levels, width = shape("detector.level_embed")
    two_stage = "detector.proposal.weight" in ours
    poses = "pose_head.project.weight" in ours
    settings: dict[str, Any] = {}
    if poses:
        settings["surface_points"] = shape("mesh_encoder.points_branch.0.weight")[1] // 3
        settings["template_vertices"] = shape("mesh_decoder.offsets.2.weight")[0] // 3

    def points(layer: str) -> int:
        return shape(f"detector.{layer}.attention_weights.weight")[0] // (int(arguments["nheads"]) * levels)

    return SmopePaperConfig(
        width=width,
        heads=int(arguments["nheads"]),
        levels=levels,
        encoder_points=points("encoder.0.self_attn"),
        decoder_points=points("decoder.0.cross_attn"),
        encoder_layers=layers("encoder"),
        decoder_layers=layers("decoder"),
        hidden=shape("detector.encoder.0.feed_forward.linear1.weight")[0],
        dropout=float(arguments["dropout"]),
        queries=int(arguments["num_queries"]) if two_stage else shape("detector.query_embed.weight")[0],
        classes=shape("detector.class_heads.0.weight")[0] - 1,
        dilated=bool(arguments["dilation"]),
        # Heads stand under the decoder too where it refines boxes with them.
        box_refine=any("transformer.decoder.bbox_embed." in key for key in state),
        two_stage=two_stage,
        poses=poses,
        **settings,
    )


@dataclass(frozen=True)
class Row:
    """What became of one tensor."""

    key: str  # in the file, or ours where the file has none
    shape: tuple[int, ...]
    outcome: str


def detector_config(state: Mapping[str, Tensor], **settings: Any) -> SmopePaperConfig:
    """The authors' network around the detector of a Deformable DETR checkpoint: plain, refined or two-stage.

    `settings` are fields of `SmopePaperConfig` that differ from the authors', such as `surface_points`.
    """
    defaults = {"nheads": 8, "dropout": 0.1, "dilation": False, "num_queries": 300}
    found = vars(config_from_args(defaults, state))
    if found["levels"] != 4:
        raise CheckpointError(f"{found['levels']} feature levels given, 4 expected")
    return SmopePaperConfig(**{**found, "classes": 1, "poses": True, **settings})


def initialise_detector(network: SmopePaper, state: Mapping[str, Tensor]) -> list[Row]:
    """Copy the tensors of a Deformable DETR checkpoint that fit. One row for each tensor of the file, and for
    each of the detector's that the file does not fill: class heads of another number of classes stay as they
    are."""
    wanted = {key: t for key, t in network.state_dict().items() if key.startswith("detector.")}
    rows, filled = [], set()
    for key, tensor in state.items():
        ours, shape = _place(key, wanted), tuple(tensor.shape)
        if ours is None:
            outcome = "left: no place for it"
        elif tensor.shape != wanted[ours].shape:
            outcome = f"left: {ours} is {'x'.join(map(str, wanted[ours].shape))}"
        elif ours not in filled:
            wanted[ours].copy_(tensor)
            filled.add(ours)
            outcome = f"-> {ours}"
        elif torch.equal(tensor, wanted[ours]):
            outcome = f"the same as {ours}"
        else:
            raise CheckpointError(
                f"{key}: differs from the other tensor for {ours}; build the network by `detector_config`"
            )
        rows.append(Row(key, shape, outcome))
    if not filled:
        raise CheckpointError("none of the tensors belongs to Deformable DETR; is this its checkpoint?")
    left = [Row(key, tuple(t.shape), "as initialised") for key, t in wanted.items() if key not in filled]
    return rows + left


def table(rows: Sequence[Row]) -> str:
    """One line a tensor, for printing."""
    width = max(len(row.key) for row in rows)
    return "\n".join(f"{row.key:{width}}  {'x'.join(map(str, row.shape)):>12}  {row.outcome}" for row in rows)
