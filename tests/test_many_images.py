"""Many images into one file: whatever stops it, the same command goes on, and nothing is done twice."""

from __future__ import annotations

import errno
import functools
import io
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_model import noise, small_model

from smope import SMOPE, cli
from smope.hub import WeightsNotFoundError
from smope.many_images import Tally, WorkerError, _sendable, image_files, predict_files
from smope.poses import PosesError
from smope.results_file import ResultsError, ResultsFile, name_of_run, read_results

OPTIONS: dict[str, Any] = {"threshold": 0.0, "top_k": 3}


@pytest.fixture(scope="module")
def model() -> SMOPE:
    return small_model()


@pytest.fixture(scope="module")
def weights(model: SMOPE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    model.save_pretrained(folder)
    return folder


def photos(folder: Path, count: int) -> list[str]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{i:03}.png" for i in range(count)]
    for i, path in enumerate(paths):
        Image.fromarray(noise(i).permute(1, 2, 0).numpy()).save(path)
    return [str(path) for path in paths]


def images_in(path: Path) -> list[str]:
    return [json.loads(line)["image"] for line in path.read_text().splitlines()]


def test_folders_patterns_and_lists_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (
        "a/2.png",
        "a/1.JPG",
        "a/deep/0.jpeg",
        "a/notes.md",
        "a/._1.jpg",
        "a/.thumbs/0.png",
        "b[1].png",
    ):
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    Path("list.txt").write_text("# mine\n\n./a/2.png\nnot/there.png\n")
    assert image_files([Path("a")]) == ["a/1.JPG", "a/2.png", "a/deep/0.jpeg"]
    assert image_files(["a/*.png", "b[1].png"]) == ["a/2.png", "b[1].png"]
    assert image_files(["a/**/*.jpeg"]) == ["a/deep/0.jpeg"]
    assert image_files(["list.txt"]) == ["a/2.png", "not/there.png"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("a/2.png\n"))
    assert image_files(["-"]) == ["a/2.png"]
    Path("empty").mkdir()
    for nothing in ("c", "c.png", "c/*.png", "empty"):
        with pytest.raises(FileNotFoundError, match=r"no (such )?image"):
            image_files([nothing])


def test_the_file_holds_what_predict_gives_and_goes_on(model: SMOPE, tmp_path: Path) -> None:
    paths, out = photos(tmp_path / "photos", 5), tmp_path / "new" / "results.jsonl"
    opened: list[str] = []

    def open_model(device: str) -> SMOPE:
        opened.append(device)
        return model

    go = functools.partial(predict_files, open_model, out=out, devices=["cpu"], run="one", options=OPTIONS)
    assert go(paths[:2] + paths[:1]) == Tally(2, 0, 0)
    assert go(paths[:2]) == Tally(0, 0, 2)
    assert opened == ["cpu"]  # and not for nothing
    assert go([*paths, "missing.png"]) == Tally(3, 1, 2, "missing.png: no image file 'missing.png'")
    assert images_in(out) == paths
    found = dict(read_results(out))
    for path, expected in zip(paths, model.predict(paths, **OPTIONS), strict=True):
        assert found[path].names == expected.names
        torch.testing.assert_close(found[path].T_CO, expected.T_CO, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_half_written_line_is_cut_and_done_again(model: SMOPE, tmp_path: Path, share: float) -> None:
    paths, out = photos(tmp_path / "photos", 3), tmp_path / "results.jsonl"
    go = functools.partial(
        predict_files, lambda device: model, out=out, devices=["cpu"], run="one", options=OPTIONS
    )
    go(paths)
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:2]) + lines[2][: int(share * len(lines[2]))])
    assert len(list(read_results(out))) == 2
    assert go(paths) == Tally(1, 0, 2)
    assert out.read_bytes() == whole


def test_a_file_of_others_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    line = b'{"image": "a \\"b\\".png", "run": "one", "poses": []}\n'
    out.write_bytes(line)
    with ResultsFile(out, "one") as file:
        assert file.done == {'a "b".png'}
        with pytest.raises(ResultsError, match="another smope predict is writing it"):
            ResultsFile(out, "one")
    with pytest.raises(ResultsError, match="other settings"):
        ResultsFile(out, "two")
    for foreign in (b'{"id": 5}\n', b"\x00\x00\n", line + b"\n" + line):
        out.write_bytes(foreign)
        with pytest.raises(ResultsError, match="no result of smope predict; name another file"):
            ResultsFile(out, "one")
        assert out.read_bytes() == foreign
    with pytest.raises(PosesError, match=r"line 1: .*smope-poses-1"):
        list(read_results(out))


def test_settings_have_a_name_of_their_own() -> None:
    settings = {"model": "lmo", "threshold": 0.3, "meshes": (Path("a.ply"),), "fov": None}
    assert name_of_run(settings) == name_of_run(dict(reversed(settings.items())))
    assert (
        len({name_of_run({**settings, **change}) for change in ({}, {"fov": 60.0}, {"threshold": 0.2})}) == 3
    )


def command(weights: Path, folder: Path, out: Path) -> list[str]:
    arguments = ["predict", str(folder), "--model", str(weights), "--out", str(out), "--device", "cpu"]
    return [*arguments, "--threshold", "0", "--top-k", "3"]


