"""smope.tools.measure_parts and lens_pairs: figures against hand-made cases, scores.json left as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import made_up_bop
import numpy as np
import pytest
import scipy.stats
import torch
import trimesh
from small_model import small_model

from smope import ObjectModel
from smope.data.bop import Estimate
from smope.evaluate.report import write_scores
from smope.evaluate.sets import load_pose_set
from smope.model import SMOPE
from smope.objects import Symmetries
from smope.scenes import MissingEGLError, SceneAssets, SceneConfig, build_assets
from smope.scenes.rasterise import create_context
from smope.tools import lens_pairs, measure_parts
from smope.tools.lens_pairs import Seen

SHIFT = (0.3, -0.2, 0.1)


def test_chamfer_of_two_planes_is_their_distance() -> None:
    grid = np.stack(np.meshgrid(np.arange(5.0), np.arange(4.0), [0.0]), -1).reshape(-1, 3)
    assert measure_parts.chamfer_percent(grid, grid, 2.0) == 0
    assert measure_parts.chamfer_percent(grid + np.array([0, 0, 0.1]), grid, 2.0) == pytest.approx(5.0)


def test_chamfer_takes_both_directions() -> None:
    """One of two points is matched exactly, the other lies 4 off: 0 one way, 2 on average the other."""
    one, two = [[0.0, 0, 0]], [[0.0, 0, 0], [4.0, 0, 0]]
    assert measure_parts.chamfer_percent(one, two, 10.0) == pytest.approx(10.0)
    assert measure_parts.chamfer_percent(two, one, 10.0) == pytest.approx(10.0)


def test_shuffling_changes_the_order_and_nothing_else() -> None:
    mesh = trimesh.creation.icosphere(subdivisions=2, radius=0.05)
    colours = np.random.default_rng(0).integers(0, 256, (len(mesh.vertices), 4), dtype=np.uint8)
    mesh.visual = trimesh.visual.ColorVisuals(mesh, vertex_colors=colours)
    other = measure_parts.shuffled(mesh, seed=3)
    assert not np.array_equal(other.vertices, mesh.vertices)
    assert not np.array_equal(other.triangles, mesh.triangles)
    assert other.volume == pytest.approx(mesh.volume)  # winding included
    assert other.area == pytest.approx(mesh.area)

    def rows(m: trimesh.Trimesh) -> list[tuple[float, ...]]:
        return sorted(map(tuple, np.column_stack([m.vertices, m.visual.vertex_colors])))

    assert rows(other) == rows(mesh)


def test_moved_symmetries_map_the_moved_mesh_onto_itself() -> None:
    """A half turn about a vertical through (10, 20, 0) mm, and the same axis as a continuous one."""
    turn = np.diag([-1.0, -1, 1, 1])
    turn[:2, 3] = 20, 40
    info = {
        "diameter": 5.0,
        "symmetries_discrete": [turn.reshape(-1).tolist()],
        "symmetries_continuous": [{"axis": [0, 0, 1], "offset": [10, 20, 0]}],
    }
    entry = measure_parts.moved_symmetries(info, SHIFT, 0.001)
    assert set(entry) == {"symmetries_discrete", "symmetries_continuous"}
    moved = np.reshape(entry["symmetries_discrete"][0], (4, 4))
    axis = np.array([0.010, 0.020, 0.0]) + SHIFT
    np.testing.assert_allclose(moved[:3, :3] @ axis + moved[:3, 3], axis, atol=1e-12)
    np.testing.assert_allclose(entry["symmetries_continuous"][0]["offset"], axis)
    assert len(Symmetries.from_bop(entry, "m").discrete) == 1
    assert measure_parts.moved_symmetries({"diameter": 5.0}, SHIFT, 0.001) == {}


def test_moved_back_undoes_the_origin() -> None:
    T = np.eye(4)
    T[:3, :3] = trimesh.transformations.rotation_matrix(0.8, [0.1, 0.4, 0.7])[:3, :3]
    T[:3, 3] = 0.1, 0.2, 0.9
    point = np.array([0.01, 0.02, 0.03])
    moved = Estimate(1, 1, 1, 0.5, T)
    (back,) = measure_parts.moved_back([moved], SHIFT)
    seen = back.T_CO[:3, :3] @ point + back.T_CO[:3, 3]
    np.testing.assert_allclose(seen, T[:3, :3] @ (point + SHIFT) + T[:3, 3])


def test_rebuilt_meshes_are_measured_in_the_meshes_own_frame() -> None:
    model = small_model()
    meshes = {"brick": trimesh.creation.box((0.12, 0.07, 0.05)).apply_translation((0.3, 0.0, 0.1))}
    row = measure_parts.measure_rebuilt(model, meshes)["objects"]["brick"]
    far = measure_parts.measure_rebuilt(model, {"brick": meshes["brick"].copy().apply_translation((1, 0, 0))})
    assert 0 < row["chamfer_percent"] < 200
    assert far["worst"]["chamfer_percent"] > 500  # a metre is seven diameters


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures of two boxes; `models` are those of `models_eval`."""
    root = made_up_bop.write(tmp_path_factory.mktemp("bop") / "boxes", with_depth=False)
    (root / "models_eval" / "names.json").write_text(json.dumps({"1": "ball", "4": "brick"}))
    (root / "models").symlink_to(root / "models_eval")
    return root


def _with_boxes() -> SMOPE:
    """The small network, knowing the data set's two boxes."""
    small = small_model()
    objects = {
        name: replace(ObjectModel.from_mesh(name, made_up_bop.mesh(obj_id), "mm"), trained=True)
        for name, obj_id in (("ball", 1), ("brick", 4))
    }
    return SMOPE(small.network, small.config, objects)


