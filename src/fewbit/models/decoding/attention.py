"""Attention of one token whose heads share keys and values, without a copy of these for each head.

Before transformers calls PyTorch's attention with a mask it repeats keys and values for every head of a query; where
many sequences are written at once that is half of a step. The heads that share them can as well be taken for so many
tokens: the same sums. (Newer versions of transformers do so themselves.) A step that is compiled is left alone, since
the compiler makes the copies in passing, and one sequence was slower without.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@contextmanager
def grouped_queries() -> Iterator[None]:
    """Within, models whose attention is "sdpa" use `attend`."""
    if "sdpa" in ALL_ATTENTION_FUNCTIONS._local_mapping:  # somebody has put another in its place
        yield
        return
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS._local_mapping.pop("sdpa", None)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers' own gives: [B, tokens, heads, D] of a query [B, heads, tokens, D], keys and values
    [B, shared, length, D] and a mask [B, 1, tokens, length]."""
    batch, heads, tokens, size = query.shape
    shared = key.shape[1]
    plain = all(kwargs.get(name) is None for name in ("position_bias", "softcap", "cache", "s_aux"))
    if not (
        plain
        and not torch.compiler.is_compiling()
        and tokens == 1
        and shared < heads
        and heads == shared * getattr(module, "num_key_value_groups", 1)
        and attention_mask is not None
        and attention_mask.shape[1:] == (1, 1, key.shape[2])
    ):
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return found
    out = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(batch, shared, heads // shared, size),
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
    )
    return out.reshape(batch, 1, heads, value.shape[-1]), None