def test_a_killed_predict_goes_on(weights: Path, tmp_path: Path) -> None:
    paths, out = photos(tmp_path / "photos", 40), tmp_path / "results.jsonl"
    arguments = command(weights, tmp_path / "photos", out)
    process = subprocess.Popen([sys.executable, "-m", "smope", *arguments], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 90
        while not (out.exists() and out.read_bytes().count(b"\n") >= 2) and time.monotonic() < deadline:
            time.sleep(0.005)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    killed = out.read_bytes()
    assert 2 <= killed.count(b"\n") < len(paths)
    assert cli.main(arguments) == 0
    assert images_in(out) == paths
    assert out.read_bytes().startswith(killed[: killed.rindex(b"\n") + 1])
    assert all(len(poses) for _, poses in read_results(out))


def test_the_command_says_what_it_did(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, out = photos(tmp_path / "photos", 3), tmp_path / "results.jsonl"
    Path(paths[1]).write_bytes(b"no picture")
    arguments = command(weights, tmp_path / "photos", out)
    assert cli.main(arguments) == 0
    said = capsys.readouterr()
    assert said.out.startswith("2 images in ")
    assert said.out.endswith(f"; 1 left out, as they cannot be used -> {out}\n")
    assert said.err.startswith(f"smope: left out: {paths[1]!r} cannot be read as an image")
    assert cli.main([*arguments, "--strict"]) == 2  # the bad one is looked at again
    said = capsys.readouterr()
    assert said.out.startswith("0 images in ")
    assert "; 2 were there already; 1 left out" in said.out
    assert said.err.endswith("smope: 1 of 3 images cannot be used (named above)\n")
    assert cli.main([*arguments[:-1], "4"]) == 2
    assert "other settings" in capsys.readouterr().err

    Image.new("RGB", (60, 40)).save(tmp_path / "other.png")
    arguments[1] = str(tmp_path / "other.png")
    arguments[5] = str(tmp_path / "none.jsonl")
    assert cli.main(arguments) == 2
    assert "none of 1 images can be used; the first: " in capsys.readouterr().err
    assert cli.main([*arguments, "--device", "all"]) == (0 if torch.cuda.is_available() else 2)
    assert cli.main([*arguments[:4], "--out", str(tmp_path), "--strict"]) == 2


def test_a_full_disk_is_said_in_a_line_and_the_run_goes_on_later(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, out = photos(tmp_path / "photos", 4), tmp_path / "results.jsonl"
    arguments = command(weights, tmp_path / "photos", out)
    add = ResultsFile.add

    def until_full(file: ResultsFile, line: bytes) -> None:
        if len(images_in(out)) == 2:
            add(file, line[:100])  # what still found room
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(file, line)

    with monkeypatch.context() as patched:
        patched.setattr(ResultsFile, "add", until_full)
        assert cli.main(arguments) == 2
    assert capsys.readouterr().err == "smope: [Errno 28] No space left on device\n"
    assert cli.main(arguments) == 0
    assert images_in(out) == paths


def open_or_die(folder: Path, device: str) -> SMOPE:
    if device == "cpu:1":
        os.kill(os.getpid(), signal.SIGKILL)
    return SMOPE.from_pretrained(folder, device=device)


def test_several_devices_share_the_images(weights: Path, model: SMOPE, tmp_path: Path) -> None:
    paths, out = photos(tmp_path / "photos", 5), tmp_path / "results.jsonl"
    Path(paths[3]).write_bytes(b"no picture")
    opening = functools.partial(SMOPE.from_pretrained, weights)
    tally = predict_files(opening, paths, out, ["cpu", "cpu"], "one", OPTIONS)
    assert (tally.written, tally.unreadable) == (4, 1)
    found = dict(read_results(out))
    assert sorted(found) == [path for path in paths if path != paths[3]]
    expected = model.predict(paths[0], **OPTIONS)
    torch.testing.assert_close(found[paths[0]].T_CO, expected.T_CO, rtol=1e-4, atol=1e-5)
    assert not multiprocessing.active_children()


def test_a_process_that_ends_early_is_an_error_not_a_hang(weights: Path, tmp_path: Path) -> None:
    paths, out = photos(tmp_path / "photos", 2), tmp_path / "results.jsonl"
    with pytest.raises(WorkerError, match="the process on cpu:1 ended before its images did"):
        predict_files(functools.partial(open_or_die, weights), paths, out, ["cpu:1", "cpu"], "one", OPTIONS)
    assert not multiprocessing.active_children()


class Picky(ValueError):
    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} and {other}")


@pytest.mark.parametrize("error", [WeightsNotFoundError("no model"), Picky("this", "that")])
def test_an_error_of_another_process_says_what_it_said_there(error: Exception) -> None:
    try:
        raise error
    except Exception as caught:
        sent = pickle.loads(pickle.dumps(_sendable(caught)))
    assert type(sent) is (WorkerError if isinstance(error, Picky) else type(error))
    assert str(sent).endswith(str(error))
    assert "raise error" in sent.__notes__[0]
