"""BOP'19 scores: the matching by hand, and the published results on the LM-O photos."""

from __future__ import annotations

import json
from pathlib import Path

import made_up_bop
import numpy as np
import pytest

from smope.data.bop import Estimate
from smope.data.reading import DataError
from smope.evaluate.bop import Pairing, bop_scores, match, pair_targets
from smope.evaluate.run import evaluate_dataset
from smope.evaluate.sets import PoseSet, load_pose_set


def test_each_truth_is_matched_once_best_score_first() -> None:
    errors = np.array([[0.3, 0.1], [0.2, 0.05], [0.05, 0.9]])
    assert match(errors, 0.5) == [(0, 1), (1, 0)]
    assert match(errors, 0.15) == [(0, 1), (2, 0)]
    assert match(errors, 0.05) == []
    assert match(np.empty((0, 2)), 1.0) == []


@pytest.fixture(scope="module", params=[True, False], ids=["depth", "no depth"])
def pose_set(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> PoseSet:
    root = tmp_path_factory.mktemp("bop") / "madeup"
    return load_pose_set(made_up_bop.write(root, with_depth=request.param), "bop")


def _estimates(move: np.ndarray | None = None) -> list[Estimate]:
    """The true poses, moved in the camera's frame by `move` (metres)."""
    found = []
    for im_id, objects in made_up_bop.poses().items():
        for n, (obj_id, T) in enumerate(objects):
            T = T.copy()
            T[:3, 3] = T[:3, 3] / 1000 + (0 if move is None else move)
            found.append(Estimate(5, im_id, obj_id, 1 - 0.1 * n, T))
    return found


def _pair(pose_set: PoseSet, estimates: list[Estimate]) -> list[Pairing]:
    objects = {i: pose_set.geometry(i) for i in pose_set.names}
    return pair_targets(pose_set.targets, estimates, pose_set.records, objects)


def test_the_truth_scores_one(pose_set: PoseSet) -> None:
    scores = bop_scores(_pair(pose_set, _estimates()))
    has_depth = pose_set.records[5, 2].depth_path is not None
    assert ("AR_VSD" in scores) == has_depth
    assert set(scores.values()) == {1.0}


def test_a_symmetric_turn_is_right_and_any_other_is_not(pose_set: PoseSet) -> None:
    turned = [
        Estimate(e.scene_id, e.im_id, e.obj_id, e.score, e.T_CO @ made_up_bop.HALF_TURN) for e in _estimates()
    ]
    pairings = _pair(pose_set, turned)
    symmetric = [p for p in pairings if p.target.obj_id == 4]
    assert bop_scores(symmetric)["AR_MSSD"] == 1.0
    plain = [p for p in pairings if p.target.obj_id == 1]
    assert bop_scores(plain)["AR_MSSD"] == 0.0  # its corners swap: further than half the diameter
    assert bop_scores(plain)["5cm5deg"] == 0.0
    assert bop_scores(plain)["found"] == 1.0


def test_a_shift_scores_what_the_hand_says(pose_set: PoseSet) -> None:
    """17 mm sideways. Diameters are 74.83 and 99.50 mm, so MSSD is 0.227 and 0.171 of them."""
    pairings = _pair(pose_set, _estimates(np.array([0.017, 0, 0])))
    by_object = {i: bop_scores([p for p in pairings if p.target.obj_id == i]) for i in (1, 4)}
    assert by_object[1]["AR_MSSD"] == pytest.approx(6 / 10)  # thresholds 0.25 to 0.50
    assert by_object[4]["AR_MSSD"] == pytest.approx(7 / 10)  # 0.20 to 0.50
    assert bop_scores(pairings)["AR_MSSD"] == pytest.approx((3 * 0.6 + 3 * 0.7) / 6)
    assert by_object[1]["ADD(-S)"] == 0.0
    assert by_object[1]["5cm5deg"] == 1.0
    # In the image the nearest corner moves furthest, by fx * 17 mm / its depth; MSPD counts pixels of a
    # picture 640 wide, this one is 96.
    hits = 0
    for objects in made_up_bop.poses().values():
        for obj_id, T in objects:
            nearest = (made_up_bop.mesh(obj_id).vertices @ T[:3, :3].T + T[:3, 3])[:, 2].min()
            hits += sum(120 * 17 / nearest < 5 * k * 96 / 640 for k in range(1, 11))
    assert bop_scores(pairings)["AR_MSPD"] == pytest.approx(hits / 60)


def test_only_the_best_inst_count_estimates_of_a_target_are_taken(pose_set: PoseSet) -> None:
    wrong = [
        Estimate(e.scene_id, e.im_id, e.obj_id, e.score + 2, e.T_CO + np.eye(4, k=3))
        for e in _estimates()
        if e.im_id == 31
    ]
    scores = bop_scores(_pair(pose_set, _estimates() + wrong))
    assert scores["AR_MSSD"] == pytest.approx(5 / 6)
    assert scores["found"] == 1.0


def test_a_missing_estimate_counts_as_a_miss(pose_set: PoseSet) -> None:
    scores = bop_scores(_pair(pose_set, _estimates()[1:]))
    assert scores["AR_MSSD"] == pytest.approx(5 / 6)
    assert scores["found"] == pytest.approx(5 / 6)


def test_vsd_follows_the_rendered_shift(tmp_path: Path) -> None:
    """Object 4 alone, a tenth further away than it is; VSD by rays cast at both."""
    pose_set = load_pose_set(made_up_bop.write(tmp_path / "madeup"), "bop")
    T = made_up_bop.poses()[31][0][1]
    depth = made_up_bop.ray_depth(made_up_bop.mesh(4), T)
    back = T.copy()
    back[:3, 3] *= 1.1
    back_depth = made_up_bop.ray_depth(made_up_bop.mesh(4), back)
    back[:3, 3] /= 1000
    (pairing,) = [p for p in _pair(pose_set, [Estimate(5, 31, 4, 1.0, back)]) if p.estimates]
    # The scene is the object itself. The moved one is seen where the true one is (within the truth's pixels),
    # and beside it, where the scene has no reading.
    v, u = np.mgrid[: made_up_bop.SIZE[1], : made_up_bop.SIZE[0]]
    rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(made_up_bop.K).T
    lengths = np.linalg.norm(rays, axis=-1)
    both = (depth > 0) & (back_depth > 0)
    either = (depth > 0) | (back_depth > 0)
    apart = (np.abs(back_depth - depth) * lengths)[both] / np.linalg.norm(made_up_bop.EXTENTS[4])
    expected = [((apart >= k * 0.05).sum() + either.sum() - both.sum()) / either.sum() for k in range(1, 11)]
    np.testing.assert_allclose(pairing.errors["vsd"][0, 0], expected, atol=0.03)


def test_a_target_that_is_not_annotated_is_named(tmp_path: Path) -> None:
    root = made_up_bop.write(tmp_path / "madeup")
    targets = json.loads((root / "test_targets_bop19.json").read_text())
    (root / "test_targets_bop19.json").write_text(json.dumps([{**targets[0], "inst_count": 2}]))
    with pytest.raises(ValueError, match=r"000002\.png: 2 targets of object 1, 1 annotated"):
        _pair(load_pose_set(root, "bop"), [])
    (root / "test_targets_bop19.json").write_text(json.dumps([{**targets[0], "im_id": 3}]))
    with pytest.raises(DataError, match=r"scene_camera\.json: image 3, which is a target, is missing"):
        load_pose_set(root, "bop")


@pytest.mark.parametrize(
    ("name", "mssd", "mspd", "add_s", "found"),
    [
        ("groundtruth", 1.0, 1.0, 1.0, 1.0),
        ("megapose-cnos", 0.514849, 0.616009, 0.4664, 0.840),
        ("pennkeypoints", 0.5958, 0.8021, 0.4501, 0.977),
        ("pix2pose-iccv19", 0.3462, 0.6037, 0.1949, 0.933),
    ],
)
def test_published_results_score_what_they_are_known_to(
    data_root: Path, name: str, mssd: float, mspd: float, add_s: float, found: float
) -> None:
    scores = evaluate_dataset(data_root / "lmo", csv=data_root / f"lmo/results/{name}_lmo-test.csv")
    row = scores["all"]
    assert row["targets"] == 431
    digits = 6 if name == "megapose-cnos" else 4
    assert row["AR_MSSD"] == pytest.approx(mssd, abs=0.5 * 10**-digits)
    assert row["AR_MSPD"] == pytest.approx(mspd, abs=0.5 * 10**-digits)
    assert row["ADD(-S)"] == pytest.approx(add_s, abs=0.5e-4)
    assert row["found"] == pytest.approx(found, abs=0.5e-3)
