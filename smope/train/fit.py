"""`fit`: meshes and a recipe in, a folder with a trained model out.

Meshes -> objects -> source (rendered scenes or a data set) -> loop(network, objective) -> model folder.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smope.architectures import Network, architecture_of, build_network
from smope.config import ConfigError, ModelConfig, from_json, to_json
from smope.data.corners import with_corner_boxes
from smope.data.items import Batch
from smope.data.readers import read_records
from smope.data.records import Record
from smope.files import write_atomically
from smope.model import SMOPE
from smope.objects import ObjectModel
from smope.scenes.assets import SceneAssets, build_assets
from smope.scenes.config import SceneConfig
from smope.scenes.stream import SceneStream
from smope.scenes.street_config import StreetConfig
from smope.train.augment import AugmentConfig
from smope.train.choice import AnyObjective, make_objective, network_config
from smope.train.distributed import Ranks, joined
from smope.train.held_out import HeldOut
from smope.train.loop import Loop, LoopResult
from smope.train.preview import draw_truth
from smope.train.recipe import DataConfig, Recipe, expand, load_recipe
from smope.train.sources import Source, mixed_source, record_source, scene_source
from smope.train.start import begin
from smope.train.streets import street_assets, street_stream

log = logging.getLogger(__name__)

MODEL, FIRST_BATCH, SCORES = "model", "first_batch.jpg", "held_out_scores.json"


class PoseTask:
    """What the loop trains: a network by its objective, scored on held-out images."""

    def __init__(
        self,
        objective: AnyObjective,
        objects: Sequence[ObjectModel],
        held_out: Sequence[Batch],
        crowds: bool = False,
    ) -> None:
        self.objective = objective
        self.judge = HeldOut(objects, held_out, crowds) if held_out else None

    def step(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        return self.objective(model, batch)

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        assert isinstance(model, Network)
        return self.judge.scores(model) if self.judge else {}


def fit(
    meshes: Mapping[str, Any] | Sequence[ObjectModel] | None = None,
    units: str | None = None,
    scenes: SceneConfig | None = None,
    dataset: Sequence[Record] | None = None,
    init: str | Path | None = None,
    out: str | Path = "runs/fit",
    max_minutes: float | None = None,
    resume: bool = False,
    recipe: str | Path | Recipe | None = None,
    assets: str | Path | SceneAssets | None = None,
    symmetries: Mapping[str, Any] | str | None = None,
    backbone: str | Path | None = None,
    continue_schedule: bool = False,
    device: torch.device | str | None = None,
    architecture: str | None = None,
    objective: str | None = None,
    **run_options: Any,
) -> Path:
    """Train a model for these meshes; returns the folder of the model, for `SMOPE.from_pretrained`.

    `meshes` {name: mesh} with their `units` (or ready objects), by default those of the recipe. Images are
    rendered from the meshes (`scenes` says how they look, `assets` is the file of clutter and backgrounds),
    or come from `dataset`, the records of a reader in `smope.data`, or from the data set that the recipe's
    section [data] names, in any of the forms of `smope.data.readers`. `recipe` is a TOML file; arguments go
    before it, `run_options` are keys of its section [run]. `init` gives weights to start from: a model, a
    full checkpoint, or a small one; with `continue_schedule` the run also stands where that small checkpoint
    stood. `backbone` is a file of ImageNet weights, used where there is no `init`.

    `architecture` is "smope-s" or "smope-paper", the authors' network, whose `objective` is "paper" or
    "paper-verbatim"; its `init` may also be a .pth of the authors' trainer or of Deformable DETR, which then
    says how large the network is.

    Ctrl-C saves and then raises KeyboardInterrupt. A run that was killed, interrupted, or ended after
    `piece_minutes` goes on with `resume=True`, on the same data and schedule. Under `torchrun` every process
    renders its own scenes; the first one writes.
    """
    plan = _planned(recipe, max_minutes, run_options, {"architecture": architecture, "objective": objective})
    with joined(device) as ranks:
        objects = objects_of(meshes, units, symmetries, plan.data)
        source, scene_config = source_of(objects, scenes, dataset, assets, plan, ranks)
        config = network_config(plan, init)
        loss = make_objective(plan, objects, config, source.clutter)
        # The same start in every process, whatever was drawn before.
        torch.manual_seed(plan.run.seed)
        network = build_network(config)
        loop = Loop(
            network,
            PoseTask(loss, objects, source.held_out, crowds=bool(plan.street)),
            source.stream,
            plan.optim,
            plan.run,
            Path(out),
            ranks,
            _about(plan, objects, network, scene_config),
            lambda batch: _show(batch, objects, Path(out)),
        )
        pretrained = backbone or (expand(plan.data.backbone) if plan.data.backbone else None)
        begin(loop, init, pretrained, resume, continue_schedule)
        result = loop.run()
        if result.interrupted:
            raise KeyboardInterrupt(
                f"interrupted; everything is saved in {out}, and resume goes on from there"
            )
        folder = Path(out) / MODEL
        if ranks.is_main:
            _save_model(folder, loop, objects, source, result)
    return folder


def objects_of(
    meshes: Mapping[str, Any] | Sequence[ObjectModel] | None,
    units: str | None,
    symmetries: Mapping[str, Any] | str | None,
    data: DataConfig,
) -> list[ObjectModel]:
    """The objects to learn, from the arguments or else from the recipe's section [data]."""
    if meshes is None:
        if not data.meshes:
            raise ConfigError(
                'no meshes: pass meshes={name: mesh} and units="mm", or name them in [data.meshes]'
            )
        meshes = {name: expand(mesh) for name, mesh in data.meshes.items()}
        units = units or data.units
        symmetries = symmetries or _read_symmetries(data)
    if not isinstance(meshes, Mapping):
        return list(meshes)
    if units is None:
        raise ConfigError('meshes need their units: pass units="m", "cm", "mm" or "in"')
    return [
        ObjectModel.from_mesh(
            name, mesh, units, symmetries.get(name) if isinstance(symmetries, Mapping) else symmetries
        )
        for name, mesh in meshes.items()
    ]


