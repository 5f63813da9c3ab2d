"""The recipes of smope-paper: the authors' settings, and steps on real frames."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from small_model import TINY_PAPER, quick_fits

from smope import SMOPE
from smope.config import ConfigError
from smope.networks.smope_paper import SmopePaper, SmopePaperConfig
from smope.train import fit
from smope.train.choice import network_config, paper_weights
from smope.train.curves import read_rows
from smope.train.optim import parameter_groups
from smope.train.recipe import Recipe, expand, load_recipe

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture(scope="module")
def settings(fixtures_root: Path) -> dict[str, Any]:
    """What the authors' trainer was called with."""
    layout = json.loads((fixtures_root / "authors_parity/checkpoint_layout.json").read_text(encoding="utf-8"))
    return {name: field["default"] for name, field in layout["args"]["fields"].items()}


@pytest.mark.parametrize("name", ["kitti3d", "linemod"])
def test_optimisation_is_as_they_had_it(settings: dict[str, Any], name: str) -> None:
    recipe = load_recipe(RECIPES / f"smope_paper_{name}.toml")
    assert (recipe.architecture, recipe.objective) == ("smope-paper", "paper")
    assert network_config(recipe) == SmopePaperConfig()
    assert recipe.optim.clip_norm == settings["clip_max_norm"]
    assert recipe.optim.weight_decay == settings["weight_decay"]
    assert recipe.run.batch_size == settings["batch_size"]
    with torch.device("meta"):
        groups = parameter_groups(SmopePaper(SmopePaperConfig()), recipe.optim)
    counts: Counter[float] = Counter()
    for group in groups:
        counts[round(group["lr"], 8)] += len(group["params"])  # type: ignore[call-overload,arg-type]
    # The layout's three groups: the rest, and at a tenth of its rate the backbone and what aims attention.
    assert counts == {settings["lr"]: 284, settings["lr_backbone"]: 42 + 26}


def test_weights_are_as_they_had_them(settings: dict[str, Any]) -> None:
    recipe = load_recipe(RECIPES / "smope_paper_kitti3d.toml")
    weights = paper_weights(recipe.loss)
    theirs = {
        "loss_ce": "cls_loss_weight",
        "loss_bbox": "bbox2d_loss_weight",
        "loss_giou": "giou_loss_weight",
        "model3d_scales": "model3d_scales_weight",
        "model3d_centers": "model3d_centers_weight",
        "model3d_points": "model3d_points_weight",
        "chamfer": "model3d_chamfer_weight",
        "edge": "model3d_edge_weight",
        "normal": "model3d_normal_weight",
        "laplacian": "model3d_laplacian_weight",
        "pose_6dof_class": "model_6dof_class_weight",
        "pose_6dof_add": "model_6dof_add_weight",
        "pose_6dof_fps_points_3d": "model_6dof_fps_points_weight",
        "pose_6dof_rotation": "model_6dof_rotation_weight",
        "focal_alpha": "focal_alpha",
        "focal_gamma": "focal_gamma",
    }
    assert {ours: getattr(weights, ours) for ours in theirs} == {o: settings[t] for o, t in theirs.items()}
    assert list(weights.meshes) == settings["model_class_weights"]
    files = [Path(mesh).name for mesh in recipe.data.meshes.values()]
    assert files == settings["model_name"]  # the weights are in this order
    match = weights.match
    costs = (settings["set_cost_class"], settings["set_cost_bbox"], settings["set_cost_giou"])
    assert (match.label, match.l1, match.giou) == costs


def test_linemod_has_nine_objects_and_its_own_weights() -> None:
    recipe = load_recipe(RECIPES / "smope_paper_linemod.toml")
    assert len(recipe.data.meshes) == 9
    assert paper_weights(recipe.loss).model3d_scales == 120.0
    assert (recipe.data.format, recipe.data.split, recipe.data.units) == ("linemod", "train", "mm")


def test_a_folder_that_is_not_named_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LINEMOD", raising=False)
    with pytest.raises(ConfigError, match=r"\$LINEMOD/data/02/models/ape.obj: an environment variable"):
        fit(recipe=RECIPES / "smope_paper_linemod.toml", out=tmp_path, device="cpu")


def small(recipe: Recipe) -> Recipe:
    run = replace(
        recipe.run,
        max_steps=2,
        batch_size=2,
        workers=0,
        eval_minutes=0.0,
        eval_images=2,
        log_every=1,
        tensorboard=False,
        progress_bar=False,
    )
    return replace(recipe, network=TINY_PAPER, run=run)


def test_real_street_frames_of_several_sizes_train(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMOPE_DATA", str(data_root))
    quick_fits(monkeypatch)
    recipe = small(load_recipe(RECIPES / "smope_paper_kitti3d.toml"))
    assert all(expand(mesh).is_file() for mesh in recipe.data.meshes.values())
    boxes = {name: trimesh.creation.box((1.8, 4.4, 1.6)) for name in recipe.data.meshes}  # quicker to load
    folder = fit(boxes, "m", recipe=recipe, out=tmp_path, device="cpu")
    losses = [row["loss"] for row in read_rows(tmp_path / "curves.csv") if "loss" in row]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    model = SMOPE.from_pretrained(folder, device="cpu")
    assert list(model.objects) == ["Tram", "Car", "Truck", "Van", "Pedestrian"]
    assert model.config.image_size == (1242, 375)  # what most of the frames are
