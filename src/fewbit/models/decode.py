"""Generating within a fixed length: one static cache of keys and values and, on a GPU, one CUDA graph for every token.

The cache is allocated once, at its full length. On a CPU attention sees the part of it that is filled, so texts come
out as with a growing cache, and nothing is copied to grow it. On a GPU it sees the whole and a mask: then each step
reads and writes the same memory, and the whole step, hundreds of launches, is recorded once and replayed. The model's
own `generate` does the rest: sampling, stopping, streaming.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

from fewbit.errors import PlanError

_CLOSE = 0.05  # relative distance of logits in bfloat16, summed over more positions
# Ways to generate that have, or ask for, a cache of another kind.
_OTHERS = ("past_key_values", "cache_implementation", "assistant_model", "prompt_lookup_num_tokens", "inputs_embeds")


def checked_length(length: Any, context: int, flag: str) -> int:
    """The length of the cache; PlanError, naming `flag`, unless a model of that context can fill it."""
    if isinstance(length, bool) or not isinstance(length, int) or length < 2:
        raise PlanError(f"{flag} {length!r} is no number of tokens", "Give prompt and answer together, such as 512.")
    if length > context:
        raise PlanError(f"{flag} {length} is beyond the model's context of {context} tokens")
    return length


def within(model: Any, length: int) -> None:
    """From now on `model.generate` uses a static cache of `length` tokens, prompt included, for greedy search and
    sampling; PlanError where a text would grow beyond it. Beams, and callers that bring a cache, generate as before."""
    model.generate = Decoder(model, length).generate


class Decoder:
    """A model's `generate` over one static cache, which is kept from call to call."""

    def __init__(self, model: Any, length: int) -> None:
        self.model, self.length = model, length
        self.plain: Callable[..., Any] = model.generate
        self.cache: Any = None
        self.graph: StepGraph | None = None
        self.used = 0
        self.key: tuple[Any, ...] = ()
        self.static: bool | None = None  # whether the model can be given a static cache, once that has been tried

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.GenerationMixin.generate`."""
        config = kwargs.get("generation_config") or self.model.generation_config
        asked = {**vars(config), **{key: value for key, value in kwargs.items() if value is not None}}
        if (
            any(asked.get(key) is not None for key in _OTHERS)
            or (asked.get("num_beams") or 1) > 1
            or asked.get("use_cache") is False
        ):
            return self.plain(*args, **kwargs)
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        prompt = ids.shape[1] if isinstance(ids, Tensor) else 1
        self._check(prompt, asked.get("max_new_tokens"), asked.get("max_length"))
        self._renew(ids.shape[0] if isinstance(ids, Tensor) else 1, asked.get("num_return_sequences") or 1)
        self.used, forward = 0, self.model.forward
        hooked = "forward" in self.model.__dict__

        @wraps(forward)  # its signature tells `generate` what to prepare
        def step(*given: Any, **named: Any) -> Any:
            return self._step(forward, *given, **named)

        self.model.forward = step
        try:
            return self.plain(*args, **{**kwargs, "past_key_values": self.cache, "disable_compile": True})
        finally:
            if hooked:
                self.model.forward = forward
            else:
                del self.model.forward

    def _check(self, prompt: int, new: int | None, total: int | None) -> None:
        reached = prompt + new if new is not None else total or prompt + 1
        if max(reached, prompt + 1) > self.length:
            raise PlanError(
                f"a prompt of {prompt} tokens and what is to come make {max(reached, prompt + 1)}, "
                f"the model was fused for {self.length}",
                "Fuse for a greater length, or ask for fewer new tokens.",
            )

    def _renew(self, batch: int, copies: int) -> None:
        """An empty cache: the one that is there, if it was made for such a batch and under such a mode."""
        key = (batch * copies, torch.is_inference_mode_enabled(), self.model.device, self.model.dtype)
        if self.static is None:
            self.static = self.model.device.type == "cuda" and takes_static(self.model, self.plain)
        if self.cache is not None and self.key == key and all(type(x) in _EMPTIED for x in self.cache.layers):
            self.cache.reset()
        else:
            self.graph = None  # it writes to the cache that it was recorded with
            made = static(self.model, self.length) if self.static else None
            self.cache, self.key = made or reserved(self.model, self.length), key

    def _step(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids")
        tokens = ids.shape[1] if isinstance(ids, Tensor) else 1
        first, self.used = self.used == 0, self.used + tokens
        if self.used > self.length:
            raise PlanError(f"the text has grown beyond the {self.length} tokens that the model was fused for")
        if first or tokens != 1 or args or not isinstance(self.cache, StaticCache):
            return forward(*args, **kwargs)
        if self.graph is None:
            self.graph = StepGraph(forward)
        return self.graph(kwargs)


class ReservedLayer(DynamicLayer):
    """A cache layer of transformers' that grows, in memory that is there from the start."""

    def __init__(self, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length, self.filled = length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.whole = tuple(t.new_empty(*t.shape[:-2], self.length, t.shape[-1]) for t in (key_states, value_states))
        self.is_initialized = True
        self._fill(0)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.filled, self.filled + key_states.shape[-2]
        for whole, states in zip(self.whole, (key_states, value_states), strict=True):
            whole[..., start:end, :] = states
        return self._fill(end)

    def reset(self) -> None:
        if self.is_initialized:
            self._fill(0)

    def _fill(self, end: int) -> tuple[Tensor, Tensor]:
        self.filled = end
        self.keys, self.values = filled = self.whole[0][..., :end, :], self.whole[1][..., :end, :]
        return filled


def reserved(model: Any, length: int) -> DynamicCache:
    """A cache of `length` tokens of which attention sees what is filled."""
    cache = DynamicCache(config=model.config)
    cache.layers = [ReservedLayer(length) if type(layer) in _GROWING else layer for layer in cache.layers]
    return cache


def static(model: Any, length: int) -> StaticCache | None:
    """A cache of `length` tokens that attention sees whole, so that a graph can be recorded; None where layers of
    another kind keep more than keys and values."""
    cache = StaticCache(config=model.config, max_cache_len=length)
    if not all(type(layer) in (StaticLayer, StaticSlidingWindowLayer) for layer in cache.layers):
        return None
    cache.layers = [StaticLayer(max_cache_len=length) for _ in cache.layers]
    return cache


# Layers of a sliding window are replaced too: the mask knows of the window, and they count in Python's numbers, which a
# graph would freeze.
_GROWING = (DynamicLayer, DynamicSlidingWindowLayer)


def takes_static(model: Any, generate: Callable[..., Any]) -> bool:
    """Whether the model's steps are the same in a static cache, tried on a few tokens; if not, a warning says so."""
    logits, size = [], 8
    for cache in (reserved(model, size), static(model, size)):
        if cache is None:
            return False
        ids = torch.arange(3, device=model.device)[None]
        options: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True, "eos_token_id": None}
        try:
            done = generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                max_new_tokens=3,
                do_sample=False,
                disable_compile=True,
                **options,
            )
        except Exception as error:  # whatever a model's own code meets in a mask or cache it was not written for
            warnings.warn(f"no CUDA graph: this model fails with a static cache ({error!r:.200})", stacklevel=2)
            return False
        logits.append(torch.stack(done.logits).float())
    distance = float((logits[1] - logits[0]).norm() / logits[0].norm())
    if distance > _CLOSE:
        warnings.warn(f"no CUDA graph: a static cache changes this model's logits by {distance:.0%}", stacklevel=2)
    return distance <= _CLOSE


_EMPTIED = (ReservedLayer, StaticLayer)  # by their `reset`


class StepGraph:
    """One decoding step as a CUDA graph: run once to warm up, recorded at the second call, replayed from then on."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward
        self.calls = 0
        self.possible = True
        self.graph: Any = None
        self.out: Any = None
        self.inputs: list[Tensor] = []

    def __call__(self, kwargs: dict[str, Any]) -> Any:
        given = _tensors(kwargs)
        self.calls += 1
        if not self.possible or self.calls == 1:
            return self.forward(**kwargs)
        if self.graph is None and not self._record(kwargs):
            return self.forward(**kwargs)
        if len(given) != len(self.inputs) or any(a.shape != b.shape for a, b in zip(given, self.inputs, strict=True)):
            return self.forward(**kwargs)
        for own, new in zip(self.inputs, given, strict=True):
            own.copy_(new)
        self.graph.replay()
        return self.out

    def _record(self, kwargs: dict[str, Any]) -> bool:
        own = _copied(kwargs)
        self.inputs = _tensors(own)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.out = self.forward(**own)
        except RuntimeError as error:  # something in the step waits for the GPU
            self.possible = False
            reason = str(error).strip().splitlines()[0][:200]
            warnings.warn(f"a step of this model cannot be recorded as a CUDA graph: {reason}", stacklevel=2)
            return False
        self.graph = graph
        return True


def _tensors(value: Any) -> list[Tensor]:
    """The tensors among a call's arguments, those in dicts (a mask for each kind of layer) too, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for inner in value.values() for tensor in _tensors(inner)] if type(value) is dict else []


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return {key: _copied(inner) for key, inner in value.items()} if type(value) is dict else value
