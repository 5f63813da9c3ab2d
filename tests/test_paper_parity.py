"""The authors' network and loss against what their own code computed, and the command that compares."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_up_parity
import numpy as np
import pytest
import torch

from smope.tools.check_authors_parity import _check_sum, check_file, compare, main
from smope.tools.parity_inputs import draw, images

BOUND = (1e-4, 0.0)


@pytest.fixture(scope="module")
def fixture(fixtures_root: Path) -> Path:
    return fixtures_root / "authors_parity"


def test_every_stored_array_agrees(fixture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(fixture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "all within the bounds"
    stored = sum(len(np.load(path).files) for path in fixture.glob("*.npz"))
    compared = int(lines[-2].split()[0])
    assert compared == len(lines) - 2
    assert stored * 0.8 < compared < stored  # the rest are the inputs of losses, meshes and ops


def test_draws_are_even_and_depend_on_salt_and_name() -> None:
    u = draw("salt", "name", (50, 40))
    assert -1 <= u.min() < -0.99
    assert 0.99 < u.max() < 1
    assert abs(u.mean()) < 0.05
    assert (u == draw("salt", "name", (2000,)).reshape(50, 40)).all()
    assert (u != draw("salt2", "name", (50, 40))).all()
    assert (u != draw("salt", "name2", (50, 40))).all()


def test_a_folder_that_is_no_fixture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    assert "no spec.json" in capsys.readouterr().out
    (tmp_path / "spec.json").write_text('{"format": "other/2"}')
    assert main([str(tmp_path)]) == 1
    assert "'smope-parity/1' expected, {'format': 'other/2'} given" in capsys.readouterr().out
    (tmp_path / "spec.json").write_text("{")
    assert main([str(tmp_path)]) == 1
    assert "not valid JSON" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ours", "theirs", "agrees"),
    [
        ([1.0, 2.0], [1.0, 2.00009], True),
        ([1.0, 2.0], [1.0, 2.00011], False),
        ([1.0, np.inf], [1.0, np.inf], True),
        ([1.0, np.inf], [1.0, -np.inf], False),
        ([np.inf, 1.0], [1.0, np.inf], False),
        ([1.0, np.nan], [1.0, np.nan], False),
        ([1.0, np.nan], [1.0, 2.0], False),
        ([1.0, 2.0], [1.0, np.nan], False),
        ([1.0], [1.0, 2.0], False),
        ([], [], True),
    ],
)
def test_comparison(ours: list[float], theirs: list[float], agrees: bool) -> None:
    line = compare("x", np.array(ours, np.float32), np.array(theirs, np.float32), BOUND)
    assert (line.fault == "") == agrees


def test_whole_numbers_must_be_equal_and_stay_whole() -> None:
    stored = np.array([3, 4])
    assert not compare("x", np.array([3, 4]), stored, BOUND).fault
    assert compare("x", np.array([3, 5]), stored, BOUND).fault
    assert compare("x", np.array([3.0, 4.0]), stored, BOUND).fault


def test_relative_bound_grows_with_the_value() -> None:
    bound = (1e-6, 1e-5)
    assert not compare("x", np.array([100.0009]), np.array([100.0]), bound).fault
    assert compare("x", np.array([0.0009]), np.array([0.0]), bound).fault


def test_missing_and_unknown_arrays_fail() -> None:
    ours = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(2)}
    stored = {
        "a": np.arange(6.0).reshape(2, 3)[:, ::2],
        "stat.a": np.array([2.5, 35**0.5 / 12**0.5, 0, 5, 2.5]),
    }

    def faults(stored: dict[str, np.ndarray], **options: object) -> list[str]:
        lines = check_file("f", stored, ours, {"a": [1, 2]}, BOUND, **options)  # type: ignore[arg-type]
        return [line.name for line in lines if line.fault]

    assert faults(stored) == ["f/b"]
    assert faults({**stored, "b": np.zeros(2)}) == []
    assert faults({**stored, "b": np.zeros(2), "c": np.zeros(2)}) == ["f/c"]
    assert faults({**stored, "b": np.zeros(2), "c": np.zeros(2)}, read=lambda name: name == "c") == []
    assert faults(stored, may_lack=lambda name: name == "b") == []
    assert faults({**stored, "b": np.zeros(2)}, described=lambda name: True) == []  # stored whole
    bare = {"a": stored["a"], "b": np.zeros(2)}
    assert faults(bare) == []
    assert faults(bare, described=lambda name: True) == ["f/stat.a"]
    assert faults({**stored, "b": np.zeros(2), "stat.a": np.zeros(5)}) == ["f/stat.a"]


@pytest.fixture(scope="module")
def other(fixture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine meshes, other sizes, another salt."""
    folder = tmp_path_factory.mktemp("parity") / "nine"
    made_up_parity.write(folder, fixture)
    return folder


