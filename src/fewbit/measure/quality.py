"""Quality of a quantized model: perplexity, KL divergence from the original, and agreement of the most likely tokens.

Perplexity is measured on disjoint windows of the joined text. Each token of a window except the first is predicted from
the tokens before it in the window. The KL divergence of the model's next-token distribution from the reference's is
sum p_ref (log p_ref - log p), in nats per token. Logits are compared window by window and then dropped. Intervals are
95 % bootstrap intervals over runs of adjacent tokens. For values that compare two models, both use the same resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import NumericsError
from fewbit.measure.intervals import Interval
from fewbit.system import ranks

_RUN = 128  # tokens that are resampled together: adjacent tokens share a context, so they are not independent
_FEWEST_RUNS = 16  # runs are shorter for a short text, so that there are enough of them to resample
_RESAMPLES = 400
_ROWS = 256  # rows of logits that are converted to probabilities at a time


@dataclass(frozen=True)
class Divergence:
    """Statistics of the KL divergence from the reference over all tokens, in nats."""

    mean: Interval
    median: Interval
    p99: Interval
    p999: Interval
    max: float


@dataclass(frozen=True)
class Quality:
    """How well a model predicts `windows` windows of `length` tokens: `tokens` predictions in all. `kl` is the KL
    divergence from the reference, and `same_top` the share of tokens with the same most likely next token. These,
    `reference_perplexity` and `perplexity_ratio` are None without a reference.
    """

    tokens: int
    windows: int
    length: int
    perplexity: Interval
    reference_perplexity: Interval | None
    perplexity_ratio: Interval | None
    kl: Divergence | None
    same_top: Interval | None


@dataclass(frozen=True)
class Recorded:
    """Saved logits of a model, used in its place: [windows, length, vocabulary]."""

    logits: Tensor


def measure(
    model: Any | Recorded,
    reference: Any | Recorded | None,
    windows: Tensor,
    progress: Callable[[int], None] | None = None,
) -> Quality:
    """Compare two causal LMs on `windows` of token ids [n, length], which are split among ranks.

    `progress` receives the number of windows that are done. NumericsError if logits have NaN.
    """
    loss, reference_loss, kl, same = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
    with torch.inference_mode():
        for index in ranks.part(len(windows)):
            number, tokens = index + 1, windows[index]
            logits = _said(model, number, tokens)
            original = None if reference is None else _said(reference, number, tokens).to(logits.device)
            for start in range(0, len(tokens) - 1, _ROWS):
                rows = slice(start, min(start + _ROWS, len(tokens) - 1))
                targets = tokens[rows.start + 1 : rows.stop + 1].unsqueeze(1)
                log_q = _log_softmax(logits[rows], "the model", number)
                targets = targets.to(log_q.device)
                loss.append(-log_q.gather(1, targets).squeeze(1).cpu())
                if original is not None:
                    log_p = _log_softmax(original[rows], "the reference", number)
                    reference_loss.append(-log_p.gather(1, targets).squeeze(1).cpu())
                    # Rounding can make a divergence of zero slightly negative.
                    kl.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0).cpu())
                    same.append((log_p.argmax(-1) == log_q.argmax(-1)).float().cpu())
            if progress:
                progress(min(len(windows), number * ranks.size()))
    lost = _joined(loss)
    runs = _Resampler(len(lost))
    alone = Quality(
        tokens=len(lost),
        windows=windows.shape[0],
        length=windows.shape[1],
        perplexity=runs.estimate(_exp_of_mean, lost),
        reference_perplexity=None,
        perplexity_ratio=None,
        kl=None,
        same_top=None,
    )
    if reference is None:
        return alone
    original_loss, divergence = _joined(reference_loss), _joined(kl)
    return replace(
        alone,
        reference_perplexity=runs.estimate(_exp_of_mean, original_loss),
        perplexity_ratio=runs.estimate(_exp_of_mean, lost - original_loss),
        kl=Divergence(
            mean=runs.estimate(torch.mean, divergence),
            median=runs.estimate(_quantile(0.5), divergence),
            p99=runs.estimate(_quantile(0.99), divergence),
            p999=runs.estimate(_quantile(0.999), divergence),
            max=float(divergence.max()),
        ),
        same_top=runs.estimate(torch.mean, _joined(same)),
    )


def _joined(pieces: list[Tensor]) -> Tensor:
    """The values per token of all ranks, in rank order, as float64."""
    return torch.cat([piece for each in ranks.all_gather(pieces) for piece in each]).double()


def _said(model: Any | Recorded, number: int, tokens: Tensor) -> Tensor:
    return model.logits[number - 1] if isinstance(model, Recorded) else logits_of(model, tokens)


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    """The logits [length, vocabulary] of one window of token ids."""
    logits = model(input_ids=tokens.unsqueeze(0).to(model.device), use_cache=False).logits[0]
    assert isinstance(logits, Tensor)
    return logits


def _log_softmax(logits: Tensor, whose: str, window: int) -> Tensor:
    log_p = logits.float().log_softmax(-1)
    if log_p.isnan().any():
        raise NumericsError(f"the logits of {whose} have NaN in window {window}", "Its weights may be damaged.")
    return log_p


class _Resampler:
    """Bootstrap over runs of adjacent tokens. All quantities share the draws, so comparisons of models are paired."""

    def __init__(self, tokens: int) -> None:
        generator = torch.Generator().manual_seed(0)
        length = max(1, min(_RUN, tokens // _FEWEST_RUNS))
        starts = torch.arange(0, tokens, length, dtype=torch.int64, device="cpu")
        drawn = torch.randint(
            len(starts), (_RESAMPLES, len(starts)), generator=generator, dtype=torch.int64, device="cpu"
        )
        self.runs = [
            torch.arange(int(s), min(int(s) + length, tokens), dtype=torch.int64, device="cpu") for s in starts
        ]
        self.draws = drawn

    def estimate(self, statistic: Callable[[Tensor], Tensor], values: Tensor) -> Interval:
        pieces = [values[run] for run in self.runs]
        resampled = torch.stack([statistic(torch.cat([pieces[i] for i in draw])) for draw in self.draws.tolist()])
        low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=resampled.dtype, device="cpu")).tolist()
        return Interval(float(statistic(values)), low, high)


def _exp_of_mean(values: Tensor) -> Tensor:
    return values.mean().exp()


def _quantile(share: float) -> Callable[[Tensor], Tensor]:
    # torch.quantile is limited to 16 million values. Interpolation between values is not needed here.
    return lambda values: values.kthvalue(max(1, round(share * len(values)))).values
