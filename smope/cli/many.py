"""`smope predict ... --out results.jsonl`: many images, with a bar, on several devices if asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from smope.cli import common
from smope.cli.common import UsageError

if TYPE_CHECKING:
    from smope.cli.predict import Predict

_SECONDS_BETWEEN_LINES = 60  # of progress, where there is no terminal


def predict_into_file(command: Predict, images: Sequence[str]) -> None:
    """Add a line an image to `command.out`; what stands there already is not done again."""
    from smope.many_images import predict_files
    from smope.results_file import name_of_run

    devices = _devices(command.device)
    options = command.options()
    looked_for = {"objects": command.objects, "meshes": command.meshes, "units": command.units}
    run = name_of_run({**options, **looked_for, "model": command.model, "symmetries": command.symmetries})
    start = time.perf_counter()
    with _progress(len(images)) as tell:
        tally = predict_files(
            command.open_model,
            images,
            command.out,
            devices,
            run,
            {**options, "batch_size": command.batch, "workers": command.workers},
            tell,
        )
    seconds = time.perf_counter() - start
    said = [f"{tally.written} images in {seconds:.1f} s ({tally.written / seconds:.1f} a second)"]
    if tally.before:
        said.append(f"{tally.before} were there already")
    if tally.unreadable:
        said.append(f"{tally.unreadable} left out, as they cannot be used")
    if tally.unreadable and not tally.written + tally.before:
        raise UsageError(f"none of {len(images)} images can be used; the first: {tally.first_error}")
    print(f"{'; '.join(said)} -> {command.out}")
    if tally.unreadable and command.strict:
        raise UsageError(f"{tally.unreadable} of {len(images)} images cannot be used (named above)")


def _devices(given: str | None) -> list[str]:
    """ "cuda:0,cuda:1", "all", or one"""
    if given != "all":
        devices = [common.device_or_best(name.strip()) for name in given.split(",")] if given else []
        devices = devices or [common.device_or_best(None)]
        if len(set(devices)) < len(devices) and any(name.startswith("cuda") for name in devices):
            raise UsageError(f"--device {given}: a GPU is named twice")
        return devices
    import torch

    if not torch.cuda.is_available():
        raise UsageError("--device all: there is no GPU")
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())]


@contextmanager
def _progress(count: int) -> Iterator[Callable[[str, str | None], None]]:
    """A function to tell of each image: a bar on a terminal, else a line a minute; and a line a bad image."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False, emoji=False)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    start = told = time.perf_counter()
    done = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        bar = bars.add_task("images", total=count, rate="")

        def tell(image: str, error: str | None) -> None:
            nonlocal done, told
            done += 1
            now = time.perf_counter()
            rate = f"{done / (now - start):.1f} a second"
            bars.update(bar, completed=done, rate=rate)
            if error is not None:
                console.print(f"smope: left out: {error if image in error else f'{image}: {error}'}")
            if not console.is_terminal and now - told > _SECONDS_BETWEEN_LINES:
                told = now
                console.print(f"smope: {done} of {count} images, {rate}")

        yield tell
