"""Frozen dataclasses <-> the readable config.json that lies beside the weights.

`to_json` and `from_json` serve any dataclass built of bool, int, float, str, Literal, Optional, tuples,
lists, string-keyed dicts and further dataclasses. Reading is strict: an unknown key, a missing one or a value
of another type is a `ConfigError` that names the place, so that a misspelt setting never passes in silence.
"""

from __future__ import annotations

import difflib
import importlib
import json
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from smope.files import write_atomically

T = TypeVar("T")

FORMAT = 1  # raised when config.json or the names of the weights change so that older readers must refuse

# Which dataclass describes the network of an architecture; imported late, as this file knows no network.
NETWORK_CONFIGS = {
    "smope-s": "smope.networks.smope_s:SmopeSConfig",
    "smope-paper": "smope.networks.smope_paper:SmopePaperConfig",
}


class ConfigError(ValueError):
    """A configuration that cannot be read; the message names the key."""


@dataclass(frozen=True)
class ModelConfig:
    """What a checkpoint says of itself: the content of config.json."""

    architecture: str  # a key of NETWORK_CONFIGS
    network: Any  # the dataclass that NETWORK_CONFIGS names
    objects: tuple[str, ...]  # names of the trained meshes, in the order of the labels
    image_size: tuple[int, int]  # (width, height) in pixels that the weights were trained on
    K: tuple[tuple[float, float, float], ...]  # [3][3] pixels: the camera that goes with `image_size`
    diameters: tuple[float, float]  # metres, the smallest and the largest object trained on
    format: int = FORMAT
    smope_version: str = ""  # the version that wrote the file

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ConfigError(
                f"format {self.format} given, {FORMAT} expected: these weights are of "
                f"smope {self.smope_version or '(version not said)'}; install that one, or save them anew"
            )
        if len(set(self.objects)) != len(self.objects):
            raise ConfigError(f"objects: every name once expected, {list(self.objects)} given")
        if min(self.image_size) < 1:
            raise ConfigError(f"image_size: (width, height) above 0 expected, {self.image_size} given")
        if len(self.K) != 3:
            raise ConfigError(f"K: 3 rows of 3 numbers expected, {len(self.K)} rows given")
        low, high = self.diameters
        if not 0 < low <= high:
            raise ConfigError(
                f"diameters: 0 < smallest <= largest in metres expected, {self.diameters} given"
            )

    @classmethod
    def load(cls, path: Path) -> ModelConfig:
        """Read config.json."""
        data = read_json(path)
        if not isinstance(data, dict):
            raise ConfigError(f"{path}: an object with keys expected, {type(data).__name__} given")
        # Before the keys: a file of another format is told apart from a misspelt one.
        if isinstance(data.get("format"), int) and data["format"] != FORMAT:
            raise ConfigError(
                f"{path}: format {data['format']} given, {FORMAT} expected; "
                f"it was written by smope {data.get('smope_version') or '(version not said)'}"
            )
        network_class = network_config_class(data.get("architecture"), where=str(path))
        try:
            network: Any = from_json(network_class, data.get("network"), where="network")
            return from_json(cls, {**data, "network": network})
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def save(self, path: Path) -> None:
        """Write config.json, whole or not at all."""
        write_atomically(path, dumps(to_json(self)).encode())


def network_config_class(architecture: object, where: str = "config") -> type:
    """The dataclass that describes the network of `architecture`."""
    if not isinstance(architecture, str) or architecture not in NETWORK_CONFIGS:
        raise ConfigError(
            f"{where}: architecture {architecture!r} given, one of {sorted(NETWORK_CONFIGS)} expected; "
            "a newer smope may know it"
        )
    module, name = NETWORK_CONFIGS[architecture].split(":")
    found: type = getattr(importlib.import_module(module), name)
    return found


