"""The rasterising kernel compiled by g++, for tests on machines without a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from smope.scenes.raster_cuda import declare

ROOT = Path(__file__).parents[1]
KERNEL = ROOT / "smope" / "_ext" / "raster.cu"


def build_for_host(folder: Path) -> ctypes.CDLL:
    """The kernel's own source over a stand-in for CUDA."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to compile the kernel for the CPU")
    target = folder / "raster.so"
    command = ["g++", "-std=c++17", "-O2", "-Wall", "-Werror", "-shared", "-fPIC"]
    # Another kernel's stand-in has variables of the same names, not to become one in this process.
    command += ["-fno-gnu-unique", "-x", "c++", "-include"]
    command += [str(ROOT / "tests/cuda_on_host/raster_on_host.hpp"), str(KERNEL), "-o", str(target)]
    subprocess.run(command, check=True)
    return declare(ctypes.CDLL(str(target)))
