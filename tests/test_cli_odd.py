"""Command lines that cannot be meant: one line says so, before any work is done."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from smope import cli
from smope.data.bop import CSV_HEADER, read_bop_csv


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "photo.png", "--out", "file"], "--out file is a file, a folder expected"),
        (["predict", "photo.png", "--units", "mm"], "--units and --symmetries are of --meshes"),
        (["predict", "photo.png", "--symmetries", "auto"], "--units and --symmetries are of --meshes"),
        (["predict", "photo.png", "--device", "gpu"], "device 'gpu' given"),
        (["predict", "photo.png", "--device", "cuda:99"], 'device "cuda:99" given, but there is'),
        (["predict", "photo.png", "--device", "cpu,gpu", "--out", "a.jsonl"], "device 'gpu' given"),
        (["predict", "photo.png", "--threshold", "7"], "threshold 7.0 and top_k 32 given"),
        (["demo", "--out", "picture"], "the name of a picture expected, such as picture.png"),
        (["demo", "--out", "picture.xyz"], "such as picture.png"),
        (["demo", "--out", "folder"], "such as folder.png"),
        (["evaluate", "folder"], "a model or results (csv) expected"),
        (["evaluate", "folder", "--model", "lmo", "--limit", "0"], "limit 0 given, at least 1 expected"),
        (["evaluate", "folder", "--model", "lmo", "--batch", "-1"], "batch -1 and limit None given"),
        (["evaluate", "folder", "--model", "lmo", "--out", "file"], "--out file is a file"),
        (["export", "lmo", "--size", "100000x100000"], "32x32 to 8192x8192 expected"),
        (["export", "lmo", "--top-k", "0"], "top_k 0 given, at least 1 expected"),
        (["scenes", "preview", "--meshes", "x.ply", "--units", "mm", "--count", "0"], "--count 0 given"),
        (["scenes", "preview", "--assets", "file"], "file: no file of scene assets"),
        (["convert", "file", "out"], "a .pth file of the authors' trainer expected"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_meant_is_said_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save("photo.png")
    Path("file").touch()
    Path("folder").mkdir()
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("smope: ")
    assert message in said[-1]


def test_a_folder_in_the_place_of_a_file_is_the_users_to_put_right() -> None:
    assert cli.user_message(FileExistsError(17, "File exists", "runs")) == "[Errno 17] File exists: 'runs'"


def test_results_without_a_row_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "empty.csv").write_text(",".join(CSV_HEADER) + "\n")
    assert read_bop_csv(tmp_path / "empty.csv") == []
    assert "no result in it" in caplog.text
