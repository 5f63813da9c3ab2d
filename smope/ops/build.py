"""Compiles the kernels of `smope/_ext`, and remembers how that went.

CUDA, at the first use: one small library for each shape of heads, level and point count and pair of types
that a program asks for, and one binding to torch that they share; both are cached on disk per torch, CUDA and
GPU architecture. A compile that fails is remembered too: it is told once, and the PyTorch path runs.
CPU, only when asked to (`build_cpu`): one library of plain C++ for all shapes, cached per kind of processor.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import threading
from pathlib import Path

import torch

from smope.ops.compiling import exclusive, own_scripts_on_path, progress

logger = logging.getLogger(__name__)
SOURCES = Path(__file__).parents[1] / "_ext"
_TYPES = {torch.float32: ("float", "f32"), torch.float16: ("F16", "f16"), torch.bfloat16: ("BF16", "bf16")}
_SCALAR_TYPE = {torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}  # c10::ScalarType
_CPU_SOURCE = SOURCES / "ms_deform_attn_cpu.cpp"
_CPU_FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
_results: dict[Kernel, bool] = {}
_cpu: dict[str, ctypes.CDLL | None] = {}  # "kernel": the loaded library, or None where it was not built
_told: set[str] = set()
_mutex = threading.RLock()


class KernelUnavailable(RuntimeError):
    """A kernel cannot be had, and the caller asked for nothing else."""


@dataclasses.dataclass(frozen=True)
class Advice:
    """What the messages say about a library that cannot be had."""

    effect: str
    again: str  # how to try again
    hide: str  # how to do without it, unsaid


_ADVICE = Advice(
    effect="Deformable attention runs on PyTorch's own operators, several times slower and with more memory.",
    again="Set SMOPE_MSDA=cuda to try again.",
    hide="Set SMOPE_MSDA=torch to hide this note.",
)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What a kernel library is compiled for."""

    heads: int
    head: int
    levels: int
    points: int
    value: torch.dtype
    offset: torch.dtype

    @property
    def supported(self) -> bool:
        known = self.value in _TYPES and self.offset in (torch.float32, self.value)
        return (
            known
            and self.head % 8 == 0
            and 8 <= self.head <= 128
            and 1 <= self.levels <= 32
            and self.points > 0
        )

    @property
    def label(self) -> str:
        types = f"{_TYPES[self.value][1]}_{_TYPES[self.offset][1]}"
        return f"msda_h{self.heads}_d{self.head}_l{self.levels}_p{self.points}_{types}"

    @property
    def defines(self) -> list[str]:
        return [
            f"-DSMOPE_HEADS={self.heads}",
            f"-DSMOPE_HEAD={self.head}",
            f"-DSMOPE_LEVELS={self.levels}",
            f"-DSMOPE_POINTS={self.points}",
            f"-DSMOPE_VALUE={_TYPES[self.value][0]}",
            f"-DSMOPE_OFFSET={_TYPES[self.offset][0]}",
        ]


@functools.cache
def kernel_for(
    heads: int, head: int, levels: int, points: int, value: torch.dtype, offset: torch.dtype
) -> Kernel | None:
    """The kernel that serves these shapes and types; None if none does. Kept, because every call asks."""
    kernel = Kernel(heads, head, levels, points, value, offset)
    return kernel if kernel.supported else None


def kernel_ready(kernel: Kernel, insist: bool = False) -> bool:
    """Whether the kernel is loaded; compiles it at its first use. With `insist`, raise instead of False."""
    known = _results.get(kernel)
    if known or (known is False and not insist):
        return known
    with _mutex:
        if _results.get(kernel):
            return True
        try:
            _load_kernel(kernel, retry=insist)
        except KernelUnavailable as error:
            if insist:
                raise
            _tell_once(str(error))
            _results[kernel] = False
        else:
            _results[kernel] = True
        return _results[kernel]


def build_cpu() -> Path:
    """Compile the CPU kernel for this machine, unless that is done, and load it; gives the library's path.

    From then on every process of this machine takes it by default, without a compiler.
    """
    with _mutex:
        target = _cpu_target()
        if not target.exists():
            _compile_cpu(target)
        _cpu["kernel"] = _load_cpu(target)
    return target


def cpu_kernel_ready(insist: bool = False) -> bool:
    """Whether the CPU kernel is loaded; loads it if it was built, and builds it only with `insist`."""
    if insist and loaded_cpu_kernel() is None:
        build_cpu()
    if "kernel" not in _cpu:
        with _mutex:
            target = _cpu_target()
            try:
                _cpu["kernel"] = _load_cpu(target) if target.exists() else None
            except KernelUnavailable as error:
                _tell_once(str(error))
                _cpu["kernel"] = None
    return _cpu["kernel"] is not None


