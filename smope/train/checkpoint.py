"""Checkpoints that a kill cannot tear.

The full form (`checkpoint.pt`) holds all that a killed run needs to go on as if nothing had been. The small
form (safetensors, fp16) holds the averaged weights alone, to start from elsewhere; it may be split in parts.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from smope.files import write_atomically

log = logging.getLogger(__name__)

FORMAT = "smope-checkpoint-1"
SMALL_FORMAT = "smope-small-1"
_KEYS = frozenset({"format", "model", "ema", "optimiser", "state", "rng", "recipe"})


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged, or not one of ours."""


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write `path`; what was there before stays beside it as `<stem>.previous<suffix>`."""
    if missing := _KEYS - content.keys() - {"format"}:
        raise ValueError(f"checkpoint without {', '.join(sorted(missing))}")
    whole = {**content, "format": FORMAT}

    def write(temporary: Path) -> None:
        torch.save(whole, temporary)
        if path.exists():
            path.replace(previous_of(path))

    write_atomically(path, write)


def previous_of(path: Path) -> Path:
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read one full checkpoint on the CPU; anything but a whole checkpoint of ours is a `CheckpointError`."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        # A file that is no zip archive would be handed to the older, pickle-first reader.
        if not zipfile.is_zipfile(path):
            raise CheckpointError(f"{path}: damaged or not a checkpoint (no archive); nothing was loaded")
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():
                raise CheckpointError(f"{path}: damaged ({broken} does not have its checksum)")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds more than tensors and plain values; refused, nothing was run"
        ) from error
    except (RuntimeError, ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: damaged or truncated ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or not content.keys() >= _KEYS:
        raise CheckpointError(f"{path}: not a training checkpoint of this library ({FORMAT} expected)")
    return content


def load_latest(path: Path) -> dict[str, Any] | None:
    """The last whole checkpoint: `path`, else the one before it; None where the run has not saved any."""
    candidates = [p for p in (path, previous_of(path)) if p.exists()]
    failures: list[CheckpointError] = []
    for candidate in candidates:
        try:
            content = load_checkpoint(candidate)
        except CheckpointError as error:
            log.warning("%s", error)
            failures.append(error)
        else:
            return content
    if failures:
        raise failures[0]
    return None


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _parts(tensors: Mapping[str, Tensor], limit: int | None) -> list[dict[str, Tensor]]:
    parts: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if limit is not None and size > limit:
            raise ValueError(f"{name} alone takes {size / 2**20:.1f} MiB, more than a part may have")
        if limit is not None and used + size > limit and parts[-1]:
            parts.append({})
            used = 0
        parts[-1][name] = tensor
        used += size
    return parts


def save_small(
    path: Path,
    weights: Mapping[str, Tensor],
    max_part_mib: float | None = None,
    note: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write the weights as fp16 safetensors to `path`, or to `<stem>-1-of-3<suffix>` ... if split.

    Whole-number entries keep their type. Returns the files; an earlier save under the same name is gone.
    """
    small = {
        name: (value.half() if value.is_floating_point() else value).detach().cpu().contiguous()
        for name, value in weights.items()
    }
    for name, value in small.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{name} has values that fp16 cannot hold, or that are not finite")
    # Room for the header, which holds some 150 bytes a tensor.
    limit = None if max_part_mib is None else int(max_part_mib * 2**20) - 200 * len(small) - 4096
    parts = _parts(small, limit)
    shared = {**(note or {}), "format": SMALL_FORMAT, "sha256": _digest(small), "parts": str(len(parts))}
    stale = set(small_files(path))
    written = []
    for number, part in enumerate(parts, start=1):
        name = path.name if len(parts) == 1 else f"{path.stem}-{number}-of-{len(parts)}{path.suffix}"
        target = path.with_name(name)
        write_atomically(target, save(part, metadata={**shared, "part": str(number)}))
        written.append(target)
    for file in stale - set(written):
        file.unlink()
    return written


def small_files(path: Path) -> list[Path]:
    """The files that a small checkpoint named `path` consists of, in order."""
    if path.is_file():
        return [path]
    return sorted(
        path.parent.glob(f"{path.stem}-*-of-*{path.suffix}"), key=lambda p: int(p.stem.rsplit("-", 3)[1])
    )


def load_small(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights as float32, and the note, of a small checkpoint given by its name or by its only file."""
    files = small_files(path)
    if not files:
        raise CheckpointError(f"{path}: no such small checkpoint, whole or in parts")
    weights: dict[str, Tensor] = {}
    note: dict[str, str] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as reader:
                header = reader.metadata() or {}
                weights.update({name: reader.get_tensor(name) for name in reader.keys()})  # noqa: SIM118  # not a dict
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{file}: damaged, truncated or not safetensors ({error})") from error
        if header.get("format") != SMALL_FORMAT:
            raise CheckpointError(f"{file}: not a small checkpoint of this library ({SMALL_FORMAT} expected)")
        if note and header["sha256"] != note["sha256"]:
            raise CheckpointError(f"{file}: belongs to another save than {files[0]}")
        note = header
    if len(files) != int(note["parts"]):
        raise CheckpointError(f"{path}: {len(files)} of its {note['parts']} parts are here")
    if _digest(weights) != note["sha256"]:
        raise CheckpointError(f"{path}: damaged (its values do not have the checksum they were saved with)")
    plain = {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
    own = {"format", "sha256", "parts", "part"}
    return plain, {key: value for key, value in note.items() if key not in own}
