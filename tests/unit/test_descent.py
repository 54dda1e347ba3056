"""The optimizer's loop keeps the best state, ends early, and resumes."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fewbit.errors import ArgumentError, NumericsError, OutputError
from fewbit.formats.containers.safetensors import read_file, write_file
from fewbit.pipeline import costs, descent
from fewbit.pipeline.descent import Descent, Objective, descend
from fewbit.pipeline.optimization import Optimization

TARGET = torch.tensor([0.02, -0.01, 0.03])


class Problem:
    """A parabola around TARGET. `held_out` may have its minimum elsewhere."""

    def __init__(self, goal: torch.Tensor = TARGET) -> None:
        self.x, self.goal, self.steps = nn.Parameter(torch.zeros(3)), goal, list[int]()

    def gradient(self, step: int) -> None:
        self.steps.append(step)
        (self.x - TARGET).square().sum().backward()

    def held_out(self) -> float:
        return float((self.x.detach() - self.goal).square().sum())

    def run(self, wanted: Optimization, saved: Path | None = None) -> Descent:
        return descend(Objective([self.x], self.gradient, self.held_out), wanted, self.tell, saved)

    def tell(self, done: int, total: int, loss: float) -> None:
        self.told = done, total, loss


def test_it_finds_the_minimum_and_says_when() -> None:
    problem = Problem()
    done = problem.run(Optimization(steps=100, learning_rate=2e-3))
    assert torch.allclose(problem.x.detach(), TARGET, atol=2e-3)
    assert done.before == pytest.approx(float(TARGET.square().sum()))
    assert done.after == problem.held_out() == min(loss for _, loss in done.history)
    assert (done.best, done.after) in done.history
    assert done.history[0] == (0, done.before)
    assert [step for step, _ in done.history] == list(range(0, 101, 5))


def test_the_best_state_is_kept_not_the_last() -> None:
    problem = Problem(goal=TARGET / 2)  # further on, the held-out loss rises again
    done = problem.run(Optimization(steps=60, learning_rate=2e-3))
    assert 0 < done.best < done.steps
    assert done.after == problem.held_out() < done.history[-1][1]
    assert problem.told == (done.steps, 60, done.history[-1][1])  # what was measured last


def test_without_a_better_state_nothing_changes() -> None:
    problem = Problem(goal=torch.zeros(3))
    done = problem.run(Optimization(steps=60))
    assert torch.equal(problem.x.detach(), torch.zeros(3))
    assert done.best == 0
    assert done.after == done.before == 0
    assert done.steps == 21  # a third of the steps, at the next measurement
    assert problem.told == (21, 60, done.history[-1][1])


def test_the_learning_rate_warms_up_and_falls_to_0() -> None:
    wanted = Optimization(steps=100, learning_rate=1.0)
    rates = [wanted.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert max(rates) == 1
    assert rates[55] == pytest.approx(0.5)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-3


class Interrupted(Exception):
    pass


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state is written after each measurement, however long that takes."""
    monkeypatch.setattr(descent, "_PAUSE", 0.0)


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(descent, "write_file", full)
    with pytest.raises(OutputError, match=f"cannot write to the cache {tmp_path}: No space left on device"):
        Problem().run(Optimization(steps=20), tmp_path / "state.safetensors")
    monkeypatch.setenv("FEWBIT_CACHE", str(tmp_path))
    monkeypatch.setattr(costs, "replace_text", full)
    with pytest.raises(OutputError, match=f"cannot write to the cache {tmp_path / 'costs'}: No space left on device"):
        costs.kept("key", "tiny", lambda: 0.5)


@pytest.mark.usefixtures("often")
def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path: Path) -> None:
    wanted, saved = Optimization(steps=60, learning_rate=2e-3), tmp_path / "state.safetensors"
    whole, cut = Problem(), Problem()
    expected = whole.run(wanted)

    def until(step: int, gradient: Callable[[int], None]) -> Callable[[int], None]:
        def stopped(at: int) -> None:
            if at == step:
                raise Interrupted
            gradient(at)

        return stopped

    with pytest.raises(Interrupted):
        descend(Objective([cut.x], until(31, cut.gradient), cut.held_out), wanted, lambda *_: None, saved)
    again = Problem()
    done = again.run(wanted, saved)
    assert again.steps[0] == 30  # the last measurement before step 31
    assert done == expected
    assert torch.equal(again.x, whole.x)


@pytest.mark.usefixtures("often")
def test_a_run_that_ended_early_has_ended(tmp_path: Path) -> None:
    wanted, saved = Optimization(steps=60, learning_rate=2e-3), tmp_path / "state.safetensors"
    first = Problem(goal=torch.zeros(3)).run(wanted, saved)
    again = Problem(goal=torch.zeros(3))
    assert again.run(wanted, saved) == first
    assert not again.steps


def test_writing_the_state_takes_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, writes = [0.0], list[float]()

    def slow(*arguments: Any) -> None:
        writes.append(now[0])
        now[0] += 10.0
        write_file(*arguments)

    def step(at: int) -> None:
        now[0] += 1.0
        problem.gradient(at)

    problem = Problem()
    monkeypatch.setattr(descent, "write_file", slow)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    wanted = Optimization(steps=500, codes=True)  # a measurement, and so a state, every 25 steps
    descend(Objective([problem.x], step, problem.held_out), wanted, lambda *_: None, tmp_path / "state")
    assert writes == [25.0, 235.0, 445.0]  # 10 s to write, then 200 s without


def test_a_damaged_state_is_not_read(tmp_path: Path) -> None:
    saved = tmp_path / "state.safetensors"
    saved.write_bytes(b"not a state")
    assert Problem().run(Optimization(steps=20), saved).steps == 20


@pytest.mark.usefixtures("often")
def test_a_state_that_lacks_something_changes_nothing(tmp_path: Path) -> None:
    wanted, saved = Optimization(steps=40), tmp_path / "state.safetensors"
    Problem().run(wanted, saved)
    tensors, metadata = read_file(saved)
    whole = json.loads(metadata["state"])
    for lacking in whole:
        write_file(saved, tensors, {"state": json.dumps({key: whole[key] for key in whole if key != lacking})})
        state = descent._State([Problem().x], wanted)
        assert not state.load(saved)
        assert (state.step, state.best_step, state.history, state.best) == (0, 0, [], [])


@pytest.mark.usefixtures("often")
def test_a_state_of_other_parameters_is_not_read(tmp_path: Path) -> None:
    wanted, saved = Optimization(steps=40), tmp_path / "state.safetensors"
    Problem().run(wanted, saved)
    other = nn.Parameter(torch.zeros(1))  # to which the values of another shape could be broadcast
    state = descent._State([other], wanted)
    assert not state.load(saved)
    assert state.step == 0


def test_numbers_that_are_not_finite_are_errors() -> None:
    problem = Problem()
    with pytest.raises(NumericsError, match="before any step"):
        descend(Objective([problem.x], problem.gradient, lambda: math.nan), Optimization(), lambda *_: None)

    def broken(step: int) -> None:
        problem.x.grad = torch.full((3,), math.nan)

    with pytest.raises(NumericsError, match="not finite in step 1") as raised:
        descend(Objective([problem.x], broken, problem.held_out), Optimization(), lambda *_: None)
    assert "learning_rate" in raised.value.hint


@pytest.mark.parametrize("given", [{"steps": 0}, {"learning_rate": 0.0}, {"learning_rate": -1.0}, {"batch": 0}])
def test_settings_out_of_range_are_errors(given: dict[str, float]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(given))):
        Optimization(**given)  # type: ignore[arg-type]
