"""The examples and `smope predict` run as they stand, with a small untrained network for weights."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from smope import SMOPE, ObjectModel, Poses, cli
from smope.config import ModelConfig
from smope.networks.smope_s import SmopeS, SmopeSConfig

EXAMPLES = Path(__file__).parent.parent / "examples"
SIZE = (160, 128)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network = SmopeSConfig(
        width=32, heads=4, encoder_layers=1, encoder_hidden=32, decoder_layers=1, decoder_hidden=32,
        queries=12, mesh_tokens=4, surface_points=64, anchors=16, refine_layers=1, rebuilt_points=32,
        denoising_groups=1,
    )  # fmt: skip
    ball = ObjectModel.from_mesh("ball", trimesh.creation.icosphere(radius=0.05), "m")
    config = ModelConfig(
        architecture="smope-s",
        network=network,
        objects=("ball",),
        image_size=SIZE,
        K=((150.0, 0.0, 79.5), (0.0, 150.0, 63.5), (0.0, 0.0, 1.0)),
        diameters=(0.1, 0.1),
    )
    folder = tmp_path_factory.mktemp("weights")
    SMOPE(SmopeS(network), config, {"ball": ball}).save_pretrained(folder)
    return folder


@pytest.fixture
def photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    pixels = np.random.default_rng(0).integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    return "photo.png"


def run_example(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_detect(
    weights: Path, photo: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_example("detect.py", [photo, "56", str(weights)], monkeypatch)
    assert capsys.readouterr().out.startswith("Poses(")
    with Image.open("detected.png") as drawn:
        assert drawn.size == SIZE


def test_own_mesh(
    weights: Path,
    photo: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trimesh.creation.box((80, 60, 40)).export(tmp_path / "brick.stl")
    run_example("own_mesh.py", [photo, "56", "brick.stl", "mm", str(weights)], monkeypatch)
    assert capsys.readouterr().out.startswith("brick 0.")
    poses = Poses.load("brick.json")
    assert poses.names == ("brick",)
    assert poses.camera.size == SIZE
    with Image.open("brick.png") as drawn:
        assert drawn.size == SIZE


def test_predict_on_the_command_line_gives_what_the_library_gives(
    weights: Path, photo: str, tmp_path: Path
) -> None:
    arguments = [
        "predict",
        photo,
        "--model",
        str(weights),
        "--fov",
        "56",
        "--threshold",
        "0",
        "--device",
        "cpu",
    ]
    assert cli.main(arguments) == 0
    told = Poses.load(tmp_path / "poses" / "photo_poses.json")
    expected = SMOPE.from_pretrained(weights, device="cpu").predict(photo, fov=56, threshold=0)
    assert len(told) == len(expected) > 0
    torch.testing.assert_close(told.T_CO, expected.T_CO, rtol=0, atol=0)
    with Image.open(tmp_path / "poses" / "photo_poses.png") as drawn:
        assert drawn.size == SIZE


def test_street(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The frame that the example brings along, with weights that predict sizes and know nothing."""
    torch.manual_seed(0)
    network = SmopeSConfig(
        width=32, heads=4, encoder_layers=1, encoder_hidden=32, decoder_layers=1, decoder_hidden=32,
        queries=12, mesh_tokens=4, surface_points=64, anchors=16, refine_layers=1, rebuilt_points=32,
        denoising_groups=1, predict_scale=True,
    )  # fmt: skip
    made = SmopeS(network)
    torch.nn.init.constant_(made.similarity.bias, 12.0)  # untrained scores would all be too low to show
    car = ObjectModel.from_mesh("Car", trimesh.creation.box((1.9, 4.4, 1.5)), "m")
    K = ((721.5, 0.0, 609.6), (0.0, 721.5, 172.9), (0.0, 0.0, 1.0))
    config = ModelConfig("smope-s", network, ("Car",), (1242, 376), K, (4.0, 6.0))
    SMOPE(made, config, {"Car": car}).save_pretrained(tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    run_example("street.py", [str(tmp_path / "weights")], monkeypatch)
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("Car")
    assert "m ahead" in line
    with Image.open("street.png") as drawn:
        assert drawn.size == (1242, 376)
