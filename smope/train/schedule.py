"""How far a run has come, and what learning rate goes with it.

A budget may be given in steps or in minutes. Minutes drive the schedule by the clock, so that a run of a
given length anneals to its end on any machine, also when it is done in several pieces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Shape = Literal["cosine", "linear"]


@dataclass(frozen=True)
class Budget:
    """The length of the whole run; with both limits, the one that is reached first ends it."""

    max_steps: int | None = None
    max_minutes: float | None = None

    def __post_init__(self) -> None:
        if self.max_steps is None and self.max_minutes is None:
            raise ValueError("a run needs an end: give max_minutes or max_steps")
        for name in ("max_steps", "max_minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: {value} given, a number above 0 expected")

    def progress(self, step: int, seconds: float) -> float:
        """Share of the budget that is spent, 0 at the start and 1 at the end."""
        by_steps = step / self.max_steps if self.max_steps else 0.0
        by_clock = seconds / (60.0 * self.max_minutes) if self.max_minutes else 0.0
        return min(1.0, max(by_steps, by_clock))


@dataclass(frozen=True)
class Schedule:
    """Warm-up over steps, then flat, then annealed over the rest of the budget.

    Warm-up counts steps and not progress: it is there for Adam's second moments, which need a number of
    gradients and not a share of the run.
    """

    warmup_steps: int = 500
    flat_until: float = 0.6  # share of the budget at which the anneal starts
    shape: Shape = "cosine"
    final: float = 0.01  # factor at the end of the budget

    def __post_init__(self) -> None:
        if not 0.0 <= self.flat_until <= 1.0:
            raise ValueError(f"flat_until: {self.flat_until} given, a share of the run in 0..1 expected")

    def factor(self, warm_steps: int, progress: float) -> float:
        """What to multiply the learning rate with; `warm_steps` are the optimiser's since it was fresh."""
        warmup = min(1.0, (warm_steps + 1) / self.warmup_steps) if self.warmup_steps > 0 else 1.0
        if progress <= self.flat_until:
            return warmup
        share = min(1.0, (progress - self.flat_until) / (1.0 - self.flat_until))
        falling = 0.5 * (1.0 + math.cos(math.pi * share)) if self.shape == "cosine" else 1.0 - share
        return warmup * (self.final + (1.0 - self.final) * falling)
