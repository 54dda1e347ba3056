"""Perplexity and KL divergence against their formulas, on models whose logits are given."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbit.measure.quality import Quality, measure

VOCAB, LENGTH, WINDOWS = 11, 300, 3


@dataclass
class Fixed:
    """A model that answers window number i with logits[i], whatever the tokens."""

    logits: Tensor
    calls: int = 0
    device: str = "cpu"

    def __call__(self, input_ids: Tensor, use_cache: bool) -> Any:
        assert input_ids.shape == (1, self.logits.shape[1])
        self.calls += 1
        return SimpleNamespace(logits=self.logits[self.calls - 1][None])


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(VOCAB, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))


def drawn(seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(WINDOWS, LENGTH, VOCAB, generator=torch.Generator().manual_seed(seed))


def log_probabilities(logits: Tensor) -> Tensor:
    """Of all predictions, float64 [windows * (length - 1), vocabulary]: a window's last logits predict nothing."""
    return logits[:, :-1].double().log_softmax(-1).flatten(0, 1)


def measured(logits: Tensor, reference: Tensor | None, tokens: Tensor) -> Quality:
    return measure(Fixed(logits), Fixed(reference) if reference is not None else None, tokens)


def test_perplexity_is_the_exponential_of_the_mean_loss(tokens: Tensor) -> None:
    found = measured(drawn(1), None, tokens)
    losses = -log_probabilities(drawn(1)).gather(1, tokens[:, 1:].reshape(-1, 1))
    assert found.perplexity.value == pytest.approx(math.exp(float(losses.mean())), rel=1e-6)
    assert (found.tokens, found.windows, found.length) == (WINDOWS * (LENGTH - 1), WINDOWS, LENGTH)
    assert (found.reference_perplexity, found.perplexity_ratio, found.kl, found.same_top) == (None, None, None, None)


def test_no_knowledge_is_a_perplexity_of_the_vocabulary(tokens: Tensor) -> None:
    found = measured(torch.zeros(WINDOWS, LENGTH, VOCAB), None, tokens)
    assert found.perplexity.value == pytest.approx(VOCAB, rel=1e-6)
    assert found.perplexity.low == pytest.approx(VOCAB, rel=1e-6)
    assert found.perplexity.high == pytest.approx(VOCAB, rel=1e-6)


def test_a_token_is_predicted_from_those_before_it(tokens: Tensor) -> None:
    """Logits that know the next token are right; those that know their own token are not."""
    certain = 20.0 * torch.nn.functional.one_hot(tokens.roll(-1, 1), VOCAB).float()
    assert measured(certain, None, tokens).perplexity.value == pytest.approx(1, abs=1e-6)
    assert measured(certain.roll(1, 1), None, tokens).perplexity.value > 1000


def test_kl_is_from_the_reference_and_in_nats(tokens: Tensor) -> None:
    logits, reference = drawn(1), drawn(2)
    found = measured(logits, reference, tokens)
    log_q, log_p = log_probabilities(logits), log_probabilities(reference)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert found.kl is not None
    assert found.kl.mean.value == pytest.approx(float(kl.mean()), rel=1e-5)
    assert found.kl.median.value == pytest.approx(float(kl.median()), rel=1e-2)
    assert found.kl.p99.value == pytest.approx(float(kl.quantile(0.99)), rel=5e-2)
    assert found.kl.p999.value == pytest.approx(float(kl.quantile(0.999)), rel=5e-2)
    assert found.kl.max == pytest.approx(float(kl.max()), rel=1e-5)
    assert found.same_top is not None
    assert found.same_top.value == pytest.approx(float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()))
    assert found.reference_perplexity is not None
    assert found.reference_perplexity == measured(reference, None, tokens).perplexity
    assert found.perplexity_ratio is not None
    assert found.perplexity_ratio.value == pytest.approx(found.perplexity.value / found.reference_perplexity.value)


