"""What an error in a linear's output costs, from one backward pass of the original model.

Let p be the model's distribution of the next token, and v a token *sampled* from it. With g_tn the gradient of the loss
- sum_t log p(v_t) at output n of a linear, and ΔW the error of its weight, the KL divergence from the original is, to
second order,

    KL = ½ E[(sum_tn g_tn (ΔW x_t)_n)²] ≈ ½ sum_n r_n ΔW_n H ΔW_nᵀ        summed over all tokens, in nats

    H = sum_t s_t x_t x_tᵀ,   s_t = mean_n g_tn²,   r_n = sum_t g_tn² over its mean

The square is that of a sum over outputs and tokens. Errors of different rows are nearly independent, and so are scores
of different positions, because the labels are sampled: so only the diagonal counts, and g_tn² ≈ s_t r_n. Labels of the
text in place of sampled ones would give another matrix, the empirical Fisher. s is heavy-tailed: it is limited to its
99.9 % quantile.

The pass holds one block at a time. On the way forward the inputs of all blocks are kept in main memory. On the way
back each block runs again on its inputs, and its gradient is handed to the block before.
Sources: the Fisher information as the Hessian of the KL divergence (Martens, https://arxiv.org/abs/1412.1193);
s as token weights: GuidedQuant, https://arxiv.org/abs/2505.07004.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.methods.base import in_compute_dtype
from fewbit.models import experts
from fewbit.models.skeleton import Skeleton
from fewbit.pipeline.capture import Block, Inputs, captured

CLIP = 0.999  # quantile of s
LOGITS = 1 << 27  # entries of logits that are computed at once
_SEED = 0  # of the sampled labels


@dataclass(frozen=True)
class Fisher:
    """H [K, K], not divided by the number of tokens, and r [N], of one linear."""

    hessian: Tensor
    rows: Tensor

    def cost(self, weight: Tensor, values: Tensor) -> float:
        """½ sum_n r_n ΔW_n H ΔW_nᵀ, in nats over all tokens: the loss from `values` in place of `weight`, [N, K]."""
        error = values.to(self.hessian.dtype) - weight.to(self.hessian.dtype)
        return 0.5 * float(((error @ self.hessian).mul_(error).sum(1) * self.rows).sum())


@dataclass
class Scores:
    """Of one linear: s of the rows of each of its calls, in order, and sum_t g_tn² [N]."""

    of_rows: list[Tensor]
    of_outputs: Tensor | None = None

    def limit(self, clip: float) -> float:
        """The quantile `clip` of s over all rows; inf if there is no row, or no limit (`clip` of 1)."""
        every = torch.cat(self.of_rows) if self.of_rows else torch.zeros(0, dtype=torch.float32, device="cpu")
        if not len(every) or clip >= 1:
            return float("inf")
        return float(every.kthvalue(max(1, ceil(clip * len(every)))).values)

    def weights_of_outputs(self) -> Tensor:
        """r [N]. They are 1 if no gradient reached the linear."""
        assert self.of_outputs is not None
        mean = self.of_outputs.mean()
        return self.of_outputs / mean if mean > 0 else torch.ones_like(self.of_outputs)


class Sweep:
    """The forward pass, made at once, and then the backward pass, block by block from the last to the first.

    tokens: int64 [windows, length]. hidden: the inputs of each block. gradient: for each batch, that at the output of
    the block that `backward` takes next.
    """

    def __init__(self, skeleton: Skeleton, tokens: Tensor, tell: Callable[[], None] = lambda: None) -> None:
        self.skeleton, self.tokens = skeleton, tokens
        vocabulary: int = skeleton.config.get_text_config().vocab_size
        inputs = Inputs(tokens, most=max(1, LOGITS // (tokens.shape[1] * vocabulary)))
        self.batches: list[Tensor] = list(tokens.split(inputs.at_once))
        states, self.calls = captured(skeleton, inputs)
        self.hidden: dict[str, list[Tensor]] = {}
        for name in skeleton.blocks:
            self.hidden[name] = [each.cpu() for each in states]
            with skeleton.materialized(name) as module:
                Block(skeleton, name, module, self.calls[name], states).replay()
            tell()
        self.last = [each.cpu() for each in states]  # the outputs of the last block
        self.gradient: list[Tensor] = []

    def start(self, end: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Compute the gradient at the output of the last block. end: as `on_text.ending` yields it."""
        generator = torch.Generator().manual_seed(_SEED)
        for tokens, states in zip(self.batches, self.last, strict=True):
            leaf = states.to(self.skeleton.device).requires_grad_()
            with torch.enable_grad():
                logits = end(tokens, leaf.clone())
                loss = nn.functional.cross_entropy(
                    logits.flatten(0, -2), sampled(logits.detach(), generator).flatten(), reduction="sum"
                )
                loss.backward()
            self.gradient.append(_gradient_of(leaf))

    @contextmanager
    def block(self, name: str) -> Iterator[Block]:
        """The block, with its weights and inputs, after `backward`; its inputs are forgotten afterwards."""
        states = [each.to(self.skeleton.device) for each in self.hidden.pop(name)]
        with self.skeleton.materialized(name) as module:
            yield Block(self.skeleton, name, module, self.calls[name], states)

    def backward(self, block: Block, names: Sequence[str]) -> dict[str, Scores]:
        """Run a block backwards. Returns the scores of its linears `names`."""
        scores = {name: Scores([]) for name in names}
        modules = {name: self.skeleton.model.get_submodule(name) for name in names}
        handles = [module.register_forward_hook(_watch(scores[name])) for name, module in modules.items()]
        try:
            for batch, states in enumerate(block.hidden):
                leaf = states.detach().requires_grad_()
                with torch.enable_grad():
                    out = block.run(batch, leaf.clone())
                    out.backward(self.gradient[batch].to(out))
                self.gradient[batch] = _gradient_of(leaf)
        finally:
            for handle in handles:
                handle.remove()
        return scores


