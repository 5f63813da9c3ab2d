"""What a training loop says of itself, gathered without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor


class Meter:
    """Collects loss parts on the device, and fetches them together once in a while."""

    def __init__(self, images_a_step: int) -> None:
        self.images_a_step = images_a_step
        self.skipped = 0  # steps left out because a gradient was not finite
        self.images = 0
        self.seconds = 0.0  # of training, evaluations and saving left out
        self.waited = 0.0  # of those, spent waiting for data
        self._restart()

    def _restart(self) -> None:
        self._vectors: dict[tuple[str, ...], list[Tensor]] = {}
        self._count = 0
        self._wait = 0.0
        self._paused = 0.0
        self._begin = time.perf_counter()

    def add(self, loss: Tensor, norm: Tensor, parts: Mapping[str, Tensor], wait: float) -> None:
        """Note one step: 0-dim tensors on the device, and seconds that its batch was waited for."""
        values = [loss, norm, *parts.values()]
        self._vectors.setdefault(tuple(parts), []).append(torch.stack([v.detach().float() for v in values]))
        self._count += 1
        self._wait += wait

    def pause(self, seconds: float) -> None:
        """Time that was spent on something else than training."""
        self._paused += seconds

    def flush(self) -> dict[str, float]:
        """Means since the last call, over the steps with finite values; waits for the device."""
        if not self._count:
            self._restart()
            return {}
        means: dict[str, float] = {}
        skipped = 0
        for names, vectors in self._vectors.items():
            table = torch.stack(vectors).double().cpu()  # [steps, 2 + parts]
            skipped += int((~torch.isfinite(table[:, 1])).sum())
            mean = table.masked_fill(~torch.isfinite(table), torch.nan).nanmean(dim=0).tolist()
            columns = ("loss", "gradient_norm", *(f"loss/{name}" for name in names))
            means.update({k: v for k, v in zip(columns, mean, strict=True) if v == v})
        seconds = max(time.perf_counter() - self._begin - self._paused, 1e-9)
        images = self._count * self.images_a_step
        self.skipped += skipped
        self.images += images
        self.seconds += seconds
        self.waited += self._wait
        means.update(
            images_per_second=images / seconds, data_wait=self._wait / seconds, skipped_steps=skipped
        )
        self._restart()
        return means