def loaded_cpu_kernel() -> ctypes.CDLL | None:
    return _cpu.get("kernel")


def cache_folder() -> Path:
    """Where compiled kernels are kept: $SMOPE_CACHE/kernels, else the user's cache folder."""
    own = os.environ.get("SMOPE_CACHE")
    users = os.environ.get("XDG_CACHE_HOME")
    home = Path(own) if own else (Path(users) if users else Path.home() / ".cache") / "smope"
    return home / "kernels"


def status() -> dict[str, str]:
    """Kernel status in words, for `smope info`. Compiles nothing."""
    folder = cache_folder()
    built = sorted(p.parent.name for p in folder.glob("*/*.so")) if folder.is_dir() else []
    failed = sorted(p.parent.name for p in folder.glob("*/failed.json")) if folder.is_dir() else []
    return {
        "path": os.environ.get("SMOPE_MSDA", "auto"),
        "compiler": _nvcc() or "no nvcc found: the PyTorch path runs",
        "cache": str(folder),
        "compiled": ", ".join(built) or "none yet",
        "failed": ", ".join(failed) or "none",
        "loaded": ", ".join(kernel.label for kernel, fine in _results.items() if fine)
        or "none in this process",
        "cpu": f"compiled: {_cpu_target()}" if _cpu_target().exists() else "not compiled: run smope build",
    }


def _cpu_target() -> Path:
    """Named after the source, the flags and the processor, whose instructions -march=native uses."""
    digest = hashlib.sha256(" ".join(_CPU_FLAGS).encode() + _CPU_SOURCE.read_bytes())
    digest.update(_processor().encode())
    name = f"smope_msda_cpu_{platform.machine()}_{digest.hexdigest()[:8]}"
    return cache_folder() / name / f"{name}.so"


@functools.cache
def _processor() -> str:
    """What tells processors with other instructions apart."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else [platform.processor()]
    return next((line for line in lines if line.startswith(("flags", "Features"))), lines[0] if lines else "")


def _compile_cpu(target: Path) -> None:
    compiler = os.environ.get("CXX", "g++")
    unfinished = target.with_suffix(f".{os.getpid()}")
    command = [*compiler.split(), *_CPU_FLAGS, "-shared", "-fPIC", str(_CPU_SOURCE), "-o", str(unfinished)]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(target.parent / "owner.lock", target.stem):
            if target.exists():  # by the process that held the lock
                return
            subprocess.run(command, capture_output=True, text=True, check=True)
            unfinished.replace(target)  # no other process ever sees half a library
    except (OSError, subprocess.CalledProcessError) as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        said = (getattr(error, "stderr", None) or str(error)).strip()
        cause = next((line for line in said.splitlines() if "error" in line), said)[:300]
        raise KernelUnavailable(
            f"smope: the CPU kernel could not be compiled ({cause}). Command: {' '.join(command)}. Remedy: a "
            "C++ compiler with OpenMP, named in CXX if it is not g++, and a cache folder that can be written "
            f"(SMOPE_CACHE, now {cache_folder()}). Without it, SMOPE_MSDA=auto runs PyTorch's own operators."
        ) from error
    logger.info("smope: compiled the CPU kernel: %s", target)


def _load_cpu(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        functions = (library.smope_msda_cpu_forward, library.smope_msda_cpu_backward)
    except (OSError, AttributeError) as error:
        raise KernelUnavailable(
            f"smope: the compiled CPU kernel could not be loaded ({error}). {_ADVICE.effect} Remedy: delete "
            f"{path.parent} and run smope build again, or set SMOPE_MSDA=torch to hide this note."
        ) from error
    for function in functions:
        function.restype = None
    return library


def _nvcc() -> str | None:
    from torch.utils.cpp_extension import CUDA_HOME

    beside = Path(CUDA_HOME) / "bin" / "nvcc" if CUDA_HOME else None
    return str(beside) if beside and beside.exists() else shutil.which("nvcc")


def _tell_once(message: str) -> None:
    if message not in _told:
        _told.add(message)
        logger.warning(message)


def _architectures() -> list[str]:
    """Of all visible GPUs, for example ["90"]."""
    devices = range(torch.cuda.device_count())
    return sorted({"{}{}".format(*torch.cuda.get_device_capability(device)) for device in devices})


def _load_kernel(kernel: Kernel, retry: bool) -> None:
    load_binding(retry)
    sources = [SOURCES / "ms_deform_attn.cu", *sorted(SOURCES.glob("*.cuh"))]
    flags = [*kernel.defines, "-O3"]
    flags += architecture_flags()
    register(kernel, ctypes.CDLL(str(compiled_library(kernel.label, sources, flags, retry))), retry)


def register(kernel: Kernel, library: ctypes.CDLL, retry: bool = False) -> None:
    """The operator takes this library for the kernel's shapes and types from now on."""
    functions = (library.smope_msda_forward, library.smope_msda_backward, library.smope_msda_scratch)
    entries = [ctypes.cast(function, ctypes.c_void_p) for function in functions]
    types = (_SCALAR_TYPE[kernel.value], _SCALAR_TYPE[kernel.offset])
    load_binding(retry).smope_register(
        kernel.heads, kernel.head, kernel.levels, kernel.points, *types, *entries
    )


