"""config.py: what goes into config.json comes back equal; what does not belong there is refused by name."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smope import config
from smope.config import ConfigError, ModelConfig, dumps, from_json, to_json


@dataclass(frozen=True)
class Inner:
    width: int = 8
    rate: float = 0.5
    kind: Literal["small", "large"] = "small"


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    parts: tuple[Inner, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    limit: float | None = None
    table: dict[str, list[float]] = field(default_factory=dict)
    on: bool = False
    either: int | str = 0


finite = st.floats(allow_nan=False, allow_infinity=False)
inners = st.builds(Inner, width=st.integers(), rate=finite, kind=st.sampled_from(["small", "large"]))
outers = st.builds(
    Outer,
    name=st.text(),
    inner=inners,
    parts=st.lists(inners, max_size=3).map(tuple),
    pair=st.tuples(st.integers(), finite),
    limit=st.none() | finite,
    table=st.dictionaries(st.text(), st.lists(finite, max_size=3), max_size=3),
    on=st.booleans(),
    either=st.integers() | st.text(),
)


@given(outers)
def test_round_trip_through_the_text(value: Outer) -> None:
    text = dumps(to_json(value))
    assert json.loads(text) == to_json(value)  # our layout says the same as json's own reading of it
    assert from_json(Outer, json.loads(text)) == value


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "name: missing; Outer needs it"),
        ({"name": "a", "limits": 1}, "limits: unknown key; did you mean 'limit'"),
        ({"name": "a", "zzz": 1}, "zzz: unknown key; known keys: name, inner"),
        ({"name": 3}, "name: text expected, 3 given"),
        ({"name": "a", "inner": {"width": 8.0}}, r"inner.width: a whole number expected, 8.0 given"),
        ({"name": "a", "inner": {"width": True}}, r"inner.width: a whole number expected, True given"),
        ({"name": "a", "inner": {"rate": "1"}}, r"inner.rate: a number expected, '1' given"),
        ({"name": "a", "inner": {"rate": math.nan}}, r"inner.rate: a finite number expected, nan given"),
        ({"name": "a", "inner": {"kind": "huge"}}, r"inner.kind: one of \['small', 'large'\] expected"),
        ({"name": "a", "inner": [1]}, r"inner: an object with keys expected, \[1\] given"),
        ({"name": "a", "parts": [{}, {"wide": 1}]}, r"parts\[1\].wide: unknown key; did you mean 'width'"),
        ({"name": "a", "pair": [1, 2, 3]}, "pair: 2 values expected, 3 given"),
        ({"name": "a", "pair": 1}, "pair: a list expected, 1 given"),
        ({"name": "a", "limit": "x"}, "limit: a number expected, 'x' given"),
        ({"name": "a", "table": {"k": ["x"]}}, r"table.k\[0\]: a number expected, 'x' given"),
        ({"name": "a", "on": 1}, "on: true or false expected, 1 given"),
        ({"name": "a", "either": None}, "either: a whole number or text expected, None given"),
    ],
)
def test_refusals_name_the_key(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_json(Outer, data)


def test_whole_numbers_serve_as_floats_and_lists_as_tuples() -> None:
    value = from_json(Outer, {"name": "a", "limit": 3, "pair": [1, 2]})
    assert value.limit == 3.0
    assert isinstance(value.limit, float)
    assert value.pair == (1, 2.0)


@pytest.mark.parametrize("value", [math.inf, math.nan, {"a": math.inf}, object()])
def test_only_json_types_are_written(value: object) -> None:
    with pytest.raises(ConfigError, match="expected"):
        to_json(value)


def test_the_text_keeps_a_matrix_row_on_a_line() -> None:
    text = dumps({"K": [[572.4, 0, 325.3], [0, 573.6, 242.0], [0, 0, 1]], "names": ["ape"]}, width=40)
    assert "    [572.4, 0, 325.3],\n    [0, 573.6, 242.0],\n    [0, 0, 1]\n" in text
    assert '"names": ["ape"]' in text


@pytest.fixture
def model_config(monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    monkeypatch.setitem(config.NETWORK_CONFIGS, "toy", f"{__name__}:Inner")
    return ModelConfig(
        architecture="toy",
        network=Inner(width=16, kind="large"),
        objects=("ape", "duck"),
        image_size=(640, 480),
        K=((572.4114, 0.0, 325.2611), (0.0, 573.57043, 242.04899), (0.0, 0.0, 1.0)),
        diameters=(0.1, 0.3),
        smope_version="0.1.0",
    )


def test_model_config_comes_back_equal(model_config: ModelConfig, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    model_config.save(path)
    assert ModelConfig.load(path) == model_config
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]  # no temporary file stays


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architecture": "vast"},
            r"architecture 'vast' given, one of \['smope-paper', 'smope-s', 'toy'\] expected",
        ),
        ({"format": 99}, r"format 99 given, 1 expected; it was written by smope 0.1.0"),
        ({"network": {"widht": 1}}, r"network.widht: unknown key; did you mean 'width'"),
        ({"network": None}, r"network: an object with keys expected, None given"),
        ({"image_size": [640, 0]}, r"image_size: \(width, height\) above 0 expected"),
        ({"objects": ["ape", "ape"]}, "objects: every name once expected"),
        ({"K": [[1, 0, 0], [0, 1, 0]]}, "K: 3 rows of 3 numbers expected, 2 rows given"),
        ({"diameters": [0.3, 0.1]}, "diameters: 0 < smallest <= largest"),
        ({"colour": "red"}, "colour: unknown key"),
    ],
)
def test_a_changed_file_is_refused(
    model_config: ModelConfig, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**to_json(model_config), **change}))
    with pytest.raises(ConfigError, match=message) as caught:
        ModelConfig.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\x80\x04\xff", b"[]", b"[" * 100_000], ids=len)
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.load(path)
