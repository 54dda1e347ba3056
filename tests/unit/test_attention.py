"""Attention of one token, its heads in groups: the same as transformers' own, and nothing else is touched."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fewbit.models.decoding import attention
from fewbit.models.decoding.attention import attend, grouped_queries


def given(tokens: int, groups: int, batch: int = 2, length: int = 24) -> Any:
    gen = torch.Generator().manual_seed(0)
    query = torch.randn(batch, 2 * groups, tokens, 16, generator=gen)
    key, value = (torch.randn(batch, 2, length, 16, generator=gen) for _ in range(2))
    mask = torch.rand(batch, 1, tokens, length, generator=gen) > 0.3
    return SimpleNamespace(num_key_value_groups=groups), query, key, value, mask


@pytest.mark.parametrize(("tokens", "groups"), [(1, 4), (1, 3), (1, 1), (5, 4)])
def test_it_is_the_same_attention(tokens: int, groups: int) -> None:
    module, query, key, value, mask = given(tokens, groups)
    got = attend(module, query, key, value, mask, scaling=0.3)[0]
    expected = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)[0]
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected)


def test_a_mask_of_each_head_is_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    module, query, key, value, mask = given(1, 4)
    called = []

    def own(*_: Any, **named: Any) -> tuple[torch.Tensor, None]:
        called.append(named)
        return query, None

    monkeypatch.setattr(attention, "sdpa_attention_forward", own)
    attend(module, query, key, value, mask.expand(-1, 8, -1, -1))
    attend(module, query, key, value, None)
    attend(module, query, key, value, mask, position_bias=torch.zeros(1))
    assert len(called) == 3
    attend(module, query, key, value, mask)
    assert len(called) == 3


def test_transformers_has_its_own_again_afterwards() -> None:
    with grouped_queries():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attend
        with grouped_queries():
            pass
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attend
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
