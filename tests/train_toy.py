"""A toy for the tests of the training loop: a tiny network, seeded data, and a run of it as a command."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from smope.train.distributed import Ranks, joined
from smope.train.loop import Loop
from smope.train.recipe import OptimConfig, RunConfig

Batch = tuple[Tensor, Tensor]

OPTIM = OptimConfig(lr=1e-2, lr_scale={"stem": 0.25}, warmup_steps=4, ema_decay=0.9)
RUN = RunConfig(
    max_steps=40,
    batch_size=8,
    precision="fp32",
    channels_last=False,
    log_every=10,
    eval_minutes=0.0,
    save_seconds=1e9,
    tensorboard=False,
    progress_bar=False,
)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("stem", nn.Conv2d(3, 8, 3, stride=2))
    model.add_module("norm", nn.BatchNorm2d(8))
    model.add_module("act", nn.ReLU())
    model.add_module(
        "drop", nn.Dropout(0.1)
    )  # draws from the global generator, whose state a resume must restore
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flat", nn.Flatten())
    model.add_module("head", nn.Linear(8, 2))
    return model


class ToyTask:
    """Learn the mean of the red and the blue channel."""

    def __init__(self, seen: Path | None = None) -> None:
        self.seen = seen

    def step(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        images, target = batch
        if self.seen is not None:
            with self.seen.open("a") as file:
                file.write(f"{target[0, 0].item():.6f}\n")
        error = (model(images) - target).square().mean(0)
        return error.sum(), {"red": error[0].detach(), "blue": error[1].detach()}

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        images, target = next(stream(10_000))
        assert not model.training
        return {"error": float((model(images) - target).square().mean())}


def stream(start: int, rank: int = 0, delay: float = 0.0) -> Iterator[Batch]:
    index = start
    while True:
        generator = torch.Generator().manual_seed(1000 * index + rank)
        images = torch.rand(8, 3, 12, 12, generator=generator)
        time.sleep(delay)
        yield images, images.mean((2, 3))[:, [0, 2]]
        index += 1


def make_loop(out: Path, run: RunConfig = RUN, ranks: Ranks | None = None, delay: float = 0.0) -> Loop:
    ranks = ranks or Ranks(torch.device("cpu"))
    seen = out / f"seen{ranks.rank}.txt"
    out.mkdir(parents=True, exist_ok=True)
    return Loop(
        make_model(), ToyTask(seen), lambda start: stream(start, ranks.rank, delay), OPTIM, run, out, ranks
    )


def main() -> None:
    """OUT DELAY SAVE_SECONDS: run or resume; every process leaves its weights in OUT."""
    out, delay, save_seconds = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    torch.set_num_threads(1)
    with joined("cpu") as ranks:
        loop = make_loop(out, replace(RUN, save_seconds=save_seconds), ranks, delay)
        loop.resume()
        loop.run()
        torch.save(loop.model.state_dict(), out / f"weights{os.environ.get('RANK', '0')}.pt")


if __name__ == "__main__":
    main()
