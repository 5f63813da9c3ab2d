"""Compiling at first use: what is cached, what is told, what happens on failure. The compiler is played."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.utils import cpp_extension

from smope.ops import build

KERNEL = build.Kernel(8, 32, 4, 4, torch.float32, torch.float32)


class Library:
    """What ctypes finds in a compiled library."""

    registered: ClassVar[list[tuple[Any, ...]]] = []
    smope_msda_forward = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)
    smope_msda_backward = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)
    smope_msda_scratch = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)

    def __init__(self, path: str) -> None:
        assert Path(path).exists()

    def smope_register(self, *args: Any) -> None:
        self.registered.append(args)


@pytest.fixture
def compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names given to the compiler, which succeeds."""
    names: list[str] = []

    def load(name: str, sources: list[str], build_directory: str, **_: Any) -> None:
        assert Path(sources[0]).exists()
        assert not (Path(build_directory) / "lock").exists(), "a stale lock makes torch wait for ever"
        names.append(name)
        (Path(build_directory) / f"{name}.so").touch()

    play(monkeypatch, tmp_path, load)
    return names


def play(monkeypatch: pytest.MonkeyPatch, cache: Path, load: Callable[..., None]) -> None:
    monkeypatch.setenv("SMOPE_CACHE", str(cache))
    monkeypatch.setattr(build, "_nvcc", lambda: "/cuda/bin/nvcc")
    monkeypatch.setattr(build, "_architectures", lambda: ["90"])
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "/cuda")
    monkeypatch.setattr(cpp_extension, "load", load)
    monkeypatch.setattr(ctypes, "CDLL", Library)
    monkeypatch.setattr(Library, "registered", [])
    new_process()


def new_process() -> None:
    build._results.clear()
    build._told.clear()
    build.load_binding.cache_clear()


@pytest.fixture(autouse=True)
def forget_afterwards() -> Any:
    yield
    new_process()


def test_a_kernel_is_compiled_once_and_named_after_what_it_is_for(compiles: list[str]) -> None:
    assert build.kernel_ready(KERNEL)
    assert build.kernel_ready(KERNEL)
    assert len(compiles) == 2  # the binding and the kernel
    for part in ("h8_d32_l4_p4_f32_f32", "sm90", "torch" + torch.__version__.split("+")[0].replace(".", "_")):
        assert part in compiles[1]
    assert Library.registered[0][:6] == (8, 32, 4, 4, 6, 6)  # types by torch's own numbers
    assert "h8_d32" in build.status()["compiled"]


def test_another_type_compiles_another_kernel_but_no_second_binding(compiles: list[str]) -> None:
    build.kernel_ready(KERNEL)
    build.kernel_ready(build.Kernel(8, 32, 4, 4, torch.bfloat16, torch.bfloat16))
    assert [name.split("_")[1:3] for name in compiles] == [
        ["msda", "binding"],
        ["msda", "h8"],
        ["msda", "h8"],
    ]


def test_a_lock_left_by_a_killed_compile_is_removed(compiles: list[str]) -> None:
    build.kernel_ready(KERNEL)
    for folder in build.cache_folder().iterdir():
        (folder / "lock").touch()
    new_process()
    assert build.kernel_ready(KERNEL)


def close_the_cache(tmp_path: Path) -> None:
    """No lock can be written or made, as in a read-only folder; rights would not keep root out."""
    (tmp_path / "file").touch()
    for folder in build.cache_folder().iterdir():
        (folder / "owner.lock").unlink(missing_ok=True)
        (folder / "owner.lock").symlink_to(tmp_path / "file" / "lock")
    new_process()


def test_what_was_compiled_is_taken_from_a_cache_that_can_only_be_read(
    compiles: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert build.kernel_ready(KERNEL)
    close_the_cache(tmp_path)
    caplog.clear()
    assert build.kernel_ready(KERNEL)
    assert len(compiles) == 2  # the first time
    assert len(Library.registered) == 2
    assert not caplog.records


@pytest.mark.parametrize("left", ["nothing", "half a library", "a failure"])
def test_a_cache_that_can_only_be_read_and_holds_no_library_is_told(
    compiles: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    left: str,
) -> None:
    def cannot_load(path: str) -> None:
        raise OSError(f"{path}: file too short")

    assert build.kernel_ready(KERNEL)
    for library in build.cache_folder().glob("*/*.so"):
        if left == "nothing":
            library.unlink()
        if left == "a failure":
            (library.parent / "failed.json").write_text("{}")
    if left == "half a library":
        monkeypatch.setattr(ctypes, "CDLL", cannot_load)
    close_the_cache(tmp_path)
    assert not build.kernel_ready(KERNEL)
    assert "SMOPE_CACHE" in caplog.text


def test_a_failure_is_told_once_and_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attempts: list[str] = []

    def load(name: str, *_: Any, **__: Any) -> None:
        attempts.append(name)
        raise RuntimeError("Error building extension\nfatal error: cuda.h: No such file or directory")

    play(monkeypatch, tmp_path, load)
    with caplog.at_level(logging.WARNING):
        assert not build.kernel_ready(KERNEL)
        assert not build.kernel_ready(KERNEL)
        assert not build.kernel_ready(build.Kernel(8, 32, 4, 4, torch.float16, torch.float16))
        new_process()
        assert not build.kernel_ready(KERNEL)
    assert len(attempts) == 1
    told = [r.message for r in caplog.records if "could not be compiled" in r.message]
    assert len(told) == 2  # once in each of the two processes
    for part in (
        "cuda.h: No such file",
        "PyTorch's own operators",
        "Remedy",
        "failed.json",
        "SMOPE_MSDA=torch",
    ):
        assert part in told[0]
    with pytest.raises(build.KernelUnavailable, match=r"cuda\.h"):
        build.kernel_ready(KERNEL, insist=True)
    assert len(attempts) == 2  # insisting tries again


def test_a_missing_compiler_is_not_remembered(compiles: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as none:
        none.setattr(build, "_nvcc", lambda: None)
        assert not build.kernel_ready(KERNEL)
    new_process()
    assert build.kernel_ready(KERNEL)


@pytest.mark.parametrize(
    ("head", "levels", "kind", "fits"),
    [
        (32, 4, torch.float32, True),
        (128, 1, torch.bfloat16, True),
        (12, 4, torch.float32, False),
        (136, 4, torch.float32, False),
        (32, 33, torch.float32, False),
        (32, 4, torch.float64, False),
    ],
)
def test_which_shapes_a_kernel_serves(head: int, levels: int, kind: torch.dtype, fits: bool) -> None:
    assert build.Kernel(8, head, levels, 4, kind, torch.float32).supported == fits