def fishers(block: Block, scores: Mapping[str, Scores], clip: float = CLIP) -> dict[str, Fisher]:
    """The Fisher information of the linears `scores`, with one run of the block. Linears without a row are left out."""
    limits = {name: each.limit(clip) for name, each in scores.items()}
    sums, seen = dict[str, Tensor](), dict.fromkeys(scores, 0)

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def record(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = in_compute_dtype(args[0].detach().reshape(-1, args[0].shape[-1]))
            weight = scores[name].of_rows[seen[name]].clamp(max=limits[name])
            seen[name] += 1
            if name not in sums:
                sums[name] = torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype, device=x.device)
            sums[name].addmm_((x * weight.unsqueeze(1)).T, x)

        return record

    modules = {name: block.skeleton.model.get_submodule(name) for name in scores}
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        with torch.no_grad(), experts.only_of(block.name, block.module, scores):
            for batch, states in enumerate(block.hidden):
                block.run(batch, states)
    finally:
        for handle in handles:
            handle.remove()
    return {name: Fisher(hessian, scores[name].weights_of_outputs()) for name, hessian in sums.items()}


def sampled(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A label int64 [...] for each position of logits [..., V], drawn from the model. The draws come from the CPU's
    generator, so they do not depend on the device."""
    draws = torch.rand(logits.shape[:-1], generator=generator, dtype=torch.float64, device="cpu").to(logits.device)
    below = logits.double().softmax(-1).cumsum(-1)
    found = torch.searchsorted(below, (draws.unsqueeze(-1) * below[..., -1:])).squeeze(-1)
    return found.clamp(max=logits.shape[-1] - 1)


def _watch(scores: Scores) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    """A forward hook that adds the gradient at a linear's output to `scores`."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        x = args[0].detach()
        used = (x != 0).any(-1).flatten()  # rows of 0 belong to tokens that did not choose the expert
        place = len(scores.of_rows)
        scores.of_rows.append(torch.zeros(len(used), dtype=in_compute_dtype(x).dtype, device=x.device))
        if scores.of_outputs is None:
            scores.of_outputs = torch.zeros(output.shape[-1], dtype=in_compute_dtype(x).dtype, device=x.device)

        def record(gradient: Tensor) -> None:
            squares = in_compute_dtype(gradient.detach().reshape(-1, gradient.shape[-1])).square()
            squares *= used.unsqueeze(1)
            scores.of_rows[place] = squares.mean(1)
            assert scores.of_outputs is not None
            scores.of_outputs += squares.sum(0)

        if not output.requires_grad:  # it does not depend on the hidden states
            output.requires_grad_()
        output.register_hook(record)

    return hook


def _gradient_of(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.detach()
