"""What stands around a compile: one process at a time, tools that are found, and word that it goes on."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def exclusive(path: Path, label: str) -> Iterator[None]:
    """Holds a lock that the system frees even if this process is killed, so that ranks compile once."""
    import fcntl

    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("smope: another process compiles %s; waiting for it", label)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def own_scripts_on_path() -> Iterator[None]:
    """An environment's ninja is found even where the environment's python was started by its full path."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([before, str(Path(sys.executable).parent)])
    try:
        yield
    finally:
        os.environ["PATH"] = before


@contextlib.contextmanager
def progress(label: str, quiet: bool) -> Iterator[None]:
    """One line at the start of a compile, and a note every 15 seconds."""
    if quiet:
        yield
        return
    logger.warning("smope: compiling the CUDA kernel %s, once for this machine (up to about a minute)", label)
    begin, finished = time.monotonic(), threading.Event()

    def note() -> None:
        while not finished.wait(15):
            logger.info("smope: still compiling %s, %.0f s", label, time.monotonic() - begin)

    watcher = threading.Thread(target=note, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()
    logger.info("smope: compiled %s in %.0f s", label, time.monotonic() - begin)
