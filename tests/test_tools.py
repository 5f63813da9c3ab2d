"""tools/update_tables.py: the tables in README and cards say what the committed JSON says."""

from __future__ import annotations

import hashlib
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools" / "update_tables.py"

CARD = "---\nlicense: cc-by-sa-4.0\n---\n# toy\n<!-- table: scores -->\n<!-- end of table -->\nend\n"
END = "<!-- end of table -->\n"
README = f"top\n<!-- table: models -->\nold\n{END}middle\n<!-- table: lmo -->\n{END}"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with one bundled model of 12 parameters, and one peer."""
    folder = tmp_path / "smope" / "weights" / "toy"
    folder.mkdir(parents=True)
    save_file(
        {
            "conv.weight": torch.zeros(3, 2).half(),
            "bn.bias": torch.zeros(6).half(),
            "bn.running_mean": torch.zeros(6).half(),
            "objects.ape.points": torch.zeros(9),
        },
        folder / "model.safetensors",
    )
    scores = {
        "dataset": "lmo",
        "images": 60,
        "weights_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "command": "smope evaluate lmo",
        "device": "cpu",
        "date": "2026-11-22T10:00:00+00:00",
        "torch": "2.13.0",
        "seconds_an_image_median": 0.7512,
        "all": row(431, 0.25049, 0.5511, None),
        "objects": {"ape": row(48, 0.1, 0.9, 0.123)},
    }
    (folder / "scores.json").write_text(json.dumps(scores))
    (folder / "config.json").write_text(json.dumps({"objects": ["ape"]}))
    (folder / "MODEL_CARD.md").write_text(CARD)
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "benchmarks").mkdir()
    peer = {
        "method": "Peer",
        "kind": "two steps",
        "photos": 200,
        "source": "published",
        **row(0, 0.5, 0.6, 0.07),
    }
    (tmp_path / "benchmarks" / "peers.json").write_text(json.dumps({"rows": [{**peer, "seconds": None}]}))
    return tmp_path


STREET = {
    "objects": 31, "AP_2d_50_moderate": 0.91549, "AOS_50_moderate": 0.5, "AP_3d_50_moderate": 0.4,
    "recall": None, "depth_error": 0.0371, "yaw_error_deg": 2.43,
    "intervals": {"depth_error": [0.021, 0.0429]},
}  # fmt: skip


def test_streets_are_told_by_class(root: Path) -> None:
    folder = root / "smope" / "weights" / "street"
    shutil.copytree(folder.parent / "toy", folder)
    scores = json.loads((folder / "scores.json").read_text())
    few = {**STREET, "objects": 2}
    sets = {
        "measure": {"images": 17, "objects": {"Car": STREET, "Tram": {**STREET, "objects": 0}}},
        "renders": {"images": 500, "objects": {"Car": few}},
    }
    kept = {key: scores[key] for key in ("weights_sha256", "command", "device", "date", "torch")}
    (folder / "scores.json").write_text(json.dumps({**kept, "sets": sets}))
    (root / "README.md").write_text(README + f"<!-- table: streets -->\n{END}")
    assert run(root).returncode == 0
    card = (folder / "MODEL_CARD.md").read_text()
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in card.splitlines() if "| Car |" in line]
    assert lines[0][1:] == ["Car", "31", "0.92", "0.50", "0.40", "", "3.7% (2.1% to 4.3%)", "2.4 deg"]
    assert lines[1][-2] == "3.7%"  # of two objects nothing can be drawn anew
    assert "Tram" not in card
    assert all("|".join(line) in (root / "README.md").read_text().replace(" | ", "|") for line in lines)


def test_speed_is_told_by_way(root: Path) -> None:
    ours = {"network": "smope-s", "batch": 32, "first": 9.0, "least": 0.1, "MiB": 1.0}
    peer = {**ours, "network": "transformers' DeformableDetr (no poses)", "way": "TF32", "median": 0.25}
    main = [{**ours, "way": "fast", "median": 0.016}, peer, {**ours, "way": "other", "median": 1.0}]
    about = {"date": "2026-12-01", "device": "a GPU", "torch": "2.11", "size": "640x480", "main": main}
    (root / "benchmarks" / "predict.json").write_text(json.dumps(about))
    (root / "README.md").write_text(README + f"<!-- table: speed -->\n{END}")
    assert run(root).returncode == 0
    text = (root / "README.md").read_text()
    assert cells(text, "**smope `lmo`**, image to poses, as by default")[1:] == ["32", "16.00", "2000"]
    assert cells(text, "transformers' Deformable DETR, boxes alone, TF32")[1:] == ["32", "250.00", "128"]
    assert "other" not in text
    assert "2026-12-01, a GPU, torch 2.11, 640x480" in text


def row(targets: int, mssd: float, mspd: float, add: float | None) -> dict[str, Any]:
    return {"targets": targets, "AR_MSSD": mssd, "AR_MSPD": mspd, "ADD(-S)": add, "found": 0.5}


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), "--root", str(root), *arguments], capture_output=True, text=True
    )


def cells(text: str, first: str) -> list[str]:
    [line] = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_tables_are_rebuilt_and_checked(root: Path) -> None:
    before = run(root, "--check")
    assert before.returncode == 1
    assert "README.md: stale" in before.stderr
    assert (root / "README.md").read_text() == README  # --check changes nothing

    assert run(root).returncode == 0
    readme = (root / "README.md").read_text()
    assert readme.startswith("top\n<!-- table: models -->\n| model ")
    assert "\n<!-- end of table -->\nmiddle\n" in readme
    assert "old" not in readme
    size = (root / "smope/weights/toy/model.safetensors").stat().st_size
    assert size < 1000
    assert cells(readme, "`toy`") == ["`toy`", "ape", "0.0 M", "0.0 MiB", "cc-by-sa-4.0"]
    expected = ["60", "0.250", "0.551", "", "50.0%", "0.751", "`scores.json`; cpu"]
    assert cells(readme, "**smope `toy`**")[2:] == expected
    assert cells(readme, "Peer")[2:] == ["200", "0.500", "0.600", "7.0%", "50.0%", "", "published"]
    card = (root / "smope/weights/toy/MODEL_CARD.md").read_text()
    assert cells(card, "ape")[1:6] == ["48", "0.100", "0.900", "12.3%", "50.0%"]
    assert "60 photos of `lmo`, 2026-11-22, cpu, torch 2.13.0" in card

    assert run(root, "--check").returncode == 0
    assert run(root).stdout == ""  # nothing left to do


def test_a_changed_score_makes_readme_and_card_stale(root: Path) -> None:
    run(root)
    path = root / "smope/weights/toy/scores.json"
    path.write_text(path.read_text().replace("0.25049", "0.35049"))
    checked = run(root, "--check")
    assert checked.returncode == 1
    assert "README.md: stale" in checked.stderr
    assert "MODEL_CARD.md: stale" in checked.stderr


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model.safetensors", None, "not of the weights beside it"),
        ("scores.json", None, "scores.json: missing"),
        ("MODEL_CARD.md", ("license", "licence"), "no line `license: ...`"),
        ("MODEL_CARD.md", ("table: scores", "table: score"), "unknown table 'score'"),
        ("MODEL_CARD.md", ("<!-- table: scores -->", ""), "no block"),
    ],
)
def test_files_that_contradict_each_other_are_named(
    root: Path, file: str, change: tuple[str, str] | None, message: str
) -> None:
    path = root / "smope/weights/toy" / file
    if change is not None:
        path.write_text(path.read_text().replace(*change))
    elif file == "scores.json":
        path.unlink()
    else:
        save_file({"a": torch.ones(1)}, path)
    checked = run(root, "--check")
    assert checked.returncode == 1
    assert message in checked.stderr


def test_parameters_are_those_of_the_network(root: Path) -> None:
    tool = runpy.run_path(str(TOOL))
    [model] = tool["bundled_models"](root)
    assert model.parameters == 12  # 3*2 + 6: neither statistics nor the object's points


def test_the_committed_tables_are_fresh() -> None:
    checked = run(ROOT, "--check")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_peers_are_those_of_the_result_files(data_root: Path, tmp_path: Path) -> None:
    """The rows on 60 photos, computed anew from the methods' own result files."""
    from smope.evaluate.run import evaluate_dataset

    peers = json.loads((ROOT / "benchmarks" / "peers.json").read_text())["rows"]
    for peer in (row for row in peers if row["photos"] == 60):
        name = peer["source"].split("`")[1]
        copy = tmp_path / f"{name}_lmo-test.csv"
        shutil.copyfile(data_root / "lmo" / "results" / copy.name, copy)
        scores = evaluate_dataset(data_root / "lmo", csv=copy)["all"]
        for key, digits in {"AR_MSSD": 4, "AR_MSPD": 4, "ADD(-S)": 4, "found": 3}.items():
            assert scores[key] == pytest.approx(peer[key], abs=0.51 * 10**-digits), (name, key)
