"""BOP'19 scores: the matching by hand, and the published results on the LM-O photos."""

from __future__ import annotations

from pathlib import Path

import made_up_bop
import numpy as np
import pytest

from smope.data.bop import BopDataset, Estimate
from smope.data.reading import DataError
from smope.evaluate.bop import Pairing, bop_scores, geometries, match, pair_targets
from smope.evaluate.run import evaluate_dataset


def test_each_truth_is_matched_once_best_score_first() -> None:
    errors = np.array([[0.3, 0.1], [0.2, 0.05], [0.05, 0.9]])
    assert match(errors, 0.5) == [(0, 1), (1, 0)]
    assert match(errors, 0.15) == [(0, 1), (2, 0)]
    assert match(errors, 0.05) == []
    assert match(np.empty((0, 2)), 1.0) == []


@pytest.fixture(scope="module", params=[True, False], ids=["depth", "no depth"])
def dataset(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> BopDataset:
    root = tmp_path_factory.mktemp("bop") / "madeup"
    return BopDataset(made_up_bop.write(root, with_depth=request.param))


def _estimates(move: np.ndarray | None = None) -> list[Estimate]:
    """The true poses, moved in the camera's frame by `move` (metres)."""
    found = []
    for im_id, objects in made_up_bop.poses().items():
        for n, (obj_id, T) in enumerate(objects):
            T = T.copy()
            T[:3, 3] = T[:3, 3] / 1000 + (0 if move is None else move)
            found.append(Estimate(5, im_id, obj_id, 1 - 0.1 * n, T, 0.5))
    return found


def _pair(dataset: BopDataset, estimates: list[Estimate]) -> list[Pairing]:
    return pair_targets(dataset.targets, estimates, {5: dataset.scene(5)}, geometries(dataset, [1, 4]))


def test_the_truth_scores_one(dataset: BopDataset) -> None:
    scores = bop_scores(_pair(dataset, _estimates()))
    has_depth = dataset.scene(5).records[2].depth_path is not None
    assert ("AR_VSD" in scores) == has_depth
    assert set(scores.values()) == {1.0}


def test_a_symmetric_turn_is_right_and_any_other_is_not(dataset: BopDataset) -> None:
    turned = [
        Estimate(e.scene_id, e.im_id, e.obj_id, e.score, e.T_CO @ made_up_bop.HALF_TURN, e.time)
        for e in _estimates()
    ]
    pairings = _pair(dataset, turned)
    symmetric = [p for p in pairings if p.target.obj_id == 4]
    assert bop_scores(symmetric)["AR_MSSD"] == 1.0
    plain = [p for p in pairings if p.target.obj_id == 1]
    assert bop_scores(plain)["AR_MSSD"] == 0.0  # its corners swap: further than half the diameter
    assert bop_scores(plain)["5cm5deg"] == 0.0
    assert bop_scores(plain)["found"] == 1.0


def test_a_shift_scores_what_the_hand_says(dataset: BopDataset) -> None:
    """17 mm sideways. Diameters are 74.83 and 99.50 mm, so MSSD is 0.227 and 0.171 of them."""
    pairings = _pair(dataset, _estimates(np.array([0.017, 0, 0])))
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


def test_only_the_best_inst_count_estimates_of_a_target_are_taken(dataset: BopDataset) -> None:
    wrong = [
        Estimate(e.scene_id, e.im_id, e.obj_id, e.score + 2, e.T_CO + np.eye(4, k=3), e.time)
        for e in _estimates()
        if e.im_id == 31
    ]
    scores = bop_scores(_pair(dataset, _estimates() + wrong))
    assert scores["AR_MSSD"] == pytest.approx(5 / 6)
    assert scores["found"] == 1.0


def test_a_missing_estimate_counts_as_a_miss(dataset: BopDataset) -> None:
    scores = bop_scores(_pair(dataset, _estimates()[1:]))
    assert scores["AR_MSSD"] == pytest.approx(5 / 6)
    assert scores["found"] == pytest.approx(5 / 6)


def test_vsd_follows_the_rendered_shift(tmp_path: Path) -> None:
    """Object 4 alone, a tenth further away than it is; VSD by rays cast at both."""
    dataset = BopDataset(made_up_bop.write(tmp_path / "madeup"))
    (target,) = [t for t in dataset.targets if t.im_id == 31]
    T = made_up_bop.poses()[31][0][1]
    depth = made_up_bop.ray_depth(made_up_bop.mesh(4), T)
    back = T.copy()
    back[:3, 3] *= 1.1
    back_depth = made_up_bop.ray_depth(made_up_bop.mesh(4), back)
    back[:3, 3] /= 1000
    (pairing,) = pair_targets(
        [target], [Estimate(5, 31, 4, 1.0, back)], {5: dataset.scene(5)}, geometries(dataset, [4])
    )
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


def test_a_target_that_is_not_annotated_is_named(dataset: BopDataset) -> None:
    scene = dataset.scene(5)
    object.__setattr__(scene.records[31], "annotations", ())
    with pytest.raises(DataError, match=r"scene_gt\.json, image 31: object 4: 1 target.*, 0 annotated"):
        pair_targets(dataset.targets, [], {5: scene}, geometries(dataset, [1, 4]))


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
