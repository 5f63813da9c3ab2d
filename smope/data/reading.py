"""What all readers share: one error that names file and place, strict or counted skipping, plain parsing."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]

_ORTHONORMAL = 0.02  # largest entry of R R^T - I that is taken for rounding


class DataError(ValueError):
    """Something in a data set cannot be read: the file, the line or key in it, and what was expected."""

    def __init__(self, file: Path | str, where: str | int | None, message: str) -> None:
        place = f", line {where}" if isinstance(where, int) else f", {where}" if where else ""
        super().__init__(f"{file}{place}: {message}")
        self.file, self.where = Path(file), where


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
    try:
        content = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise DataError(file, error.lineno, f"not valid JSON: {error.msg}") from None
    if not isinstance(content, kind):
        raise DataError(file, None, f"a JSON {kind.__name__} expected, a {type(content).__name__} given")
    return content


def get(item: Any, key: str, file: Path, where: str | int) -> Any:
    """`item[key]`, or an error that names the place and the missing key."""
    if not isinstance(item, dict):
        raise DataError(file, where, f"an object with key {key!r} expected, {item!r:.60} given")
    if key not in item:
        raise DataError(file, where, f"key {key!r} is missing")
    return item[key]


def floats(values: Any, shape: tuple[int, ...], file: Path, where: str | int) -> FloatArray:
    """`values` as a finite float64 array of `shape`; flat lists are reshaped row by row."""
    if isinstance(values, str):
        values = values.split()
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError(file, where, f"{math.prod(shape)} numbers expected, {values!r:.80} given") from None
    if array.size != math.prod(shape):
        raise DataError(file, where, f"{math.prod(shape)} numbers expected, {array.size} given")
    if not np.isfinite(array).all():
        raise DataError(file, where, f"finite numbers expected, {values!r:.80} given")
    return array.reshape(shape)


def integer(value: Any, file: Path, where: str | int) -> int:
    """`value` (a number or its text) as a whole number."""
    try:
        number = float(value)
        if number != int(number):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise DataError(file, where, f"a whole number expected, {value!r:.60} given") from None
    return int(number)


def pose(rotation: Any, translation: Any, file: Path, where: str | int) -> FloatArray:
    """A 4x4 pose from a rotation [3, 3], checked but left as stored, and a translation [3].

    Files round (LM-O's rotations are off orthonormal by up to 0.01); what is scaled or mirrored is refused.
    """
    out = np.eye(4)
    out[:3, :3] = floats(rotation, (3, 3), file, where)
    out[:3, 3] = floats(translation, (3,), file, where)
    if np.abs(out[:3, :3] @ out[:3, :3].T - np.eye(3)).max() > _ORTHONORMAL or np.linalg.det(out) < 0:
        raise DataError(file, where, f"not a rotation matrix: {np.round(out[:3, :3], 4).tolist()}")
    return out


def nearest_rotation(matrix: FloatArray) -> FloatArray:
    """The rotation nearest in the Frobenius norm (orthogonal Procrustes), for matrices rounded in a file."""
    u, _, vt = np.linalg.svd(matrix)
    return u @ np.diag([1.0, 1.0, np.linalg.det(u @ vt)]) @ vt


def check_intrinsics(K: FloatArray, file: Path, where: str | int) -> FloatArray:
    """K [3, 3] with positive focal lengths and a last row of 0 0 1."""
    if K[0, 0] <= 0 or K[1, 1] <= 0 or not np.allclose(K[2], [0, 0, 1]):
        raise DataError(file, where, f"camera matrix expected, {K.tolist()} given")
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
