"""The authors' network and loss against what their own code computed, and the command that compares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from smope.tools.check_authors_parity import check_file, compare, main
from smope.tools.parity_inputs import draw

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
    assert "'other/2' given" in capsys.readouterr().out


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
    assert faults({**stored, "b": np.zeros(2)}, described=lambda name: True) == ["f/stat.b"]
    assert faults({**stored, "b": np.zeros(2), "stat.a": np.zeros(5)}) == ["f/stat.a"]
