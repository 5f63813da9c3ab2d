"""The bundled street weights, and what they find on the street that was rendered for the example."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from smope import SMOPE, Poses, hub
from smope.config import ModelConfig

ASSETS = Path(hub.__file__).parent / "assets"
CLASSES = ("Tram", "Car", "Truck", "Van", "Pedestrian")


@pytest.fixture(scope="module")
def kitti3d() -> Path:
    return hub.resolve("kitti3d")


def test_a_model_is_three_files_and_its_scores(kitti3d: Path) -> None:
    assert {path.name for path in kitti3d.iterdir()} == {*hub.MODEL_FILES, "scores.json"}
    assert (kitti3d / hub.WEIGHTS_FILE).stat().st_size <= 32 * 2**20
    network = {n: t for n, t in hub.load_weights(kitti3d).items() if not n.startswith("objects.")}
    assert {t.dtype for t in network.values() if t.is_floating_point()} == {torch.float16}
    assert all(t.isfinite().all() for t in network.values())


def test_the_config_tells_what_the_model_is(kitti3d: Path) -> None:
    config = ModelConfig.load(kitti3d / hub.CONFIG_FILE)
    assert (config.objects, config.image_size) == (CLASSES, (1242, 376))
    assert config.K[0] == pytest.approx((721.5377, 0.0, 609.5593))  # P2 of KITTI's object frames


def test_the_card_names_data_licence_and_recipe(kitti3d: Path) -> None:
    card = (kitti3d / hub.CARD_FILE).read_text(encoding="utf-8")
    for said in ("license: cc-by-nc-sa-3.0", "CC BY-NC-SA 3.0", "states no licence", "recipes/kitti3d.toml"):
        assert said in card


def test_the_scores_are_of_the_stored_file_and_as_promised(kitti3d: Path) -> None:
    scores = json.loads((kitti3d / "scores.json").read_text())
    stored = (kitti3d / hub.WEIGHTS_FILE).read_bytes()
    assert scores["weights_sha256"] == hashlib.sha256(stored).hexdigest()
    measured = scores["sets"]["measure"]
    assert (measured["images"], scores["sets"]["labelimg3d"]["images"]) == (17, 6)
    car = measured["objects"]["Car"]
    assert car["AP_2d_50_moderate"] >= 0.65
    assert car["AOS_50_moderate"] >= 0.60
    assert car["depth_error"] <= 0.08
    confused = scores["confusion"]
    assert confused["Van"]["Van"] / sum(confused["Van"].values()) >= 0.5
    assert confused["Car"]["Van"] / sum(confused["Car"].values()) <= 0.05


@pytest.fixture(scope="module")
def found(kitti3d: Path) -> Poses:
    street = json.loads((ASSETS / "street.json").read_text())
    return SMOPE.from_pretrained(kitti3d, device="cpu").predict(ASSETS / "street.png", K=street["K"])


def test_vehicles_are_found_where_they_were_put(found: Poses) -> None:
    """Against what the picture was rendered with, for all that are at least half seen."""
    vehicles = json.loads((ASSETS / "street.json").read_text())["vehicles"]
    seen = [v for v in vehicles if v["visibility"] >= 0.5]
    assert len(seen) >= 6
    extents = torch.stack([found.objects[name].extents for name in found.names])
    sizes = found.scale * extents  # [N, 3] width, length, height
    centres = torch.stack([found.objects[name].centre for name in found.names])
    middles = found.T_CO[:, :3, 3] + (found.T_CO[:, :3, :3] @ (found.scale * centres)[..., None])[..., 0]
    for true in seen:
        middle = torch.tensor(true["middle"])
        errors = (middles - middle).norm(dim=1)
        best = int(errors.argmin())
        assert found.names[best] == true["class"]
        assert errors[best] < 0.06 * middle.norm()
        ahead = -found.T_CO[best, :3, 1]  # the front of a vehicle is its -y
        yaw = torch.atan2(-ahead[2], ahead[0]) - true["rotation_y"]
        assert torch.cos(yaw) > 0.98  # 11 degrees
        assert (sizes[best] / torch.tensor(true["size"]) - 1).abs().max() < 0.25
