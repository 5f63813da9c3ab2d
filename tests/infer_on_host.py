"""The recorded pass's own kernels compiled by g++, for tests on machines without a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from torch import Tensor

from smope.inference.kernels import Kernel, _stored, whole_source


def compile_on_host(kernels: Sequence[Kernel], folder: Path) -> None:
    """Their own source; a thread of a GPU is a turn of a loop."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to compile the kernels for the CPU")
    source, target = folder / "kernels.cpp", folder / "kernels.so"
    loops = []
    for kernel in kernels:
        pointers = [f"const {_stored(x)}*" for x in kernel.inputs] + [
            f"{_stored(y)}*" for y in kernel.outputs
        ]
        given = ", ".join(f"({pointer})p[{i}]" for i, pointer in enumerate(pointers))
        loops.append(
            f'extern "C" void run_{kernel.__name__}(void** p) '
            f"{{ for (long long t = 0; t < {kernel.threads}; ++t) "
            f"{{ thread_on_host = t; {kernel.__name__}({given}); }} }}\n"
        )
    source.write_text(whole_source(kernels) + "".join(loops))
    command = [
        "g++",
        "-std=c++17",
        "-O1",
        "-shared",
        "-fPIC",
        "-fno-gnu-unique",
        str(source),
        "-o",
        str(target),
    ]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(target))

    def launch(kernel: Kernel, tensors: list[Tensor]) -> None:
        pointers = (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])
        library[f"run_{kernel.__name__}"](pointers)

    for kernel in kernels:
        kernel.launch = launch
