"""The training loop: it knows steps, clocks and files, and nothing of the network that it trains."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from smope.train.checkpoint import CheckpointError, load_latest, save_checkpoint, save_small
from smope.train.curves import Curves, write_record
from smope.train.distributed import Ranks
from smope.train.ema import Ema
from smope.train.meter import Meter
from smope.train.optim import GuardedAdamW
from smope.train.recipe import OptimConfig, RunConfig
from smope.train.schedule import Budget, Schedule
from smope.train.terminal import interruptible, progress_bar

log = logging.getLogger(__name__)

CHECKPOINT, SMALL, RECORD = "checkpoint.pt", "small.safetensors", "run.json"


class Task(Protocol):
    """What is learned: the loop calls these two and looks no further."""

    def step(self, model: nn.Module, batch: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss to minimise [] and its named parts [] for the log, all on the device."""
        ...

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        """Scores of a model that is in eval mode."""
        ...


Stream = Callable[[int], Iterable[Any]]  # index of the first batch -> batches from there on, always the same


@dataclass
class LoopState:
    """Where a run stands; a step takes one batch, so `step` is also the index of the next batch."""

    step: int = 0
    warm_steps: int = 0  # since the optimiser was fresh
    seconds: float = 0.0  # of the budget that are spent


@dataclass
class LoopResult:
    finished: bool  # the budget is spent; otherwise `resume` goes on
    interrupted: bool
    state: LoopState
    scores: dict[str, float] = field(default_factory=dict)


class _Step(nn.Module):
    """Model and task as one module: distributed training hooks into its forward, which returns the loss."""

    def __init__(self, model: nn.Module, task: Task, amp: bool, device: torch.device) -> None:
        super().__init__()
        self.model, self._task, self._amp, self._device = model, task, amp, device.type

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(self._device, dtype=torch.bfloat16, enabled=self._amp):
            loss, parts = self._task.step(self.model, batch)
        return loss, dict(parts)


