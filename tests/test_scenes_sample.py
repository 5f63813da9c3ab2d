"""What the sampler promises about scenes, counted over many; its small rotations against scipy."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import trimesh
from scipy.spatial.transform import Rotation
from scipy.stats import kstest

from smope.data.corners import corner_box
from smope.scenes import SceneConfig
from smope.scenes.assets import SceneAssets, build_assets
from smope.scenes.dress import draw_colour, sample_materials
from smope.scenes.layout import Scene
from smope.scenes.meshes import prepare_mesh
from smope.scenes.sample import SceneSampler
from smope.scenes.turns import about_vector, about_z, any_turn

TO_IQ = np.array([[0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])  # FCC 1953
COLOURS = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (40, 50, 200), "white": (220, 220, 210)}


def painted(mesh: trimesh.Trimesh, rgb: tuple[int, int, int]) -> trimesh.Trimesh:
    mesh.visual.vertex_colors = np.tile([*rgb, 255], (len(mesh.vertices), 1))
    return mesh


@pytest.fixture(scope="module")
def assets() -> SceneAssets:
    known = [
        SimpleNamespace(name=name, mesh=painted(trimesh.creation.box((0.06, 0.08, 0.1)), rgb))
        for name, rgb in COLOURS.items()
    ]
    grey = (128, 128, 128)
    others = [
        painted(trimesh.creation.icosphere(subdivisions=1, radius=0.05), grey),
        painted(trimesh.creation.cylinder(radius=0.012, height=0.14, sections=8), grey),
    ]
    made = build_assets(known, [], None)
    clutter = tuple(prepare_mesh(f"clutter{k}", mesh) for k, mesh in enumerate(others))
    return SceneAssets(made.targets, clutter, (), made.environments)


def sampler(assets: SceneAssets, config: SceneConfig | None = None) -> SceneSampler:
    return SceneSampler(assets.targets, assets.clutter, config or SceneConfig(), 4, 8, 4, 1)


def scenes(assets: SceneAssets, count: int, **changes: object) -> list[Scene]:
    draw = sampler(assets, replace(SceneConfig(), **changes))  # type: ignore[arg-type]
    return [draw((31, k)) for k in range(count)]


def test_turns_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    for vector in (*rng.normal(0, 1.5, (6, 3)), np.zeros(3), np.array([0, 0, np.pi])):
        np.testing.assert_allclose(about_vector(vector), Rotation.from_rotvec(vector).as_matrix(), atol=1e-12)
        angle = vector[0] * 4
        np.testing.assert_allclose(about_z(angle), Rotation.from_euler("z", angle).as_matrix(), atol=1e-12)


def test_any_turn_is_uniform_over_rotations() -> None:
    rng = np.random.default_rng(1)
    turns = np.stack([any_turn(rng) for _ in range(3000)])
    np.testing.assert_allclose(turns @ turns.transpose(0, 2, 1), np.tile(np.eye(3), (3000, 1, 1)), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(turns), 1)
    # A uniform rotation's angle has the distribution (a - sin a) / pi; its columns are uniform on a sphere.
    angle = np.linalg.norm(Rotation.from_matrix(turns).as_rotvec(), axis=1)
    assert kstest(angle, lambda a: (a - np.sin(a)) / np.pi).pvalue > 0.01
    assert kstest(turns[:, 2, 0], "uniform", (-1, 2)).pvalue > 0.01


def test_a_lookalike_comes_near_the_colour_aimed_at_and_keeps_contrast() -> None:
    rng = np.random.default_rng(2)
    own = rng.uniform(0.1, 0.9, (500, 3))  # the colours of a printed thing
    aim = np.array([0.15, 0.2, 0.45])
    means, spreads = [], []
    for _ in range(200):
        paint = draw_colour(rng, False, own.mean(axis=0), SceneConfig(), aim=aim)
        np.testing.assert_array_less(np.abs(paint.of(own.mean(axis=0)) - aim).max(), 0.25)
        shown = (own @ paint.matrix[:, :3].T + paint.matrix[:, 3]).clip(0, 1) ** paint.gamma
        means.append(paint.of(own.mean(axis=0)))
        spreads.append(shown.mean(axis=1).std())
    np.testing.assert_allclose(np.mean(means, axis=0), aim, atol=0.03)
    assert np.median(spreads) > 0.02


def test_known_objects_keep_their_own_colour_in_the_middle_of_what_they_take() -> None:
    rng = np.random.default_rng(5)
    for own in (np.array([0.24, 0.24, 0.25]), np.array([0.89, 0.73, 0.11])):
        taken = np.stack([draw_colour(rng, True, own, SceneConfig()).of(own) for _ in range(400)])
        low, high = np.quantile(taken, [0.1, 0.9], axis=0)
        assert (low < own).all()
        assert (own < high).all()
        assert low.max() > 0.05  # never black


def test_known_objects_turn_in_hue_and_change_in_contrast_as_far_as_asked() -> None:
    rng = np.random.default_rng(6)
    red = np.array([0.6, 0.3, 0.35])
    printed = np.stack([red - 0.05, red + 0.05])
    turns, contrasts = [], []
    config = replace(SceneConfig(), known_hue=12.0, known_contrast=(0.25, 4.0))
    for _ in range(1500):
        paint = draw_colour(rng, True, red, config)
        linear = paint.matrix[:, :3].astype(np.float64)
        turns.append(np.rad2deg(np.angle(complex(*TO_IQ @ linear @ red) / complex(*TO_IQ @ red))))
        # Level, saturation and cast come besides, about 1 in the middle of their ranges.
        contrasts.append(np.log(np.mean((printed @ linear.T)[1] - (printed @ linear.T)[0]) / 0.1))
    assert np.std(turns) == pytest.approx(12, abs=2.5)  # the cast adds a few degrees
    low, high = np.quantile(contrasts, [0.1, 0.9])
    assert high - low == pytest.approx(0.8 * np.log(16), abs=0.15)


def test_as_many_known_objects_are_marked_as_asked_and_no_clutter() -> None:
    def marked(share: float, known: bool) -> float:
        rng, config = np.random.default_rng(8), replace(SceneConfig(), mark_probability=share)
        paints = [draw_colour(rng, known, np.full(3, 0.5), config) for _ in range(400)]
        return float(np.mean([paint.marks[0] != 0 for paint in paints]))

    assert marked(0.0, True) == marked(1.0, False) == 0
    assert marked(1.0, True) == 1
    assert marked(0.3, True) == pytest.approx(0.3, abs=0.08)


def test_as_many_objects_are_glossy_as_asked() -> None:
    def materials(share: float) -> np.ndarray:
        rng, config = np.random.default_rng(7), replace(SceneConfig(), gloss_probability=share)
        return np.concatenate([sample_materials(rng, config)[:-1] for _ in range(60)])

    for share in (0.0, 0.3, 1.0):
        rough, _, specular = materials(share).T
        glossy = (rough < 0.25) & (specular >= 0.8)
        if share == 0:
            assert rough.min() >= 0.2
        else:
            assert (glossy & (rough < 0.2)).mean() == pytest.approx(share * 2 / 3, abs=0.04)


def test_occlusion_is_as_strong_as_asked(assets: SceneAssets) -> None:
    drawn = [s.fields["occlusion"][0] for s in scenes(assets, 60, occlusion=(0.2, 0.7))]
    assert kstest(drawn, "uniform", (0.2, 0.5)).pvalue > 0.01


def test_mean_colour_weighs_by_area() -> None:
    """A long box whose two small ends alone are white."""
    box = trimesh.creation.box((0.1, 0.1, 1.0))
    ends = np.abs(box.face_normals[:, 2]) > 0.5
    colours = np.where(ends[:, None], 255, 0) * np.ones(3)
    split = trimesh.Trimesh(box.triangles.reshape(-1, 3), np.arange(36).reshape(-1, 3), process=False)
    split.visual.vertex_colors = np.column_stack([np.repeat(colours, 3, axis=0), np.full(36, 255)]).astype(
        np.uint8
    )
    prepared = prepare_mesh("box", split)
    coloured = replace(
        prepared,
        vertices=np.asarray(split.vertices, dtype=np.float32),
        faces=np.asarray(split.faces, dtype=np.int32),
        colors=np.repeat(colours, 3, axis=0).astype(np.uint8),
    )
    np.testing.assert_allclose(coloured.mean_color, 2 * 0.01 / (2 * 0.01 + 4 * 0.1), atol=1e-6)
    assert prepared.slender == pytest.approx(10, rel=1e-3)


def test_clutter_takes_the_colours_of_targets(assets: SceneAssets) -> None:
    """All clutter is grey; painted as look-alikes it comes near a target's colour far more often."""

    def near_a_target(share: float) -> float:
        hits = []
        for scene in scenes(
            assets, 60, lookalike_probability=share, lookalike_near_probability=share, targets=(2, 4)
        ):
            colours = [
                (d.mesh, (d.colour @ [*assets.targets[d.mesh].mean_color, 1]).clip(0, 1) ** d.gamma)
                for d in scene.draws
                if d.mesh < 4
            ]
            for d in scene.draws:
                if d.mesh >= 4 and colours:
                    own = (d.colour @ np.array([128 / 255] * 3 + [1])).clip(0, 1) ** d.gamma
                    hits.append(min(np.abs(own - c).max() for _, c in colours) < 0.12)
        return float(np.mean(hits))

    assert near_a_target(1.0) > 0.5
    assert near_a_target(0.0) < 0.25


