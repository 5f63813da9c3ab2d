"""Assignment on a GPU, its kernel read by Triton's interpreter: as cheap as SciPy's."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from smope.train.matcher import assign

# In a process of its own: Triton looks once, when a kernel is defined, whether it is to be interpreted.
PROGRAM = """
import sys
import torch
from smope.train.assign_triton import assign_on_device
tables = torch.load(sys.argv[1], weights_only=True)
torch.save([assign_on_device(table) for table in tables], sys.argv[2])
"""


def test_kernel_finds_assignments_as_cheap_as_scipys(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if version("triton").startswith("3.1.") and np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        pytest.skip("the interpreter of Triton 3.1, which torch 2.5 brings, needs NumPy 1")
    generator = torch.Generator().manual_seed(1)
    tables = [
        torch.randn(shape, generator=generator) for shape in ((1, 2, 20, 5), (1, 1, 6, 6), (1, 1, 7, 1))
    ]
    tables[0][:, 1, :, 3:] = 0.0  # empty slots
    tables.append(torch.randint(0, 3, (1, 2, 9, 8), generator=generator).float())  # ties
    tables.append(torch.randn(1, 1, 10, 6, generator=generator).masked_fill(torch.eye(10)[:, :6] > 0, 1e4))
    folder = tmp_path_factory.mktemp("assign")
    torch.save(tables, folder / "tables.pt")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    command = [sys.executable, "-c", PROGRAM, str(folder / "tables.pt"), str(folder / "found.pt")]
    subprocess.run(command, check=True)
    for table, found in zip(tables, torch.load(folder / "found.pt", weights_only=True), strict=True):
        expected = assign(table)
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        assert all(len(set(slots.tolist())) == len(slots) for slots in found.flatten(0, 1))
        cost, least = (
            table.double().gather(2, match[:, :, None]).sum((-1, -2)) for match in (found, expected)
        )
        torch.testing.assert_close(cost, least, rtol=1e-6, atol=1e-5)
