"""A training run as one TOML file: sections of frozen dataclasses, in which a wrong key is an error."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from smope.config import ConfigError, from_json


@dataclass(frozen=True)
class DataConfig:
    """What is learned from.

    Paths may hold environment variables ($SMOPE_DATA/...); relative ones count from where the run starts.
    """

    meshes: Mapping[str, str] = field(default_factory=dict)  # object name -> mesh file
    units: str = "m"  # of the meshes: m, cm, mm or in
    symmetries: str | None = None  # "auto", or a models_info.json
    dataset: str | None = None  # folder of annotated images, in place of rendered scenes
    format: Literal["bop", "linemod", "labelimg3d", "kitti"] | None = None  # of `dataset`
    split: str | None = None  # the part of `dataset`, in the format's own words
    # "corners": the extents of the projected 3D boxes take the place of the data set's own 2D boxes.
    box: Literal["silhouette", "corners"] = "silhouette"
    held_out: tuple[str, ...] = ()  # beginnings of the names of images not to train on; else every tenth is
    # Of each batch so much are images of `dataset`, the rest renders; by default no scenes are rendered.
    share: float = 1.0
    assets: str | None = None  # scene assets in one file; made from the next two where it does not exist
    clutter: str | None = None  # folder of PLY meshes in metres, with index.json
    backgrounds: str | None = None  # folder of photos and hdri/
    layouts: str | None = None  # of streets: what tools/make_street_layouts.py wrote
    vehicles: str | None = None  # of streets: folder of further vehicles (GLB)
    backbone: str | None = None  # safetensors of pretrained backbone weights


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedule and the average of the weights."""

    lr: float = 4e-4
    lr_scale: Mapping[str, float] = field(
        default_factory=lambda: {"backbone": 0.25}
    )  # part of a name -> factor
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float = 0.5
    warmup_steps: int = 500
    flat_until: float = 0.6  # share of the budget
    anneal: Literal["cosine", "linear"] = "cosine"
    final: float = 0.01  # factor of the learning rate at the end
    ema_decay: float = 0.999


@dataclass(frozen=True)
class RunConfig:
    """How long, how large, and how often what is written."""

    max_minutes: float | None = None  # length of the whole run, over all its pieces
    max_steps: int | None = None
    piece_minutes: float | None = None  # stop this process, resumable, after so long
    batch_size: int = 32  # images a step and process
    workers: int = 12  # rendering processes
    seed: int = 1
    precision: Literal["bf16", "fp32"] = "bf16"
    channels_last: bool = True
    compile: tuple[str, ...] = ()  # submodules to give to torch.compile, by name
    log_every: int = 50  # steps
    eval_minutes: float = 2.0  # 0: at the end only
    eval_images: int = 256
    save_seconds: float = 120.0
    small_part_mib: float | None = None  # split the small checkpoint
    tensorboard: bool = True
    progress_bar: bool = True


@dataclass(frozen=True)
class Recipe:
    """A whole run. Scenes, network and loss stay tables here; `fit` reads them into their dataclasses."""

    architecture: Literal["smope-s", "smope-paper"] = "smope-s"  # the default network, or the authors'
    # The loss. "default" is the architecture's own: for smope-paper that of the authors with its defects
    # mended, "paper"; "paper-verbatim" is theirs as it was.
    objective: Literal["default", "paper", "paper-verbatim"] = "default"
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    scenes: Mapping[str, Any] = field(default_factory=dict)
    street: Mapping[str, Any] = field(default_factory=dict)  # streets in place of scenes, if not empty
    augment: Mapping[str, Any] = field(default_factory=dict)  # of photos, where it is not empty
    network: Mapping[str, Any] = field(default_factory=dict)
    loss: Mapping[str, Any] = field(default_factory=dict)


def expand(path: str) -> Path:
    """A recipe's path with its environment variables filled in."""
    filled = os.path.expandvars(path)
    if "$" in filled:
        raise ConfigError(
            f"{path}: an environment variable in it is not set; set it to the folder it stands for"
        )
    return Path(filled)


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe file."""
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML ({error})") from error
    try:
        return from_json(Recipe, table)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
