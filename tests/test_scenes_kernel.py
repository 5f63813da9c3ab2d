"""The rasterising kernel's own source, compiled by g++, against OpenGL, numpy and geometry; nvcc; a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trimesh
from raster_on_host import KERNEL, build_for_host

from smope.scenes.assets import SceneAssets, build_assets
from smope.scenes.config import SceneConfig
from smope.scenes.dress import light_view
from smope.scenes.layout import Draw, Scene, pack, scene_fields, scene_size
from smope.scenes.raster_cuda import CudaRasteriser
from smope.scenes.raster_table import pack_draws, table_shape
from smope.scenes.rasterise import GBuffer, MissingEGLError, Rasteriser
from smope.scenes.sample import SceneSampler
from smope.software_raster import rasterise

NVCC = shutil.which("nvcc")
MIDDLE = SceneConfig(
    width=320, height=240, fx=286.2, fy=286.8, cx=162.6, cy=121.0, shadow_size=128, max_targets=3,
    targets=(1, 3), table_probability=0.5,
)  # fmt: skip
Pictures = dict[str, np.ndarray]


def shapes() -> tuple[list[SimpleNamespace], list[SimpleNamespace]]:
    """Targets and clutter; all spotted, some of few large faces, one a single sheet."""
    rng = np.random.default_rng(0)
    box, ring = trimesh.creation.box((0.08, 0.05, 0.11)), trimesh.creation.torus(0.05, 0.018)
    ring.apply_translation([0.3, -0.2, 0.1])
    sheet = trimesh.Trimesh(
        [[-0.1, -0.1, 0], [0.1, -0.1, 0], [0.1, 0.1, 0.03], [-0.1, 0.1, 0]], [[0, 1, 2], [0, 2, 3]]
    )
    pin = trimesh.creation.cylinder(0.004, 0.3)
    ball = trimesh.creation.icosphere(subdivisions=4, radius=0.06)
    for mesh in (box, ring, sheet, pin, ball):
        mesh.visual.vertex_colors = rng.integers(0, 255, (len(mesh.vertices), 4), dtype=np.uint8)
    named = [SimpleNamespace(name=str(k), mesh=m) for k, m in enumerate((box, ring, ball, sheet, pin))]
    return named[:3], named[3:]


@pytest.fixture(scope="module")
def assets() -> SceneAssets:
    targets, clutter = (build_assets(group, [], None) for group in shapes())
    return SceneAssets(targets.targets, clutter.targets, (), targets.environments)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build_for_host(tmp_path_factory.mktemp("raster"))


@pytest.fixture(scope="module")
def kernel(library: ctypes.CDLL, assets: SceneAssets) -> CudaRasteriser:
    return CudaRasteriser(assets.targets + assets.clutter, MIDDLE, torch.device("cpu"), library)


@pytest.fixture(scope="module")
def opengl(assets: SceneAssets) -> Iterator[Rasteriser]:
    try:
        made = Rasteriser(assets.targets + assets.clutter, MIDDLE)
    except MissingEGLError as error:
        pytest.skip(str(error))
    yield made
    made.release()


def sampled(assets: SceneAssets, count: int, seed: int = 3) -> list[Scene]:
    sampler = SceneSampler(assets.targets, assets.clutter, MIDDLE, 0, 8, 4, 1)
    return [sampler((seed, k)) for k in range(count)]


def tables(scenes: Sequence[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.full((len(scenes), *table_shape(MIDDLE)), 7.0)
    rows = torch.zeros(len(scenes), scene_size(MIDDLE))
    for k, scene in enumerate(scenes):
        pack_draws(scene, draws[k].numpy())
        pack(scene.fields, MIDDLE, rows[k].numpy())
    return draws, rows


def by_kernel(kernel: CudaRasteriser, scenes: Sequence[Scene]) -> Pictures:
    draws, rows = (table.to(kernel.device) for table in tables(scenes))
    return {name: tensor.cpu().numpy() for name, tensor in kernel.draw(draws, rows).items() if name != "rows"}


def by_opengl(opengl: Rasteriser, scenes: Sequence[Scene]) -> Pictures:
    out = [GBuffer.empty(MIDDLE) for _ in scenes]
    for scene, buffer in zip(scenes, out, strict=True):
        opengl.draw(scene, buffer)
    return {name: np.stack([getattr(buffer, name) for buffer in out]) for name in GBuffer.shapes(MIDDLE)}


def still(draws: list[Draw]) -> Scene:
    """Draws before the camera of MIDDLE, boxes around the left and the right half of its image."""
    fields = {name: np.zeros(shape, dtype=np.float32) for name, shape in scene_fields(MIDDLE).items()}
    fields["K"][:] = [[MIDDLE.fx, 0, MIDDLE.cx], [0, MIDDLE.fy, MIDDLE.cy], [0, 0, 1]]
    fields["boxes"][:2] = [[-0.5, -0.5, 159.5, 239.5], [159.5, -0.5, 319.5, 239.5]]
    fields["light_view"][:] = light_view(np.array([0, 0, -1.0]), np.array([0, 0, 0.5]), 0.3)
    return Scene(tuple(draws), fields)


def plain(mesh: int, t: Sequence[float], material: int, scale: float = 1.0) -> Draw:
    keep = np.eye(3, 4, dtype=np.float32)
    return Draw(mesh, np.column_stack([scale * np.eye(3), t]), material, keep, 1.0, (0.0, 1.0, 0.0))


def assert_same(got: Pictures, want: Pictures) -> None:
    """Equal but for pixels whose centres an edge grazes, or where two surfaces are equally near."""
    ids, drawn = want["albedo"][..., 3], want["albedo"][..., 3] > 0
    assert 0.05 < drawn.mean() < 0.95
    assert (got["albedo"][..., 3] != ids).mean() < 2e-4
    both = drawn & (got["albedo"][..., 3] == ids)
    colour = np.abs(got["albedo"][both][:, :3].astype(int) - want["albedo"][both][:, :3]).max(axis=1)
    bend = np.abs(got["normal"][both].astype(int) - want["normal"][both]).max(axis=1)
    away = np.abs(got["depth"][both] - want["depth"][both])
    assert (colour > 2).mean() < 1e-3
    assert (bend > 3).mean() < 1e-3
    assert (away > 1e-4).mean() < 1e-3
    assert np.median(away) < 1e-6
    nothing = got["albedo"][..., 3] == 0
    for name in ("albedo", "normal", "depth"):
        assert (got[name][nothing] == 0).all()
    shadowed = want["light"] < 1
    assert 0.01 < shadowed.mean() < 0.9
    assert ((got["light"] < 1) != shadowed).mean() < 2e-4
    assert (np.abs(got["light"] - want["light"])[shadowed] > 1e-4).mean() < 2e-3
    assert 0.02 < (want["tiles"] > 0).mean() < 0.9
    assert set(np.unique(got["tiles"])) == {0, 255}
    assert (got["tiles"] != want["tiles"]).mean() < 2e-4


def test_scenes_look_as_with_opengl(kernel: CudaRasteriser, opengl: Rasteriser, assets: SceneAssets) -> None:
    scenes = sampled(assets, 24)
    assert_same(by_kernel(kernel, scenes), by_opengl(opengl, scenes))


def test_scenes_agree_with_a_z_buffer_in_numpy(kernel: CudaRasteriser, assets: SceneAssets) -> None:
    meshes, compared = assets.targets + assets.clutter, 0
    scenes = sampled(assets, 6, seed=8)
    got = by_kernel(kernel, scenes)
    for k, scene in enumerate(scenes):
        points, faces, ids = [], [], []
        for draw in scene.draws:
            mesh = meshes[draw.mesh]
            faces.append(mesh.faces + sum(len(p) for p in points))
            points.append(mesh.vertices @ draw.T_CM[:, :3].T + draw.T_CM[:, 3])
            ids.append(np.full(len(mesh.faces), draw.material))
        cloud = np.concatenate(points)
        projected = cloud @ scene.fields["K"].astype(np.float64).T
        if cloud[:, 2].min() < MIDDLE.near:
            continue  # the oracle leaves such faces out
        compared += 1
        seen = rasterise(
            projected[:, :2] / projected[:, 2:],
            cloud[:, 2],
            np.concatenate(faces),
            (MIDDLE.width, MIDDLE.height),
        )
        owner = np.where(seen.mask, np.concatenate(ids)[seen.face], 0)
        assert (owner != got["albedo"][k, ..., 3]).mean() < 2e-4
        same = seen.mask & (owner == got["albedo"][k, ..., 3])
        assert np.quantile(np.abs(seen.depth - got["depth"][k])[same], 0.999) < 1e-5
    assert compared >= 3


@pytest.mark.parametrize("drop", [0.1, 0.02])
def test_a_floor_that_passes_under_the_camera_does_not_smear(
    kernel: CudaRasteriser, opengl: Rasteriser, assets: SceneAssets, drop: float
) -> None:
    """A box of twenty times its size, its upper face just below the lens: every row's depth is known.

    From 0.02 m the near plane cuts it within the image, and one sees into the box.
    """
    half = 10 * float(np.ptp(assets.targets[0].vertices[:, 1]))
    floor = plain(0, (0.3, drop + half, 1.0), 1, scale=20.0)
    scene = still([floor])
    got = by_kernel(kernel, [scene])
    depth = got["depth"][0]
    row = np.arange(MIDDLE.height)[:, None]
    reach = float(1.0 + 10 * np.ptp(assets.targets[0].vertices[:, 2]))
    assert (assets.targets[0].vertices[:, 2].min() * 20 + 1.0) < 0  # it does reach behind the camera
    with np.errstate(divide="ignore"):
        expected = MIDDLE.fy * drop / (row - MIDDLE.cy)
    shown = (expected >= MIDDLE.near) & (expected <= reach) & (row > MIDDLE.cy)
    on_floor = np.broadcast_to(shown, depth.shape) & (depth > 0)
    assert on_floor.mean() > 0.2
    np.testing.assert_allclose(depth[on_floor], np.broadcast_to(expected, depth.shape)[on_floor], rtol=1e-5)
    assert (depth[: int(MIDDLE.cy)] == 0).all()
    turn = trimesh.transformations.euler_matrix(0.0, 0.0, 0.5)[:3, :3]  # no box around pixels fits this one
    rolled = still([replace(floor, T_CM=turn @ floor.T_CM)])
    got, want = by_kernel(kernel, [scene, rolled]), by_opengl(opengl, [scene, rolled])
    alike = np.abs(got["depth"] - want["depth"]) < 1e-5 * np.maximum(want["depth"], 1)
    assert alike.mean() > 0.9995
    for name in ("albedo", "normal"):
        assert np.abs(got[name][alike].astype(int) - want[name][alike]).max() <= 1


@pytest.mark.parametrize("waves", [60.0, 250.0])
def test_marks_are_patches_on_a_surface_that_else_stays_as_it_is(
    kernel: CudaRasteriser, opengl: Rasteriser, waves: float
) -> None:
    plainly = plain(2, (0, 0, 0.4), 1)
    scenes = [still([replace(plainly, marks=(strength, waves))]) for strength in (0.0, 0.7, -0.7)]
    got, want = by_kernel(kernel, scenes), by_opengl(opengl, scenes)
    same, dark, light = got["albedo"][..., :3].astype(int)
    seen = got["albedo"][0, ..., 3] > 0
    assert (dark <= same).all()
    assert (light[seen] >= same[seen]).all()
    for other, end in ((dark, 0), (light, 255)):
        changed = (np.abs(other - same) > 3).any(axis=-1)[seen]
        assert 0.03 < changed.mean() < 0.4
        wholly = same[seen] + 0.7 * (end - same[seen])  # in the middle of a mark
        assert (np.abs(other[seen] - wholly) < 2).all(axis=-1).any()
    assert np.abs(got["albedo"].astype(int) - want["albedo"])[:, seen].max() <= 2


def test_what_is_behind_the_camera_or_beyond_far_is_not_drawn(kernel: CudaRasteriser) -> None:
    got = by_kernel(kernel, [still([plain(2, (0, 0, -0.5), 1), plain(2, (0, 0, 12.5), 2)])])
    assert not got["albedo"].any()
    assert not got["tiles"].any()


def test_of_equally_near_surfaces_the_first_drawn_is_seen(kernel: CudaRasteriser, opengl: Rasteriser) -> None:
    scenes = [still([plain(2, (0, 0, 0.5), first), plain(2, (0, 0, 0.5), 3 - first)]) for first in (1, 2)]
    for pictures in (by_kernel(kernel, scenes), by_opengl(opengl, scenes)):
        for k, first in enumerate((1, 2)):
            assert set(np.unique(pictures["albedo"][k, ..., 3])) == {0, first}


@pytest.mark.parametrize("room", [0, 1, 37])
def test_a_full_queue_of_large_triangles_changes_nothing(
    library: ctypes.CDLL, kernel: CudaRasteriser, assets: SceneAssets, room: int
) -> None:
    scenes = [*sampled(assets, 3), still([plain(0, (0, 0, 0.3), 1, scale=2.0)])]
    narrow = CudaRasteriser(
        assets.targets + assets.clutter, MIDDLE, torch.device("cpu"), library, queue_room=room
    )
    want = by_kernel(kernel, scenes)
    for name, array in by_kernel(narrow, scenes).items():
        np.testing.assert_array_equal(array, want[name], err_msg=name)


def test_an_image_without_draws_is_empty(kernel: CudaRasteriser, assets: SceneAssets) -> None:
    got = by_kernel(kernel, [still([]), *sampled(assets, 1)])
    assert not got["albedo"][0].any()
    assert (got["light"][0] == 1).all()
    assert got["albedo"][1].any()


def test_tables_of_another_form_are_refused(kernel: CudaRasteriser, library: ctypes.CDLL) -> None:
    draws, rows = tables([still([])])
    with pytest.raises(ValueError, match=r"draws: contiguous float32 \(1, 40, 32\) on cpu expected"):
        kernel.draw(draws[:, :5], rows)
    with pytest.raises(ValueError, match="rows"):
        kernel.draw(draws, rows.double())
    with pytest.raises(ValueError, match="a scene of 41 draws"):
        pack_draws(still([plain(0, (0, 0, 1), 1)] * 41), draws[0].numpy())
    assert library.smope_raster(None, 8, 0, None) == -1
    assert b"other sources" in library.smope_raster_error(-1)


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("arch", ["75", "80", "90"])
def test_nvcc_compiles_it_without_spills(arch: str, tmp_path: Path) -> None:
    target = [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-cubin", "-o", str(tmp_path / "raster.cubin")]
    command = [str(NVCC), "-std=c++17", "-O3", "-Xptxas=-v", *target, str(KERNEL)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("0 bytes spill stores, 0 bytes spill loads") == 3
    assert "warning" not in result.stderr, result.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("index", range(torch.cuda.device_count()))
def test_a_gpu_draws_what_the_cpu_draws(kernel: CudaRasteriser, assets: SceneAssets, index: int) -> None:
    device = torch.device("cuda", index)
    there = CudaRasteriser(assets.targets + assets.clutter, MIDDLE, device)
    scenes = [*sampled(assets, 24), still([plain(0, (0, 0, 0.3), 1, scale=2.0)])]
    want = by_kernel(kernel, scenes)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        first, again = by_kernel(there, scenes), by_kernel(there, scenes)
    assert_same(first, want)
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name], err_msg=name)
