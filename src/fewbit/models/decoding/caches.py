"""Caches of keys and values that are written in place: of a fixed number of tokens, or growing."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

from fewbit.errors import PlanError
from fewbit.kernels.nvidia import operators

# The argument that holds the cache, which transformers renamed in 5.24. A call with the old name warns there.
_PREPARES = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _PREPARES else "past_key_values"
_ROOM = 256  # tokens that the memory of a growing layer has room for at first


class InPlaceLayer(DynamicLayer):
    """A growing cache layer of transformers, without a copy of all keys and values for each token.

    whole: memory for keys and values, [B, heads, room, D] each. Tokens `start` to `end` of it are known. Without room
    for more, new memory of twice the size is allocated.
    """

    def __init__(self) -> None:
        self.whole: tuple[Tensor, ...] = ()
        self.start = self.end = 0
        super().__init__()  # type: ignore[no-untyped-call]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.whole, self.start, self.end = (), 0, 0
        self._allocate((key_states, value_states), self._room(key_states.shape[-2]))
        self.is_initialized = True

    def _room(self, tokens: int) -> int:
        """For how many tokens to allocate memory that gets so many at once."""
        return max(_ROOM, 2 * tokens)

    def _allocate(self, states: tuple[Tensor, Tensor], room: int) -> None:
        self.whole = tuple(t.new_empty(*t.shape[:-2], room, t.shape[-1]) for t in states)

    def reserve(self, tokens: int) -> bool:
        """Make room for so many more tokens. False if there can be none."""
        known, held = self.end - self.start, self.whole[0]
        frozen = held.is_inference() and not torch.is_inference_mode_enabled()
        if frozen or self.end + tokens > held.shape[-2]:
            before = (self.keys.clone(), self.values.clone())
            if frozen or self._room(known + tokens) > held.shape[-2]:
                self._allocate(before, self._room(known + tokens))
            for whole, states in zip(self.whole, before, strict=True):
                whole[..., :known, :] = states
            self.start, self.end = 0, known
        return True

    def first(self) -> int:
        """The first token that the next ones see."""
        return self.start

    def advance(self, tokens: int) -> None:
        """Count so many more tokens as known, after they were written behind the known ones."""
        self.end += tokens

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens, states = key_states.shape[-2], (key_states, value_states)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*states, *self.whole)):
            known = (self.keys, self.values)  # a gradient needs them as they are
            self.whole = tuple(torch.cat(pair, dim=-2) for pair in zip(known, states, strict=True))
            self.start, self.end = 0, self.end - self.start
        else:
            if not self.reserve(tokens):
                room = self.whole[0].shape[-2]
                raise PlanError(
                    f"the text takes {self.end + tokens} positions in the cache with those that the model puts before "
                    f"it, and the model was fused for {room}",
                    "Fuse it for these and all new tokens, with `max_length` or `fuse`.",
                )
            for whole, new in zip(self.whole, states, strict=True):
                whole[..., self.end : self.end + tokens, :] = new
        first, end = self.first(), self.end + tokens
        self.advance(tokens)
        return self.whole[0][..., first:end, :], self.whole[1][..., first:end, :]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; their number is given as a negative number. A positive one says how many stay."""
        known = self.end - self.start
        removed = known - tokens_to_remove if tokens_to_remove > 0 else -tokens_to_remove
        self.end -= min(max(removed, 0), known)

    def reset(self) -> None:
        self.whole, self.start, self.end, self.is_initialized = (), 0, 0, False

    # Known tokens are cut out when they are read: most steps do not read them. transformers assigns as many tokens, of
    # other texts: beam search does.
    @property
    def keys(self) -> Any:
        return self.whole[0][..., self.start : self.end, :] if self.whole else None

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._assign(0, value)

    @property
    def values(self) -> Any:
        return self.whole[1][..., self.start : self.end, :] if self.whole else None

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._assign(1, value)

    def _assign(self, which: int, value: Tensor | None) -> None:
        if value is None:
            assert not self.whole, "keys and values are removed by `reset`"
            return
        assert value.shape[-2] == self.end - self.start, "tokens are removed by `crop`"
        made = value.new_empty(*value.shape[:-2], self.whole[which].shape[-2], value.shape[-1])
        made[..., self.start : self.end, :] = value
        self.whole = (made, self.whole[1]) if which == 0 else (self.whole[0], made)


class WindowLayer(InPlaceLayer, DynamicSlidingWindowLayer):
    """The same for attention with a sliding window: it keeps the tokens that the next one sees."""

    def __init__(self, window: int) -> None:
        self.whole, self.start, self.end = (), 0, 0
        DynamicSlidingWindowLayer.__init__(self, window)

    def first(self) -> int:
        return max(self.start, self.end - self.sliding_window + 1)

    def advance(self, tokens: int) -> None:
        super().advance(tokens)
        self.cumulative_length += tokens
        if not self.record_past:
            self.start = self.first()

    def crop(self, tokens_to_remove: int) -> None:
        beyond = self.cumulative_length >= self.sliding_window
        if beyond and (tokens_to_remove > 0 or not self.record_past):
            DynamicSlidingWindowLayer.crop(self, tokens_to_remove)  # raises
        before = self.end
        super().crop(tokens_to_remove)
        self.cumulative_length -= before - self.end
        if beyond:
            self.start = self.first()

    def reset(self) -> None:
        super().reset()
        self.cumulative_length = 0


class ReservedLayer(InPlaceLayer):
    """The same for `length` tokens at most, in memory that is allocated once."""

    def __init__(self, length: int) -> None:
        self.length = length
        super().__init__()

    def _room(self, tokens: int) -> int:
        return self.length

    def reserve(self, tokens: int) -> bool:
        return self.end + tokens <= self.length

    def reset(self) -> None:
        self.end = 0

    def keep(self, tokens: int) -> None:
        """Forget all but the first tokens."""
        self.end = min(tokens, self.end)


def in_place(layer: Any) -> Any:
    """A growing layer of transformers as one that is written in place, with what it holds; any other as it is."""
    if type(layer) is DynamicLayer:
        made: Any = InPlaceLayer()
    elif type(layer) is DynamicSlidingWindowLayer:
        made = WindowLayer(layer.sliding_window)
        made.record_past = layer.record_past
    else:
        return layer
    if layer.is_initialized and layer.keys is not None and layer.keys.dim() == 4:
        made.update(layer.keys, layer.values)
        if isinstance(made, WindowLayer):
            made.cumulative_length = layer.cumulative_length
    return made


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

    def keep(self, tokens: int) -> None:
        """Forget all but the first tokens. In place: a recorded step reads this memory."""
        self.cumulative_length.clamp_(max=tokens)


# Sliding-window layers are replaced too. The mask already applies the window, and these layers count tokens in Python
# integers, which a graph would freeze.
_GROWING = (DynamicLayer, DynamicSlidingWindowLayer)


EMPTIED = (ReservedLayer, OneByOneLayer)  # layers that `reset` empties, and `keep` shortens