@functools.cache
def load_binding(retry: bool = False) -> ctypes.CDLL:
    import smope.ops.library  # noqa: F401  # the schemas that the binding implements

    sources = [SOURCES / "binding.cpp", SOURCES / "autograd.h"]
    return ctypes.CDLL(str(compiled_library("msda_binding", sources, ["-O2"], retry)))


def architecture_flags() -> list[str]:
    """What makes nvcc compile for all visible GPUs."""
    return [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in _architectures()]


def compiled_library(
    label: str, sources: list[Path], flags: list[str], retry: bool = False, advice: Advice = _ADVICE
) -> Path:
    """The shared library of the first of `sources`, compiled unless cached, and loaded."""
    from torch.utils import cpp_extension

    if _nvcc() is None or cpp_extension.CUDA_HOME is None:
        raise KernelUnavailable(
            f"smope: no CUDA compiler (nvcc) was found. {advice.effect} Remedy: install the CUDA toolkit of "
            f"torch's CUDA version ({torch.version.cuda}) and name its folder in CUDA_HOME. {advice.hide}"
        )
    digest = hashlib.sha256(" ".join([*flags, torch.__version__, _nvcc() or ""]).encode())
    for source in sources:
        digest.update(source.read_bytes())
    place = f"torch{torch.__version__}_cu{torch.version.cuda}_sm{'_'.join(_architectures())}"
    name = re.sub(r"\W", "_", f"smope_{label}_{place}_{digest.hexdigest()[:8]}")
    folder = cache_folder() / name
    target, failure = folder / f"{name}.so", folder / "failed.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "owner.lock").touch()
    except OSError as error:
        if target.exists() and not failure.exists() and _loads(target):
            return target  # compiled by whoever may write here, for those who may only read
        raise KernelUnavailable(
            f"smope: compiled kernels cannot be kept ({error}). {advice.effect} Remedy: name a folder that "
            f"can be written to in SMOPE_CACHE. {advice.hide}"
        ) from error
    with exclusive(folder / "owner.lock", label):
        if failure.exists() and not retry:
            raise KernelUnavailable(json.loads(failure.read_text())["message"])
        failure.unlink(missing_ok=True)
        # We alone hold the folder: a lock file of torch's in it was left by a compile that was killed.
        (folder / "lock").unlink(missing_ok=True)
        cuda = sources[0].suffix == ".cu"
        try:
            with progress(label, quiet=target.exists()), own_scripts_on_path():
                cpp_extension.load(
                    name,
                    [str(sources[0])],
                    extra_cflags=None if cuda else flags,
                    extra_cuda_cflags=flags if cuda else None,
                    build_directory=str(folder),
                    with_cuda=True,
                    is_python_module=False,
                )
        except (RuntimeError, OSError, ImportError) as error:
            message = _failure_message(label, error, failure, advice)
            failure.write_text(json.dumps({"message": message, "log": str(error)}, indent=1))
            raise KernelUnavailable(message) from error
    return target


def _loads(library: Path) -> bool:
    """Not one that its compiler has left half written or is still at."""
    try:
        ctypes.CDLL(str(library))
    except OSError:
        return False
    return True


def _failure_message(label: str, error: BaseException, record: Path, advice: Advice) -> str:
    lines = [
        line.strip() for line in str(error).splitlines() if re.search(r"error|not found|mismatch", line, re.I)
    ]
    cause = (lines or str(error).splitlines() or [type(error).__name__])[-1 if len(lines) < 2 else 1][:300]
    return (
        f"smope: the CUDA kernel {label} could not be compiled ({cause}). {advice.effect} Remedy: a C++ "
        f"compiler and a CUDA toolkit that match torch (CUDA {torch.version.cuda}); the compiler's output is "
        f"in {record}. {advice.again} {advice.hide}"
    )
