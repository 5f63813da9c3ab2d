"""The loop on a toy: killed and resumed runs, several processes, skipped steps, interrupts."""

from __future__ import annotations

import csv
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import train_toy
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from train_toy import RUN, make_loop

import smope
from smope.train.checkpoint import load_small
from smope.train.distributed import Ranks
from smope.train.loop import LoopState


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Runs are compared bit by bit, across processes too, and sums depend on how many threads share them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start_toy(
    out: Path, delay: float, save_seconds: float, launcher: Sequence[str] = (), **environment: str
) -> subprocess.Popen[bytes]:
    paths = [str(Path(smope.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, *launcher, train_toy.__file__, str(out), str(delay), str(save_seconds)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        stderr=subprocess.PIPE,
    )


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


def weights_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture
def whole_run(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    out = tmp_path / "whole"
    loop = make_loop(out)
    result = loop.run()
    assert result.finished
    assert result.state.step == 40
    return out, loop.model.state_dict()


def test_killed_run_goes_on_with_the_same_data_and_ends_in_the_same_weights(
    tmp_path: Path, whole_run: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    whole, weights = whole_run
    out = tmp_path / "killed"
    process = start_toy(out, delay=0.05, save_seconds=0.2)
    wait_for(out / "checkpoint.previous.pt", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "weights0.pt").exists(), "it was to be killed before its end"

    order = (whole / "seen0.txt").read_text().split()
    before = (out / "seen0.txt").read_text().split()
    assert before == order[: len(before)], "the order before the kill"
    loop = make_loop(out)
    assert loop.resume()
    assert 0 < loop.state.step <= len(before)
    after_step = loop.state.step
    loop.run()
    seen = (out / "seen0.txt").read_text().split()
    assert seen[len(before) :] == order[after_step:], "goes on with the batch after the checkpoint"
    assert weights_equal(loop.model.state_dict(), weights)
    with (out / "curves.csv").open() as stream:
        steps = [float(row["step"]) for row in csv.DictReader(stream)]
    assert steps == sorted(steps), "rows that the killed piece wrote after its checkpoint are gone"
    assert len(json.loads((out / "run.json").read_text())["pieces"]) == 2


def test_interrupt_saves_and_the_run_can_go_on(
    tmp_path: Path, whole_run: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    out = tmp_path / "interrupted"
    loop = make_loop(out)

    def with_ctrl_c(start: int) -> Iterator[train_toy.Batch]:
        for index, batch in enumerate(train_toy.stream(start)):
            if index == 7:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    loop.stream = with_ctrl_c
    before = signal.getsignal(signal.SIGINT)
    result = loop.run()
    assert result.interrupted
    assert not result.finished
    assert signal.getsignal(signal.SIGINT) is before
    loop = make_loop(out)
    assert loop.resume()
    assert loop.state.step == 7
    assert loop.run().finished
    assert weights_equal(loop.model.state_dict(), whole_run[1])


def test_two_processes_keep_equal_weights_and_see_different_data(tmp_path: Path) -> None:
    out = tmp_path / "two"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = start_toy(out, 0.0, 1e9, launcher, GLOO_SOCKET_IFNAME="lo")
    try:
        _, errors = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher ends its processes too
        raise AssertionError(process.communicate()[1].decode()) from None
    assert process.returncode == 0, errors.decode()
    first, second = (torch.load(out / f"weights{r}.pt", weights_only=True) for r in range(2))
    trained = [name for name in first if "running" not in name and "tracked" not in name]
    assert all(torch.equal(first[name], second[name]) for name in trained)
    assert not torch.equal(first["head.weight"], train_toy.make_model().state_dict()["head.weight"])
    seen = [set((out / f"seen{r}.txt").read_text().split()) for r in range(2)]
    assert not seen[0] & seen[1]
    assert json.loads((out / "run.json").read_text())["pieces"][0]["processes"] == 2


def test_nothing_parallel_outlives_the_run(tmp_path: Path) -> None:
    # What does may be freed after the process group, which then hangs in one of some hundred tries.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        loop = make_loop(tmp_path, ranks=Ranks(torch.device("cpu"), 0, 2, dist.group.WORLD))
        assert loop.run().finished
        assert not any(type(thing) is DistributedDataParallel for thing in gc.get_objects())
    finally:
        dist.destroy_process_group()


def test_a_step_with_a_bad_gradient_changes_nothing_and_is_counted(tmp_path: Path) -> None:
    hurt = make_loop(tmp_path / "hurt")
    hurt.budget = replace(hurt.budget, max_steps=5)
    hurt.run()
    before = {name: value.clone() for name, value in hurt.model.state_dict().items()}
    moments = [value.clone() for state in hurt.optimiser.adamw.state.values() for value in state.values()]
    hurt.budget = replace(hurt.budget, max_steps=6)
    hurt.stream = lambda start: iter([(torch.full((8, 3, 12, 12), torch.nan), torch.zeros(8, 2))] * 2)
    hurt.run()
    assert hurt.state.step == 6
    after = hurt.model.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before if n != "norm.num_batches_tracked")
    kept = [value for state in hurt.optimiser.adamw.state.values() for value in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, kept, strict=True))
    record = json.loads((tmp_path / "hurt" / "run.json").read_text())
    assert [piece["steps_skipped"] for piece in record["pieces"]] == [0, 1]


def test_small_form_starts_another_run_where_the_first_stood(tmp_path: Path) -> None:
    first = make_loop(tmp_path / "first")
    first.budget = replace(first.budget, max_steps=20)
    first.run()
    weights, note = load_small(tmp_path / "first" / "small.safetensors")
    assert int(note["step"]) == 20
    for name, value in first.ema.model.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)

    second = make_loop(tmp_path / "second")
    second.start_from(weights, LoopState(step=20, seconds=float(note["seconds"])))
    assert second.run().finished
    seen = (tmp_path / "second" / "seen0.txt").read_text().split()
    expected = next(train_toy.stream(20))[1][0, 0].item()
    assert len(seen) == 20
    assert seen[0] == f"{expected:.6f}"


def test_minutes_drive_the_schedule_over_pieces(tmp_path: Path) -> None:
    run = replace(RUN, max_steps=None, max_minutes=1.2 / 60, piece_minutes=0.6 / 60, log_every=1)
    began = time.perf_counter()
    first = make_loop(tmp_path, run, delay=0.01)
    result = first.run()
    assert not result.finished
    assert not result.interrupted
    assert 0.6 <= result.state.seconds < 0.9
    second = make_loop(tmp_path, replace(run, piece_minutes=None), delay=0.01)
    assert second.resume()
    assert second.run().finished
    assert time.perf_counter() - began < 6
    rates = [row["learning_rate"] for row in second.curves.rows if "learning_rate" in row]
    assert max(rates) == pytest.approx(1e-2)
    assert rates[-1] < 0.15 * max(rates), "annealed to the end of the budget"


def test_a_finished_run_resumes_to_nothing(whole_run: tuple[Path, dict[str, torch.Tensor]]) -> None:
    out, weights = whole_run
    loop = make_loop(out)
    assert loop.resume()
    assert loop.run().finished
    assert weights_equal(loop.model.state_dict(), weights)


def test_an_ending_stream_is_named(tmp_path: Path) -> None:
    loop = make_loop(tmp_path)
    loop.stream = lambda start: iter([next(train_toy.stream(start))])
    with pytest.raises(RuntimeError, match="ended before the run"):
        loop.run()


def test_autocast_and_channels_last_train(tmp_path: Path) -> None:
    loop = make_loop(tmp_path, replace(RUN, precision="bf16", channels_last=True))
    result = loop.run()
    assert result.scores["error"] < 0.03
    assert loop.model.get_submodule("stem").weight.is_contiguous(memory_format=torch.channels_last)


def test_first_batch_is_shown_once(tmp_path: Path) -> None:
    shown: list[object] = []
    loop = make_loop(tmp_path)
    loop.first_batch = shown.append
    loop.run()
    again = make_loop(tmp_path, replace(RUN, max_steps=45))
    again.first_batch = shown.append
    again.resume()
    again.run()
    assert len(shown) == 1


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    loop = make_loop(tmp_path, ranks=Ranks(torch.device("cpu"), rank=1, world=1))
    loop.run()
    assert [p.name for p in tmp_path.iterdir()] == ["seen1.txt"]


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    make_loop(tmp_path).run()
    other = make_loop(tmp_path / "other")
    other.out = tmp_path
    other.model.add_module("more", nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="another network or optimiser"):
        other.resume()