class Loop:
    """One process's share of a run. Make it, then `resume()` or `start_from(...)` if wanted, then `run()`."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        stream: Stream,
        optim: OptimConfig,
        run: RunConfig,
        out: Path,
        ranks: Ranks,
        about: Mapping[str, Any] | None = None,
        first_batch: Callable[[Any], None] | None = None,
    ) -> None:
        """`about` goes into the checkpoints and run.json as the run's description (plain values)."""
        self.task, self.stream, self.config, self.out, self.ranks = task, stream, run, out, ranks
        self.about = dict(about or {})
        self.first_batch = first_batch
        self.budget = Budget(run.max_steps, run.max_minutes)
        self.schedule = Schedule(optim.warmup_steps, optim.flat_until, optim.anneal, optim.final)
        self.model = model.to(ranks.device)
        if run.channels_last:
            # Torch's stubs know the format only together with a device or a type.
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = Ema(self.model, optim.ema_decay)
        self.optimiser = GuardedAdamW(self.model, optim)
        for name in run.compile:
            self._compile(name)
        self.step_module: nn.Module = _Step(self.model, task, run.precision == "bf16", ranks.device)
        self.state = LoopState()
        self.record: dict[str, Any] = {"about": self.about, "pieces": []}
        self.scores: dict[str, float] = {}
        self._resumed = False
        torch.manual_seed(run.seed + ranks.rank)

    def _compile(self, name: str) -> None:
        """A submodule of the model or, as task.<name>, a function of the task or of what it holds.

        Submodules of one class share a graph, so their layers are compiled once. Shapes are the same in every
        step; what is called with several in a step gets a graph for each.
        """
        if not name.startswith("task."):
            # Parts are compiled, not the whole: nothing is to be cut into distributed training's buckets.
            torch._dynamo.config.optimize_ddp = False
            self.model.get_submodule(name).compile(dynamic=False)
            return
        *holders, leaf = name.split(".")[1:]
        owner: Any = self.task
        for holder in holders:
            owner = getattr(owner, holder)
        setattr(owner, leaf, torch.compile(getattr(owner, leaf), dynamic=False))

    @contextmanager
    def _parallel(self) -> Iterator[None]:
        """Average the step's gradients over the processes until the end of the context.

        No longer than that, and in no local variable that a traceback could keep: what averages must be gone
        before the process group is, whose destructor waits for threads that want the interpreter's lock while
        DistributedDataParallel's holds it (pytorch/pytorch#56297).
        """
        alone = self.step_module
        if self.ranks.world > 1:
            # Batch statistics stay each process's own; torch 2.13 renamed the switch.
            known = inspect.signature(DistributedDataParallel.__init__).parameters
            switch = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            options: dict[str, Any] = {switch: False, "gradient_as_bucket_view": True, "static_graph": True}
            # No device_ids: batches are on their device already.
            self.step_module = DistributedDataParallel(alone, **options)
        try:
            yield
        finally:
            self.step_module = alone

    # -- where a run begins ---------------------------------------------------------------------------------

    def resume(self) -> bool:
        """Go on from the last whole checkpoint in `out`; False where there is none."""
        content = load_latest(self.out / CHECKPOINT)
        if content is None:
            return False
        try:
            self.model.load_state_dict(content["model"])
            self.ema.model.load_state_dict(content["ema"])
            self.optimiser.load_state_dict(content["optimiser"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{self.out / CHECKPOINT}: was written by another network or optimiser than this one "
                f"({error}); give the recipe of that run, or another `out`"
            ) from error
        state = dict(content["state"])
        self.ema.updates = state.pop("ema_updates")
        self.state = LoopState(**state)
        if self.ranks.is_main:
            self._set_rng(content["rng"])
        else:
            torch.manual_seed(self.config.seed + self.ranks.rank + 1_000_003 * self.state.step)
        self.record = content["record"]
        self._warn_of_changes(content["recipe"])
        self._resumed = True
        log.info("going on from step %d, minute %.2f", self.state.step, self.state.seconds / 60)
        return True

    def start_from(self, weights: Mapping[str, Tensor], spent: LoopState | None = None) -> None:
        """Take these weights, with a fresh optimiser; with `spent`, on the schedule as it stood there."""
        self.model.load_state_dict(weights)
        self.ema.model.load_state_dict(weights)
        self.optimiser.restart_guard()
        if spent is not None:
            self.state = LoopState(step=spent.step, seconds=spent.seconds)
            # Past the average's own warm-up: the weights that come in are a mean already.
            self.ema.updates = spent.step

    def _warn_of_changes(self, before: Mapping[str, Any]) -> None:
        now = self.about.get("recipe", {})
        changed = sorted(k for k in now.keys() | before.keys() if now.get(k) != before.get(k))
        if changed:
            log.warning("the recipe differs from the one this run began with in: %s", ", ".join(changed))

    # -- the loop -------------------------------------------------------------------------------------------

    def run(self) -> LoopResult:
        """Train to the end of the budget, of this piece, or to an interrupt; what there is then is saved."""
        if self.budget.progress(self.state.step, self.state.seconds) >= 1.0:
            log.info("this run is finished")
            return LoopResult(True, False, self.state)
        self.model.train()
        config, main = self.config, self.ranks.is_main
        with ExitStack() as stack:
            stack.enter_context(self._parallel())
            interrupt = stack.enter_context(interruptible())
            batches = stack.enter_context(opened(self.stream(self.state.step)))
            batch, _ = _next(batches)  # workers start and shaders compile before the clock does
            waited = 0.0
            if main:
                self._open_records(stack)
            if main and self.first_batch is not None and self.state.step == 0:
                self.first_batch(batch)
            bar = stack.enter_context(progress_bar(main and config.progress_bar))
            self.meter = Meter(config.batch_size * self.ranks.world)
            began, before = time.perf_counter(), self.state.seconds
            last_save = last_evaluation = began
            finished = False
            while True:
                now = time.perf_counter()
                self.state.seconds = before + now - began
                piece_over = config.piece_minutes is not None and now - began >= 60 * config.piece_minutes
                progress = self.budget.progress(self.state.step, self.state.seconds)
                progress, stop = self.ranks.agree(progress, interrupt.asked or piece_over)
                finished = progress >= 1.0
                if finished or stop:
                    break
                rate = self._one_step(batch, progress, waited)
                bar(progress, self.state.step)
                if self.state.step % config.log_every == 0 and main:
                    self._log(rate)
                if main and config.eval_minutes > 0 and now - last_evaluation >= 60 * config.eval_minutes:
                    self._aside(self.evaluate)
                    last_evaluation = time.perf_counter()
                if main and now - last_save >= config.save_seconds:
                    self._aside(self.save)
                    last_save = time.perf_counter()
                batch, waited = _next(batches)
            if main:
                self._finish(finished, interrupt.asked)
        return LoopResult(finished, interrupt.asked, self.state, self.scores)

    def _one_step(self, batch: Any, progress: float, waited: float) -> float:
        rate = self.optimiser.set_factor(self.schedule.factor(self.state.warm_steps, progress))
        loss, parts = self.step_module(batch)
        loss.backward()
        norm = self.optimiser.step()
        if self.ranks.is_main:
            self.ema.update()
            self.meter.add(loss, norm, parts, waited)
        self.state.step += 1
        self.state.warm_steps += 1
        return rate

    def _aside(self, action: Callable[[], object]) -> None:
        """Do something that is not training, and leave its time out of the images a second."""
        self._log(None)
        began = time.perf_counter()
        action()
        self.meter.pause(time.perf_counter() - began)

    def _finish(self, finished: bool, interrupted: bool) -> None:
        self._log(None)
        if not interrupted:
            self.evaluate()
        self.save()
        if finished:
            log.info("finished after %d steps, %.1f minutes", self.state.step, self.state.seconds / 60)
        else:
            log.info("stopped at step %d; resume goes on from there", self.state.step)

    # -- what it writes -------------------------------------------------------------------------------------

    def _open_records(self, stack: ExitStack) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        resume_at = self.state.step if self._resumed else None
        self.curves = Curves(self.out, resume_at, self.config.tensorboard)
        stack.callback(self.curves.close)
        device = self.ranks.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self.record["pieces"].append(
            {
                "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "device": name,
                "processes": self.ranks.world,
                "torch": str(torch.__version__),
                "first_step": self.state.step,
            }
        )

    def _log(self, rate: float | None) -> None:
        values = self.meter.flush()
        if not values:
            return
        if rate is not None:
            values["learning_rate"] = rate
        self.curves.add(self.state.seconds / 60, self.state.step, values)
        self.curves.write()
        log.info(
            "step %d  minute %.2f  loss %.4f  gradient %.3g  %.3g images/s  waiting %.0f %%%s",
            self.state.step,
            self.state.seconds / 60,
            values.get("loss", float("nan")),
            values.get("gradient_norm", float("nan")),
            values["images_per_second"],
            100 * values["data_wait"],
            f"  {values['skipped_steps']:.0f} steps skipped" if values["skipped_steps"] else "",
        )

    def evaluate(self) -> None:
        """Score the averaged weights and note the scores beside the minutes."""
        self.ema.model.eval()
        with torch.no_grad():
            self.scores = dict(self.task.evaluate(self.ema.model))
        named = {f"score/{name}": value for name, value in self.scores.items()}
        self.curves.add(self.state.seconds / 60, self.state.step, named)
        self.curves.write()
        self.curves.draw(f"{self.state.step} steps, {self.state.seconds / 60:.1f} minutes")
        shown = "  ".join(f"{name} {value:.4f}" for name, value in self.scores.items())
        log.info("step %d  minute %.2f  held out: %s", self.state.step, self.state.seconds / 60, shown)

    def save(self) -> None:
        """The full checkpoint, the small one and the record."""
        self._note_piece()
        save_checkpoint(
            self.out / CHECKPOINT,
            {
                "model": self.model.state_dict(),
                "ema": self.ema.model.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "state": {**asdict(self.state), "ema_updates": self.ema.updates},
                "rng": self._rng(),
                "recipe": self.about.get("recipe", {}),
                "record": self.record,
            },
        )
        self.save_small(self.out / SMALL)
        write_record(self.out / RECORD, self.record)

    def save_small(self, path: Path) -> None:
        """The averaged weights in fp16, with where the run stands, for `start_from` elsewhere."""
        note = {"step": str(self.state.step), "seconds": f"{self.state.seconds:.3f}"}
        save_small(path, self.ema.model.state_dict(), self.config.small_part_mib, note)

    def _note_piece(self) -> None:
        meter, device = self.meter, self.ranks.device
        seconds = max(meter.seconds, 1e-9)
        self.record["pieces"][-1].update(
            last_step=self.state.step,
            minutes_so_far=round(self.state.seconds / 60, 3),
            images=meter.images,
            images_per_second=round(meter.images / seconds, 2),
            data_wait_share=round(meter.waited / seconds, 4),
            steps_skipped=meter.skipped,
        )
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device) / 2**30
            self.record["pieces"][-1]["device_memory_gib"] = round(peak, 3)
        losses = [row for row in self.curves.rows if "loss" in row]
        self.record["losses"] = losses[-1] if losses else {}
        self.record["scores"] = [r for r in self.curves.rows if any(name.startswith("score/") for name in r)]

    # -- the world outside ----------------------------------------------------------------------------------

    def _rng(self) -> dict[str, Tensor | None]:
        device = self.ranks.device
        on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return {"cpu": torch.get_rng_state(), "device": on_device}

    def _set_rng(self, states: Mapping[str, Tensor | None]) -> None:
        cpu, device = states["cpu"], states["device"]
        if cpu is not None:
            torch.set_rng_state(cpu)
        if device is not None and self.ranks.device.type == "cuda":
            torch.cuda.set_rng_state(device, self.ranks.device)


@contextmanager
def opened(batches: Iterable[Any]) -> Iterator[Iterator[Any]]:
    """Iterate, and close what can be closed: streams own worker processes."""
    iterator = iter(batches)
    try:
        yield iterator
    finally:
        for owner in (iterator, batches):
            if close := getattr(owner, "close", None):
                close()


def _next(batches: Iterator[Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    try:
        batch = next(batches)
    except StopIteration:
        raise RuntimeError(
            "the stream of batches ended before the run did; training needs an endless one"
        ) from None
    return batch, time.perf_counter() - began
