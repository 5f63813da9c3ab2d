"""What all readers share: one error that names file and place, strict or counted skipping, plain parsing."""

from __future__ import annotations

import json
import logging
import math
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]

_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{},:]|[^\s\[\]{},:"]+')
_ORTHONORMAL = 0.02  # largest entry of R R^T - I that is taken for rounding


# Where in a file: a line, the keys that lead there in JSON or YAML, or in words; None for the whole file.
Place = int | tuple[str | int, ...] | str | None


class DataError(ValueError):
    """Something in a data set cannot be read: the file, the line and the key in it, and what was expected."""

    def __init__(self, file: Path | str, place: Place, message: str) -> None:
        self.file = Path(file)
        self.line = place if isinstance(place, int) else None
        if isinstance(place, tuple):
            self.line = _line_of_key(self.file, tuple(map(str, place)))
        parts = [str(file)]
        if self.line is not None:
            parts.append(f"line {self.line}")
        if isinstance(place, tuple) and place:
            parts.append("at " + " / ".join(map(str, place)))
        elif isinstance(place, str):
            parts.append(place)
        super().__init__(f"{', '.join(parts)}: {message}")


class Problems:
    """Raises each error at once, or, where not strict, keeps it and lets the reader leave the item out."""

    def __init__(self, strict: bool = True) -> None:
        self.strict = strict
        self.errors: list[DataError] = []

    @contextmanager
    def skip(self) -> Iterator[None]:
        """Around the reading of one item: an error inside ends the item, not (unless strict) the reading."""
        try:
            yield
        except DataError as error:
            if self.strict:
                raise
            self.errors.append(error)

    def report(self, what: str) -> None:
        if self.errors:
            logger.warning("%s: %d item(s) skipped, the first: %s", what, len(self.errors), self.errors[0])


def read_text(file: Path) -> str:
    """The text of a file; missing or undecodable files are named."""
    try:
        return file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(file, None, "file is missing") from None
    except UnicodeDecodeError as error:
        raise DataError(file, None, f"not a UTF-8 text ({error.reason} at byte {error.start})") from None


def read_json(file: Path, kind: type = dict) -> Any:
    """The file's JSON, whose top level must be of type `kind`."""
    text = read_text(file)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(file, error.lineno, f"not valid JSON: {error.msg}") from None
    if not isinstance(content, kind):
        raise DataError(file, None, f"a JSON {kind.__name__} expected, a {type(content).__name__} given")
    return content


def read_yaml(file: Path) -> dict[Any, Any]:
    """The file's YAML, whose top level must be a mapping."""
    text = read_text(file)
    try:
        content = yaml.load(text, Loader=_YAML_LOADER)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise DataError(file, line, f"not valid YAML: {error.problem}") from None
    if not isinstance(content, dict):
        raise DataError(file, None, f"a YAML mapping expected, a {type(content).__name__} given")
    return content


def get(item: Any, key: str | int, file: Path, place: Place) -> Any:
    """`item[key]`, or an error that names the place and the missing key."""
    if not isinstance(item, dict):
        raise DataError(file, place, f"an object with key {key!r} expected, {item!r:.60} given")
    if key not in item:
        raise DataError(file, place, f"key {key!r} is missing")
    return item[key]


def listed(value: Any, file: Path, place: Place) -> list[Any]:
    """`value` if it is a list."""
    if not isinstance(value, list):
        raise DataError(file, place, f"a list expected, {value!r:.60} given")
    return value


def floats(values: Any, shape: tuple[int, ...], file: Path, place: Place) -> FloatArray:
    """`values` as a finite float64 array of `shape`; flat lists are reshaped row by row."""
    if isinstance(values, str):
        values = values.split()
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError(file, place, f"{math.prod(shape)} numbers expected, {values!r:.80} given") from None
    if array.size != math.prod(shape):
        raise DataError(file, place, f"{math.prod(shape)} numbers expected, {array.size} given")
    if not np.isfinite(array).all():
        raise DataError(file, place, f"finite numbers expected, {values!r:.80} given")
    return array.reshape(shape)


def number(value: Any, file: Path, place: Place) -> float:
    """`value` (a number or its text) as a finite float."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise DataError(file, place, f"a finite number expected, {value!r:.60} given")
    return found


def integer(value: Any, file: Path, place: Place) -> int:
    """`value` (a number or its text) as a whole number."""
    try:
        number = float(value)
        if number != int(number):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise DataError(file, place, f"a whole number expected, {value!r:.60} given") from None
    return int(number)


def pose(rotation: Any, translation: Any, file: Path, place: Place) -> FloatArray:
    """A 4x4 pose from a rotation [3, 3], checked but left as stored, and a translation [3].

    Files round (LM-O's rotations are off orthonormal by up to 0.01); what is scaled or mirrored is refused.
    """
    out = np.eye(4)
    out[:3, :3] = floats(rotation, (3, 3), file, place)
    out[:3, 3] = floats(translation, (3,), file, place)
    if np.abs(out[:3, :3] @ out[:3, :3].T - np.eye(3)).max() > _ORTHONORMAL or np.linalg.det(out) < 0:
        raise DataError(file, place, f"not a rotation matrix: {np.round(out[:3, :3], 4).tolist()}")
    return out


def nearest_rotation(matrix: FloatArray) -> FloatArray:
    """The rotation nearest in the Frobenius norm (orthogonal Procrustes), for matrices rounded in a file."""
    u, _, vt = np.linalg.svd(matrix)
    return u @ np.diag([1.0, 1.0, np.linalg.det(u @ vt)]) @ vt


def check_intrinsics(K: FloatArray, file: Path, place: Place) -> FloatArray:
    """K [3, 3] with positive focal lengths and a last row of 0 0 1."""
    if K[0, 0] <= 0 or K[1, 1] <= 0 or not np.allclose(K[2], [0, 0, 1]):
        raise DataError(file, place, f"camera matrix expected, {K.tolist()} given")
    return K


def find_image(folders: Sequence[Path], stem: str, suffixes: Sequence[str]) -> Path:
    """The first `folder/stem + suffix` that exists."""
    for folder in folders:
        for suffix in suffixes:
            candidate = folder / f"{stem}{suffix}"
            if candidate.is_file():
                return candidate
    tried = ", ".join(str(folder) for folder in folders)
    raise DataError(folders[0] / f"{stem}.*", None, f"no such image; looked in {tried}")


def _line_of_key(file: Path, keys: tuple[str, ...]) -> int | None:
    """The line where the value at `keys` begins, or that of what is there of the way to it."""
    try:
        lines = _lines_of_keys(file, file.stat().st_mtime_ns)
    except (OSError, ValueError, yaml.YAMLError):
        return None  # the message then goes without a line
    return next((lines[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in lines), None)


@lru_cache(maxsize=2)
def _lines_of_keys(file: Path, changed: int) -> dict[tuple[str, ...], int]:
    """Only built where something is wrong, and then for the whole file, as more may be wrong in it."""
    text = file.read_text(encoding="utf-8")
    if file.suffix in (".yml", ".yaml"):
        return dict(_yaml_lines(yaml.compose(text, Loader=_YAML_LOADER), ()))
    return dict(_json_lines(text))


def _yaml_lines(node: Any, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
    yield keys, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _yaml_lines(value, (*keys, str(key.value)))
    elif isinstance(node, yaml.SequenceNode):
        for n, value in enumerate(node.value):
            yield from _yaml_lines(value, (*keys, str(n)))


def _json_lines(text: str) -> Iterator[tuple[tuple[str, ...], int]]:
    """(keys, line) of every value of a valid JSON text, of which Python's parser keeps no positions."""
    newlines = [match.start() for match in re.finditer("\n", text)]
    keys: list[str | int] = []  # of the containers that are open: a name in an object, a number in a list
    in_list: list[bool] = []
    awaiting_key = False
    for match in _JSON_TOKEN.finditer(text):
        token = match.group()
        if token == ",":
            awaiting_key = not in_list[-1]
            if in_list[-1]:
                keys[-1] = int(keys[-1]) + 1
        elif token in "]}":
            keys.pop()
            in_list.pop()
            awaiting_key = False
        elif token == ":":
            awaiting_key = False
        elif awaiting_key:
            keys[-1] = json.loads(token)
        else:
            yield tuple(map(str, keys)), bisect_right(newlines, match.start()) + 1
            if token in "[{":
                in_list.append(token == "[")
                keys.append(0 if token == "[" else "")
                awaiting_key = token == "{"
