"""Which device is meant, and PyTorch as the library counts on it, whatever the caller's program has set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


class DeviceError(ValueError):
    """A device that is not to be had here."""


def device_from(given: torch.device | str | None) -> torch.device:
    """`given`, by default a GPU where there is one."""
    if given is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if isinstance(given, torch.dtype):
            raise TypeError("a type, not a place")
        device = torch.device(given)
    except (RuntimeError, TypeError) as error:
        raise DeviceError(f'device {given!r} given, "cpu", "cuda" or "cuda:1" expected') from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            gpus = ", ".join(f"cuda:{i}" for i in range(count)) or "no GPU that this PyTorch can use"
            raise DeviceError(f'device "{device}" given, but there is {gpus}; pass device="cpu"')
    return device


@contextmanager
def plain_torch(device: torch.device) -> Iterator[None]:
    """Without the caller's autocast, inference mode and default device: what is computed stays the same."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for kind in {"cpu", device.type}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def float32_by_default() -> Iterator[None]:
    """For networks while they are built. PyTorch has one default for all threads: keep it short."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
