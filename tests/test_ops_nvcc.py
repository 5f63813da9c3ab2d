"""The kernels' source compiles with nvcc alone, without torch's headers, for old and new GPUs."""

from __future__ import annotations

import re
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
    spills = dict(
        re.findall(r"Compiling entry function '(\S+)'.*?(\d+) bytes spill stores", report, re.DOTALL)
    )
    assert len(spills) == report.count("Compiling entry function") > 0
    for name, stores in spills.items():
        # The tiled kernel puts away what its inner loop does not need, so that more blocks run at a time.
        assert int(stores) <= (512 if "tile_kernel" in name else 0), name
    assert "warning" not in report, report
