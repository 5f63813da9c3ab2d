"""tools/score_renders.py: where the truth is what one value finds, the row of that value is perfect."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_model import SIZE, K, small_model

from smope import SMOPE
from smope.data.items import Batch

TOOL = runpy.run_path(str(Path(__file__).resolve().parent.parent / "tools" / "score_renders.py"))


def found_with_one_step(model: SMOPE) -> Batch:
    """An image whose one object stands where the best detection does, refined once."""
    network, config = model.network, model.network.config
    image = torch.rand(3, SIZE[1], SIZE[0], generator=torch.Generator().manual_seed(1))
    network.config = replace(config, refine_steps=1)
    best = model.predict(image, K=torch.tensor(K), threshold=0.0, top_k=1)
    network.config = config
    return Batch(
        images=image[None],
        K=torch.tensor(K)[None],
        labels=best.labels[None],
        T_CO=best.T_CO[None],
        boxes_xyxy=best.boxes_xyxy[None],
        visibility=torch.ones(1, 1),
    )


def test_each_value_has_its_row_of_scores() -> None:
    model = small_model()
    lines = TOOL["table"](model, [found_with_one_step(model)], ["refine_steps=1"]).splitlines()
    heads, _, plain, changed = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    assert (plain[0], changed[0]) == ("as it is", "refine_steps=1")
    scores, others = (dict(zip(heads[1:], map(float, row[1:]), strict=True)) for row in (changed, plain))
    assert (scores["AR_MSSD"], scores["AR_MSPD"], scores["depth_error"]) == (1.0, 1.0, 0.0)
    assert scores["box_IoU"] == others["box_IoU"] == pytest.approx(1.0, abs=1e-3)
    assert others["depth_error"] > 0.0


def test_a_key_that_changes_the_weights_is_refused() -> None:
    model = small_model()
    with pytest.raises(RuntimeError, match="refiners"):
        TOOL["table"](model, [found_with_one_step(model)], ["refine_layers=4"])
