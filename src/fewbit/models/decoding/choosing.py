"""How the next token of one request is chosen from the model's logits, and the log probabilities that are reported."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import PlanError

_LEAST = -9999.0  # what OpenAI reports in place of minus infinity, which JSON does not have


@dataclass(frozen=True)
class Choosing:
    """How the tokens of one request are chosen.

    temperature: 0 takes the most likely token. top_k: None or 0 is all. logprobs: number of most likely tokens to
    report at each position; None reports nothing. presence_penalty, frequency_penalty, logit_bias: see `adjusted`.
    repetition_penalty: as transformers' of prompt and answer, in place of the model's own; None is the model's own.
    min_tokens: no token that ends an answer comes before so many others. ignore_eos: no token ends the answer.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    repetition_penalty: float | None = None
    min_tokens: int = 0
    ignore_eos: bool = False


@dataclass(frozen=True)
class Likely:
    """The log probability of a token, and those of the most likely tokens, in nats, before temperature and limits.

    logprob: None for the first token of a prompt, which nothing comes before.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


def adjusted(logits: Tensor, counts: Mapping[int, int], choosing: Choosing) -> Tensor:
    """`logits` [vocabulary] after the penalties and the bias of a request. PlanError for a token that there is not.

    As OpenAI defines it (https://platform.openai.com/docs/guides/text-generation), the logit of token j becomes
    logit - counts[j] * frequency_penalty - (counts[j] > 0) * presence_penalty + bias[j]. counts: how often the answer
    so far has each token; the prompt does not count.
    """
    changes = dict(choosing.logit_bias)
    if changes and not 0 <= min(changes) <= max(changes) < len(logits):
        raise PlanError(f"logit_bias: token ids go from 0 to {len(logits) - 1}")
    if choosing.presence_penalty or choosing.frequency_penalty:
        for token, count in counts.items():
            penalty = count * choosing.frequency_penalty + choosing.presence_penalty
            changes[token] = changes.get(token, 0.0) - penalty
    if not changes:
        return logits
    ids = torch.tensor(list(changes), dtype=torch.int64, device=logits.device)
    added = torch.tensor(list(changes.values()), dtype=torch.float32, device=logits.device)
    changed = logits.float()
    return changed.index_add(0, ids, added).to(logits.dtype)


def within(logits: Tensor, scores: Tensor, allowed: bytes) -> Tensor:
    """`logits` [vocabulary] with minus infinity at the tokens that are not allowed: see `Grammar`.

    scores: taken instead of `logits` if these exclude every allowed token, for example because the model's
    generation_config suppresses it.
    """
    forbidden = torch.ones(len(logits), dtype=torch.bool, device="cpu")
    known = torch.frombuffer(bytearray(allowed), dtype=torch.uint8)[: len(logits)]
    forbidden[: len(known)] = known == 0
    forbidden = forbidden.to(logits.device)
    limited = logits.masked_fill(forbidden, -math.inf)
    if bool(limited.isneginf().all()):
        limited = scores.masked_fill(forbidden, -math.inf)
    return limited


def drawn(logits: Tensor, choosing: Choosing, uniform: Sequence[float]) -> Tensor:
    """The token that each of `uniform`, from [0, 1), chooses from its row of `logits` [rows, vocabulary]: int64 [rows].

    It is the inverse of the row's distribution. As transformers, temperature comes first, then top_k, then top_p: the
    most likely tokens whose probabilities sum to at least top_p (nucleus sampling, Holtzman et al. 2020). A row's token
    does not depend on the other rows.
    """
    values, ids = logits.float() / choosing.temperature, None
    if choosing.top_k and not values.is_cuda:
        values, ids = values.topk(min(choosing.top_k, values.shape[-1]))
    elif choosing.top_k or choosing.top_p < 1:  # on a GPU, which of equal values `topk` takes depends on the rows
        values, ids = (x[:, : choosing.top_k or None] for x in values.sort(descending=True, stable=True))
    # Devices without float64 are none that fewbit computes on.
    likely = values.to(torch.float64).softmax(-1)
    if choosing.top_p < 1:
        likely = likely.where(likely.cumsum(-1) - likely < choosing.top_p, 0.0)
    summed = likely.cumsum(-1)
    reached = torch.tensor(uniform, dtype=torch.float64, device=logits.device)[:, None] * summed[:, -1:]
    place = torch.searchsorted(summed, reached, right=True).clamp(max=summed.shape[-1] - 1)
    return (place if ids is None else ids.gather(-1, place))[:, 0]


def likely(logits: Tensor, tokens: Sequence[int], top: int) -> list[Likely]:
    """The log probabilities of one token in each row of `logits` [tokens, vocabulary]."""
    logprobs = logits.float().log_softmax(-1).clamp(min=_LEAST)
    values, ids = logprobs.topk(min(top, logprobs.shape[-1]))
    at = torch.tensor(tokens, dtype=torch.int64, device=logits.device)
    taken = logprobs.gather(1, at[:, None])[:, 0].tolist()
    pairs = [tuple(zip(some, values, strict=True)) for some, values in zip(ids.tolist(), values.tolist(), strict=True)]
    return [Likely(*each) for each in zip(tokens, taken, pairs, strict=True)]


def settings_of(model: Any) -> Choosing:
    """What the model's generation_config says of sampling, and else OpenAI's default: temperature 1."""
    owner = model.get_base_model() if hasattr(model, "get_base_model") else model
    stated = copy.copy(owner.generation_config)
    if not stated.do_sample:
        return Choosing(temperature=1.0)
    return Choosing(
        temperature=1.0 if stated.temperature is None else float(stated.temperature),
        top_p=1.0 if stated.top_p is None else float(stated.top_p),
        top_k=stated.top_k,
    )
