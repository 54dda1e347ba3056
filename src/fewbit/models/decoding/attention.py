"""Grouped-query attention of one token, without repeated keys and values.

Before transformers calls PyTorch's attention with a mask, it repeats keys and values for each query head. With many
sequences in a batch, this takes half of a decoding step. Instead, the query heads that share keys and values become
positions of one head, which gives the same sums. (Newer versions of transformers do this too.)

Keys and values may also lie in the pages of continuous batching (`Paged`).

On an NVIDIA GPU, one kernel divides the keys among its programs, because the few heads of one sequence would leave most
of the GPU idle (`fewbit.kernels.nvidia.operators.attend`). A compiled step uses that too, where it can; else it keeps
the repeats, which the compiler fuses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fewbit.errors import KernelError
from fewbit.kernels.nvidia import operators

_grouped: ContextVar[bool] = ContextVar("fewbit_grouped_queries", default=False)
_lock, _users = Lock(), [0]
_growing: list[bool] = []  # for each user of `growing_texts`, whether PyTorch used cuDNN before
# The table of all models. An entry of it is replaced and put back, never removed: other threads look it up meanwhile.
_FUNCTIONS: Any = type(ALL_ATTENTION_FUNCTIONS)._global_mapping

_PAGES = "fewbit_pages"  # the argument of an attention with the step's `Paged`


@dataclass(frozen=True)
class Places:
    """Where the keys and values of n texts lie. Their order does not matter to attention.

    lengths: int32 [n], the keys of each text with the new one. slots: int64 [n], of the new keys. pages: int32 [n, most
    pages], the first slot of each page.
    """

    lengths: Tensor
    slots: Tensor
    pages: Tensor


@dataclass(frozen=True)
class Paged:
    """The keys and values of one token for each of n texts, in pages. It takes the place of a cache in a step.

    views: layer -> keys and values [slots, heads, D]. places: layer -> where those of the texts are.
    """

    views: Mapping[int, tuple[Tensor, Tensor]]
    places: Mapping[int, Places]

    def update(self, key: Tensor, value: Tensor, layer: int, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Store key and value [1, heads, n, D] of the new tokens. kwargs: of the attention, which get this object.

        Models call it as they call `update` of transformers' paged cache.
        """
        for view, new in zip(self.views[layer], (key, value), strict=True):
            view.index_copy_(0, self.places[layer].slots, new[0].transpose(0, 1))
        kwargs[_PAGES] = self
        return key, value

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """The attention [1, n, heads, D] of the queries [1, heads, n, D]."""
        (keys, values), own = self.views[layer], self.places[layer]
        rows = query[0].transpose(0, 1).unsqueeze(2)
        if not operators.attends_pages(rows, keys, values):
            raise KernelError(f"attention over pages does not take {query.dtype} queries of shape {tuple(query.shape)}")
        return operators.attend_pages(rows, keys, values, own.lengths, own.pages, scale)[None]


@contextmanager
def grouped_queries() -> Iterator[None]:
    """Inside this context, models that this thread runs with attention "sdpa" use `attend`.

    While any thread is inside, the function in the table is `_of_thread`, which calls transformers' function for the
    other threads. If a user has replaced that function, nothing changes.
    """
    token = _grouped.set(True)
    with _lock:
        _users[0] += 1
        if _FUNCTIONS["sdpa"] is sdpa_attention_forward:
            _FUNCTIONS["sdpa"] = _of_thread
    try:
        yield
    finally:
        with _lock:
            _users[0] -= 1
            if not _users[0] and _FUNCTIONS["sdpa"] is _of_thread:
                _FUNCTIONS["sdpa"] = sdpa_attention_forward
        _grouped.reset(token)


@contextmanager
def growing_texts() -> Iterator[None]:
    """Inside this context, PyTorch's attention does not use cuDNN, which plans anew for each number of keys.

    A plan takes 50 ms on an H200 with PyTorch 2.11, and a text needs one for each token. The setting holds for all
    threads.
    """
    with _lock:
        _growing.append(torch.backends.cuda.cudnn_sdp_enabled())
        torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        with _lock:
            before = _growing.pop()
            if not _growing:  # the first user's
                torch.backends.cuda.enable_cudnn_sdp(before)


def _of_thread(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    # A compiler cannot trace context variables.
    grouped = torch.compiler.is_compiling() or _grouped.get()
    out: tuple[Tensor, None] = (attend if grouped else sdpa_attention_forward)(*args, **kwargs)
    return out


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
    if (paged := kwargs.get(_PAGES)) is not None:
        if any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "s_aux")):
            raise KernelError("attention over pages knows plain attention only")
        return paged.attend(module.layer_idx, query, size**-0.5 if scaling is None else scaling), None
    one = (
        all(kwargs.get(name) is None for name in ("position_bias", "softcap", "cache", "s_aux"))
        and tokens == 1
        and heads == shared * getattr(module, "num_key_value_groups", 1)
        and not dropout
    )
    mask = attention_mask if one and attention_mask is not None else None
    if mask is not None and mask.shape[1:] != (1, 1, key.shape[2]):
        mask = None
    if mask is not None and operators.attends(query, key, value, mask):
        out = operators.attend(query, key, value, mask, size**-0.5 if scaling is None else scaling)
        return out[:, None], None
    if mask is None or shared == heads or torch.compiler.is_compiling():
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return found
    out = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(batch, shared, heads // shared, size),
        key,
        value,
        attn_mask=mask,
        scale=scaling,
    )
    return out.reshape(batch, 1, heads, value.shape[-1]), None
