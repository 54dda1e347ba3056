"""The gradient of a training step on fixed memory, so that a GPU replays its launches as a CUDA graph.

A step of a small model is thousands of launches of a few microseconds each, forward and backward. Python takes longer
to launch them than the GPU takes to run them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fewbit.models.decoding.graph import Graph


class TrainingStep:
    """loss(tokens, target) and its gradients by `trained`, for windows of token ids [count, length].

    On a GPU the first call runs normally, the second records, and later ones replay. Where a step cannot be recorded,
    a warning says so once, and every call runs normally.
    """

    def __init__(
        self, loss: Callable[[Tensor, Tensor | None], Tensor], trained: Sequence[Tensor], device: torch.device
    ) -> None:
        self.loss, self.trained, self.device = loss, list(trained), device
        self.tokens: Tensor | None = None
        self.target: Tensor | None = None
        self.graph = Graph(self._run, device)

    def __call__(self, tokens: Tensor, target: Tensor | None) -> Tensor:
        """The loss, a scalar. The gradients are added to `grad` of the parameters.

        target: what else the loss reads, of one shape for all calls. tokens, target: on any device.
        """
        self.tokens, self.target = _kept(self.tokens, tokens, self.device), _kept(self.target, target, self.device)
        loss, gradients = self.graph()
        for parameter, gradient in zip(self.trained, gradients, strict=True):
            if gradient is not None:  # a replay writes over it
                parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad + gradient
        out: Tensor = loss
        return out

    def _run(self) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        assert self.tokens is not None
        with torch.enable_grad():
            loss = self.loss(self.tokens, self.target)
            return loss.detach(), torch.autograd.grad(loss, self.trained, allow_unused=True)


def _kept(memory: Tensor | None, value: Tensor | None, device: torch.device) -> Tensor | None:
    """The value in the memory of the first call."""
    if memory is None or value is None:
        return None if value is None else value.to(device, copy=True)
    return memory.copy_(value, non_blocking=True)
