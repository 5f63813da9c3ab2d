"""The `smope` command: thin over the library.

Each subcommand is a dataclass whose fields are its options, one file a group of them. What is heavy is
imported when a command runs, so that `--help` is quick.
"""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro
from tyro.conf import subcommand

import smope
from smope.cli.common import UsageError, clutter_files, load_objects, mesh_files, pose_table
from smope.cli.convert import Convert
from smope.cli.evaluate import Evaluate
from smope.cli.export import Export
from smope.cli.fit import Fit
from smope.cli.installation import Build, Info
from smope.cli.predict import Demo, Predict
from smope.cli.scenes import Scenes
from smope.cli.serve import Serve

__all__ = [
    "Build", "Convert", "Demo", "Evaluate", "Export", "Fit", "Info", "Predict", "Scenes", "Serve",
    "UsageError", "clutter_files", "load_objects", "main", "mesh_files", "pose_table", "user_message",
]  # fmt: skip

_USER_ERROR, _INTERRUPTED = 2, 130
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

Command = (
    Annotated[Demo, subcommand("demo")]
    | Annotated[Predict, subcommand("predict")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Fit, subcommand("fit")]
    | Annotated[Scenes, subcommand("scenes")]
    | Annotated[Convert, subcommand("convert")]
    | Annotated[Build, subcommand("build")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Serve, subcommand("serve")]
    | Annotated[Info, subcommand("info")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0, 2 for what the user can put right, 130 for Ctrl-C."""
    command = tyro.cli(
        Command,
        prog="smope",
        description=smope.__doc__,
        args=argv,
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone),
    )
    logging.basicConfig(format="smope: %(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("smope").setLevel(logging.INFO)
    try:
        command.run()
    except KeyboardInterrupt:
        print("smope: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        print(f"smope: {message.removeprefix('smope: ')}", file=sys.stderr)
        return _USER_ERROR
    return 0


def user_message(error: Exception) -> str | None:
    """One line, if the error is one that the user can put right; None for a fault in the program.

    Those are the library's own errors, a `ValueError` that the library raised itself, files that are not
    there or not to be opened, a full disk, and packages of an extra that is not installed.
    """
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("smope"):
        return f'this command needs the package {error.name!r}: pip install ".[all]" in a clone of smope'
    own = type(error).__module__.split(".")[0] == "smope"
    files = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
    full = isinstance(error, OSError) and error.errno in _NO_ROOM
    if own or full or isinstance(error, files) or (isinstance(error, ValueError) and _raised_here(error)):
        return " ".join(str(error).split())
    return None


def _raised_here(error: Exception) -> bool:
    """Whether the line that raised is one of this package's."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).split(".")[0] == "smope"
