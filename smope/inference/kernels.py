"""Kernels of our own for the recorded pass: described with all their sizes, compiled while recording.

NVRTC compiles them, which comes with PyTorch: no CUDA toolkit is needed. What it made is kept on disk, beside
the other kernels. The sources are smope/_ext/infer*.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smope.files import write_atomically
from smope.networks.gauss_newton import LARGEST_STEP
from smope.ops.build import SOURCES, cache_folder

log = logging.getLogger(__name__)

BLOCK = 256
WARP = 32
HEADERS = ("infer.h", "infer_maps.h", "infer_pose.h")  # in this order
COMPILERS = 8  # at a time
TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
Strides = tuple[int, ...]


@dataclass(eq=False)
class Layout:
    """Of one of a kernel's tensors"""

    shape: tuple[int, ...]
    strides: Strides
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)

    @classmethod
    def contiguous(cls, tensor: Tensor) -> Layout:
        return cls.of(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))

    def empty(self, device: torch.device) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)

    def fits(self, tensor: Tensor) -> bool:
        strides = zip(self.shape, self.strides, tensor.stride(), strict=True)
        return all(length == 1 or mine == its for length, mine, its in strides)


class Kernel:
    """One kernel, called with its input tensors; a graph holds it as a function."""

    def __init__(
        self,
        name: str,
        body: str,
        inputs: Sequence[Layout],
        outputs: Sequence[Layout],
        threads: int,
        aligned: bool = True,
    ) -> None:
        """`body` uses x0, x1, ... and y0, y1, ..., pointers to what inputs and outputs store; `aligned`: 16
        bytes at once."""
        self.__name__, self.__module__ = name, __name__  # how a graph's code names its functions
        self.inputs, self.outputs, self.threads = tuple(inputs), tuple(outputs), threads
        self.aligned = aligned
        self.body = body
        self.launch: Callable[[Kernel, list[Tensor]], None] | None = None

    @property
    def source(self) -> str:
        arguments = [f"const {_stored(layout)}* __restrict__ x{i}" for i, layout in enumerate(self.inputs)]
        arguments += [f"{_stored(layout)}* __restrict__ y{i}" for i, layout in enumerate(self.outputs)]
        head = f'extern "C" __global__ void __launch_bounds__({BLOCK}) {self.__name__}'
        return f"{head}({', '.join(arguments)}) {{ {self.body} }}\n"

    def __call__(self, *tensors: Tensor) -> Any:
        assert self.launch is not None
        given = [
            tensor if self._usable(layout, tensor) else layout.empty(tensor.device).copy_(tensor)
            for layout, tensor in zip(self.inputs, tensors, strict=True)
        ]
        made = [layout.empty(tensors[0].device) for layout in self.outputs]
        self.launch(self, given + made)
        return made[0] if len(made) == 1 else tuple(made)

    def _usable(self, layout: Layout, tensor: Tensor) -> bool:
        return layout.fits(tensor) and not (self.aligned and tensor.data_ptr() % 16)


def _stored(layout: Layout) -> str:
    if layout.dtype == torch.uint8:
        return "unsigned char"
    return f"smope::{TYPES[layout.dtype]}::Stored"


def whole_source(kernels: Sequence[Kernel]) -> str:
    headers = [(SOURCES / name).read_text(encoding="utf-8") for name in HEADERS]
    constant = f"#define LARGEST_STEP {LARGEST_STEP}f\n"
    return constant + "".join(headers) + "".join(kernel.source for kernel in kernels)


def compile_kernels(kernels: Sequence[Kernel]) -> None:
    """Make all of them callable on the current GPU; RuntimeError (or what PyTorch raises) where it fails."""
    from torch.cuda import _utils

    capability = "{}{}".format(*torch.cuda.get_device_capability())
    parts = [kernels[i::COMPILERS] for i in range(min(COMPILERS, len(kernels)))]
    sources = [whole_source(part) for part in parts]
    if not all(_kept(source, capability).is_file() for source in sources):
        log.warning(
            "smope: compiling the kernels of the fast pass, once for this network, image size and number of "
            "images (some seconds); model.fast = False goes without"
        )
    with ThreadPoolExecutor(COMPILERS) as pool:
        binaries = list(pool.map(lambda source: _compiled(source, capability), sources))
    for part, binary in zip(parts, binaries, strict=True):
        loaded: Any = _utils._cuda_load_module(binary, [kernel.__name__ for kernel in part])
        for kernel in part:
            kernel.launch = _launcher(loaded[kernel.__name__])


def _kept(source: str, capability: str) -> Path:
    """Where the cache on disk has it"""
    digest = hashlib.sha256(f"{source} {torch.version.cuda} {capability}".encode()).hexdigest()
    return cache_folder() / "infer" / f"{digest[:32]}.cubin"


def _compiled(source: str, capability: str) -> bytes:
    """From the cache on disk, or made and put there"""
    from torch.cuda import _utils

    kept = _kept(source, capability)
    if kept.is_file():
        return kept.read_bytes()
    binary = compile_source(_utils._get_gpu_rtc_library(), source, capability)
    with contextlib.suppress(OSError):  # a cache is no need
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, binary)
    return binary


def compile_source(nvrtc: ctypes.CDLL, source: str, capability: str) -> bytes:
    """The cubin for sm_`capability`. PyTorch's own call of NVRTC asks for a CUDA toolkit's headers."""

    def text(size: Callable[..., int], read: Callable[..., int]) -> bytes:
        length = ctypes.c_size_t()
        size(program, ctypes.byref(length))
        buffer = ctypes.create_string_buffer(length.value)
        read(program, buffer)
        return buffer.raw

    program = ctypes.c_void_p()
    options = (f"--gpu-architecture=sm_{capability}".encode(), b"--std=c++17")
    given = (ctypes.c_char_p * len(options))(*options)
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"infer.cu", 0, None, None):
        raise RuntimeError("NVRTC makes no program")
    try:
        if nvrtc.nvrtcCompileProgram(program, len(options), given):
            said = text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
            raise RuntimeError(f"NVRTC refuses the pass's kernels: {said.decode(errors='replace')[:2000]}")
        return text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _launcher(start: Any) -> Callable[[Kernel, list[Tensor]], None]:
    def launch(kernel: Kernel, tensors: list[Tensor]) -> None:
        blocks = -(-kernel.threads // BLOCK)
        start(grid=(blocks, 1, 1), block=(BLOCK, 1, 1), args=tensors)

    return launch
