"""Files of images on one or several devices -> a file of results that a stopped run goes on with."""

from __future__ import annotations

import glob
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from smope.poses import PosesError
from smope.results_file import ResultsFile, result_line

if TYPE_CHECKING:
    from smope.model import SMOPE

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}

OpenModel = Callable[[str], "SMOPE"]  # a device -> the model on it; picklable for several devices
Tell = Callable[[str, str | None], None]  # an image, and what is wrong with it if anything is
Outcome = tuple[str, bytes | None, str]  # image, its line or None, why there is none


@dataclass(frozen=True)
class Tally:
    """How many images there were of each kind."""

    written: int
    unreadable: int
    before: int  # stood in the file already
    first_error: str = ""


class WorkerError(RuntimeError):
    """A process that predicted on one device is gone."""


def image_files(sources: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Files, folders (with all below them), patterns such as "a/**/*.png", lists (.txt, a path a line; - is
    standard input) -> paths in order. Those of a list are not looked for here."""
    found: list[str] = []
    for given in sources:
        source, path = os.fspath(given), Path(given)
        if source == "-" or (path.suffix == ".txt" and path.is_file()):
            text = sys.stdin.read() if source == "-" else path.read_text(encoding="utf-8")
            lines = (line.strip() for line in text.splitlines())
            names = [str(Path(line)) for line in lines if line and not line.startswith("#")]
        elif path.is_dir():
            names = list(_below(path))
        elif path.exists() or not glob.has_magic(source):
            if not path.is_file():
                raise FileNotFoundError(f"{source}: no such image")
            names = [str(path)]
        else:
            matches = glob.glob(source, recursive=True)  # noqa: PTH207  # Path.glob takes no absolute ones
            names = sorted(name for name in matches if Path(name).is_file())
        if not names:
            raise FileNotFoundError(f"{source}: no image in it ({', '.join(sorted(SUFFIXES))})")
        found += names
    return found


def _below(folder: Path) -> Iterator[str]:
    """Images in a folder and those below it, sorted; hidden ones, as some systems add, are left out."""
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                yield str(Path(where) / name)


def predict_files(
    open_model: OpenModel,
    images: Sequence[str],
    out: str | os.PathLike[str],
    devices: Sequence[str],
    run: str,
    options: Mapping[str, Any] | None = None,
    tell: Tell = lambda image, error: None,
) -> Tally:
    """Predict the images that do not yet stand in the file `out`, and add a line for each, once.

    `run` names the settings (`results_file.name_of_run`); a file of others is refused. `options` are those of
    `SMOPE.stream`. With one device the model runs in this process, with several in a process each.
    """
    written = unreadable = 0
    first_error = ""
    with ResultsFile(out, run) as file:
        wanted = list(dict.fromkeys(images))
        left = [image for image in wanted if image not in file.done]
        before = len(wanted) - len(left)
        if not left:
            return Tally(0, 0, before)
        job = (open_model, run, dict(options or {}))
        if len(devices) == 1:
            outcomes = _predicted(*job, devices[0], left)
        else:
            outcomes = _predicted_by_many(*job, devices, left)
        with closing(outcomes):
            for image, line, error in outcomes:
                if line is None:
                    unreadable += 1
                    first_error = first_error or f"{image}: {error}"
                else:
                    file.add(line)
                    written += 1
                tell(image, error if line is None else None)
    return Tally(written, unreadable, before, first_error)


def _predicted(
    open_model: OpenModel, run: str, options: dict[str, Any], device: str, images: Sequence[str]
) -> Generator[Outcome, None, None]:
    model = open_model(device)
    with closing(model.stream(images, **options)) as results:
        for one in results:
            if one.poses is None:
                yield one.source, None, str(one.error)
                continue
            try:
                yield one.source, result_line(one.source, run, one.poses), ""
            except PosesError as error:
                yield one.source, None, str(error)


def _predicted_by_many(
    open_model: OpenModel, run: str, options: dict[str, Any], devices: Sequence[str], images: Sequence[str]
) -> Generator[Outcome, None, None]:
    """Every n-th image to each of n processes; what they find comes back through a pipe each.

    A pipe holds little, so that a process waits for the writing, and it breaks when this process is killed,
    which ends the others.
    """
    with _processes(open_model, run, options, devices, images) as pipes:
        while pipes:
            for pipe in wait(list(pipes)):
                assert isinstance(pipe, Connection)
                try:
                    message = pipe.recv()
                except EOFError:
                    raise WorkerError(
                        f"the process on {pipes[pipe]} ended before its images did, as if killed for want of "
                        "memory; what is written stays, and the same command goes on"
                    ) from None
                if isinstance(message, BaseException):
                    raise message
                if message is None:
                    del pipes[pipe]
                else:
                    yield message


@contextmanager
def _processes(
    open_model: OpenModel, run: str, options: dict[str, Any], devices: Sequence[str], images: Sequence[str]
) -> Iterator[dict[Connection, str]]:
    """One process a device, and the pipe from each; none is left behind."""
    import torch.multiprocessing as mp

    context = mp.get_context("spawn")
    threads = max(1, torch.get_num_threads() // len(devices))
    pipes, processes = {}, []
    try:
        for i, device in enumerate(devices):
            reading, writing = context.Pipe(duplex=False)
            job = (open_model, run, options, device, images[i :: len(devices)])
            process = context.Process(target=_work, args=(writing, threads, job), daemon=True)
            process.start()
            writing.close()  # here, so that the pipe ends with the process
            pipes[reading] = device
            processes.append(process)
        yield pipes
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _work(
    pipe: Connection, threads: int, job: tuple[OpenModel, str, dict[str, Any], str, Sequence[str]]
) -> None:
    """Of one process: send each outcome, then None; or the error that ended it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal; the first one ends these
    torch.set_num_threads(threads)
    try:
        for outcome in _predicted(*job):
            pipe.send(outcome)
        pipe.send(None)
    except (BrokenPipeError, ConnectionResetError):  # nobody reads on
        return
    except Exception as error:
        pipe.send(_sendable(error))


def _sendable(error: Exception) -> Exception:
    """It, or one that says the same, with its traceback as a note, which a pipe would not carry."""
    trace = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # pickle raises whatever an error's own class does
        error = WorkerError(f"{type(error).__name__}: {error}")
    error.add_note(f"Raised in another process:\n{trace}")
    return error