def test_a_quarter_of_images_may_repeat_an_object(assets: SceneAssets) -> None:
    draw = sampler(assets, replace(SceneConfig(), targets=(3, 4), full_set_probability=0.0))
    rng = np.random.default_rng(3)
    counts = [Counter(draw._choose_targets(rng).tolist()) for _ in range(2000)]
    most = np.array([max(c.values()) for c in counts])
    # Of 1/4: half repeat two or three times for certain; half draw 3 or 4 of 4 kinds with replacement,
    # which are all unlike with 24/64 and 24/256.
    expected = 0.25 * (0.5 + 0.5 * (1 - (24 / 64 + 24 / 256) / 2))
    assert (most > 1).mean() == pytest.approx(expected, abs=0.03)
    assert all(3 <= sum(c.values()) <= 4 for c in counts)


def test_an_object_alone_is_not_repeated_beyond_the_limit(assets: SceneAssets) -> None:
    config = replace(SceneConfig(), targets=(1, 1), full_set_probability=0.0, repeat_probability=1.0)
    rng = np.random.default_rng(4)
    assert {len(sampler(assets, config)._choose_targets(rng)) for _ in range(50)} == {1}


def test_distances_lie_within_their_range_and_gather_in_the_usual_part(assets: SceneAssets) -> None:
    low, high = 0.4, 6.4
    config = replace(
        SceneConfig(), distance=(low, high), usual_distance=(0.5, 0.75), usual_distance_probability=0.5,
        table_probability=1.0, look_at_jitter=0.0, targets=(1, 1), full_set_probability=0.0,
        repeat_probability=0.0, elevation=(30.0, 60.0), heap_radius=(0.001, 0.002), stack_probability=0.0,
    )  # fmt: skip
    alone = SceneAssets(assets.targets, (), (), assets.environments)
    draw = sampler(alone, config)
    away = np.array([draw((6, k)).fields["T_CO"][0, 2, 3] for k in range(600)])
    assert away.min() > low - 0.06
    assert away.max() < high + 0.06
    # Half of the draws lie in 0.4 * 16^0.5 .. 0.4 * 16^0.75; of the other half a quarter.
    assert ((away > 1.6) & (away < 3.2)).mean() == pytest.approx(0.5 + 0.5 / 4, abs=0.08)


