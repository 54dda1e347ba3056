"""Caches of keys and values for a fixed number of tokens, allocated once."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

from fewbit.kernels.nvidia import operators

# The argument that holds the cache, which transformers renamed in 5.24. A call with the old name warns there.
_PREPARES = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _PREPARES else "past_key_values"


class ReservedLayer(DynamicLayer):
    """A growing cache layer of transformers, in memory for `length` tokens that is allocated once."""

    def __init__(self, length: int) -> None:
        self.length, self.filled = length, 0
        self.whole: tuple[Tensor, ...] = ()
        super().__init__()  # type: ignore[no-untyped-call]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.whole = tuple(t.new_empty(*t.shape[:-2], self.length, t.shape[-1]) for t in (key_states, value_states))
        self.is_initialized = True
        self.fill(0)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.filled, self.filled + key_states.shape[-2]
        for whole, states in zip(self.whole, (key_states, value_states), strict=True):
            whole[..., start:end, :] = states
        return self.fill(end)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; their number is given as a negative number."""
        if self.is_initialized:
            self.fill(max(0, self.filled + tokens_to_remove))

    def reset(self) -> None:
        if self.is_initialized:
            self.fill(0)

    def fill(self, end: int) -> tuple[Tensor, Tensor]:
        """Count the first `end` tokens as known. Returns their keys and values."""
        self.filled = end
        return self.keys, self.values

    # Keys and values of the known tokens are cut out when they are read: most steps do not read them.
    @property
    def keys(self) -> Any:
        return self.whole[0][..., : self.filled, :] if self.whole else None

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        assert value is None, "the memory is fixed"

    @property
    def values(self) -> Any:
        return self.whole[1][..., : self.filled, :] if self.whole else None

    @values.setter
    def values(self, value: Tensor | None) -> None:
        assert value is None, "the memory is fixed"


def reserved(model: Any, length: int) -> DynamicCache:
    """A cache for `length` tokens. Attention reads only the filled part."""
    cache = DynamicCache(config=model.config)
    cache.layers = [ReservedLayer(length) if type(layer) in _GROWING else layer for layer in cache.layers]
    return cache


def static(model: Any, length: int) -> StaticCache | None:
    """A cache for `length` tokens that attention reads as a whole, so that a graph can be recorded. None if the model
    has layers that cache more than keys and values."""
    try:
        cache = StaticCache(config=model.config, max_cache_len=length)
    except Exception:  # transformers looks up the class of a layer, and has no static one for some
        return None
    if not all(type(layer) in (StaticLayer, StaticSlidingWindowLayer) for layer in cache.layers):
        return None
    cache.layers = [OneByOneLayer(max_cache_len=length) for _ in cache.layers]
    return cache


class OneByOneLayer(StaticLayer):
    """A static cache layer of transformers. On an NVIDIA GPU, one kernel writes the key and the value of one token."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.ticket = torch.zeros(1, dtype=torch.int32, device=key_states.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.keys, self.values
        if (
            torch.compiler.is_compiling()
            or keys is None
            or values is None
            or not operators.stores(keys, values, key_states, value_states)
        ):
            return super().update(key_states, value_states, *args, **kwargs)
        operators.store(keys, values, key_states, value_states, self.cumulative_length, self.ticket)
        return keys, values


# Sliding-window layers are replaced too. The mask already applies the window, and these layers count tokens in Python
# integers, which a graph would freeze.
_GROWING = (DynamicLayer, DynamicSlidingWindowLayer)


EMPTIED = (ReservedLayer, OneByOneLayer)  # layers that `reset` empties
