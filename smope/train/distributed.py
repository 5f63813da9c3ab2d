"""Data parallelism under `torchrun`: who this process is, and how all of them stay in step."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from smope.devices import device_from

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

    device: torch.device
    rank: int = 0
    world: int = 1
    host_group: dist.ProcessGroup | None = None  # over CPU tensors, so that agreeing never waits for a GPU

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and evaluates."""
        return self.rank == 0

    def agree(self, progress: float, stop: bool) -> tuple[float, bool]:
        """The first process's progress, and whether any process wants to stop.

        Each process steps its own optimiser, so all need the same learning rate at the same step, and all
        must leave the loop at the same step or the last ones would wait for ever.
        """
        if self.world == 1:
            return progress, stop
        word = torch.tensor([progress if self.is_main else -1.0, float(stop)], dtype=torch.float64)
        dist.all_reduce(word, op=dist.ReduceOp.MAX, group=self.host_group)
        return float(word[0]), bool(word[1] > 0)

    def same_for_all(self, value: int) -> int:
        """The first process's whole number."""
        if self.world == 1:
            return value
        word = torch.tensor([value if self.is_main else torch.iinfo(torch.int64).min])
        dist.all_reduce(word, op=dist.ReduceOp.MAX, group=self.host_group)
        return int(word[0])


def pick_device(device: torch.device | str | None) -> torch.device:
    """The given device, else this process's GPU, else the CPU."""
    chosen = device_from(device)
    if device is None and chosen.type == "cpu":
        log.warning(
            "no GPU that PyTorch can use: the CPU trains, which is for trying out, far too slow for use"
        )
    if chosen.type == "cuda" and chosen.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return chosen


@contextmanager
def joined(device: torch.device | str | None = None) -> Iterator[Ranks]:
    """Join the other processes where `torchrun` started several, and leave them at the end."""
    chosen = pick_device(device)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world == 1:
        yield Ranks(chosen)
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        host_group = dist.new_group(backend="gloo") if chosen.type == "cuda" else dist.group.WORLD
        yield Ranks(chosen, dist.get_rank(), world, host_group)
    finally:
        dist.destroy_process_group()
