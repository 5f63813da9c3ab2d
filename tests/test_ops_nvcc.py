"""The kernels' source compiles with nvcc alone, without torch's headers, for old and new GPUs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "smope" / "_ext" / "ms_deform_attn.cu"
NVCC = shutil.which("nvcc")


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize(
    ("arch", "value", "offset", "extra"),
    [
        ("75", "F16", "float", []),
        ("80", "BF16", "BF16", []),
        ("89", "float", "float", []),
        ("90", "float", "float", ["-DSMOPE_PORTABLE"]),  # without sm_90's own instructions
        ("90", "BF16", "BF16", []),
    ],
)
def test_kernels_compile(arch: str, value: str, offset: str, extra: list[str], tmp_path: Path) -> None:
    sizes = ["-DSMOPE_HEADS=8", "-DSMOPE_HEAD=32", "-DSMOPE_LEVELS=4", "-DSMOPE_POINTS=4"]
    types = [f"-DSMOPE_VALUE={value}", f"-DSMOPE_OFFSET={offset}"]
    target = [
        "-std=c++17",
        f"-gencode=arch=compute_{arch},code=sm_{arch}",
        "-cubin",
        "-o",
        str(tmp_path / "k.cubin"),
    ]
    command = [str(NVCC), *target, "-Xptxas=-v", *sizes, *types, *extra, str(SOURCE)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    report = result.stderr
    assert report.count("0 bytes spill stores, 0 bytes spill loads") == report.count(
        "Compiling entry function"
    )
    assert "warning" not in report, report