def test_occluders_stand_or_hang_between_camera_and_target(assets: SceneAssets) -> None:
    """With nothing else about, clutter lies nearer than the target, beside its line of sight."""
    changes = {
        "table_probability": 1.0, "table_occluder_probability": 1.0, "clutter": (0, 0), "far_clutter": (0, 0),
        "targets": (1, 1), "full_set_probability": 0.0, "repeat_probability": 0.0,
    }  # fmt: skip
    seen = 0
    for scene in scenes(assets, 80, **changes):
        target = next(d for d in scene.draws if d.mesh < 4).T_CM[:, 3]
        for d in scene.draws:
            if d.mesh < 4:
                continue
            seen += 1
            ray = target / np.linalg.norm(target)
            beside = np.linalg.norm(d.T_CM[:, 3] - (d.T_CM[:, 3] @ ray) * ray)
            assert 0.1 < np.linalg.norm(d.T_CM[:, 3]) < np.linalg.norm(target) + 0.03
            assert beside < 0.25
    assert seen > 60
    changes["table_occluder_probability"] = 0.0
    assert all(len(scene.draws) == 1 for scene in scenes(assets, 20, **changes))


def test_material_ids_suffice_where_all_that_can_be_placed_is(assets: SceneAssets) -> None:
    """Every target hidden, most clutter: ids stay below the plane's."""
    c = SceneConfig()
    most = {
        "table_occluder_probability": 1.0, "front_occluder_probability": 1.0, "targets": (8, 8),
        "repeat_probability": 1.0, "clutter": (c.clutter[1],) * 2, "far_clutter": (c.far_clutter[1],) * 2,
    }  # fmt: skip
    for scene in scenes(assets, 40, **most):
        ids = [d.material for d in scene.draws]
        assert len(set(ids)) == len(ids)
        assert max(ids) < c.plane_material


