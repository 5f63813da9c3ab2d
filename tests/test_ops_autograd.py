"""The C++ autograd of CUDA tensors keeps what the Python one of torch.library does, on a CPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile it")
def test_operators_tests_pass_with_the_cpp_autograd() -> None:
    """Gradients, torch.library's rules, torch.compile, empty tensors: once more."""
    chosen = ["-p", "autograd_on_host", "-k", "operator or nothing_in", "tests/test_ops.py"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # ninja lies there
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen],
        cwd=ROOT,
        env={**os.environ, "PATH": path, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'cuda_on_host'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
