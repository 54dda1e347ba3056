"""The KL divergence of a quantized model from its original, before anything is written, one block in memory at a time.

Each block runs with its original weights on the original model's states, and then with its quantized weights on the
quantized model's. So it takes two forward passes. The logits of both models are made of the states after the last
block, for a few windows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.errors import NumericsError
from fewbit.models import on_text
from fewbit.pipeline import blocks
from fewbit.pipeline.capture import Block, Inputs
from fewbit.pipeline.fisher import LOGITS
from fewbit.pipeline.run import Run
from fewbit.pipeline.settled import Settled

_ENTRIES = 1 << 18  # logits that are compared at a time: they stay in a core's cache


def divergence(settled: Settled, run: Run, tokens: Tensor) -> float:
    """The mean of KL(p ‖ q) in nats over all tokens int64 [windows, length]: p is the original's distribution, and q
    that of the model with the weights that `run` has for all blocks and for all weights outside them.

    NumericsError if it is not finite.
    """
    skeleton = settled.skeleton
    vocabulary: int = skeleton.config.get_text_config().vocab_size
    inputs = Inputs(tokens, most=max(1, LOGITS // (tokens.shape[1] * vocabulary)))
    batches = list(tokens.split(inputs.at_once))
    outside = _outside(settled, run)
    exact, calls = skeleton.capture(batches)
    other, other_calls = list(exact), calls
    embedding: Any = skeleton.model.get_input_embeddings()
    if (values := _values_of(settled, embedding, outside)) is not None:
        with _weight(embedding, values):
            other, other_calls = skeleton.capture(batches)
    for index, name in enumerate(skeleton.blocks):
        saved = run.load(index)
        assert saved is not None
        with skeleton.materialized(name) as module:
            Block(skeleton, name, module, calls[name], exact).replay()
            block = Block(skeleton, name, module, other_calls[name], other)
            blocks.restore(settled, block, saved[0])
            block.replay()
    total = 0.0
    head: Any = skeleton.model.get_output_embeddings()
    values = _values_of(settled, head, outside)
    with on_text.ending(skeleton) as end, torch.no_grad():
        for some, one, two in zip(batches, exact, other, strict=True):
            original = end(some, one)
            if values is None:
                total += nats_between(original, end(some, two))
                continue
            with _weight(head, values):
                total += nats_between(original, end(some, two))
    if not total < float("inf"):
        raise NumericsError(f"the KL divergence on held-out windows is {total}", "Give more bits.")
    return total / tokens.numel()


def _outside(settled: Settled, run: Run) -> dict[str, Tensor]:
    """Module outside the blocks -> the values of its quantized weight."""
    found = {}
    for index, assignment in enumerate(settled.outside, len(settled.skeleton.blocks)):
        saved = run.load(index)
        assert saved is not None
        weight = blocks.read(settled, assignment.module, saved[0])
        found[assignment.module] = weight.dequantize().to(settled.skeleton.dtype)
    return found


def _values_of(settled: Settled, module: nn.Module | None, outside: Mapping[str, Tensor]) -> Tensor | None:
    """The values of a quantized embedding or head, which may be tied; None if it is not quantized."""
    skeleton = settled.skeleton
    name = next((name for name, each in skeleton.model.named_modules() if each is module), "")
    owner = skeleton.tied.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")
    return outside.get(owner)


@contextmanager
def _weight(module: Any, values: Tensor) -> Iterator[None]:
    """A context in which the module computes with `values` as its weight."""

    def swap(module: nn.Module, args: tuple[Any, ...]) -> None:
        kept.append(weight := module.get_parameter("weight"))
        kept.append(weight.data)
        weight.data = values

    def back(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        data, weight = kept.pop(), kept.pop()
        weight.data = data

    kept: list[Any] = []
    handles = [module.register_forward_pre_hook(swap), module.register_forward_hook(back, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def nats_between(original: Tensor, other: Tensor) -> float:
    """The sum of KL(p ‖ q) over all rows of logits [..., V]: p of the original, q of the other.

    With d = other - original, less its mean under p, KL = log sum p exp(d). The mean of d is 0 under p, so the sum is
    1 + sum p (exp(d) - 1 - d), whose terms are not negative: no digits cancel in float32.
    """
    total, some = 0.0, max(1, _ENTRIES // original.shape[-1])
    for one, two in zip(original.flatten(0, -2).split(some), other.flatten(0, -2).split(some), strict=True):
        one, two = one.float(), two.float()
        p = one.softmax(-1)
        d = two - one
        d -= (p * d).sum(-1, keepdim=True)
        rows = d.expm1().sub_(d).mul_(p).sum(-1).double().log1p()
        if not bool(rows.isfinite().all()):  # exp(d) is beyond float32
            log_p, log_q = one.double().log_softmax(-1), two.double().log_softmax(-1)
            rows = (log_p.exp() * (log_p - log_q)).sum(-1)
        total += float(rows.sum())
    return total