def read_json(path: Path) -> Any:
    """The content of a JSON file, with one clear error for a file that is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not a JSON file ({error}); it may be damaged or cut short") from None


def dumps(data: Any, width: int = 100) -> str:
    """JSON with one key a line and short lists on one line, so that a person can read and compare it."""
    return _dump(data, indent=0, width=width) + "\n"


def _dump(data: Any, indent: int, width: int) -> str:
    flat = json.dumps(data, ensure_ascii=False, allow_nan=False)
    if not isinstance(data, (dict, list)) or not data:
        return flat
    if isinstance(data, list) and indent + len(flat) <= width:
        return flat
    inner, outer = " " * (indent + 2), " " * indent
    if isinstance(data, dict):
        items = [
            f"{json.dumps(k, ensure_ascii=False)}: {_dump(v, indent + 2, width)}" for k, v in data.items()
        ]
        left, right = "{", "}"
    else:
        items = [_dump(v, indent + 2, width) for v in data]
        left, right = "[", "]"
    return left + "\n" + ",\n".join(inner + item for item in items) + "\n" + outer + right


def to_json(value: Any) -> Any:
    """A dataclass (or a value of one) as plain JSON types; floats must be finite."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{value} given, a finite number expected: JSON has no other")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ConfigError(f"{type(value).__name__} given, a dataclass, number, text, list or dict expected")


def from_json(cls: type[T], data: Any, where: str = "") -> T:
    """Build the dataclass `cls` from JSON types; `where` is the path of keys that errors name."""
    if isinstance(data, cls):
        return data
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where or cls.__name__}: an object with keys expected, {_shown(data)} given")
    known = {f.name: f for f in fields(cls) if f.init}  # type: ignore[arg-type]  # not any type: a dataclass
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise ConfigError(f"{_join(where, str(key))}: unknown key; {hint}")
    missing = [
        name
        for name, f in known.items()
        if name not in data and f.default is MISSING and f.default_factory is MISSING
    ]
    if missing:
        raise ConfigError(f"{_join(where, missing[0])}: missing; {cls.__name__} needs it")
    hints = get_type_hints(cls)
    values = {key: _convert(hints[key], item, _join(where, key)) for key, item in data.items()}
    try:
        return cls(**values)
    except ConfigError as error:  # raised by the dataclass's own check
        raise ConfigError(f"{where}: {error}" if where else str(error)) from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` checked against the type `hint`; lists become tuples and whole numbers floats on the way."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        raise ConfigError(f"{where}: one of {list(arguments)} expected, {_shown(value)} given")
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is tuple:
        return _convert_tuple(arguments, value, where)
    if origin is list and isinstance(value, (list, tuple)):
        return [_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is not None and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {str(k): _convert(arguments[1], item, _join(where, str(k))) for k, item in value.items()}
    if is_dataclass(hint) and isinstance(hint, type):
        return from_json(hint, value, where)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ConfigError(f"{where}: a finite number expected, {value} given")
        return float(value)
    if hint is type(None) and value is None:
        return None
    if hint in (bool, int, str) and type(value) is hint:  # `type`, as True is an int to isinstance
        return value
    raise ConfigError(f"{where}: {_described(hint)} expected, {_shown(value)} given")


def _convert_union(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in choices:
        return None
    others = [choice for choice in choices if choice is not type(None)]
    if len(others) == 1:  # Optional: keep the inner error, which names the inner key
        return _convert(others[0], value, where)
    for choice in others:
        try:
            return _convert(choice, value, where)
        except ConfigError:
            continue
    raise ConfigError(
        f"{where}: {' or '.join(_described(choice) for choice in others)} expected, {_shown(value)} given"
    )


def _convert_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where}: a list expected, {_shown(value)} given")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(value) != len(arguments):
        raise ConfigError(f"{where}: {len(arguments)} values expected, {len(value)} given")
    return tuple(
        _convert(hint, item, f"{where}[{i}]")
        for i, (hint, item) in enumerate(zip(arguments, value, strict=True))
    )


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _described(hint: Any) -> str:
    names: dict[Any, str] = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        type(None): "null",
    }
    if isinstance(get_origin(hint), type) and issubclass(get_origin(hint), Mapping):
        return "a table (key = value)"
    return names.get(hint) or str(getattr(hint, "__name__", hint))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