def test_another_fixture_is_taken_as_it_says(other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(other)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "all within the bounds"
    assert int(lines[-2].split()[0]) == len(lines) - 2 > 200
    stored = np.load(other / "pose.npz")
    assert stored["pose_6dof"].shape == (3, 11, 9, 7)


def test_every_fault_put_into_it_is_found(
    other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "faults"
    shutil.copytree(other, folder)

    def spoil(file: str, changes: dict[str, Any]) -> None:
        arrays = dict(np.load(folder / f"{file}.npz"))
        for name, change in changes.items():
            arrays[name] = arrays[name].copy()
            change(arrays[name])
            if change is delete:
                del arrays[name]
        np.savez(folder / f"{file}.npz", **arrays)

    def delete(array: np.ndarray) -> None:
        """Leave it out."""

    def put(value: float) -> Callable[[np.ndarray], None]:
        return lambda array: array.reshape(-1).__setitem__(array.size // 2, value)

    def add(value: float) -> Callable[[np.ndarray], None]:
        return lambda array: array.reshape(-1).__setitem__(
            array.size // 2, array.reshape(-1)[array.size // 2] + value
        )

    def turn_over(array: np.ndarray) -> None:
        np.logical_not(array, out=array)

    spoil(
        "pose", {"pose_6dof": add(2e-4), "attention": put(np.nan), "mask": turn_over, "stat.memory": delete}
    )
    spoil("two_stage", {"two_stage.topk_index": add(1), "two_stage.enc_coord_unact": put(-np.inf)})
    spoil("meshes", {"out.fps_points": add(1e-3), "out.scale_list": delete})
    spoil("losses", {"main.out.total": add(0.05), "one_empty.grad.pose_6dof": add(1e-3)})
    spoil("losses", {"main.sampled.sample1.pred": delete, "main.match.last.2.target": put(7)})
    expected = [
        *("pose/pose_6dof", "pose/stat.memory", "pose/attention", "pose/mask"),
        *("two_stage/two_stage.topk_index", "two_stage/two_stage.enc_coord_unact"),
        *("meshes/out.fps_points", "meshes/out.scale_list", "losses/main.out.total"),
        *("losses/one_empty.grad.pose_6dof", "losses/main.sampled.sample1.pred"),
        "losses/main.match.last.2.target",
    ]
    assert main([str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[1] for line in lines if "FAULT" in line) == sorted(expected)
    assert lines[-1] == f"{len(expected)} faults"


@pytest.mark.parametrize(
    ("file", "name", "said"),
    [
        ("losses.npz", "main.target2.model_ids", "target2.model_ids"),
        ("meshes.npz", None, "meshes.npz: missing"),
        ("ops.npz", "msda.value", "msda.value"),
    ],
)
def test_a_missing_input_or_file_fails(
    other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, name: str | None, said: str
) -> None:
    folder = tmp_path / "lacking"
    shutil.copytree(other, folder)
    spec = json.loads((folder / "spec.json").read_text())
    # The forward passes were compared above; the icosphere's level is read from the specification.
    spec["variants"] = {"pose": spec["variants"]["pose"]}
    (folder / "spec.json").write_text(json.dumps(spec))
    if name is None:
        (folder / file).unlink()
    else:
        arrays = dict(np.load(folder / file))
        del arrays[name]
        np.savez(folder / file, **arrays)
    assert main([str(folder)]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("FAULT: ")
    assert said in last


def test_another_salt_than_the_sums_are_of_fails(other: Path) -> None:
    spec = json.loads((other / "spec.json").read_text())
    assert not list(_check_sum("images", {str(i): a for i, a in enumerate(images(spec))}, spec["sums"]))
    changed = {**spec, "salt": "another"}
    (line,) = _check_sum("images", {str(i): a for i, a in enumerate(images(changed))}, spec["sums"])
    assert "another sha256" in line.fault
