"""Attention of one token, its heads in groups: the same as transformers' own, and nothing else is touched."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import fewbit
from fewbit.models.decoding import attention
from fewbit.models.decoding.attention import attend, grouped_queries, growing_texts


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


def run(groups: int = 4) -> torch.Tensor:
    """One token through the function that models use now."""
    module, query, key, value, mask = given(1, groups)
    out: torch.Tensor = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask)[0]
    return out


def test_transformers_has_its_own_again_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "attend", lambda *_: (torch.zeros(1), None))
    with grouped_queries():
        assert len(run()) == 1
        with grouped_queries():
            pass
        assert len(run()) == 1
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


def test_a_function_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", lambda *_: (torch.zeros(2), None))
    with grouped_queries():
        assert len(run()) == 2


def test_other_threads_keep_transformers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "attend", lambda *_: (torch.zeros(1), None))
    context = grouped_queries()
    with ThreadPoolExecutor(1) as other:
        with grouped_queries():
            assert len(other.submit(run).result()) == 2
            other.submit(context.__enter__).result()
        assert len(other.submit(run).result()) == 1  # the first to leave does not end it for the others
        assert len(run()) == 2
        other.submit(context.__exit__, None, None, None).result()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


def test_cudnn_is_off_while_a_text_grows() -> None:
    def on() -> bool:
        return bool(torch.backends.cuda.cudnn_sdp_enabled())

    assert on()
    first, second = ExitStack(), ExitStack()
    first.enter_context(growing_texts())
    second.enter_context(growing_texts())
    first.close()
    assert not on()  # the first to leave does not end it for the other
    second.close()
    assert on()


def test_generation_does_not_use_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set[bool]()
    attended = torch.nn.functional.scaled_dot_product_attention

    def recorded(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.add(torch.backends.cuda.cudnn_sdp_enabled())
        return attended(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    fewbit.generate("tiny", "Once", max_new_tokens=2)
    assert seen == {False}
