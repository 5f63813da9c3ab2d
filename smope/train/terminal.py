"""Whoever sits before the terminal: Ctrl-C ends a run with nothing lost, and a bar shows how far it is."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

log = logging.getLogger(__name__)


@dataclass
class Interrupt:
    asked: bool = False


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Ctrl-C or a polite kill is noted, for the loop to end after its step; a second one ends at once."""
    interrupt = Interrupt()

    def note(number: int, frame: object) -> None:
        if interrupt.asked:
            raise KeyboardInterrupt
        interrupt.asked = True
        log.warning("%s: stopping after this step, and saving", signal.Signals(number).name)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever started it there ends it
        yield interrupt
        return
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def progress_bar(wanted: bool) -> Iterator[Callable[[float, int], None]]:
    """A function to tell the progress in 0..1 and the step; shown on terminals alone, not in log files."""
    console = Console(stderr=True)
    if not (wanted and console.is_terminal):
        yield lambda progress, step: None
        return
    shown = (
        TextColumn("step {task.fields[step]}"),
        BarColumn(),
        TextColumn("{task.percentage:.1f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*shown, console=console) as bars:
        bar = bars.add_task("training", total=1.0, step=0)
        yield lambda progress, step: bars.update(bar, completed=progress, step=step)
