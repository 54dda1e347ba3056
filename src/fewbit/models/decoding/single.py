"""The steps of continuous batching in which one request runs and none can join it, on a CPU.

In such a step, transformers' bookkeeping for many requests and its code around the blocks take longer than a small
model's products. So `Single` takes the page of the next token from transformers' cache, and calls what the model
consists of: embedding, blocks by the CPU library, last norm and head. The request stays transformers' own, so that its
next step may be one with others, and its text is the same: the first logits of an engine are compared, bit for bit,
with the model's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import KernelError
from fewbit.kernels.cpu.block import PagedChain
from fewbit.models.decoding import compiled_blocks, pages
from fewbit.models.decoding.outside import Outside
from fewbit.models.decoding.replacement import Replacement

Choose = Callable[[list[Any], Tensor], list[int]]  # requests' states and logits [n, words] -> the next tokens
_MANAGER = ("input_queue", "cancel_queue", "background_thread_status")  # what is asked of transformers' manager


class Single:
    """Computes the next token of the only request."""

    def __init__(self, model: Any, manager: Any, length: int, choose: Choose) -> None:
        """manager: transformers' for the model. length: of a text at most.

        choose: the next tokens of requests' states.
        """
        self._model, self._manager, self._length, self._choose = model, manager, length, choose
        self._cache: Any = None  # the one that `_parts` is for
        self._parts: _Parts | None = None
        self._state: Any = None  # the request of the step before, if that was one of these
        self._expected: Tensor | None = None  # logits of the next step, until they were compared
        self._tested = False

    def step(self, processor: Any) -> bool:
        """Compute a step of transformers' processor. False, with nothing done, if it is none of these."""
        parts = self._of(processor)
        state = None if parts is None else self._only(processor)
        if parts is None or state is None or not self._room(processor.cache, parts, state):
            self._state = self._expected = None
            return False
        position, (token,) = state.position_offset, state.tokens_to_process
        if not self._tested:
            self._state, self._expected = None, self.logits(parts, token, position).clone()
            return False  # the model computes the same, and overwrites the keys and values
        advance(processor, [state], self._choose([state], self.logits(parts, token, position)))
        return True

    def logits(self, parts: _Parts, token: int, position: int) -> Tensor:
        """The model's logits [1, words] in float32."""
        return parts.logits(token, position)

    def compare(self, states: Sequence[Any], scores: Tensor) -> None:
        """Hear the model's own logits of a step."""
        if self._expected is not None:
            if torch.equal(self._expected, scores):
                self._tested = True
            else:
                self._parts = None
            self._expected = None

    def release(self) -> None:
        """Let go of the cache: there are no more steps."""
        self._cache = self._parts = self._state = self._expected = None

    def _only(self, processor: Any) -> Any:
        """The request, if it is the only one and nobody asks for anything else. None if not."""
        states = only_decoding(self._manager, processor.scheduler)
        return states[0] if states is not None and len(states) == 1 else None

    def _of(self, processor: Any) -> _Parts | None:
        if processor.cache is not self._cache:
            self._cache, self._tested = processor.cache, False
            self._parts = _Parts.of(self._model, processor.cache, self._length) if known(self._manager) else None
        return self._parts

    def _room(self, cache: Any, parts: _Parts, state: Any) -> bool:
        """Whether there is a slot for the request's next token."""
        position = state.position_offset
        if state is self._state and position < parts.known:
            return True
        if not (all(each.unchanged() for each in parts.blocks) and cache.can_store_request_tokens(state, 1)):
            return False
        page = parts.allocator.tokens_per_page
        slots = list[int]()
        cache.extend_read_and_write_indices(state.request_id, position, page - position % page, [slots], [[]])
        parts.sees(slots)
        self._state = state
        return True


def only_decoding(manager: Any, scheduler: Any) -> list[Any] | None:
    """The running requests of transformers' scheduler, if each reads one token and nobody asks for anything else.

    Requests that wait ask for nothing as long as no more may run.
    """
    states = list(scheduler.active_requests.values())
    full = scheduler.block_new_requests or len(states) >= getattr(scheduler, "max_requests_per_batch", math.inf)
    if scheduler.waiting_requests and not full:
        return None
    if not (manager.input_queue.empty() and manager.cancel_queue.empty()):
        return None
    status = manager.background_thread_status
    if status.local_status != status.DONT_STOP or status.is_pause_requested():
        return None
    for state in states:
        reads = len(state.tokens_to_process) != 1 or state.remaining_prefill_tokens
        if state.status.name != "DECODING" or reads or state.num_children:
            return None
    return states


def advance(processor: Any, states: Sequence[Any], tokens: Sequence[int]) -> None:
    """Do after a step what transformers' processor does: note the next tokens of the requests, and tell them."""
    told = list[Any]()
    for state, token in zip(states, tokens, strict=True):
        complete = processor.cache.count_new_complete_blocks(state, 1)
        state.position_offset += 1
        finished = state.update_and_check_completion(token, None)
        processor.cache.mark_complete_blocks(state, complete)
        if finished:
            processor.scheduler.finish_request(state.request_id)
            processor.scheduler.block_new_requests = False
        told.append(state.to_generation_output())
    processor.output_router.deliver_batch(told)


def known(manager: Any) -> bool:
    """Whether `only_decoding` can be asked about a manager of this version of transformers."""
    return all(hasattr(manager, name) for name in _MANAGER) and hasattr(
        manager.background_thread_status, "is_pause_requested"
    )


class _Parts:
    """What a model consists of, over the pages of a cache. blocks: in order. known: tokens whose slots are known."""

    def __init__(self, model: Any, blocks: list[Replacement], cache: Any, length: int) -> None:
        (self.allocator,) = cache.cache_allocators.values()
        self.blocks, self.known = blocks, 0
        self._outside, head = Outside(model, blocks), model.get_output_embeddings()
        if head is None:
            raise KernelError("its parts are others")
        self._head = compiled_blocks.unquantized(model).get(head, head)
        views = [self.allocator._kv_token_views[each.layer] for each in blocks]
        room = length + self.allocator.tokens_per_page
        self._chain = PagedChain([each.block for each in blocks], views, self._outside.angles, room)

    @staticmethod
    def of(model: Any, cache: Any, length: int) -> _Parts | None:
        """None if the model or the cache is of another kind."""
        if model.device.type != "cpu" or not pages.is_paged(cache):
            return None
        blocks = compiled_blocks.whole(model)
        try:
            return None if blocks is None else _Parts(model, blocks, cache, length)
        except (AttributeError, KeyError, TypeError, ValueError, KernelError):
            return None

    def sees(self, slots: list[int]) -> None:
        """The slots of the text's tokens, with those of the page that is written."""
        self._chain.sees(slots)
        self.known = len(slots)

    def logits(self, token: int, position: int) -> Tensor:
        """The logits [1, words] after a token, in float32."""
        self._chain.x.copy_(self._outside.embedded(token))
        self._outside.turn(self._chain.x, position)
        out: Tensor = self._head(self._outside.norm(self._chain.at(position)))
        return out[0].float()
