"""Streaming gives what predict gives, in order, in bounded memory, and stumbles over nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_model import K, noise, small_model

from smope import SMOPE, Camera
from smope.camera import CameraError
from smope.images import ImageError


@pytest.fixture(scope="module")
def model() -> SMOPE:
    return small_model()


@pytest.mark.parametrize("options", [{}, {"batch_size": 3, "workers": 3}, {"batch_size": 50}])
def test_it_gives_what_predict_gives_in_order(model: SMOPE, options: dict[str, Any]) -> None:
    pictures = [noise(i) for i in range(8)]
    streamed = list(model.stream(iter(pictures), threshold=0.0, top_k=3, **options))
    assert [one.index for one in streamed] == list(range(8))
    assert all(one.source is picture for one, picture in zip(streamed, pictures, strict=True))
    for one, expected in zip(streamed, model.predict(pictures, threshold=0.0, top_k=3), strict=True):
        assert one.poses is not None
        assert one.error is None
        assert one.poses.names == expected.names
        torch.testing.assert_close(one.poses.T_CO, expected.T_CO, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_read_ends_nothing(model: SMOPE, tmp_path: Path) -> None:
    Image.new("RGB", (96, 64)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    sources = ["missing.png", tmp_path / "bad.png", tmp_path / "good.png", noise(0, 60, 40), 5]
    results = list(model.stream(sources, batch_size=2))
    assert [one.poses is None for one in results] == [True, True, False, True, True]
    assert [type(one.error) for one in results] == [
        ImageError, ImageError, type(None), CameraError, ImageError,
    ]  # fmt: skip
    assert all(one.poses is None for one in model.stream(["a.png", "b.png"], batch_size=2))


def test_each_image_may_come_with_its_camera(model: SMOPE) -> None:
    wide = Camera.from_fov(70, (80, 64), dist=[-0.1, 0.0, 0.0, 0.0])
    picture = noise(1, 80, 64)
    pairs = [(picture, wide), noise(0), (picture, Camera(torch.tensor(K), (96, 64)))]
    first, second, wrong = model.stream(pairs, batch_size=3, threshold=0.0)
    alone = model.predict(picture, K=wide.K, dist=wide.dist, threshold=0.0)
    assert first.poses is not None
    assert first.poses.names == alone.names
    torch.testing.assert_close(first.poses.T_CO, alone.T_CO, rtol=1e-4, atol=1e-5)
    assert second.poses is not None
    assert isinstance(wrong.error, CameraError)
    assert "96x64 pixels, the image of 80x64" in str(wrong.error)


def test_it_takes_no_more_than_it_needs_and_can_be_left(model: SMOPE) -> None:
    taken = 0

    def endless() -> Iterator[torch.Tensor]:
        nonlocal taken
        while True:
            taken += 1
            yield noise(taken)

    stream = model.stream(endless(), batch_size=2, workers=2)
    for _ in range(6):
        next(stream)
    assert taken <= 6 + 2 * 4  # what was given, and four batches ahead
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("smope-")]


def test_a_fault_is_raised_where_the_results_are_read(model: SMOPE, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any, **options: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "predict", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(model.stream([noise(0)] * 30))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("smope-")]
    with pytest.raises(ValueError, match="batch_size 0"):
        next(model.stream([], batch_size=0))
