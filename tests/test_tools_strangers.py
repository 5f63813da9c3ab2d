"""smope.tools.strangers: which meshes are chosen, and what is counted."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trimesh
from PIL import Image
from small_model import SIZE, small_model

from smope.tools.strangers import choose, measure


def test_meshes_are_spread_over_those_that_were_not_seen() -> None:
    files = [Path(f"{letter}.ply") for letter in "hgfedcba"]
    assert choose(files, {"a", "h"}, 3) == [Path("c.ply"), Path("e.ply"), Path("g.ply")]
    with pytest.raises(ValueError, match="2 of 8 are left"):
        choose(files, set("abcdef"), 3)


def test_counts_follow_the_best_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    photos = []
    for k in range(2):
        photos.append(tmp_path / f"{k}.png")
        Image.new("RGB", SIZE, (40 * k, 90, 120)).save(photos[-1])
    rod, cup = tmp_path / "rod.ply", tmp_path / "cup.ply"
    trimesh.creation.box((0.02, 0.03, 0.2)).export(rod)
    trimesh.creation.cylinder(0.04, 0.1).export(cup)
    scores = iter([(0.9, 0.4, 0.6), (0.2, 0.1, 0.1)])

    def told(photo: Path, **options: float) -> SimpleNamespace:
        names = ("stranger_0", "stranger_0", "stranger_1")
        return SimpleNamespace(names=names, scores=torch.tensor(next(scores)))

    monkeypatch.setattr(model, "predict", told)
    result = measure(model, photos, [rod, cup])
    assert list(model.objects)[-2:] == ["stranger_0", "stranger_1"]
    # Best scores: rod 0.9 and 0.2, cup 0.6 and 0.1.
    assert result["share_found"] == {"0.3": 0.5, "0.5": 0.5, "0.7": 0.25}
    assert result["found_a_photo"] == {"0.3": 1.0, "0.5": 1.0, "0.7": 0.5}
    assert result["highest_score"] == pytest.approx(0.9)
