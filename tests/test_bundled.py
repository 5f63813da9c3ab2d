"""What must lie in the package: bundled models and the demo's picture. These fail where a file is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from smope import SMOPE, Poses, hub
from smope.config import ModelConfig

ASSETS = Path(hub.__file__).parent / "assets"
LMO = ("ape", "can", "cat", "driller", "duck", "eggbox", "glue", "holepuncher")


@pytest.fixture(scope="module")
def lmo() -> Path:
    return hub.resolve("lmo")


def test_a_model_is_three_files_and_its_scores(lmo: Path) -> None:
    assert {path.name for path in lmo.iterdir()} == {*hub.MODEL_FILES, "scores.json"}


def test_the_weights_are_small_and_in_half_precision(lmo: Path) -> None:
    assert (lmo / hub.WEIGHTS_FILE).stat().st_size <= 32 * 2**20
    tensors = hub.load_weights(lmo)
    assert all(t.isfinite().all() for t in tensors.values())
    network = {name: t for name, t in tensors.items() if not name.startswith("objects.")}
    assert {t.dtype for t in network.values() if t.is_floating_point()} == {torch.float16}
    assert sum(t.numel() for t in network.values()) <= 16e6


def test_the_config_tells_what_the_model_is(lmo: Path) -> None:
    config = ModelConfig.load(lmo / hub.CONFIG_FILE)
    assert config.architecture == "smope-s"
    assert config.objects == LMO
    assert config.image_size == (640, 480)
    assert config.K[0][0] == pytest.approx(572.4114)
    low, high = config.diameters
    assert (low, high) == pytest.approx(
        (0.102099, 0.261472), rel=1e-3
    )  # ape, driller in BOP's models_info.json


def test_the_card_names_data_licence_and_recipe(lmo: Path) -> None:
    card = (lmo / hub.CARD_FILE).read_text(encoding="utf-8")
    for said in (
        "license:",
        "CC BY-SA 4.0",
        "Apache-2.0",
        "recipes/lmo.toml",
        "minutes",
        "<!-- table: scores -->",
    ):
        assert said in card


def test_the_scores_reach_what_was_promised(lmo: Path) -> None:
    scores = json.loads((lmo / "scores.json").read_text())
    assert (scores["dataset"], scores["images"]) == ("lmo", 60)
    assert scores["all"]["AR_MSSD"] >= 0.25
    assert scores["all"]["AR_MSPD"] >= 0.55


def test_the_poses_of_the_demo_are_right(lmo: Path) -> None:
    """Against the poses that the picture was rendered with, where an object is at least half seen."""
    truth = Poses.load(ASSETS / "demo.json")
    with Image.open(ASSETS / "demo.png") as picture:
        assert picture.size == truth.camera.size
    found = SMOPE.from_pretrained(lmo, device="cpu").predict(ASSETS / "demo.png", K=truth.camera.K)
    best = dict(reversed(list(zip(found.names, found.T_CO, strict=True))))  # the first one is the surest
    seen = [i for i in range(len(truth)) if truth.visibility[i] >= 0.5]
    assert len(seen) >= 6
    right = 0
    for i in seen:
        true = truth.T_CO[i]
        pose = best.get(truth.names[i])
        if pose is not None:
            pixels = truth.camera.project(torch.stack([pose[:3, 3], true[:3, 3]]))
            right += bool((pixels[0] - pixels[1]).norm() < 8 and abs(pose[2, 3] / true[2, 3] - 1) < 0.1)
    assert right >= len(seen) - 1
