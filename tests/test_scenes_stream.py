"""The stream: labels against brute force, repeatability over workers, errors, clean ends."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trimesh

from smope.scenes import SceneConfig, SceneStream, preview_sheet
from smope.scenes.assets import AssetError, SceneAssets, build_assets
from smope.scenes.compose import visibility
from smope.scenes.rasterise import MissingEGLError, create_context
from smope.scenes.workers import WorkerError, WorkerPool

pytestmark = pytest.mark.usefixtures("few_textures")

SMALL = SceneConfig(
    width=160, height=120, fx=143.1, fy=143.4, cx=81.3, cy=60.5, shadow_size=64, max_targets=3, targets=(1, 3)
)


@pytest.fixture(scope="module")
def assets() -> SceneAssets:
    try:
        create_context().release()
    except MissingEGLError as error:
        pytest.skip(str(error))
    box, ring = trimesh.creation.box((0.08, 0.05, 0.11)), trimesh.creation.torus(0.05, 0.018)
    ring.apply_translation([0.3, -0.2, 0.1])
    known = [SimpleNamespace(name="box", mesh=box), SimpleNamespace(name="ring", mesh=ring)]
    targets = build_assets(known, [], None)
    other = build_assets(
        [SimpleNamespace(name="ball", mesh=trimesh.creation.icosphere(radius=0.06))], [], None
    )
    return SceneAssets(targets.targets, other.targets, (), targets.environments)


@pytest.fixture(scope="module")
def stream(assets: SceneAssets) -> Iterator[SceneStream]:
    with SceneStream((), assets=assets, config=SMALL, seed=4, batch_size=4) as made:
        yield made


def test_batch_is_whole_and_consistent(stream: SceneStream) -> None:
    seen = 0
    for number in range(5):
        batch = stream.batch(number)
        assert batch.images.min() >= 0
        assert batch.images.max() <= 1
        assert torch.isfinite(batch.images).all()
        assert batch.instance is not None
        assert batch.depth is not None
        assert batch.full_masks is not None
        assert (batch.labels < 2).all()
        for k in range(len(batch)):
            ids = set(batch.instance[k].unique().tolist()) - {0}
            slots = {s + 1 for s in torch.nonzero(batch.present[k]).flatten().tolist()}
            assert ids == slots
            for slot in ids:
                mask = batch.instance[k] == slot
                v, u = torch.nonzero(mask, as_tuple=True)
                x0, y0, x1, y1 = batch.boxes_xyxy[k, slot - 1].tolist()
                assert u.min() > x0 - 0.6
                assert v.min() > y0 - 0.6
                assert u.max() < x1 + 0.6
                assert v.max() < y1 + 0.6
                seen += 1
    assert seen > 10


def test_visible_surface_lies_on_the_mesh(stream: SceneStream, assets: SceneAssets) -> None:
    """Object coordinates from depth and pose are points of the mesh, whatever stands in front."""
    checked = 0
    for number in range(3):
        batch = stream.batch(number)
        assert batch.instance is not None
        assert batch.depth is not None
        for k in range(len(batch)):
            for slot in torch.nonzero(batch.present[k]).flatten().tolist():
                mesh = assets.targets[int(batch.labels[k, slot])]
                v, u = np.nonzero((batch.instance[k] == slot + 1).numpy())
                pixels = (
                    np.stack([u, v, np.ones_like(u)], axis=1)[::7] * batch.depth[k].numpy()[v, u][::7, None]
                )
                in_camera = pixels @ np.linalg.inv(batch.K[k].double().numpy()).T
                pose = batch.T_CO[k, slot].double().numpy()
                points = (in_camera - pose[:3, 3]) @ pose[:3, :3] - mesh.centre
                surface = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
                _, away, _ = trimesh.proximity.closest_point(surface, points)
                assert np.quantile(away, 0.95) < 1.5e-3
                checked += 1
    assert checked > 5


def test_visible_share_counts_pixels() -> None:
    """Half of a 20 x 10 px box is hidden; a second object lies wholly outside the image."""
    material = torch.zeros(1, 40, 60, dtype=torch.uint8)
    material[0, 10:20, 5:15] = 1
    tiles = torch.ones(1, 2, 64, 64, dtype=torch.bool)
    boxes = torch.tensor([[[4.5, 9.5, 24.5, 19.5], [-50.0, 0, -10, 20]]])
    torch.testing.assert_close(visibility(material, tiles, boxes), torch.tensor([[0.5, 0.0]]))


def test_unoccluded_objects_are_seen_whole(assets: SceneAssets) -> None:
    config = replace(
        SMALL, targets=(1, 1), full_set_probability=0.0, table_probability=1.0, elevation=(40.0, 90.0),
        focal_jitter_probability=0.0, look_at_jitter=0.02, distance=(0.4, 0.6),
    )  # fmt: skip
    alone = SceneAssets(assets.targets, (), (), assets.environments)
    with SceneStream((), assets=alone, config=config, seed=1, batch_size=6) as single:
        batch = single.batch(0)
    inside = (batch.boxes_xyxy[:, 0, :2] > 1).all(1) & (
        batch.boxes_xyxy[:, 0, 2:] < torch.tensor([158.0, 118])
    ).all(1)
    assert inside.sum() >= 3
    assert batch.visibility[inside, 0].min() > 0.93


def test_two_workers_give_what_none_give(stream: SceneStream, assets: SceneAssets) -> None:
    with SceneStream((), assets=assets, config=SMALL, seed=4, batch_size=4, workers=2) as pooled:
        batches = pooled.batches(1)
        for number, batch in zip((1, 2), islice(batches, 2), strict=True):
            here = stream.batch(number)
            for field in fields(batch):
                given, expected = getattr(batch, field.name), getattr(here, field.name)
                torch.testing.assert_close(given, expected, rtol=0, atol=0, msg=field.name)
        batches.close()
    deadline = time.monotonic() + 5
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


def test_seeds_differ_and_repeat(stream: SceneStream) -> None:
    first, again, other = stream.batch(0), stream.batch(0), stream.batch(1)
    torch.testing.assert_close(first.images, again.images, rtol=0, atol=0)
    assert (first.images - other.images).abs().mean() > 0.01


def test_streams_in_one_process_keep_their_contexts_apart(assets: SceneAssets) -> None:
    others = SceneAssets(assets.targets[::-1], (), (), assets.environments)
    with SceneStream((), assets=assets, config=SMALL, seed=9, batch_size=2) as first:
        before = first.batch(0)
        with SceneStream((), assets=others, config=SMALL, seed=10, batch_size=2) as second:
            second.batch(0)
            between = first.batch(0)
        after = first.batch(0)
    assert before.present.any()
    for batch in (between, after):
        torch.testing.assert_close(batch.images, before.images, rtol=0, atol=0)
        torch.testing.assert_close(batch.labels, before.labels, rtol=0, atol=0)


class Broken:
    """A sampler that fails in the worker."""

    config = SMALL

    def __init__(self, targets: tuple[object, ...]) -> None:
        self.targets, self.clutter = targets, ()

    def __call__(self, seed: tuple[int, ...]) -> object:
        raise ArithmeticError("the dice are loaded")


def seed_of(number: int, image: int) -> tuple[int, ...]:
    return (number, image)


def test_a_workers_failure_reaches_the_parent(assets: SceneAssets) -> None:
    pool = WorkerPool(Broken(assets.targets), 1, 1, seed_of, slots=1)  # type: ignore[arg-type]
    try:
        with pytest.raises(WorkerError, match="the dice are loaded"):
            pool.take()
    finally:
        pool.close()


class Deadly(Broken):
    """Ends its process as `how` says: a signal, or 0 for an exit."""

    def __init__(self, targets: tuple[object, ...], how: int) -> None:
        super().__init__(targets)
        self.how = how

    def __call__(self, seed: tuple[int, ...]) -> object:
        if self.how:
            os.kill(os.getpid(), self.how)
        os._exit(1)


@pytest.mark.parametrize(
    ("how", "said"), [(signal.SIGKILL, "ended by signal 9"), (0, 'below `if __name__ == "__main__":`')]
)
def test_a_worker_that_dies_is_an_error_with_advice(assets: SceneAssets, how: int, said: str) -> None:
    pool = WorkerPool(Deadly(assets.targets, how), 1, 1, seed_of, slots=1)  # type: ignore[arg-type]
    try:
        with pytest.raises(WorkerError, match=re.escape(said)):
            pool.take()
    finally:
        pool.close()


def test_missing_egl_names_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    moderngl = pytest.importorskip("moderngl")

    def fail(**_: object) -> None:
        raise Exception("libEGL.so not loaded")

    monkeypatch.setattr(moderngl, "create_standalone_context", fail)
    with pytest.raises(MissingEGLError, match="apt-get install libegl1 libgl1-mesa-dri"):
        create_context()


def test_an_object_without_mesh_is_named() -> None:
    with pytest.raises(AssetError, match="'duck' has no mesh"):
        build_assets([SimpleNamespace(name="duck", mesh=None)], [], None)


def test_a_file_of_something_else_is_refused(tmp_path: object) -> None:
    path = f"{tmp_path}/x.npz"
    np.savez(path, a=np.zeros(3))
    with pytest.raises(AssetError, match="prepare_assets"):
        SceneAssets.load(path)


def test_preview_has_a_place_for_each_sample(stream: SceneStream) -> None:
    assert preview_sheet(stream, 5, columns=3).size == (480, 240)
