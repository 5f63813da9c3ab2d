"""Checkpoints: what goes in comes out, and nothing but a whole checkpoint of ours is taken."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from smope.train.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_latest,
    load_small,
    previous_of,
    save_checkpoint,
    save_small,
    small_files,
)


def content(value: float = 0.0) -> dict[str, object]:
    tensor = torch.arange(500, dtype=torch.float32) + value
    return {
        "model": {"weight": tensor},
        "ema": {"weight": tensor + 1},
        "optimiser": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"betas": (0.9, 0.99)}]},
        "state": {"step": 7, "seconds": 1.5},
        "rng": {"cpu": torch.get_rng_state(), "device": None},
        "recipe": {"run": {"seed": 1}},
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "checkpoint.pt"
    save_checkpoint(path, content())
    return path.read_bytes()


def test_round_trip_keeps_last_and_previous(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    for value in (1.0, 2.0, 3.0):
        save_checkpoint(path, content(value))
    assert load_checkpoint(path)["model"]["weight"][0] == 3.0
    assert load_checkpoint(previous_of(path))["model"]["weight"][0] == 2.0
    assert load_checkpoint(path)["optimiser"]["param_groups"][0]["betas"] == (0.9, 0.99)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.previous.pt", "checkpoint.pt"]


def test_a_failed_save_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, content(1.0))
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(path, {**content(2.0), "recipe": lambda: None})
    assert load_checkpoint(path)["model"]["weight"][0] == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
    with pytest.raises(ValueError, match="checkpoint without ema"):
        save_checkpoint(path, {key: value for key, value in content().items() if key != "ema"})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_anywhere_is_one_clear_error(tmp_path: Path, whole: bytes, share: float) -> None:
    path = tmp_path / "cut.pt"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=r"cut\.pt"):
        load_checkpoint(path)


def test_a_changed_value_is_seen(tmp_path: Path, whole: bytes) -> None:
    value = torch.tensor(137.0).numpy().tobytes()
    place = whole.index(value + torch.tensor(138.0).numpy().tobytes())
    path = tmp_path / "changed.pt"
    path.write_bytes(whole[:place] + b"\x01" + whole[place + 1 :])
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (os.environ["BOMB"],)


def test_a_pickle_posing_as_a_checkpoint_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crater = tmp_path / "crater"
    monkeypatch.setenv("BOMB", str(crater))
    plain, zipped, inside = (tmp_path / name for name in ("plain.pt", "zipped.pt", "inside.pt"))
    plain.write_bytes(pickle.dumps(Bomb()))
    torch.save(Bomb(), zipped)
    torch.save({**content(), "format": "smope-checkpoint-1", "recipe": Bomb()}, inside)
    for path in (plain, zipped, inside):
        with pytest.raises(CheckpointError, match=path.stem):
            load_checkpoint(path)
    assert not crater.exists()


@pytest.mark.parametrize("kind", ["empty", "text", "other", "future", "missing", "folder"])
def test_files_of_another_kind(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "checkpoint.pt"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif kind == "other":
        torch.save({"state_dict": {}}, path)
    elif kind == "future":
        torch.save({**content(), "format": "smope-checkpoint-99"}, path)
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt"):
        load_checkpoint(path)


def test_latest_falls_back_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "checkpoint.pt"
    assert load_latest(path) is None
    save_checkpoint(path, content(1.0))
    save_checkpoint(path, content(2.0))
    path.write_bytes(path.read_bytes()[:-100])
    latest = load_latest(path)
    assert latest is not None
    assert latest["model"]["weight"][0] == 1.0
    assert "checkpoint.pt" in caplog.text
    previous_of(path).write_bytes(b"")
    with pytest.raises(CheckpointError):
        load_latest(path)


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": (300, 400), "b": (500, 300), "c": (700,), "d": (100, 900)}
    random = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    return {**random, "count": torch.tensor(7)}


@pytest.mark.parametrize("part", [None, 0.35])
def test_small_form_in_one_or_more_files(tmp_path: Path, part: float | None) -> None:
    path = tmp_path / "small.safetensors"
    files = save_small(path, weights(), part, {"step": "12"})
    assert len(files) == (1 if part is None else 3)
    assert all(file.stat().st_size <= (part or 1e9) * 2**20 for file in files)
    loaded, note = load_small(path)
    assert note == {"step": "12"}
    for name, value in weights().items():
        expected = value.half().float() if value.is_floating_point() else value
        assert torch.equal(loaded[name], expected)
    raw = {name: value for file in files for name, value in load_file(file).items()}
    assert raw["a"].dtype == torch.float16
    assert raw["count"].dtype == torch.int64


def test_small_form_changes_its_number_of_parts(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    save_small(path, weights(), 0.35)
    save_small(path, weights())
    assert small_files(path) == [path]
    save_small(path, weights(), 0.35)
    assert len(small_files(path)) == 3
    assert not path.exists()


def test_small_form_refuses_what_is_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    with pytest.raises(CheckpointError, match="no such small checkpoint"):
        load_small(path)
    first, second, _ = save_small(path, weights(), 0.35)
    data = second.read_bytes()
    second.write_bytes(data[:-64])
    with pytest.raises(CheckpointError, match=r"2-of-3.*damaged"):
        load_small(path)
    second.write_bytes(data[:-64] + bytes(64))
    with pytest.raises(CheckpointError, match="checksum"):
        load_small(path)
    second.unlink()
    with pytest.raises(CheckpointError, match="2 of its 3 parts"):
        load_small(path)
    save_small(path, {**weights(), "a": torch.zeros(300, 400)}, 0.35)
    second.write_bytes(data)
    with pytest.raises(CheckpointError, match="another save"):
        load_small(path)
    save_file({"a": torch.zeros(3)}, first)
    with pytest.raises(CheckpointError, match="not a small checkpoint"):
        load_small(path)


def test_small_form_refuses_values_that_fp16_cannot_hold(tmp_path: Path) -> None:
    for value in (1e6, torch.nan):
        with pytest.raises(ValueError, match="weight has values"):
            save_small(tmp_path / "small.safetensors", {"weight": torch.tensor([value])})
    with pytest.raises(ValueError, match="more than a part"):
        save_small(tmp_path / "small.safetensors", {"weight": torch.zeros(2**20)}, 1.0)
