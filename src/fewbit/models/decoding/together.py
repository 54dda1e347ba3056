"""The steps of continuous batching in which every running request gets one token and none can join, on an NVIDIA GPU.

In such a step, Python launches a model's operations slower than the GPU computes them, and transformers' own recorded
steps would choose tokens on the GPU, where a request cannot have its own settings. So `Together` takes the pages of the
requests from transformers' cache, and replays the model as a CUDA graph on them, from token ids to logits. The requests
stay transformers' own, so that their next step may be one with a new prompt. The first logits are compared with those
of transformers' step.

A graph has a fixed number of rows and of pages for each text. Rows without a request write to a page that nobody reads.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewbit.kernels.nvidia import operators
from fewbit.models.decoding import operations
from fewbit.models.decoding.attention import Paged, Places, grouped_queries
from fewbit.models.decoding.graph import Graph
from fewbit.models.decoding.single import Choose, advance, known, only_decoding

_log = logging.getLogger("fewbit")
# The allocators of transformers' pages that are known, and what is asked of them.
_KINDS = ("FullAttentionCacheAllocator", "SlidingAttentionCacheAllocator")
_NAMES = ("block_table", "block_physical_stride", "write_trash_index", "tokens_per_page", "_kv_token_views")
_LEAST_PAGES = 64  # 2048 tokens
_WIDER = 4  # a graph has so many times as many pages as the next smaller one


class Together:
    """Computes the next token of all requests."""

    devices: tuple[str, ...] = ("cuda",)

    def __init__(self, model: Any, manager: Any, choose: Choose) -> None:
        """manager: transformers' for the model. choose: the next tokens of requests' states."""
        self._model, self._manager, self._choose = model, manager, choose
        self._cache: Any = None  # the one that `_made` are for
        self._allocators: list[Any] = []  # of this cache; none: transformers computes all steps
        self._made: dict[tuple[int, tuple[int, ...]], _Recorded] = {}  # by rows, and pages for each allocator
        self._expected: dict[str, Tensor] = {}  # the logits of requests in the next step, until they were compared
        self._tested = False

    def step(self, processor: Any) -> bool:
        """Compute a step of transformers' processor. False, with nothing done, if it is none of these."""
        states = only_decoding(self._manager, processor.scheduler) if self._serves(processor) else None
        if not states or not all(processor.cache.can_store_request_tokens(state, 1) for state in states):
            self._expected = {}
            return False
        if (logits := self._computed(states)) is None:
            return False
        if not self._tested:  # the model computes the same, and overwrites the keys and values
            self._expected = {state.request_id: row for state, row in zip(states, logits, strict=True)}
            return False
        advance(processor, states, self._choose(states, logits))
        return True

    def _computed(self, states: list[Any]) -> Tensor | None:
        """The logits, which stay until they were compared. None if there are none: then transformers computes the step.

        Of what transformers has, this changes nothing but the keys and values of the new tokens.
        """
        logits: Tensor | None = None
        try:
            logits = self._logits(states)
            logits = logits if self._tested else logits.clone()
        except torch.OutOfMemoryError:  # transformers' step may need the memory of the graphs
            self.forget()
        except Exception as error:  # a model's own code can raise anything with a cache that it was not written for
            self._refuse(f"{type(error).__name__}: {str(error)[:200]}")
        if self._model.device.type == "cuda" and (logits is None or not self._tested):
            torch.cuda.current_stream(self._model.device).synchronize()  # transformers uses another stream
        return logits

    def forget(self) -> None:
        """Free the graphs, which are recorded again when they are needed."""
        self._made.clear()

    def release(self) -> None:
        """Let go of the cache too: there are no more steps."""
        self._cache, self._allocators, self._expected = None, [], {}
        self.forget()

    def _refuse(self, why: str) -> None:
        self._allocators = []
        self.forget()
        _log.warning("Steps of this model are not recorded as CUDA graphs: %s", why)

    def compare(self, states: Sequence[Any], scores: Tensor) -> None:
        """Hear the model's own logits [n, words] of a step."""
        if not self._expected:
            return
        expected, self._expected = self._expected, {}
        rows = [
            (expected[s.request_id], row) for s, row in zip(states, scores, strict=True) if s.request_id in expected
        ]
        if not rows:
            return
        ours, own = (torch.stack(list(each)).float() for each in zip(*rows, strict=True))
        distance = float((ours - own).norm() / own.norm())
        try:
            self._tested = distance <= operations.tolerance(self._model)
        except Exception as error:  # a model that takes no embeddings, for example
            self._refuse(f"{type(error).__name__}: {str(error)[:200]}")
            return
        if not self._tested:
            self._refuse(f"its logits differ by {distance:.1%}")

    def _serves(self, processor: Any) -> bool:
        if processor.cache is not self._cache:
            self._cache, self._tested, self._allocators = processor.cache, False, []
            self.forget()
            if self._model.device.type in self.devices:
                why = self._why_not(processor.cache)
                if why is None:
                    self._allocators = list(processor.cache.cache_allocators.values())
                else:
                    self._refuse(why)
        return bool(self._allocators)

    def _why_not(self, cache: Any) -> str | None:
        """Why transformers computes all steps; None if it does not."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return "several processes serve it"
        if len(devices := {str(parameter.device) for parameter in self._model.parameters()}) > 1:
            return f"it lies on several devices: {', '.join(sorted(devices))}"
        if (attention := self._model.config._attn_implementation) != "sdpa":
            return f"its attention is {attention}, not sdpa"
        if not known(self._manager) or not hasattr(cache, "cache_allocators"):
            return "this version of transformers has another cache; 5.24 has one that fits"
        for each in cache.cache_allocators.values():
            named = type(each).__name__ in _KINDS and all(hasattr(each, name) for name in _NAMES)
            if not named or each.tokens_per_page != operators.PAGE:
                return "this version of transformers has other pages"
        return None

    def _logits(self, states: Sequence[Any]) -> Tensor:
        """The model's logits [requests, words] in float32; they are valid until the next step."""
        tokens = [[state.tokens_to_process[0], state.position_offset] for state in states]
        places = [[_places(each, s.request_id, s.position_offset) for s in states] for each in self._allocators]
        rows = 1 << (len(states) - 1).bit_length()
        for own, each in zip(places, self._allocators, strict=True):
            own += [[1, each.write_trash_index, each.write_trash_index]] * (rows - len(states))
        widths = tuple(_width(max(map(len, own)) - 2) for own in places)
        if (rows, widths) not in self._made:
            self._made[rows, widths] = _Recorded(self._model, self._allocators, rows, widths)
        lines = [tokens + [[0, 0]] * (rows - len(states)), *places]
        return self._made[rows, widths](lines)[: len(states)]


