"""Whole files on the disk: what is written is there after a power cut too, or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from smope.atomic import atomic_path


def write_atomically(path: str | Path, content: bytes | Callable[[Path], None]) -> None:
    """Put `content` at `path` through a temporary file beside it, flushed to disk before it takes its name.

    `content` may be a function that writes the temporary file itself (for libraries that take a path).
    Who may read it follows the umask, also where such a library makes private files, as safetensors does.
    """
    with atomic_path(path) as temporary:
        if callable(content):
            temporary.touch()
            mode = temporary.stat().st_mode
            content(temporary)
            temporary.chmod(mode)
        else:
            temporary.write_bytes(content)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
