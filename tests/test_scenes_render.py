"""The rasteriser and the sampler against analytic geometry and trimesh's rays."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trimesh

from smope.scenes.assets import SceneAssets, build_assets
from smope.scenes.config import SceneConfig
from smope.scenes.dress import light_view
from smope.scenes.layout import Draw, Scene, pack, scene_fields, scene_size, unpack
from smope.scenes.meshes import PreparedMesh, prepare_mesh, resting_poses
from smope.scenes.rasterise import GBuffer, MissingEGLError, Rasteriser
from smope.scenes.sample import SceneSampler

SMALL = SceneConfig(
    width=160, height=120, fx=143.1, fy=143.4, cx=81.3, cy=60.5, shadow_size=64, max_targets=3, targets=(1, 3)
)
OFFSET = np.array([0.3, -0.2, 0.1])  # the meshes' own frames are far from centred


def coloured(mesh: trimesh.Trimesh, rgb: tuple[int, int, int]) -> trimesh.Trimesh:
    mesh.visual.vertex_colors = np.tile([*rgb, 255], (len(mesh.vertices), 1))
    return mesh


def shapes() -> list[SimpleNamespace]:
    ball = trimesh.creation.icosphere(subdivisions=4, radius=0.05)
    box = trimesh.creation.box((0.08, 0.05, 0.11))
    ring = trimesh.creation.torus(0.05, 0.018)
    ring.apply_translation(OFFSET)
    meshes = [("ball", ball, (200, 40, 40)), ("box", box, (40, 200, 40)), ("ring", ring, (40, 40, 200))]
    return [SimpleNamespace(name=n, mesh=coloured(m, c)) for n, m, c in meshes]


@pytest.fixture(scope="module")
def assets() -> SceneAssets:
    return build_assets(shapes(), [], None)


@pytest.fixture(scope="module")
def rasteriser(assets: SceneAssets) -> Iterator[Rasteriser]:
    try:
        made = Rasteriser(assets.targets, SMALL)
    except MissingEGLError as error:
        pytest.skip(str(error))
    yield made
    made.release()


def sampler(assets: SceneAssets, config: SceneConfig = SMALL) -> SceneSampler:
    return SceneSampler(assets.targets, assets.clutter, config, 0, 8, 4, 1)


def plain(mesh: int, R: np.ndarray, t: np.ndarray, material: int) -> Draw:
    keep = np.column_stack([np.eye(3), np.zeros(3)]).astype(np.float32)
    return Draw(mesh, np.column_stack([R, t]), material, keep, 1.0, (0.0, 1.0, 0.0))


def still(draws: list[Draw], boxes: np.ndarray) -> Scene:
    K = np.array([[SMALL.fx, 0, SMALL.cx], [0, SMALL.fy, SMALL.cy], [0, 0, 1]])
    views = np.stack([light_view(np.array([0, 0, -1.0]), np.array([0, 0, 0.5]), 0.3)] * 2)
    return Scene(tuple(draws), {"K": K, "boxes": boxes, "light_view": views})


def drawn(rasteriser: Rasteriser, scene: Scene) -> GBuffer:
    out = GBuffer.empty(SMALL)
    rasteriser.draw(scene, out)
    return out


def rays() -> np.ndarray:
    v, u = np.mgrid[: SMALL.height, : SMALL.width]
    return np.stack(
        [(u - SMALL.cx) / SMALL.fx, (v - SMALL.cy) / SMALL.fy, np.ones_like(u, dtype=float)], axis=-1
    )


def test_ball_depth_normals_and_colour_are_analytic(rasteriser: Rasteriser) -> None:
    centre = np.array([0.03, -0.02, 0.5])
    out = drawn(rasteriser, still([plain(0, np.eye(3), centre, 1)], np.zeros((3, 4))))
    ray = rays()
    square, along = (ray**2).sum(-1), ray @ centre
    root = along**2 - square * (centre @ centre - 0.05**2)
    expected = (along - np.sqrt(np.maximum(root, 0))) / square
    inner = root > 0.1 * root.max()  # away from the silhouette, where the tessellation shows
    np.testing.assert_allclose(out.depth[inner], expected[inner], atol=2e-4)
    normal = (ray * expected[..., None] - centre) / 0.05
    np.testing.assert_allclose(out.normal[inner][:, :3] / 127.5 - 1, normal[inner], atol=0.03)
    assert np.abs(out.albedo[inner].astype(int) - [200, 40, 40, 1]).max() <= 1
    assert (out.albedo[root < -1e-4][:, 3] == 0).all()


def test_masks_and_depth_agree_with_traced_rays(rasteriser: Rasteriser, assets: SceneAssets) -> None:
    turn = trimesh.transformations.euler_matrix(0.5, 0.3, 0.2)[:3, :3]
    poses = [(turn, np.array([0.0, 0.0, 0.45])), (turn.T, np.array([0.03, 0.0, 0.35]))]
    draws = [plain(k + 1, R, t, k + 1) for k, (R, t) in enumerate(poses)]
    out = drawn(rasteriser, still(draws, np.zeros((3, 4))))
    step = 3
    directions = rays()[::step, ::step].reshape(-1, 3)
    nearest, ids = np.full(len(directions), np.inf), np.zeros(len(directions), dtype=int)
    for k, (R, t) in enumerate(poses):
        prepared = assets.targets[k + 1]
        mesh = trimesh.Trimesh(prepared.vertices @ R.T + t, prepared.faces, process=False)
        spots, which, _ = mesh.ray.intersects_location(
            np.zeros_like(directions), directions, multiple_hits=True
        )
        for spot, ray in zip(spots, which, strict=True):
            if spot[2] < nearest[ray]:
                nearest[ray], ids[ray] = spot[2], k + 1
    shown = out.albedo[::step, ::step, 3].reshape(-1)
    assert (shown == ids).mean() > 0.995  # rays that graze an edge may fall either way
    both = (shown == ids) & (ids > 0)
    assert both.sum() > 100
    assert np.quantile(np.abs(out.depth[::step, ::step].reshape(-1)[both] - nearest[both]), 0.99) < 3e-4


def test_boxes_hold_the_silhouette_and_tiles_fill_them(rasteriser: Rasteriser, assets: SceneAssets) -> None:
    seen = 0
    draw_scene = sampler(assets)
    for seed in range(12):
        scene = draw_scene((5, seed))
        out = drawn(rasteriser, scene)
        for draw in scene.draws:
            alone = drawn(rasteriser, replace(scene, draws=(draw,)))
            v, u = np.nonzero(alone.albedo[..., 3])
            x0, y0, x1, y1 = scene.fields["boxes"][draw.material - 1]
            if len(v) < 60 or x0 < 1 or y0 < 1 or x1 > SMALL.width - 2 or y1 > SMALL.height - 2:
                continue
            seen += 1
            inset = np.array([u.min() - x0, v.min() - y0, x1 - u.max(), y1 - v.max()])
            assert inset.min() > -0.1  # no pixel's centre lies outside the box
            assert inset.max() < 2.0  # a corner's tip may slip between centres
            tile = out.tiles[draw.material - 1]
            area = (tile > 127).mean() * (x1 - x0) * (y1 - y0)
            assert area == pytest.approx(len(v), rel=0.08)
            assert all(edge.any() for edge in (tile[:, 0], tile[:, -1], tile[0], tile[-1]))
    assert seen >= 6


def test_pose_is_in_the_own_frame(rasteriser: Rasteriser, assets: SceneAssets) -> None:
    """The ring's vertices, moved by T_CO from their own far-off frame, project to its box."""
    draw_scene = sampler(assets)
    checked = 0
    for seed in range(8):
        fields = draw_scene((7, seed)).fields
        for slot in np.nonzero(fields["labels"] == 2)[0]:
            own = np.asarray(shapes()[2].mesh.vertices)
            points = own @ fields["T_CO"][slot, :3, :3].T + fields["T_CO"][slot, :3, 3]
            uv = points @ fields["K"].T
            uv = uv[:, :2] / uv[:, 2:]
            expected = [*uv.min(axis=0), *uv.max(axis=0)]
            np.testing.assert_allclose(fields["boxes"][slot], expected, atol=0.02)
            checked += 1
    assert checked > 2


