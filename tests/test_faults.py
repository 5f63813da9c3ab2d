"""A thousand damaged files: each gives a result or one clear error, never a crash, and memory stays."""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from small_model import noise, small_model

from smope import SMOPE, Camera, Poses
from smope.camera import CameraError
from smope.config import ConfigError, ModelConfig, to_json
from smope.images import ImageError, load_image
from smope.meshes import MeshError
from smope.objects import ObjectModel
from smope.poses import PosesError
from smope.results_file import ResultsError, ResultsFile, read_results, result_line

SURPRISES = [
    b"",
    b"\x00",
    b"\xff\xff\xff\xff",
    b"NaN",
    b"1e999",
    b"-1",
    b"[" * 2000,
    b'"',
    b"\n",
    b"99999999999",
]


@pytest.fixture(scope="module")
def model() -> SMOPE:
    return small_model()


def mutations(good: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Bytes flipped, cut out, doubled, swapped for surprises, or the end cut off: one to four at a time."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        content = bytearray(good)
        for _ in range(random.integers(1, 5)):
            a, b = sorted(random.integers(0, len(content) + 1, 2).tolist())
            b = min(b, a + int(random.integers(1, 64)))
            kind = random.integers(0, 5)
            if kind == 0:
                content[a:b] = random.integers(0, 256, b - a, dtype=np.uint8).tobytes()
            elif kind == 1:
                del content[a:b]
            elif kind == 2:
                content[a:a] = content[a:b]
            elif kind == 3:
                content[a:b] = SURPRISES[random.integers(len(SURPRISES))]
            else:
                del content[max(a, 1) :]
        yield bytes(content)


def survive(
    good: bytes, count: int, path: Path, read: Callable[[Path], Any], errors: tuple[type[Exception], ...]
) -> tuple[int, int]:
    """How many were read and how many refused; the good one is read."""
    path.write_bytes(good)
    read(path)
    fine = refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the readers, about what is wrong in the file
        for content in mutations(good, count, seed=len(good)):
            path.write_bytes(content)
            try:
                read(path)
                fine += 1
            except errors as error:
                assert str(error), content  # noqa: PT017  # either may happen
                refused += 1
    return fine, refused


def encoded(form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    rows = np.linspace(0, 255, 40 * 30 * 3).reshape(30, 40, 3).astype(np.uint8)
    Image.fromarray(rows).save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
def test_images(form: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    good = encoded(form, **({"exif": exif} if form in ("PNG", "JPEG", "TIFF", "WEBP") else {}))

    def read(path: Path) -> None:
        pixels = load_image(path)
        assert pixels.dtype == torch.uint8
        assert pixels.shape[0] == 3

    fine, refused = survive(good, 80, tmp_path / "a", read, (ImageError,))
    assert refused > 5
    assert fine + refused == 80


@pytest.mark.parametrize("ending", ["ply", "obj", "stl", "glb"])
def test_meshes(ending: str, tmp_path: Path) -> None:
    trimesh.creation.box((0.1, 0.2, 0.3)).export(tmp_path / f"good.{ending}")
    good = (tmp_path / f"good.{ending}").read_bytes()

    def read(path: Path) -> None:
        model = ObjectModel.from_mesh("thing", path, "m", force=True)
        assert torch.isfinite(model.points).all()
        assert model.diameter > 0

    fine, refused = survive(good, 50, tmp_path / f"bad.{ending}", read, (MeshError,))
    assert fine + refused == 50
    assert refused > 5


def test_configurations(model: SMOPE, tmp_path: Path) -> None:
    good = json.dumps(to_json(model.config)).encode()
    fine, refused = survive(good, 150, tmp_path / "config.json", ModelConfig.load, (ConfigError,))
    assert fine + refused == 150
    assert refused > 50


def test_poses(model: SMOPE, tmp_path: Path) -> None:
    model.predict(noise(0), threshold=0.0, top_k=3).save(tmp_path / "good.json")
    good = (tmp_path / "good.json").read_bytes()
    fine, refused = survive(good, 150, tmp_path / "bad.json", Poses.load, (PosesError, CameraError))
    assert fine + refused == 150
    assert refused > 50


def test_results(model: SMOPE, tmp_path: Path) -> None:
    poses = model.predict(noise(0), threshold=0.0, top_k=2)
    good = b"".join(result_line(f"{i}.png", "one", poses) for i in range(3))

    def go_on(path: Path) -> None:
        with ResultsFile(path, "one") as file:
            file.add(result_line("more.png", "one", poses))
        assert path.read_bytes().endswith(result_line("more.png", "one", poses))

    def read(path: Path) -> None:
        assert all(isinstance(found, Poses) for _, found in read_results(path))

    fine, refused = survive(good, 75, tmp_path / "a.jsonl", go_on, (ResultsError,))
    assert fine + refused == 75
    fine, refused = survive(good, 75, tmp_path / "b.jsonl", read, (PosesError, CameraError))
    assert fine + refused == 75


def test_cameras() -> None:
    random = np.random.default_rng(0)
    values = [0.0, -1.0, 1.0, np.nan, np.inf, 1e30, -1e30, 500.0, 320.0, 1e-30]
    refused = 0
    for _ in range(100):
        K = np.array([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]])
        for _ in range(random.integers(1, 3)):
            K[tuple(random.integers(0, 3, 2))] = random.choice(values)
        try:
            assert torch.isfinite(Camera(torch.from_numpy(K), (640, 480)).K).all()
        except CameraError as error:
            assert str(error)  # noqa: PT017  # either may happen
            refused += 1
    assert refused > 30


def test_a_card_of_any_bytes_does_no_harm(model: SMOPE, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    (tmp_path / "MODEL_CARD.md").write_bytes(b"# Caf\xe9\n")
    assert SMOPE.from_pretrained(tmp_path, device="cpu").card == "# Caf\N{REPLACEMENT CHARACTER}\n"


def test_a_full_disk_leaves_the_old_weights(model: SMOPE, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: writing fails after some bytes in both."""
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    code = (
        "import resource, sys\n"
        "from smope import SMOPE\n"
        "model = SMOPE.from_pretrained(sys.argv[1], device='cpu')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))\n"
        "try:\n    model.save_pretrained(sys.argv[1])\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=100, check=True
    )
    assert "File too large" in done.stdout
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert SMOPE.from_pretrained(tmp_path, device="cpu").objects.keys() == model.objects.keys()


def test_memory_does_not_grow_with_what_is_refused(tmp_path: Path) -> None:
    good = encoded("PNG")

    def refuse(count: int) -> int:
        survive(good, count, tmp_path / "a.png", load_image, (ImageError,))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB

    before = refuse(50)
    assert refuse(300) - before < 20_000