def _places(allocator: Any, request: str, at: int) -> list[int]:
    """Of the token at a position of a request: the number of keys with its own, the slot of its key, and the pages.

    With a sliding window, the keys are a ring: that of position p is at place p % window.
    """
    window, stride, size = getattr(allocator, "sliding_window", None), allocator.block_physical_stride, operators.PAGE
    length, place = (at + 1, at) if window is None else (min(at + 1, window), at % window)
    starts = [block * stride for block in allocator.block_table[request][: -(-length // size)]]
    return [length, starts[place // size] + place % size, *starts]


def _width(pages: int) -> int:
    """The pages of a text for which a step is recorded."""
    width = _LEAST_PAGES
    while width < pages:
        width *= _WIDER
    return width


class _Recorded:
    """A step of `rows` texts, with at most so many pages each for each kind of layers."""

    def __init__(self, model: Any, allocators: Sequence[Any], rows: int, widths: Sequence[int]) -> None:
        device, pinned = model.device, model.device.type == "cuda"
        self._sizes = [2, *(2 + width for width in widths)]  # token and position; number of keys, slot, and pages
        self._given = torch.zeros(rows, sum(self._sizes), dtype=torch.int32, device="cpu", pin_memory=pinned)
        self._numbers = torch.zeros(rows, sum(self._sizes), dtype=torch.int32, device=device)
        self._mask = torch.zeros(1, 1, rows, 1, dtype=model.dtype, device=device)  # keeps transformers from making one
        self._model, self._allocators = model, allocators
        self._views = {layer: view for each in allocators for layer, view in each._kv_token_views.items()}
        self._graph = Graph(self._forward, device)

    def __call__(self, lines: Sequence[Sequence[Sequence[int]]]) -> Tensor:
        """The logits [rows, words]. lines: the rows of each part of the numbers, without what fills them up."""
        for part, own in zip(self._given.split(self._sizes, 1), lines, strict=True):
            for row, line in zip(part.numpy(), own, strict=True):
                row[: len(line)] = line
        self._numbers.copy_(self._given, non_blocking=True)
        with grouped_queries():
            logits: Tensor = self._graph()
        return logits

    def _forward(self) -> Tensor:
        first, *others = self._numbers.split(self._sizes, 1)
        places = {
            layer: Places(part[:, 0].contiguous(), part[:, 1].long(), part[:, 2:])
            for part, each in zip(others, self._allocators, strict=True)
            for layer in each._kv_token_views
        }
        out = self._model(
            input_ids=first[None, :, 0].long(),
            position_ids=first[None, :, 1].long(),
            attention_mask=self._mask,
            cache=Paged(self._views, places),
            use_cache=False,
        )
        logits: Tensor = out.logits[0].float()
        return logits