def test_the_same_seed_gives_the_same_scene(assets: SceneAssets) -> None:
    one, two = (sampler(assets)((1, 2, 0, 3)) for _ in range(2))
    for name, value in one.fields.items():
        np.testing.assert_array_equal(value, two.fields[name])
    assert len(one.draws) == len(two.draws)
    for a, b in zip(one.draws, two.draws, strict=True):
        np.testing.assert_array_equal(a.T_CM, b.T_CM)
        np.testing.assert_array_equal(a.colour, b.colour)


def test_no_clutter_holds_the_lens_on_a_table(assets: SceneAssets) -> None:
    alone = SceneAssets(assets.targets, assets.clutter[:1], (), assets.environments)  # a ball of 5 cm
    changes = {"table_probability": 1.0, "table_occluder_probability": 0.0, "far_scale": (6.0, 8.0)}
    balls = 0
    for scene in scenes(alone, 80, **changes):
        for draw in scene.draws:
            if draw.mesh == len(alone.targets):
                radius = 0.05 * np.cbrt(np.linalg.det(draw.T_CM[:, :3]))
                assert np.linalg.norm(draw.T_CM[:, 3]) > radius + 0.1
                balls += radius > 0.3
    assert balls > 40


def test_boxes_enclose_the_silhouette_or_the_corners_as_asked(assets: SceneAssets) -> None:
    ball = prepare_mesh("ball", trimesh.creation.icosphere(subdivisions=2, radius=0.04))
    round_ones = replace(assets, targets=(ball,) * 4)
    low, high = np.full(3, -0.04), np.full(3, 0.04)
    for k in range(6):
        kinds: list[Literal["silhouette", "corners"]] = ["silhouette", "corners"]
        close, wide = (sampler(round_ones, SceneConfig(box=kind))((31, k)).fields for kind in kinds)
        for slot in np.flatnonzero(wide["labels"] >= 0):
            expected = corner_box(
                wide["T_CO"][slot].astype(float), low, high, np.ones(3), wide["K"].astype(float)
            )
            np.testing.assert_allclose(wide["boxes"][slot], expected, atol=0.05)
            near, far = close["boxes"][slot], wide["boxes"][slot]
            assert (near[:2] >= far[:2] - 0.02).all()
            assert (near[2:] <= far[2:] + 0.02).all()
            assert np.prod(near[2:] - near[:2]) < 0.97 * np.prod(far[2:] - far[:2])
