"""Poses of many images in one file, a JSON object a line, that a stopped run goes on with.

A line is `{"image": path, "run": settings, ...}` with what `Poses.to_dict` gives. Only a whole line counts:
what a killed process left half-written is cut off before the next one is added.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from smope.poses import Poses, PosesError

_START = re.compile(rb'\{"image": ("(?:[^"\\]|\\.)*"), "run": "(\w+)", ')


class ResultsError(ValueError):
    """A file of results that cannot be gone on with."""


def result_line(image: str, run: str, poses: Poses) -> bytes:
    """One line of the file, with its end; the keys by which it is known again stand first."""
    document = {"image": image, "run": run, **poses.to_dict()}
    return json.dumps(document, allow_nan=False).encode("ascii") + b"\n"


def read_results(path: str | os.PathLike[str]) -> Iterator[tuple[str, Poses]]:
    """The image and the poses of each whole line."""
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                document = json.loads(line)
                yield document["image"], Poses.from_dict(document)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise PosesError(f"{path}, line {number}: no result of smope predict ({error})") from error


def name_of_run(settings: Mapping[str, Any]) -> str:
    """A few characters that tell runs with other settings apart."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


class ResultsFile:
    """The file, open for one process to add to; `done` are the images that stand in it already."""

    def __init__(self, path: str | os.PathLike[str], run: str) -> None:
        self.path = Path(path)
        self.done: set[str] = set()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        try:
            self._hold_alone()
            self._go_on(run)
        except BaseException:
            self._file.close()
            raise

    def add(self, line: bytes) -> None:
        """Write a line and hand it to the system, which keeps it whatever becomes of this process."""
        self._file.write(line)
        self._file.flush()

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            os.fsync(self._file.fileno())
        self._file.close()

    def _hold_alone(self) -> None:
        try:
            import fcntl
        except ModuleNotFoundError:  # a system without it: two runs on one file are the user's to avoid
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # freed even if this process is killed
        except BlockingIOError:
            raise ResultsError(
                f"{self.path}: another smope predict is writing it; wait for it, or name another file"
            ) from None

    def _go_on(self, run: str) -> None:
        """Read what is done, cut a half-written last line, and stand at the end."""
        end = _read_done(self._file, self.path, run, self.done)
        self._file.truncate(end)


def _read_done(file: BinaryIO, path: Path, run: str, done: set[str]) -> int:
    """Add the images of all whole lines to `done`; gives where the last of them ends."""
    file.seek(0)
    end = 0
    for number, line in enumerate(file, start=1):
        if not line.endswith(b"\n"):
            break
        start = _START.match(line)
        if start is None:
            raise ResultsError(f"{path}, line {number}: no result of smope predict; name another file")
        if start[2].decode() != run:
            raise ResultsError(
                f"{path} was written with other settings (model, meshes, camera, threshold or top_k); "
                "name another file, or delete this one"
            )
        done.add(json.loads(start[1]))
        end += len(line)
    return end