def test_kl_of_two_known_distributions() -> None:
    """p = (3/4, 1/4) and q = (1/4, 3/4): sum p log(p/q) = log(3) / 2."""
    p, q = (torch.tensor(odds).log().expand(1, 40, 2) for odds in ((0.75, 0.25), (0.25, 0.75)))
    found = measured(q, p, torch.zeros(1, 40, dtype=torch.long))
    assert found.kl is not None
    assert found.same_top is not None
    assert found.perplexity_ratio is not None
    expected = math.log(3) / 2
    assert found.kl.mean.value == pytest.approx(expected, rel=1e-6)
    assert found.kl.median.value == found.kl.max == pytest.approx(expected, rel=1e-6)
    assert found.same_top.value == 0
    assert found.perplexity.value == pytest.approx(4)
    assert found.perplexity_ratio.value == pytest.approx(3)


def test_a_model_against_itself_has_lost_nothing(tokens: Tensor) -> None:
    found = measured(drawn(1, 5.0), drawn(1, 5.0), tokens)
    assert found.kl is not None
    assert found.kl.mean.value == found.kl.p999.value == found.kl.max == 0
    assert found.same_top is not None
    assert found.same_top.value == found.same_top.low == 1
    assert found.perplexity_ratio is not None
    assert found.perplexity_ratio.low == found.perplexity_ratio.high == 1


def test_a_constant_added_to_the_logits_changes_nothing(tokens: Tensor) -> None:
    found = measured(drawn(1) + 30, drawn(1), tokens)
    assert found.kl is not None
    assert found.kl.max < 1e-5


def test_the_further_away_the_worse(tokens: Tensor) -> None:
    reference, noise = drawn(1, 2.0), drawn(2)
    found = [measured(reference + step * noise, reference, tokens) for step in (0.01, 0.1, 0.5, 2.0)]
    means = [q.kl.mean.value for q in found if q.kl]
    assert means == sorted(means)
    assert len(set(means)) == 4
    tops = [q.same_top.value for q in found if q.same_top]
    assert tops == sorted(tops, reverse=True)
    for quality in found:
        assert quality.kl is not None
        ordered = [quality.kl.median, quality.kl.p99, quality.kl.p999]
        values = [estimate.value for estimate in ordered] + [quality.kl.max]
        assert values == sorted(values)


def test_every_interval_holds_its_value_and_has_some_width(tokens: Tensor) -> None:
    found = measured(drawn(1) + drawn(3), drawn(1), tokens)
    assert found.kl is not None
    for estimate in (
        found.perplexity,
        found.reference_perplexity,
        found.perplexity_ratio,
        found.kl.mean,
        found.same_top,
    ):
        assert estimate is not None
        assert estimate.low < estimate.value < estimate.high
    for estimate in (found.kl.median, found.kl.p99, found.kl.p999):
        assert estimate.low <= estimate.value <= estimate.high


def test_more_text_narrows_the_interval() -> None:
    tokens = torch.randint(VOCAB, (WINDOWS * 16, LENGTH), generator=torch.Generator().manual_seed(0))
    logits = torch.randn(WINDOWS * 16, LENGTH, VOCAB, generator=torch.Generator().manual_seed(1))
    wide, narrow = (measured(logits[:n], None, tokens[:n]).perplexity for n in (WINDOWS, WINDOWS * 16))
    assert narrow.high - narrow.low < 0.5 * (wide.high - wide.low)


def test_measuring_again_gives_the_same_digits(tokens: Tensor) -> None:
    assert measured(drawn(1), drawn(2), tokens) == measured(drawn(1), drawn(2), tokens)


def test_half_precision_logits_are_compared_in_float32(tokens: Tensor) -> None:
    found = measured(drawn(1).bfloat16(), drawn(1), tokens)
    log_q, log_p = log_probabilities(drawn(1).bfloat16().float()), log_probabilities(drawn(1))
    assert found.kl is not None
    assert found.kl.mean.value == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-2)


def test_progress_counts_windows(tokens: Tensor) -> None:
    seen: list[int] = []
    measure(Fixed(drawn(1)), None, tokens, seen.append)
    assert seen == [1, 2, 3]


def test_two_tokens_are_the_least(tokens: Tensor) -> None:
    found = measured(drawn(1)[:1, :2], drawn(2)[:1, :2], tokens[:1, :2])
    assert found.tokens == 1
    assert found.kl is not None
    assert found.kl.mean.value == found.kl.max
