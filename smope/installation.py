"""What is installed here, for `smope info` and for reports of faults."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

_PACKAGES = ("numpy", "trimesh", "pillow", "safetensors", "huggingface_hub", "roma", "scipy", "moderngl")


def describe_installation() -> dict[str, str]:
    """Fact -> value, in the order of reading."""
    import torch
    from huggingface_hub import constants

    import smope
    from smope import hub
    from smope.ops import build

    return {
        "smope": f"{smope.__version__} ({Path(smope.__file__).parent})",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "cuda of torch": torch.version.cuda or "none",
        "packages": ", ".join(f"{name} {_version(name)}" for name in _PACKAGES),
        "devices": ", ".join(["cpu", *_gpus()]),
        "g++": _first_line([os.environ.get("CXX", "g++"), "--version"]),
        "nvcc": _last_line(["nvcc", "--version"]),
        **{f"kernel {name}": value for name, value in build.status().items()},
        "bundled models": ", ".join(hub.bundled_names()) or "none",
        "model cache": str(constants.HF_HUB_CACHE),
    }


def _gpus() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"cuda:{i} {p.name}, {p.total_memory / 2**30:.0f} GiB" for i, p in enumerate(found)]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def _first_line(command: list[str]) -> str:
    return _output(command).splitlines()[0]


def _last_line(command: list[str]) -> str:
    return _output(command).splitlines()[-1]


def _output(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return "not found"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"does not run ({type(error).__name__})"
    return done.stdout.strip() or "says nothing"
