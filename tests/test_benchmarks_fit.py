"""The benchmark of `fit` on a tiny recipe: it runs the loop to its end, and its parts add up."""

from __future__ import annotations

import importlib.util
import json
import signal
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import trimesh
from small_model import TINY_S, thin_backbone

from smope.scenes import SceneStream
from smope.train.loop import Loop

RECIPE = """
[data]
units = "m"
[data.meshes]
brick = "{mesh}"
[scenes]
width = 96
height = 64
fx = 90.0
fy = 90.0
cx = 47.5
cy = 31.5
clutter = [0, 0]
far_clutter = [0, 0]
targets = [1, 2]
[network]
{network}
[run]
max_minutes = 5.0
batch_size = 2
workers = 0
precision = "fp32"
"""


@pytest.fixture(scope="module")
def benchmark_fit() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "fit.py"
    spec = importlib.util.spec_from_file_location("benchmark_fit", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def recipe(few_textures: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    thin_backbone(monkeypatch)
    mesh = tmp_path / "brick.ply"
    trimesh.creation.box((0.12, 0.07, 0.05)).subdivide().export(mesh)
    recipe = tmp_path / "tiny.toml"
    network = "\n".join(f"{key} = {json.dumps(value)}" for key, value in TINY_S.items())
    recipe.write_text(RECIPE.format(mesh=mesh.as_posix(), network=network))
    return recipe


def test_fit_is_timed_part_by_part(benchmark_fit: ModuleType, recipe: Path, tmp_path: Path) -> None:
    plain = (SceneStream.finish, SceneStream.rasterise, torch.Tensor.backward)
    outputs = [tmp_path / "rows.json", tmp_path / "rows.md"]
    out = [word for path in outputs for word in ("--out", str(path))]
    row = benchmark_fit.main([str(recipe), "--device", "cpu", "--steps", "2", "--warmup", "1", *out])

    assert (SceneStream.finish, SceneStream.rasterise, torch.Tensor.backward) == plain
    assert row["steps"] == 2
    assert row["images_s"] == pytest.approx(2 * 1e3 / row["step_ms"], abs=0.051)  # told to a tenth
    parts = {name: part["host_ms"] for name, part in row["parts"].items()}
    assert list(parts) == [*benchmark_fit.PARTS, "whole step"]
    within = sum(parts[n] for n in ("forward and loss", "backward", "optimiser", "moving average"))
    assert 0.7 * parts["whole step"] < within <= 1.01 * parts["whole step"]
    assert parts["  costs of matching"] + parts["  assignment"] < parts["forward and loss"]
    # One batch is drawn within the two steps: the first was ready before the clock, the last is not timed.
    assert parts["whole step"] < row["step_ms"]
    assert json.loads(outputs[0].read_text()) == [row]
    assert f"## {row['images_s']} images/s: cpu" in outputs[1].read_text()


def test_a_benchmark_that_is_stopped_reports_nothing(
    benchmark_fit: ModuleType, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*_: Any) -> float:
        signal.raise_signal(signal.SIGTERM)
        return 0.0

    monkeypatch.setattr(Loop, "_one_step", step)
    out = tmp_path / "rows.json"
    with pytest.raises(KeyboardInterrupt, match="interrupted"):
        benchmark_fit.main([str(recipe), "--device", "cpu", "--steps", "2", "--out", str(out)])
    assert not out.exists()
