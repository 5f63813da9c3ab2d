"""Where weights come from and go to: a bundled name, a folder, or a Hugging Face id.

A model is a folder of three files: `config.json` (readable), `model.safetensors` (tensors only: nothing in it
can run) and `MODEL_CARD.md` (data, licences, recipe, scores).
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from smope.files import write_atomically

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "MODEL_CARD.md"
CHECKSUM = "sha256"  # of the tensors, in the header of the weights
MODEL_FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE)
BUNDLED = Path(__file__).parent / "weights"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NOT_TENSORS = {
    b"PK\x03\x04": "a zip archive, as torch.save writes",
    b"\x80": "a Python pickle",
    b"version https://git-lfs": "a Git LFS pointer, which stands for the file (`git lfs pull` fetches it)",
}


class WeightsNotFoundError(FileNotFoundError):
    """No model of that name or in that place; the message says where it was looked for."""


class WeightsError(ValueError):
    """A file of weights that is damaged, cut short, or none at all."""


def bundled_names() -> list[str]:
    """Names of the models that came with the package."""
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{CONFIG_FILE}"))


def resolve(
    name_or_path: str | Path,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a model: of a bundled name, a folder itself, or fetched from the Hugging Face hub.

    `revision` (branch, tag or commit), `cache_dir` and `local_files_only` concern the hub alone.
    """
    name = str(name_or_path)
    if name in bundled_names() and (isinstance(name_or_path, str) or not name_or_path.exists()):
        if Path(name).is_dir():
            logger.warning(
                "%r is both a bundled model and a folder here; the bundled one is taken ('./%s' is not)",
                name,
                name,
            )
        folder = BUNDLED / name
    elif Path(name).expanduser().exists():
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise WeightsNotFoundError(
                f"{folder}: a file given, the folder expected that holds {' and '.join(MODEL_FILES[:2])}"
            )
    elif isinstance(name_or_path, str) and _HUB_ID.fullmatch(name):
        return _checked(_fetch(name, revision, cache_dir, local_files_only))
    else:
        raise WeightsNotFoundError(
            f"no model {name!r}: neither bundled ({', '.join(bundled_names()) or 'none is'}) nor a folder "
            f"({Path(name).expanduser().absolute()}), and a Hugging Face id has the form owner/name"
        )
    if revision is not None:
        raise ValueError(
            f"revision={revision!r} given for {folder}, which has none: only models on the hub have"
        )
    return _checked(folder)


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model's folder, on the CPU and in the types of the file; damaged ones are refused."""
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        raise WeightsNotFoundError(f"{path}: no such file; a model's folder holds {', '.join(MODEL_FILES)}")
    with path.open("rb") as file:
        start = file.read(32)
    try:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as opened:
            expected = (opened.metadata() or {}).get(CHECKSUM)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        for mark, what in _NOT_TENSORS.items():
            # A safetensors file begins with the length of its header, which may begin as a pickle does.
            if start.startswith(mark) and start[8:9] != b"{":
                raise WeightsError(f"{path}: {what}, not a safetensors file; it was not opened") from None
        raise WeightsError(
            f"{path}: {path.stat().st_size} bytes that are no whole safetensors file ({error}); "
            "it is damaged or cut short: fetch or copy it again"
        ) from None
    if expected is not None and expected != _checksum(tensors):
        raise WeightsError(
            f"{path}: the tensors are not those that were saved (their {CHECKSUM} differs); "
            "the file is damaged: fetch or copy it again"
        )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise WeightsError(
                f"{path}: {name} holds values that are not finite; the file is damaged, or the training "
                "that made it failed"
            )
    return tensors


def save_weights(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    """Write the tensors into a model's folder, whole or not at all, with a checksum; types are kept."""
    path = Path(folder) / WEIGHTS_FILE
    # Copies, as safetensors refuses views and tensors that share memory.
    owned = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in sorted(tensors.items())
    }
    # One entry only: safetensors writes several in a random order, and the same tensors give the same file.
    metadata = {CHECKSUM: _checksum(owned)}
    write_atomically(path, lambda temporary: save_file(owned, temporary, metadata=metadata))
    return path


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Of names, types, shapes and values; safetensors itself sees no change among the values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a smope model",
) -> str:
    """Upload a model's folder to the Hugging Face hub; returns the commit's address.

    The repository is made where there is none. The card goes up as README.md too, which the hub shows.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    folder = _checked(Path(folder))
    files = [(name, folder / name) for name in MODEL_FILES if (folder / name).is_file()]
    if (folder / CARD_FILE).is_file():
        files.append(("README.md", folder / CARD_FILE))
    api = HfApi(token=token, library_name="smope")
    api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.create_commit(
        repo_id,
        operations=[CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files],
        commit_message=commit_message,
        revision=revision,
    )
    return str(commit.commit_url)


def _checked(folder: Path) -> Path:
    missing = [name for name in MODEL_FILES[:2] if not (folder / name).is_file()]
    if missing:
        raise WeightsNotFoundError(
            f"{folder}: no {' and no '.join(missing)} in it, so it holds no smope model"
        )
    return folder


def _fetch(repo_id: str, revision: str | None, cache_dir: str | Path | None, local_files_only: bool) -> Path:
    # Imported here: huggingface_hub takes a second, and bundled models need none of it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted: dict[str, Any] = {
        "revision": revision,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    where = f"{repo_id!r} on the Hugging Face hub" + (f" at revision {revision!r}" if revision else "")
    bundled = f"bundled with smope: {', '.join(bundled_names()) or 'none'}"
    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(MODEL_FILES), **wanted))
    except LocalEntryNotFoundError as error:
        cause = "local_files_only was asked for" if local_files_only else "the hub cannot be reached"
        raise WeightsNotFoundError(
            f"{where} is not in the local cache and {cause}; "
            f"fetch it once with a connection, or give a folder ({bundled})"
        ) from error
    except GatedRepoError as error:
        raise WeightsNotFoundError(
            f"{where} is gated: accept its terms on its page, then `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise WeightsNotFoundError(f"{where}: no such revision") from error
    except RepositoryNotFoundError as error:
        raise WeightsNotFoundError(
            f"{where}: no such repository, or it is private and you are not logged in; "
            f"there is no folder of that name either ({bundled})"
        ) from error
    except HfHubHTTPError as error:
        raise WeightsNotFoundError(f"{where}: the hub answered with an error ({error})") from error
