"""Schedule, weight average, optimiser, curves and recipe, against plain arithmetic or torch."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from smope.config import ConfigError
from smope.train.curves import Curves, read_rows, write_record
from smope.train.ema import Ema
from smope.train.optim import GuardedAdamW, parameter_groups
from smope.train.recipe import OptimConfig, Recipe, expand, load_recipe
from smope.train.schedule import Budget, Schedule

ROOT = Path(__file__).parents[1]


def test_schedule_at_hand_computed_points() -> None:
    cosine = Schedule(warmup_steps=10, flat_until=0.5, shape="cosine", final=0.1)
    assert cosine.factor(0, 0.0) == pytest.approx(0.1)
    assert cosine.factor(9, 0.0) == 1.0
    assert cosine.factor(1000, 0.5) == 1.0
    assert cosine.factor(1000, 0.75) == pytest.approx(0.1 + 0.9 * 0.5)
    assert cosine.factor(1000, 1.0) == pytest.approx(0.1)
    linear = Schedule(warmup_steps=0, flat_until=0.6, shape="linear", final=0.0)
    assert linear.factor(0, 0.0) == 1.0
    assert linear.factor(0, 0.7) == pytest.approx(0.75)
    assert Schedule(warmup_steps=0, flat_until=1.0).factor(5, 1.0) == 1.0


@given(
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 50),
    st.sampled_from(["cosine", "linear"]),
)
def test_schedule_never_rises_after_warmup(flat: float, a: float, b: float, warmup: int, shape: str) -> None:
    schedule = Schedule(warmup, flat, shape, 0.01)  # type: ignore[arg-type]
    first, second = schedule.factor(100, min(a, b)), schedule.factor(100, max(a, b))
    assert 0.01 - 1e-9 <= second <= first + 1e-9 <= 1 + 2e-9


def test_budget_ends_at_whichever_limit_comes_first() -> None:
    assert Budget(max_steps=100).progress(25, 1e9) == 0.25
    assert Budget(max_minutes=10).progress(10**9, 300) == 0.5
    assert Budget(max_steps=100, max_minutes=10).progress(50, 540) == pytest.approx(0.9)
    assert Budget(max_steps=3).progress(5, 0) == 1.0
    with pytest.raises(ValueError, match="needs an end"):
        Budget()
    with pytest.raises(ValueError, match="max_minutes: 0 given"):
        Budget(max_minutes=0)


def test_ema_equals_torch_averaged_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ema = Ema(model, decay=0.6)
    weights = [copy.deepcopy(model.state_dict())]
    for _ in range(12):
        with torch.no_grad():
            for value in model.state_dict().values():
                value.add_(torch.randn_like(value.float()).to(value.dtype))
        ema.update()
        weights.append(copy.deepcopy(model.state_dict()))
    expected = weights[0]["0.weight"].double()
    for step, now in enumerate(weights[1:]):
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * now["0.weight"].double()
    torch.testing.assert_close(ema.model.state_dict()["0.weight"].double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(ema.model.state_dict()["1.running_mean"], weights[-1]["1.running_mean"])
    assert not ema.model.training
    assert not any(p.requires_grad for p in ema.model.parameters())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 2)
        self.names = nn.Embedding(5, 4)
        self.level_embed = nn.Parameter(torch.randn(3, 4))
        self.fixed = nn.Parameter(torch.zeros(1), requires_grad=False)


def test_groups_hold_each_parameter_once_with_its_rate_and_decay() -> None:
    net = Net()
    config = OptimConfig(lr=0.1, lr_scale={"backbone": 0.25}, weight_decay=0.05)
    groups = parameter_groups(net, config)
    settings = {}
    for group in groups:
        for parameter in group["params"]:  # type: ignore[attr-defined]
            name = next(n for n, p in net.named_parameters() if p is parameter)
            assert name not in settings
            settings[name] = (group["lr"], group["weight_decay"])
    assert settings == {
        "backbone.0.weight": (0.025, 0.05),
        "backbone.0.bias": (0.025, 0.0),
        "backbone.1.weight": (0.025, 0.0),
        "backbone.1.bias": (0.025, 0.0),
        "head.weight": (0.1, 0.05),
        "head.bias": (0.1, 0.0),
        "names.weight": (0.1, 0.0),
        "level_embed": (0.1, 0.0),
    }
    with pytest.raises(ValueError, match="no trained parameter has bakbone"):
        parameter_groups(net, OptimConfig(lr_scale={"bakbone": 0.1}))


def test_optimiser_follows_plain_adamw_and_leaves_out_a_bad_step() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    config = OptimConfig(lr=0.01, lr_scale={}, weight_decay=0.1, clip_norm=0.5, betas=(0.9, 0.99))
    guarded = GuardedAdamW(ours, config)
    plain = torch.optim.AdamW(
        [{"params": [theirs.weight], "weight_decay": 0.1}, {"params": [theirs.bias], "weight_decay": 0.0}],
        lr=0.005,
        betas=(0.9, 0.99),
        foreach=False,
    )
    assert guarded.set_factor(0.5) == pytest.approx(0.005)
    for step in range(8):
        x = torch.randn(6, 4) * 10
        if step == 3:  # only ours sees the bad step
            ours(x * torch.inf).sum().backward()
            assert not torch.isfinite(guarded.step())
        ours(x).square().sum().backward()
        theirs(x).square().sum().backward()
        norm = guarded.step()
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        plain.step()
        plain.zero_grad()
        torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)


def test_moments_come_back_and_rates_stay_the_present_ones() -> None:
    net = nn.Linear(2, 2)
    first = GuardedAdamW(net, OptimConfig(lr=0.1, lr_scale={}))
    net(torch.ones(1, 2)).sum().backward()
    first.step()
    second = GuardedAdamW(net, OptimConfig(lr=0.3, lr_scale={}))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.set_factor(1.0) == 0.3
    moments = [state["exp_avg"] for state in second.adamw.state.values()]
    assert all(torch.equal(a, b["exp_avg"]) for a, b in zip(moments, first.adamw.state.values(), strict=True))


def test_curves_survive_a_resume_and_draw(tmp_path: Path) -> None:
    curves = Curves(tmp_path, tensorboard=True)
    curves.add(0.5, 10, {"loss": 2.0, "loss/box": 1.5})
    curves.add(1.0, 20, {"loss": 1.0, "loss/box": 0.5})
    curves.add(1.0, 20, {"score/AR": 0.25})
    curves.add(1.5, 30, {"loss": math.nan})
    curves.write()
    curves.draw("a run")
    curves.close()
    assert [row["step"] for row in read_rows(tmp_path / "curves.csv")] == [10, 20, 20, 30]
    with Image.open(tmp_path / "curves.png") as picture:
        assert len(picture.convert("L").getcolors() or []) > 5
    again = Curves(tmp_path, resume_at=20)
    again.add(2.0, 25, {"loss": 0.5, "new": 7})
    again.write()
    rows = read_rows(tmp_path / "curves.csv")
    assert [row["step"] for row in rows] == [10, 20, 20, 25]
    assert rows[2] == {"minutes": 1.0, "step": 20, "score/AR": 0.25}
    assert rows[3]["new"] == 7

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/box")] == [(10, 1.5), (20, 0.5)]
    assert events.Scalars("score/AR")[0].value == 0.25


def test_record_is_strict_json(tmp_path: Path) -> None:
    write_record(tmp_path / "run.json", {"a": [1.5, math.nan], "b": {"c": math.inf}, "d": "x"})
    assert json.loads((tmp_path / "run.json").read_text()) == {"a": [1.5, None], "b": {"c": None}, "d": "x"}


def test_recipe_reads_and_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text("[optim]\nlr = 1\nbetas = [0.8, 0.9]\n[run]\nmax_minutes = 3\n[network]\nwidth = 64\n")
    recipe = load_recipe(file)
    assert recipe.optim == OptimConfig(lr=1.0, betas=(0.8, 0.9))
    assert recipe.run.max_minutes == 3.0
    assert recipe.network == {"width": 64}
    for text, message in {
        "[optim]\nlearning_rat = 1": r"recipe.toml: optim.learning_rat: unknown key",
        "[optim]\nwarm_steps = 1": r"optim.warm_steps: unknown key; did you mean 'warmup_steps'",
        "[optin]\nlr = 1": r"optin: unknown key; did you mean 'optim'",
        '[optim]\nlr = "much"': r"optim.lr: a number expected, 'much' given",
        "[optim]\nanneal = 'sine'": r"optim.anneal: one of",
        "[run": r"not TOML",
    }.items():
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_recipe(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_recipe(tmp_path / "absent.toml")
    monkeypatch.setenv("SOME_FOLDER", "/there")
    assert expand("$SOME_FOLDER/a.ply") == Path("/there/a.ply")
    with pytest.raises(ConfigError, match="not set"):
        expand("$SOME_OTHER_FOLDER/a.ply")


def test_committed_recipe_fits_its_dataclasses() -> None:
    from smope.config import from_json
    from smope.networks.smope_s import SmopeSConfig
    from smope.scenes import SceneConfig
    from smope.train.objective import LossConfig

    recipe: Recipe = load_recipe(ROOT / "recipes" / "lmo.toml")
    from_json(SceneConfig, recipe.scenes, "scenes")
    from_json(SmopeSConfig, recipe.network, "network")
    from_json(LossConfig, recipe.loss, "loss")
    assert list(recipe.data.meshes) == [
        "ape",
        "can",
        "cat",
        "driller",
        "duck",
        "eggbox",
        "glue",
        "holepuncher",
    ]
    assert recipe.run.max_minutes is not None
    assert recipe.run.max_minutes >= 20