def _read_symmetries(data: DataConfig) -> Mapping[str, Any] | str | None:
    """The word "auto", or entries of a models_info.json by name, for mesh files obj_000001.ply and so on."""
    if data.symmetries is None or data.symmetries == "auto":
        return data.symmetries
    try:
        entries = json.loads(expand(data.symmetries).read_text(encoding="utf-8"))
        ids = {name: str(int(Path(mesh).stem.removeprefix("obj_"))) for name, mesh in data.meshes.items()}
        return {name: entries[number] for name, number in ids.items()}
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f'data.symmetries: {data.symmetries} given; "auto", or a models_info.json with an entry for each '
            f"mesh file obj_NNNNNN expected ({error})"
        ) from error


def _planned(
    recipe: str | Path | Recipe | None,
    max_minutes: float | None,
    run_options: Mapping[str, Any],
    choices: Mapping[str, str | None],
) -> Recipe:
    plan = recipe if isinstance(recipe, Recipe) else Recipe() if recipe is None else load_recipe(recipe)
    chosen = {name: choice for name, choice in choices.items() if choice is not None}
    if chosen:
        plan = from_json(Recipe, {**to_json(plan), **chosen})
    given = {key: value for key, value in run_options.items() if value is not None}
    if max_minutes is not None:
        given["max_minutes"] = max_minutes
    run = from_json(type(plan.run), {**to_json(plan.run), **given}, "run")
    if run.max_minutes is None and run.max_steps is None:
        raise ConfigError("a run needs an end: pass max_minutes (or max_steps), or set it in [run]")
    return replace(plan, run=run)


