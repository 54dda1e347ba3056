"""The loop of an optimizer that keeps the state with the lowest loss on held-out text.

Adam on float32 parameters, linear warm-up of the learning rate, then cosine decay to 0. Every few steps the held-out
loss is measured, and the best parameters are copied. The loop ends early when the held-out loss has not improved for a
third of the steps, unless codes are trained. The parameters end as the best state, which is the first one if no step
improved it.

A run can be interrupted: with `saved`, the state is written after a measurement, and a later run continues there. It is
written so often that this takes at most about a twentieth of the time.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fewbit.errors import FormatError, NumericsError, PlanError
from fewbit.formats.containers.safetensors import read_file, write_file
from fewbit.pipeline.optimization import Optimization
from fewbit.system.cache import writing

_PATIENCE = 3  # the loop ends after 1 / 3 of the steps without improvement
_BETAS = (0.9, 0.99)
_PAUSE = 20.0  # times that writing the state took, until it is written again
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # of Adam


@dataclass(frozen=True)
class Descent:
    """The result. before, after: held-out loss of the first and of the best state. steps: taken. best: step of the
    best state, 0 for the first. history: (steps, held-out loss) of all measurements."""

    before: float
    after: float
    steps: int
    best: int
    history: tuple[tuple[int, float], ...]


Tell = Callable[[int, int, float], None]  # steps done, steps in total, held-out loss


@dataclass(frozen=True)
class Objective:
    """A loss over `parameters`.

    gradient: adds the gradient of a step, counted from 0, to `grad` of the parameters. held_out: the loss of the
    parameters as they are, on held-out text.
    """

    parameters: Sequence[nn.Parameter]
    gradient: Callable[[int], None]
    held_out: Callable[[], float]


def descend(objective: Objective, wanted: Optimization, tell: Tell, saved: Path | None = None) -> Descent:
    """Minimize a loss. Its parameters end as the state with the lowest held-out loss.

    saved: file of an interrupted run, to continue and to write. NumericsError if the held-out loss is not finite at
    first, or a gradient is not.
    """
    state = _State(objective.parameters, wanted)
    if saved is None or not state.load(saved):
        state.measured(objective.held_out())
    if not math.isfinite(state.history[0][1]):
        raise NumericsError(f"the held-out loss is {state.history[0][1]} before any step", "A model may be damaged.")
    while state.step < wanted.steps and not state.stalled:
        for _ in range(min(wanted.every, wanted.steps - state.step)):
            tell(state.step, wanted.steps, state.history[-1][1])
            objective.gradient(state.step)
            state.advance()
        state.measured(objective.held_out())
        if saved is not None:
            state.save(saved)
    tell(state.step, wanted.steps, state.history[-1][1])
    return state.result()


class _State:
    """The parameters, Adam's moments, and the best parameters so far."""

    def __init__(self, parameters: Sequence[nn.Parameter], wanted: Optimization) -> None:
        if not parameters:
            raise PlanError("there is nothing to train")
        self.parameters, self.wanted = list(parameters), wanted
        self.optimizer = torch.optim.Adam(self.parameters, lr=wanted.learning_rate, betas=_BETAS)
        self.step, self.best_step, self.best_loss = 0, 0, math.inf
        self.history: list[tuple[int, float]] = []
        self.best: list[Tensor] = []
        self.next_save = 0.0  # on the clock of `time.monotonic`

    @property
    def stalled(self) -> bool:
        """Whether the held-out loss has not improved for so long that the loop ends."""
        # Codes that are rounded jump at the peak of the learning rate. The loss rises then, and falls at the end.
        return not self.wanted.codes and (self.step - self.best_step) * _PATIENCE >= self.wanted.steps

    def measured(self, loss: float) -> None:
        self.history.append((self.step, loss))
        if loss < self.best_loss:
            self.best_loss, self.best_step = loss, self.step
            self.best = [parameter.detach().clone() for parameter in self.parameters]

    def advance(self) -> None:
        grads = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if grads and not bool(torch.isfinite(torch.nn.utils.get_total_norm(grads, math.inf))):
            raise NumericsError(f"a gradient is not finite in step {self.step + 1}", "Try a lower `learning_rate`.")
        for group in self.optimizer.param_groups:
            group["lr"] = self.wanted.rate(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    @torch.no_grad()
    def result(self) -> Descent:
        for parameter, best in zip(self.parameters, self.best, strict=True):
            parameter.copy_(best)
        history = tuple(self.history)
        return Descent(history[0][1], self.best_loss, self.step, self.best_step, history)

    def save(self, path: Path) -> None:
        """Write the state, unless it was written a short time ago."""
        if (start := time.monotonic()) < self.next_save:
            return
        tensors: dict[str, Tensor] = {}
        for i, (parameter, best) in enumerate(zip(self.parameters, self.best, strict=True)):
            tensors |= {f"{i}.value": parameter.detach(), f"{i}.best": best}
            tensors |= {f"{i}.{name}": moment for name, moment in self.optimizer.state[parameter].items()}
        state = {"step": self.step, "best": [self.best_step, self.best_loss], "history": self.history}
        with writing(path.parent):
            write_file(path, tensors, {"state": json.dumps(state)})
        end = time.monotonic()
        self.next_save = end + _PAUSE * (end - start)

    def load(self, path: Path) -> bool:
        """Continue from a saved state. False, and nothing changes, if there is none or if it is damaged."""
        try:
            tensors, metadata = read_file(path)
            state = json.loads(metadata["state"])
            values = [(tensors[f"{i}.value"], tensors[f"{i}.best"]) for i in range(len(self.parameters))]
            step, (best_step, best_loss) = state["step"], state["best"]
            history = [(step, loss) for step, loss in state["history"]]
        except (FormatError, ValueError, KeyError, TypeError):
            return False
        if any(own.shape != each.shape for own, both in zip(self.parameters, values, strict=True) for each in both):
            return False
        self.step, self.best_step, self.best_loss, self.history = step, best_step, best_loss, history
        for i, (parameter, (value, best)) in enumerate(zip(self.parameters, values, strict=True)):
            parameter.data.copy_(value)
            self.best.append(best.to(parameter.device))
            moments = {name: tensors[f"{i}.{name}"] for name in _MOMENTS if f"{i}.{name}" in tensors}
            if moments:  # a parameter that never had a gradient has none
                on = {name: x if name == "step" else x.to(parameter.device) for name, x in moments.items()}
                self.optimizer.state[parameter] = on
        return True
