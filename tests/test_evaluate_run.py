"""The run of a model over a data set, with a stand-in that knows the answers and errs by known amounts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import made_up_bop
import numpy as np
import pytest
import torch
from scipy import stats

from smope.camera import Camera
from smope.data.bop import read_bop_csv
from smope.evaluate import report
from smope.evaluate.run import evaluate_dataset
from smope.poses import Poses


class Oracle:
    """`predict` as SMOPE has it: the true poses, with every claim about them off by a known amount."""

    device = torch.device("cpu")

    def __init__(self, root: Path, names: dict[int, str] | None = None) -> None:
        self.infos = json.loads((root / "test/000005/scene_gt_info.json").read_text())
        self.names = names or {1: "obj_000001", 4: "obj_000004"}
        self.calls: list[int] = []

    def predict(self, images: Sequence[Path], K: Sequence[Any], threshold: float, top_k: int) -> list[Poses]:
        assert threshold == 0
        for k in K:
            np.testing.assert_allclose(k, made_up_bop.K)
        self.calls.append(len(images))
        return [self._poses(int(path.stem)) for path in images]

    def _poses(self, im_id: int) -> Poses:
        objects = made_up_bop.poses()[im_id]
        T = torch.tensor(np.stack([T for _, T in objects]), dtype=torch.float32)
        T[:, :3, 3] /= 1000
        x, y, w, h = torch.tensor([i["bbox_obj"] for i in self.infos[str(im_id)]]).float().T
        seen = torch.tensor([i["visib_fract"] for i in self.infos[str(im_id)]])
        n = len(objects)
        return Poses(
            names=tuple(self.names[obj_id] for obj_id, _ in objects),
            labels=torch.zeros(n, dtype=torch.int64),
            scores=torch.linspace(0.9, 0.1, n),
            boxes_xyxy=torch.stack([x, y, x + w + 1, y + h + 1], 1),
            T_CO=T,
            scale=torch.ones(n, 3),
            visibility=(seen - 0.125).float(),
            sigma=torch.ones(n, 2),
            camera=Camera(torch.from_numpy(made_up_bop.K), made_up_bop.SIZE),
        )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up_bop.write(tmp_path_factory.mktemp("bop") / "madeup", with_depth=False)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_model_that_is_right_scores_one(root: Path, tmp_path: Path, batch: int) -> None:
    oracle = Oracle(root)
    scores = evaluate_dataset(root, model=oracle, out=tmp_path, batch=batch)  # type: ignore[arg-type]
    # One image, or the first batch, is predicted once more beforehand.
    assert oracle.calls == ([1] * 4 if batch == 1 else [2, 2, 1])
    for row in (scores["all"], *scores["objects"].values()):
        for key in ("AR", "AR_MSSD", "AR_MSPD", "ADD(-S)", "projection_5px", "5cm5deg", "found", "box_AP"):
            assert row[key] == 1.0, key
        assert row["visibility_mae"] == pytest.approx(0.125, abs=1e-6)
    assert scores["all"]["visibility_spearman"] == pytest.approx(1.0)
    assert scores["all"]["sigma_rotation_spearman"] is None  # a constant ranks nothing
    assert scores["all"]["targets"] == 6
    assert scores["images"] == 3
    assert scores["seconds_an_image_median"] > 0

    stored = json.loads((tmp_path / "scores.json").read_text())
    assert stored == {key: value for key, value in scores.items() if key != "table"}
    assert {"device", "date", "torch", "command", "model"} <= set(stored)
    assert str(tmp_path) not in json.dumps(stored)
    again = evaluate_dataset(root, csv=tmp_path / "smope_model-test.csv")
    assert again["all"]["AR_MSSD"] == 1.0
    assert len(read_bop_csv(tmp_path / "smope_model-test.csv")) == 6


def test_the_table_has_a_row_an_object_and_one_for_all(root: Path) -> None:
    table = evaluate_dataset(root, model=Oracle(root))["table"].splitlines()  # type: ignore[arg-type]
    assert [line.split()[0] for line in table[1:]] == ["obj_000001", "obj_000004", "all"]
    assert table[0].split()[:3] == ["targets", "found", "AR_MSSD"]
    assert len({len(line) for line in table}) == 1


def test_names_are_matched_to_object_ids(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    # 1 and 4 may be LineMod's objects, whatever the folder is called.
    linemod = Oracle(root, {1: "ape", 4: "cam"})
    assert evaluate_dataset(root, model=linemod)["all"]["AR"] == 1.0  # type: ignore[arg-type]
    half = Oracle(root, {1: "ape", 4: "teapot"})
    assert evaluate_dataset(root, model=half)["all"]["AR"] == pytest.approx(0.5)  # type: ignore[arg-type]
    assert "teapot" in caplog.text
    with pytest.raises(ValueError, match=r"\['mug', 'teapot'\] are none of the data set's.*names.json"):
        evaluate_dataset(root, model=Oracle(root, {1: "mug", 4: "teapot"}))  # type: ignore[arg-type]


def test_limit_takes_the_first_images(root: Path) -> None:
    scores = evaluate_dataset(root, model=Oracle(root), limit=1)  # type: ignore[arg-type]
    assert (scores["images"], scores["all"]["targets"], scores["all"]["AR"]) == (1, 2, 1.0)


def test_an_instance_that_is_no_target_does_no_harm_to_box_ap(root: Path, tmp_path: Path) -> None:
    other = made_up_bop.write(tmp_path / "madeup", with_depth=False)
    targets = json.loads((other / "test_targets_bop19.json").read_text())
    kept = [t for t in targets if not (t["im_id"] == 2 and t["obj_id"] == 1)]
    (other / "test_targets_bop19.json").write_text(json.dumps(kept))
    oracle = Oracle(other)
    oracle.infos["2"][0]["bbox_obj"] = [0, 0, 3, 3]  # a prediction far from what is annotated there
    scores = evaluate_dataset(other, model=oracle)  # type: ignore[arg-type]
    assert scores["all"]["targets"] == 5
    assert scores["all"]["box_AP"] == 1.0


def test_exactly_one_of_model_and_csv(root: Path) -> None:
    with pytest.raises(ValueError, match="a model or results"):
        evaluate_dataset(root)
    with pytest.raises(ValueError, match="format 'bob' given"):
        evaluate_dataset(root, format="bob", csv="x.csv")


def test_spearman_is_scipys() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 6, 15), rng.normal(size=15)
        assert report.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert np.isnan(report.spearman([1, 1], [1, 2]))
    assert np.isnan(report.spearman([1], [1]))


def test_a_missing_value_is_a_dash_and_null(tmp_path: Path) -> None:
    table = report.format_table({"a": {"targets": 3, "AR": float("nan")}, "b": {"targets": 10, "AR": 0.5}})
    assert table.splitlines() == ["   targets      AR", "a        3       -", "b       10  0.5000"]
    report.write_scores(tmp_path / "s.json", {"x": float("nan"), "y": np.float64(1 / 3), "z": np.int64(2)})
    assert json.loads((tmp_path / "s.json").read_text()) == {"x": None, "y": 0.33333333, "z": 2}