def test_resting_box_lies_on_its_faces() -> None:
    rests, weights = resting_poses(trimesh.creation.box((0.02, 0.10, 0.2)))
    heights = [np.ptp(trimesh.creation.box((0.02, 0.10, 0.2)).vertices @ R.T, axis=0)[2] for R in rests]
    assert len(rests) == 6
    assert weights.sum() == pytest.approx(1, abs=1e-5)
    assert sorted(round(float(h), 3) for h in heights) == [0.02, 0.02, 0.1, 0.1, 0.2, 0.2]
    assert heights[int(weights.argmax())] == pytest.approx(0.02)
    assert all(np.linalg.det(R) == pytest.approx(1, abs=1e-5) for R in rests)


def test_table_objects_touch_the_plane_and_are_seen_from_above(assets: SceneAssets) -> None:
    config = replace(SMALL, table_probability=1.0, stack_probability=0.0)
    draw_scene = sampler(assets, config)
    for seed in range(10):
        fields = draw_scene((3, seed)).fields
        normal, offset = fields["plane"][:3], fields["plane"][3]
        assert offset < 0  # the camera, at the origin, is on the upper side: n . 0 > d
        for slot in np.nonzero(fields["labels"] >= 0)[0]:
            mesh: PreparedMesh = assets.targets[int(fields["labels"][slot])]
            points = (mesh.hull + mesh.centre) @ fields["T_CO"][slot, :3, :3].T + fields["T_CO"][slot, :3, 3]
            assert (points @ normal - offset).min() == pytest.approx(0, abs=1e-4)


def test_creased_normals_keep_a_box_flat() -> None:
    mesh = prepare_mesh("box", trimesh.creation.box((0.1, 0.2, 0.3)))
    assert len(mesh.vertices) == 24
    assert np.sort(np.abs(mesh.normals), axis=1)[:, :2].max() < 1e-6
    assert mesh.diameter == pytest.approx(math.sqrt(0.14), abs=1e-6)


def test_scene_rows_round_trip(assets: SceneAssets) -> None:
    scene = sampler(assets)((1, 2, 3))
    row = np.zeros(scene_size(SMALL), dtype=np.float32)
    pack(scene.fields, SMALL, row)
    back = unpack(torch.from_numpy(row)[None], SMALL)
    assert list(back) == list(scene_fields(SMALL))
    for name, value in back.items():
        np.testing.assert_array_equal(value[0].numpy(), scene.fields[name])


def test_assets_survive_their_file(assets: SceneAssets, tmp_path: object) -> None:
    path = f"{tmp_path}/assets.npz"
    assets.save(path)
    back = SceneAssets.load(path)
    assert [m.name for m in back.targets] == ["ball", "box", "ring"]
    for old, new in zip(assets.targets, back.targets, strict=True):
        np.testing.assert_array_equal(old.faces, new.faces)
        np.testing.assert_allclose(old.vertices, new.vertices, atol=5e-5)
        np.testing.assert_array_equal(old.hull, new.hull)