def source_of(
    objects: Sequence[ObjectModel],
    scenes: SceneConfig | None,
    dataset: Sequence[Record] | None,
    assets: str | Path | SceneAssets | None,
    plan: Recipe,
    ranks: Ranks,
) -> tuple[Source, SceneConfig | None]:
    if scenes is not None and dataset is not None:
        raise ConfigError("both scenes and dataset given; a run learns from one of them")
    photos, count = None, 0
    make: Callable[..., SceneStream] = SceneStream
    config = scenes or from_json(SceneConfig, plan.scenes, "scenes")
    if plan.street and scenes is None:
        config = from_json(StreetConfig, plan.street, "street")
    if scenes is None:
        sized = bool(plan.network.get("predict_scale", False))
        records = dataset if dataset is not None else read_dataset(plan.data, objects, sized)
        if plan.street:
            make = street_stream(plan.data, records or ())
        if records is not None:
            mixed = dataset is None and plan.data.share < 1
            count = max(1, round(plan.data.share * plan.run.batch_size)) if mixed else plan.run.batch_size
            photos = record_source(
                objects,
                records,
                replace(plan.run, batch_size=count),
                ranks.device,
                ranks.rank,
                plan.data.held_out,
                from_json(AugmentConfig, plan.augment, "augment") if plan.augment else None,
                (-(-config.width // 32) * 32, -(-config.height // 32) * 32) if mixed else None,
            )
            if not mixed:
                return photos, None
    build = street_assets if isinstance(config, StreetConfig) else _scene_assets
    ready = _assets(objects, assets, plan.data, ranks, build)
    run = replace(plan.run, batch_size=plan.run.batch_size - count)
    rendered = scene_source(objects, ready, config, run, ranks.device, ranks.rank, make)
    return (rendered if photos is None else mixed_source(rendered, photos)), config


def read_dataset(data: DataConfig, objects: Sequence[ObjectModel], sized: bool) -> list[Record] | None:
    """The data set of the section [data], if it names one; `sized`: with the sizes of instances as scales."""
    if (data.dataset is None) != (data.format is None):
        raise ConfigError("data.dataset and data.format go together: the folder, and which form it has")
    if data.dataset is None or data.format is None:
        return None
    extents = {model.name: model.extents.tolist() for model in objects} if sized else None
    records = read_records(expand(data.dataset), data.format, data.split, extents=extents)
    return with_corner_boxes(records, objects) if data.box == "corners" else records


def _assets(
    objects: Sequence[ObjectModel],
    assets: str | Path | SceneAssets | None,
    data: DataConfig,
    ranks: Ranks,
    build: Callable[[Sequence[ObjectModel], DataConfig], SceneAssets],
) -> SceneAssets:
    """The given assets, those of a file, or new ones, which are put into the file if one is named."""
    if isinstance(assets, SceneAssets):
        return _in_order(assets, objects)
    file = Path(assets) if assets is not None else expand(data.assets) if data.assets else None
    if file is not None and file.exists():
        return _in_order(SceneAssets.load(file), objects)
    if assets is not None and not (data.clutter or data.backgrounds):
        raise ConfigError(f"assets: {file} does not exist, and the recipe names no folders to make it from")
    # One process prepares, then the others read or, without a file, prepare the same for themselves.
    ready = None
    for turn in (True, False):
        if ranks.is_main is turn:
            if file is not None and file.exists():
                ready = _in_order(SceneAssets.load(file), objects)
            else:
                log.info("preparing %d objects, and what stands around them, to render", len(objects))
                ready = build(objects, data)
                if file is not None:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    ready.save(file)
        ranks.same_for_all(0)
    assert ready is not None
    return ready


def _scene_assets(objects: Sequence[ObjectModel], data: DataConfig) -> SceneAssets:
    clutter = sorted(expand(data.clutter).rglob("*.ply")) if data.clutter else []
    return build_assets(objects, clutter, expand(data.backgrounds) if data.backgrounds else None)


def _in_order(assets: SceneAssets, objects: Sequence[ObjectModel]) -> SceneAssets:
    """Labels follow the objects' order, whatever order the file has them in."""
    stored = {mesh.name: mesh for mesh in assets.targets}
    if missing := [model.name for model in objects if model.name not in stored]:
        raise ConfigError(
            f"the scene assets hold {', '.join(stored) or 'no objects'}, but not {', '.join(missing)}; "
            "prepare them anew with these meshes"
        )
    return replace(assets, targets=tuple(stored[model.name] for model in objects))


def _about(
    plan: Recipe, objects: Sequence[ObjectModel], network: nn.Module, scenes: SceneConfig | None
) -> dict[str, Any]:
    about = {
        "recipe": to_json(plan),
        "objects": [model.name for model in objects],
        "parameters": sum(p.numel() for p in network.parameters()),
    }
    if scenes is not None:
        about["recipe"]["scenes"] = to_json(scenes)
    return about


def _show(batch: Batch, objects: Sequence[ObjectModel], out: Path) -> None:
    sheet = draw_truth(batch, objects)
    write_atomically(out / FIRST_BATCH, lambda path: sheet.save(path, format="JPEG", quality=90))
    log.info("the first batch is drawn in %s: look at it before you wait", out / FIRST_BATCH)


def trained_model(
    network: Network,
    objects: Sequence[ObjectModel],
    image_size: tuple[int, int],
    K: Tensor,
    device: torch.device | None = None,
) -> SMOPE:
    """A model of a training's network, its weights rounded to the float16 of the file that it is saved in.

    `image_size` (width, height) and `K` [3, 3] are of the camera that it was trained for. The meshes are
    encoded with the rounded weights, so that what was saved gives what this model gives.
    """
    diameters = [model.diameter for model in objects]
    rows = K.double().tolist()
    config = ModelConfig(
        architecture=architecture_of(network.config),
        network=network.config,
        objects=tuple(model.name for model in objects),
        image_size=image_size,
        K=(tuple(rows[0]), tuple(rows[1]), tuple(rows[2])),
        diameters=(min(diameters), max(diameters)),
    )
    trained = {model.name: replace(model, trained=True) for model in objects}
    halved = build_network(network.config)
    halved.load_state_dict(
        {k: v.half().float() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    )
    return SMOPE(halved.to(device), config, trained)


def _save_model(
    folder: Path, loop: Loop, objects: Sequence[ObjectModel], source: Source, result: LoopResult
) -> None:
    """Write the averaged weights as a model, read that back, and score what was read."""
    averaged = loop.ema.model
    assert isinstance(averaged, Network)
    model = trained_model(averaged, objects, source.image_size, source.K, loop.ranks.device)
    model.save_pretrained(folder, dtype=torch.float16)
    stored = SMOPE.from_pretrained(folder, device=loop.ranks.device)
    with torch.no_grad():
        scores = loop.task.evaluate(stored.network)
    content = {
        "held_out": dict(scores),
        "images": sum(len(batch) for batch in source.held_out),
        "minutes": round(result.state.seconds / 60, 2),
        "steps": result.state.step,
        "finished": result.finished,
    }
    write_atomically(folder.parent / SCORES, (json.dumps(content, indent=2) + "\n").encode())
    log.info("model in %s: %s", folder, "  ".join(f"{name} {value:.4f}" for name, value in scores.items()))
