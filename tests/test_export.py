"""What `smope export` writes gives what the network gives, in onnxruntime and by torch.export."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small_model import K, noise, small_model, thin_backbone

from smope import SMOPE, Camera, Poses, cli
from smope.architectures import find
from smope.defaults import LOWEST_SCORE
from smope.export import ExportError, export_model
from smope.export.network import OUTPUTS
from smope.images import load_image

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "onnx_only.py"
OTHER = (128, 80)  # pixels; the small model is of 96x64
DEMO = ROOT / "smope" / "assets" / "demo.png"


def camera() -> Camera:
    """Of the demo picture."""
    return Poses.load(DEMO.with_suffix(".json")).camera


@pytest.fixture(scope="module")
def model() -> SMOPE:
    """The time of an export goes by the number of operators."""
    with pytest.MonkeyPatch.context() as patch:
        thin_backbone(patch)
        return small_model()


def expected(model: SMOPE, batch: dict[str, NDArray[Any]], top_k: int) -> dict[str, NDArray[Any]]:
    """By the network itself, and numpy for what comes after it."""
    images = torch.from_numpy(batch["images"]).permute(0, 3, 1, 2).float() / 255
    assert model._tokens is not None
    found, (width, height) = find(model.network, images, torch.from_numpy(batch["K"]), model._tokens, top_k)
    labels, pose = found.labels.numpy(), found.pairs.poses[-1]
    objects = list(model.objects.values())
    rotation, centre = pose.rotation.detach().numpy(), pose.translation.detach().numpy()
    T_CO = np.tile(np.eye(4, dtype=np.float32), (*labels.shape, 1, 1))
    T_CO[..., :3, :3] = rotation
    middles = np.stack([one.centre.numpy() for one in objects])[labels]
    T_CO[..., :3, 3] = centre - np.einsum("bpij,bpj->bpi", rotation, middles)
    x, y, w, h = np.moveaxis(found.boxes.detach().numpy(), -1, 0)
    corners = [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
    errors = np.exp(np.clip(found.pairs.log_sigma.detach().numpy(), -6, 3))
    diameters = np.array([one.diameter for one in objects])[labels]
    return {
        "scores": found.scores.detach().numpy(),
        "labels": labels,
        "boxes": np.stack(corners, -1) - 0.5,
        "T_CO": T_CO,
        "visibility": 1 / (1 + np.exp(-found.pairs.visibility_logit.detach().numpy())),
        "sigma": np.stack([np.degrees(errors[..., 0]), errors[..., 1] * diameters], -1),
        "scale": np.ones((*labels.shape, 3), np.float32),  # these weights do not predict it
    }


def check(found: Any, expected: dict[str, NDArray[Any]], rows: slice = slice(None)) -> None:
    for name, value in zip(OUTPUTS, found, strict=True):
        assert np.asarray(value).shape == expected[name][rows].shape
        np.testing.assert_allclose(
            np.asarray(value), expected[name][rows], rtol=1e-3, atol=1e-3, err_msg=name
        )


@pytest.fixture(scope="module")
def small_pt2(model: SMOPE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "small.pt2"
    assert export_model(model, out, "pt2", OTHER, top_k=5) == out.with_name("small.meshes.npz")
    return out


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_pt2_gives_what_the_network_gives(model: SMOPE, small_pt2: Path) -> None:
    images = np.stack([noise(i, *OTHER).permute(1, 2, 0).numpy() for i in range(3)])  # exported were two
    batch = {"images": images, "K": np.array([K] * 3, np.float32)}
    batch["K"][1, :2] *= 1.1
    arrays = dict(np.load(small_pt2.with_suffix(".meshes.npz")))
    assert arrays["size"].tolist() == list(OTHER)
    meshes = [torch.from_numpy(arrays[name]) for name in arrays if name not in ("names", "size")]
    program = torch.export.load(small_pt2).module()
    with torch.no_grad():
        found = program(torch.from_numpy(batch["images"]), torch.from_numpy(batch["K"]), *meshes)
    check(found, expected(model, batch, 5))


def test_what_cannot_be_exported_is_one_error(
    model: SMOPE, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ExportError, match="size 20x64 given"):
        export_model(model, tmp_path / "a.onnx", "onnx", (20, 64))
    assert not list(tmp_path.iterdir())
    assert cli.main(["export", "lmo", "--size", "640"]) == 2
    assert "--size 640 given, WIDTHxHEIGHT expected" in capsys.readouterr().err


@pytest.fixture(scope="module")
def lmo_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime")
    out = tmp_path_factory.mktemp("export") / "lmo.onnx"
    assert cli.main(["export", "lmo", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def lmo() -> SMOPE:
    return SMOPE.from_pretrained("lmo", device="cpu")


def test_a_torch_whose_exporter_fails_is_refused(
    model: SMOPE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu124")
    with pytest.raises(ExportError, match=r"torch 2\.5\.1\+cu124 given"):
        export_model(model, tmp_path / "model.pt2", "pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_onnx_gives_what_the_network_gives(lmo_onnx: Path, lmo: SMOPE) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    assert sorted(path.name for path in lmo_onnx.parent.iterdir()) == ["lmo.meshes.npz", "lmo.onnx"]
    onnx.checker.check_model(lmo_onnx)
    assert "GridSample" in {node.op_type for node in onnx.load(lmo_onnx).graph.node}
    meshes = dict(np.load(lmo_onnx.with_suffix(".meshes.npz")))
    assert meshes.pop("names").tolist() == list(lmo.objects)
    assert meshes.pop("size").tolist() == list(lmo.config.image_size)

    picture = load_image(DEMO).permute(1, 2, 0).numpy()
    batch = {"images": np.stack([picture, picture[:, ::-1], picture // 2]), "K": np.stack([camera().K] * 3)}
    batch["K"][1, :2] *= 1.05
    exact = expected(lmo, batch, 32)
    session = runtime.InferenceSession(lmo_onnx)
    sure = int((exact["scores"] > 0.1).sum(1).min())  # beyond these two may change places by a rounding
    assert sure >= 3

    def best(values: Any) -> list[NDArray[Any]]:
        return [value[:, :sure] for value in values]

    cut = {name: value[:, :sure] for name, value in exact.items()}
    check(best(session.run(None, {**batch, **meshes})), cut)  # three, where two were exported
    single = best(session.run(None, {**{name: value[:1] for name, value in batch.items()}, **meshes}))
    check(single, {name: value[:1] for name, value in cut.items()})

    swapped = {name: value[::-1].copy() for name, value in meshes.items()}  # other meshes: tokens are inputs
    found = dict(zip(OUTPUTS, best(session.run(None, {**batch, **swapped})), strict=True))
    np.testing.assert_array_equal(len(lmo.objects) - 1 - found["labels"], cut["labels"])
    np.testing.assert_allclose(found["T_CO"], cut["T_CO"], rtol=1e-3, atol=1e-3)


def run_example(model: Path, photo: Path, intrinsics: torch.Tensor) -> list[tuple[str, float, np.ndarray]]:
    """Name, score and T_CO [3, 4] of each line, where neither torch nor smope can be imported."""
    numbers = [str(float(intrinsics[i, j])) for i, j in ((0, 0), (1, 1), (0, 2), (1, 2))]
    code = (
        "import runpy, sys\n"
        "sys.modules.update(torch=None, smope=None)\n"
        f"sys.argv = {['onnx_only.py', str(model), str(photo), *numbers]!r}\n"
        f"runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    lines = [
        re.fullmatch(r"(\S+) (.+) box (\[.*\]) pose (\[.*\])", line) for line in done.stdout.splitlines()
    ]
    assert all(lines), done.stdout
    return [(line[2], float(line[1]), np.array(json.loads(line[4]))) for line in lines if line]


def same_objects(found: list[tuple[str, float, np.ndarray]], poses: Poses) -> None:
    sure = [i for i in range(len(poses)) if abs(float(poses.scores[i]) - LOWEST_SCORE) > 1e-3]
    told = [one for one in found if abs(one[1] - LOWEST_SCORE) > 1e-3]
    assert sorted(one[0] for one in told) == sorted(poses.names[i] for i in sure)
    for i in sure:
        errors = [
            np.abs(T - poses.T_CO[i, :3].numpy()).max() for name, _, T in told if name == poses.names[i]
        ]
        assert min(errors) < 1e-3, poses.names[i]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_example_finds_what_predict_finds_in_the_demo(lmo_onnx: Path, lmo: SMOPE) -> None:
    poses = lmo.predict(DEMO, K=camera().K)
    assert len(poses) >= 3
    same_objects(run_example(lmo_onnx, DEMO, camera().K), poses)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_on_real_photos_it_finds_what_predict_finds(lmo_onnx: Path, lmo: SMOPE, data_root: Path) -> None:
    photos = sorted((data_root / "lmo").rglob("rgb/*.jpg"))[:3]
    assert len(photos) == 3
    for photo in photos:
        same_objects(run_example(lmo_onnx, photo, torch.tensor(lmo.config.K)), lmo.predict(photo))


class Running:
    """`smope serve` in a thread, which ends when asked to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        uvicorn = pytest.importorskip("uvicorn")
        run = uvicorn.Server.run

        def noted(server: Any, *given: Any, **options: Any) -> None:
            self.server = server
            run(server, *given, **options)

        monkeypatch.setattr(uvicorn.Server, "run", noted)
        self.server: Any = None

    def start(self, arguments: list[str]) -> None:
        self.thread = threading.Thread(target=cli.main, args=(arguments,))
        self.thread.start()
        deadline = time.monotonic() + 100
        while self.server is None or not self.server.started:
            assert self.thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def as_curl(arguments: list[str]) -> bytes:
    """-H HEADER --data-binary @FILE ADDRESS"""
    given = argparse.ArgumentParser()
    given.add_argument("-H", dest="header")
    given.add_argument("--data-binary")
    given.add_argument("address")
    options = given.parse_args(arguments)
    name, _, value = options.header.partition(": ")
    body = Path(options.data_binary.removeprefix("@")).read_bytes()
    asked = urllib.request.Request(options.address, body, {name: value})
    with urllib.request.urlopen(asked, timeout=100) as answer:
        return bytes(answer.read())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_page_on_deploying_runs(
    lmo_onnx: Path, small_pt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it stands, but for what is made once for all tests: exported files, and the kernel (test_cli)."""

    def ready(model: SMOPE, out: Path, format: str, size: Any, top_k: int) -> Path:
        source = lmo_onnx if format == "onnx" else small_pt2
        shutil.copy(source, out)
        return Path(shutil.copy(source.with_suffix(".meshes.npz"), out.with_suffix(".meshes.npz")))

    monkeypatch.setattr("smope.export.export_model", ready)
    monkeypatch.setattr("smope.ops.build.build_cpu", lambda: Path("kernel.so"))
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for name in ("1.png", "2.png"):
        shutil.copy(DEMO, Path("photos") / name)

    page = (ROOT / "docs" / "deploy.md").read_text()
    blocks = re.findall(r"```(\w+)\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 10
    known: dict[str, Any] = {}
    running, port = Running(monkeypatch), free_port()
    for kind, code in blocks:
        if kind == "python":
            exec(compile(code, "docs/deploy.md", "exec"), known)
            continue
        for line in code.splitlines():
            program, *arguments = shlex.split(line.replace("8080", str(port)))
            if arguments == ["serve"]:
                running.start(["serve", "--port", str(port)])
            elif program == "curl":
                assert len(Poses.from_dict(json.loads(as_curl(arguments)))) >= 3
                running.stop()
            elif program == "smope":
                assert cli.main(arguments) == 0, line
            else:
                arguments[0] = str(ROOT / arguments[0])
                done = subprocess.run(
                    [sys.executable, *arguments], capture_output=True, text=True, timeout=300
                )
                assert len(done.stdout.splitlines()) >= 3, done
    assert {path for path, _ in known["read_results"]("results.jsonl")} == {"photos/1.png", "photos/2.png"}
    assert known["T_CO"].shape == (1, 5, 4, 4)
