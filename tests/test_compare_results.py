"""tools/compare_results.py on results whose errors are known."""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from made_up_bop import write

from smope.data.bop import Estimate, write_bop_csv
from smope.evaluate.sets import load_pose_set

TOOL = runpy.run_path(str(Path(__file__).resolve().parent.parent / "tools" / "compare_results.py"))


def test_true_poses_have_all_recalls_and_a_stretched_ray_its_depth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write(tmp_path / "set")
    pose_set = load_pose_set(root, "bop")
    true = [
        Estimate(*key, annotation.object_id, 1.0, annotation.T_CO)
        for key, record in pose_set.records.items()
        for annotation in record.annotations
        if annotation.object_id is not None
    ]
    far = []
    for estimate in true:
        points = pose_set.geometry(estimate.obj_id).points
        middle = (points.min(0) + points.max(0)) / 2
        T = estimate.T_CO.copy()
        T[:3, 3] += 0.03 * (T[:3, :3] @ middle + T[:3, 3])  # the middle moves along its ray, by 3 %
        far.append(replace(estimate, T_CO=T))
    write_bop_csv(tmp_path / "true_set-test.csv", true)
    write_bop_csv(tmp_path / "far_set-test.csv", far)
    arguments = [root, tmp_path / "true_set-test.csv", tmp_path / "far_set-test.csv"]
    monkeypatch.setattr(sys, "argv", ["compare_results.py", *map(str, arguments)])
    TOOL["main"]()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if "|" in line]
    heads = [row for row in rows if row[-2:] == ["true", "far"]]
    assert len(heads) == 2
    recalls, depth = [row for row in rows if row[0] == "all"]
    assert recalls[2] == "1.000 / 1.000"
    assert depth[2:] == ["+0.0%, 0.0%", "+3.0%, 3.0%"]
    assert int(depth[1]) == sum(target.inst_count for target in pose_set.targets)
