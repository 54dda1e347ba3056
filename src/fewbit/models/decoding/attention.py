"""Grouped-query attention of one token, without repeated keys and values.

Before transformers calls PyTorch's attention with a mask, it repeats keys and values for each query head. With many
sequences in a batch, this takes half of a decoding step. Instead, the query heads that share keys and values become
positions of one head, which gives the same sums. (Newer versions of transformers do this too.) A compiled step keeps
the repeats: the compiler fuses them, and a single sequence was slower without them.
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
    """Inside this context, models with attention "sdpa" use `attend`."""
    if "sdpa" in ALL_ATTENTION_FUNCTIONS._local_mapping:  # somebody else has replaced it
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
    """The same result as transformers' function: [B, tokens, heads, D].

    query: [B, heads, tokens, D]. key, value: [B, shared, length, D]. attention_mask: [B, 1, tokens, length].
    """
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