def test_the_same_meshes_anew_change_next_to_nothing(photos: Path) -> None:
    model = _with_boxes()
    before = dict(model.objects)
    figures = measure_parts.measure_photos(model, load_pose_set(photos, "bop"))
    assert figures["images"] == 3
    assert 0 <= figures["visibility_mae"] <= 1
    assert figures["shuffled"]["change"] <= 0.05
    assert figures["models_eval"]["change"] == 0  # the very files
    assert model.objects == before


def _seen(visibility: float, error: float, depth: float = 0.8) -> Seen:
    return Seen(visibility, error, depth)


def test_lenses_are_compared_on_common_targets() -> None:
    a, b, c = (0, "ape"), (0, "can"), (1, "ape")
    figures = lens_pairs.compare_lenses(
        {
            0.7: {a: _seen(0.9, -0.06), b: _seen(0.9, 0.10), c: _seen(0.9, 9.0)},
            1.0: {a: _seen(0.9, 0.04), b: _seen(0.9, -0.04), c: _seen(0.9, 9.0)},
            1.4: {a: _seen(0.9, 0.02), b: _seen(0.3, float("inf")), c: _seen(0.29, 0.0)},
        }
    )
    assert figures["targets"] == 2
    short, middle, long = (figures["focal_scales"][key] for key in ("0.7", "1", "1.4"))
    assert short["depth_error_median"] == pytest.approx(0.08)
    assert short["signed_depth_error_median"] == pytest.approx(0.02)
    assert short["ratio"] == pytest.approx(2.0)
    assert (middle["ratio"], middle["found"], long["found"]) == (1.0, 1.0, 0.5)


def test_the_interval_of_a_ratio_is_a_bootstraps() -> None:
    draws = np.random.default_rng(3)
    original = draws.exponential(0.02, 90)
    errors = 1.4 * original * draws.uniform(0.5, 1.5, 90)
    expected = scipy.stats.bootstrap(
        (errors, original),
        lambda a, b, axis: np.median(a, axis) / np.median(b, axis),
        paired=True,
        confidence_level=0.9,
        n_resamples=4000,
        method="percentile",
        random_state=draws,
    ).confidence_interval
    alone = lens_pairs._interval(errors, original, range(90))
    assert alone == pytest.approx([expected.low, expected.high], rel=0.05)
    # Four copies of each target, in one scene each, say no more than one.
    copies = (np.repeat(errors, 4), np.repeat(original, 4))
    assert lens_pairs._interval(*copies, np.repeat(range(90), 4).tolist()) == pytest.approx(alone, rel=0.05)


def test_lenses_need_common_targets_at_one_depth() -> None:
    a = (0, "ape")
    with pytest.raises(ValueError, match="render more scenes"):
        lens_pairs.compare_lenses({1.0: {a: _seen(0.1, 0.0)}})
    with pytest.raises(ValueError, match="differ between the lenses"):
        lens_pairs.compare_lenses({1.0: {a: _seen(0.9, 0.0)}, 1.4: {a: _seen(0.9, 0.0, depth=0.9)}})


def test_every_lens_sees_the_same_poses(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        create_context().release()
    except MissingEGLError as error:
        pytest.skip(str(error))
    model = _with_boxes()
    solid = {
        name: replace(known, mesh=made_up_bop.mesh(obj_id).apply_scale(0.001))
        for (name, known), obj_id in zip(model.objects.items(), (1, 4), strict=True)
    }
    made = build_assets(list(solid.values()), [], None)
    assets = SceneAssets(made.targets, (), (), made.environments)
    small = SceneConfig(width=96, height=64, fx=90, fy=90, cx=47.5, cy=31.5, shadow_size=64)
    small = replace(small, max_targets=2, targets=(2, 2))
    views = {s: lens_pairs._renders(model, assets, 2, s, small)[0] for s in (0.7, 1.4)}
    shared = (views[0.7].labels == views[1.4].labels) & views[0.7].present
    assert shared.any()
    torch.testing.assert_close(views[0.7].T_CO[shared], views[1.4].T_CO[shared], rtol=0, atol=1e-6)
    torch.testing.assert_close(views[1.4].K[:, 0, 0], 2 * views[0.7].K[:, 0, 0])

    monkeypatch.setattr(lens_pairs, "_renders", lambda *_: [views[0.7]])
    seen = lens_pairs.targets_seen(model, assets, 2, 0.7, small)
    assert len(seen) == int(views[0.7].present.sum())
    depths = views[0.7].T_CO[views[0.7].present][:, 2, 3]  # the boxes' centres are their origins
    np.testing.assert_allclose([one.depth for one in seen.values()], depths, rtol=1e-5)


def test_scores_gain_the_parts_and_keep_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    write_scores(file, {"images": 60, "all": {"AR": 0.46357309, "none": None}, "parts": {"photos": {"a": 1}}})
    before = file.read_text()
    measure_parts.add_to_scores(file, {})
    assert file.read_text() == before
    measure_parts.add_to_scores(file, {"rebuilt": {"points": 512}})
    assert json.loads(file.read_text()) == {
        "images": 60,
        "all": {"AR": 0.46357309, "none": None},
        "parts": {"photos": {"a": 1}, "rebuilt": {"points": 512}},
    }


def test_verdicts_compare_with_the_issue_s_bounds() -> None:
    parts = {
        "photos": {"visibility_mae": 0.13, "visibility_spearman": 0.5},
        "lenses": {"focal_scales": {"0.7": {"ratio": 1.4}, "1.4": {"ratio": 1.6}}},
    }
    held = [holds for *_, holds in measure_parts.verdicts(parts)]
    assert held == [False, True, True, False]
