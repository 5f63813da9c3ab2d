"""Which network a recipe trains, and by which objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from smope.architectures import NetworkConfig
from smope.checkpoints_authors import CheckpointError, detector_config, load_pickle, our_key, read_checkpoint
from smope.config import ConfigError, from_json, to_json
from smope.networks.smope_paper import SmopePaperConfig
from smope.networks.smope_s import SmopeSConfig
from smope.objects import ObjectModel
from smope.scenes.meshes import PreparedMesh
from smope.train.objective import LossConfig, Objective
from smope.train.paper_losses import PaperWeights
from smope.train.paper_objective import PaperObjective
from smope.train.recipe import Recipe
from smope.train.strangers import Strangers

# Called with a network and a batch: the loss [] and its parts [].
AnyObjective = Callable[[Any, Any], tuple[Tensor, Mapping[str, Tensor]]]

_PRESETS = {"kitti3d": PaperWeights.kitti3d, "linemod": PaperWeights.linemod}


def network_config(plan: Recipe, init: str | Path | None = None) -> NetworkConfig:
    """From the recipe's [network]; what it leaves open is as in the .pth that smope-paper starts from, and
    else as the architecture has it."""
    if plan.architecture == "smope-s":
        return from_json(SmopeSConfig, plan.network, "network")
    base = SmopePaperConfig()
    if init is not None and Path(init).suffix == ".pth":
        state = detector_state(init)
        base = read_checkpoint(init).config if state is None else detector_config(state)
        # From now on annotations come without those offsets, and meshes as `load_mesh` has them.
        base = replace(base, depth_shift=0.0, box_shift=0.0, listed_vertices=False)
    return from_json(SmopePaperConfig, {**to_json(base), **plan.network}, "network")


def make_objective(
    plan: Recipe,
    objects: Sequence[ObjectModel],
    config: NetworkConfig,
    clutter: Sequence[PreparedMesh] = (),
) -> AnyObjective:
    """The loss that the recipe names, with the weights of its section [loss]; strangers are taken from the
    clutter."""
    if isinstance(config, SmopeSConfig):
        if plan.objective != "default":
            raise ConfigError(
                f'objective {plan.objective!r} given for smope-s; it trains architecture = "smope-paper" only'
            )
        loss = from_json(LossConfig, plan.loss, "loss")
        if config.rescore and loss.rivals < 1:
            raise ConfigError(
                f"loss.rivals = {loss.rivals} given, at least 1 expected where network.rescore is on: what "
                "lowers scores learns from wrong pairs"
            )
        strangers = Strangers.of(clutter, len(objects[0].points)) if loss.strangers and clutter else None
        return Objective(objects, loss, strangers)
    name = "paper" if plan.objective == "default" else plan.objective
    weights = paper_weights(plan.loss)
    return PaperObjective(objects, weights, name, samples=config.surface_points)


def paper_weights(table: Mapping[str, Any]) -> PaperWeights:
    """[loss] for smope-paper: fields of `PaperWeights`, over those of `preset` "kitti3d" or "linemod"."""
    settings = dict(table)
    preset = settings.pop("preset", None)
    if preset is not None and preset not in _PRESETS:
        raise ConfigError(f"loss.preset: {preset!r} given, one of {', '.join(_PRESETS)} expected")
    base = _PRESETS[preset]() if preset else PaperWeights()
    return from_json(PaperWeights, {**to_json(base), **settings}, "loss")


def detector_state(path: str | Path) -> dict[str, Tensor] | None:
    """The tensors of a Deformable DETR checkpoint; None where they are those of the authors' network."""
    content = load_pickle(path)
    state = content.get("model", content)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: no dict of tensors in it, as Deformable DETR and the authors write")
    if any((our_key(key) or "").startswith("pose_head.") for key in state):
        return None
    return dict(state)
