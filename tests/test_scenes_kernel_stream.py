"""Streams of scenes whose workers only sample: the kernel, compiled for the CPU, draws for them."""

from __future__ import annotations

import logging
import multiprocessing
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
import trimesh
from raster_on_host import build_for_host

from smope.ops.build import KernelUnavailable
from smope.scenes import SceneConfig, SceneStream, raster_cuda, stream
from smope.scenes.assets import SceneAssets, build_assets
from smope.scenes.layout import Scene
from smope.scenes.raster_cuda import CudaRasteriser, kernel_or_none
from smope.scenes.rasterise import MissingEGLError, create_context
from smope.scenes.sample import SceneSampler
from smope.scenes.workers import WorkerPool

pytestmark = pytest.mark.usefixtures("few_textures")

SMALL = SceneConfig(
    width=160, height=120, fx=143.1, fy=143.4, cx=81.3, cy=60.5, shadow_size=64, max_targets=3, targets=(1, 3)
)


@pytest.fixture(scope="module")
def assets() -> SceneAssets:
    box, ball = trimesh.creation.box((0.08, 0.05, 0.11)), trimesh.creation.icosphere(radius=0.06)
    targets = build_assets([SimpleNamespace(name="box", mesh=box)], [], None)
    others = build_assets([SimpleNamespace(name="ball", mesh=ball)], [], None)
    return SceneAssets(targets.targets, others.targets, (), targets.environments)


@pytest.fixture(scope="module")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """SceneStream(rasteriser="cuda") draws on the CPU with the kernel's own source."""
    library = build_for_host(tmp_path_factory.mktemp("raster"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "CudaRasteriser", partial(CudaRasteriser, library=library))
        yield


def open_stream(assets: SceneAssets, workers: int = 0, rasteriser: str = "cuda") -> SceneStream:
    return SceneStream(
        (), assets=assets, config=SMALL, seed=4, batch_size=5, workers=workers, rasteriser=rasteriser
    )


def test_two_workers_give_what_none_give(on_host: None, assets: SceneAssets) -> None:
    with open_stream(assets) as alone, open_stream(assets, workers=2) as pooled:
        batches = pooled.batches(1)
        for number, batch in zip((1, 2, 3), islice(batches, 3), strict=True):
            here = alone.batch(number)
            for field in fields(batch):
                given, expected = getattr(batch, field.name), getattr(here, field.name)
                torch.testing.assert_close(given, expected, rtol=0, atol=0, msg=field.name)
        batches.close()
    deadline = time.monotonic() + 5
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


def test_batches_are_those_of_opengl(on_host: None, assets: SceneAssets) -> None:
    try:
        create_context().release()
    except MissingEGLError as error:
        pytest.skip(str(error))
    with open_stream(assets) as ours, open_stream(assets, rasteriser="opengl") as theirs:
        for number in range(3):
            got, want = ours.batch(number), theirs.batch(number)
            for name in ("labels", "K", "T_CO", "boxes_xyxy"):
                torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=0, atol=0)
            assert want.present.any()
            torch.testing.assert_close(got.visibility, want.visibility, rtol=0, atol=0.02)
            assert got.instance is not None
            assert (got.instance != want.instance).float().mean() < 1e-3
            assert (got.images - want.images).abs().mean() < 2e-3


class Watchful(SceneSampler):
    """Fails where the process that samples has OpenGL's module or a CUDA context."""

    def __call__(self, seed: tuple[int, ...]) -> Scene:
        if "moderngl" in sys.modules or torch.cuda.is_initialized():
            raise AssertionError("graphics in a process that only samples")
        return super().__call__(seed)


def seed_of(number: int, image: int) -> tuple[int, ...]:
    return (4, number, 0, image)


def test_workers_that_only_sample_open_no_graphics(assets: SceneAssets) -> None:
    watchful = Watchful(assets.targets, assets.clutter, SMALL, 0, 8, 4, 1)
    pool = WorkerPool(watchful, 1, 7, seed_of, slots=2, pictures=False)
    try:
        assert pool.take() == (0, 0)
        assert (pool.slots[0].arrays["draws"][:, 0, 28] > 0).all()  # every image has its first draw
    finally:
        pool.close()
    pytest.importorskip("moderngl")
    with pytest.raises(AssertionError, match="graphics in a process"):  # the watch does see OpenGL
        watchful(seed_of(0, 0))


def test_without_a_compiler_the_reason_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: object
) -> None:
    from torch.utils import cpp_extension

    from smope.ops import build

    monkeypatch.setenv("SMOPE_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_nvcc", lambda: None)
    monkeypatch.setattr(build, "_architectures", lambda: ["90"])
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setattr(raster_cuda, "_told", False)
    raster_cuda.load_library.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert kernel_or_none() is None
        assert kernel_or_none() is None
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    for part in ("no CUDA compiler (nvcc) was found", "drawn with OpenGL", "Remedy", "rasteriser='opengl'"):
        assert part in told[0]
    with pytest.raises(KernelUnavailable):
        raster_cuda.load_library()


def test_a_choice_that_cannot_be_had_is_refused(assets: SceneAssets) -> None:
    with pytest.raises(ValueError, match="needs a CUDA device"):
        CudaRasteriser(assets.targets, SMALL, torch.device("cpu"))
    with pytest.raises(ValueError, match="'auto', 'cuda' or 'opengl' expected"):
        open_stream(assets, rasteriser="metal")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_workers_give_what_none_give(assets: SceneAssets) -> None:
    """The feeding thread's stream, events and pinned copies against the plain way, on the last GPU."""
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    options = {"assets": assets, "config": SMALL, "seed": 4, "batch_size": 16, "device": device}
    with (
        SceneStream((), rasteriser="cuda", **options) as alone,  # type: ignore[arg-type]
        SceneStream((), rasteriser="cuda", workers=2, **options) as pooled,  # type: ignore[arg-type]
    ):
        feed = stream._Feed(pooled, 0)
        try:
            for number in range(8):
                given, arrays = feed.get()
                assert given == number
                for name, expected in alone.rasterise(number).items():
                    assert arrays[name].device == device
                    assert torch.equal(arrays[name], expected), (number, name)
                assert (arrays["albedo"][..., 3] > 0).any()
        finally:
            feed.close()
