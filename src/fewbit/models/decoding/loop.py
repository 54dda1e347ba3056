"""A decoding loop for greedy search and plain sampling with a static cache.

`transformers.GenerationMixin.generate` prepares everything, and calls this loop instead of its own. A step of greedy
search is one CUDA graph: the model, the choice of the token, and the inputs of the next step. The host only launches
the graph, and reads the tokens some steps later, so that the GPU never waits for the host. In sampling, the graph ends
at the logits, and transformers' logits warpers follow. All other requests use transformers' loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from fewbit.models import parallel
from fewbit.models.decoding import compiled_blocks
from fewbit.models.decoding.graph import Graph

AHEAD = 2  # steps that are launched before the host reads a token
ROWS = 128  # steps for which masks are prepared at once
# These depend on a row's logits only, not on its token ids.
_WARPERS = (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
)
# Methods that the loop replaces or relies on. A model that overrides one of them keeps transformers' loop.
_OWN = (
    "prepare_inputs_for_generation",
    "_update_model_kwargs_for_generation",
    "_optimize_model_for_decode",
    "_prefill",
    "_sample",
)
# Arguments of `generate` that need another loop, or that `generate` does not pass on to a loop.
_OTHERS = (
    "assistant_model",
    "constraints",
    "custom_generate",
    "dola_layers",
    "force_words_ids",
    "negative_prompt_ids",
    "penalty_alpha",
    "prefix_allowed_tokens_fn",
    "stop_strings",
    "synced_gpus",
    "tokenizer",
)


Tables = dict[tuple[str, ...], Tensor]  # key: argument name, and kind of layer if there are several


def can_serve(model: Any, requested: dict[str, Any]) -> bool:
    """Whether `Loop` can write the tokens for a call of the model's `generate` with the arguments `requested`."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (
        (parallel.is_split(model) or not distributed)
        and all(requested.get(key) is None or requested[key] is False for key in _OTHERS)
        and all(_is_own(model, name) for name in _OWN)
        and not compiled_blocks.has_other_hooks(model)
        and not model.config.is_encoder_decoder
    )


def _is_own(model: Any, name: str) -> bool:
    method = getattr(model, name, None)
    return method is not None and getattr(method, "__func__", None) is getattr(GenerationMixin, name, None)


class Stop(StoppingCriteria):
    """Ends all texts after a token if `stopped()` says so. It does not look at the tokens, so the loop can ask it."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self.stopped = stopped

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self.stopped(), dtype=torch.bool, device=input_ids.device)


class Loop:
    """The loop over one static cache. forward: of one step, compiled or not. Later texts use the same graphs."""

    def __init__(self, forward: Callable[..., Any], cache: Any, length: int) -> None:
        self.forward, self.cache, self.length = forward, cache, length
        self.step: Step | None = None
        # transformers makes no mask for as many tokens as the cache holds: it takes them for a prompt.
        self.rows = ROWS - 1 if length == ROWS else ROWS
        self.possible = True  # whether masks can be prepared for later steps

    def writer(self, streamer: Any, again: Callable[[], None]) -> Callable[..., Any]:
        """The `custom_generate` argument of `generate`. It calls `again` before transformers' loop starts over."""

        def write(
            model: Any,
            input_ids: Tensor,
            logits_processor: LogitsProcessorList,
            stopping_criteria: StoppingCriteriaList,
            generation_config: Any,
            **kwargs: Any,
        ) -> Any:
            if self._serves(model, input_ids, logits_processor, stopping_criteria, generation_config):
                before = dict(kwargs)
                written = self._write(
                    model, input_ids, logits_processor, stopping_criteria, generation_config, streamer, kwargs
                )
                if written is not None:
                    return written
                kwargs = before
                again()
            return model._sample(
                input_ids, logits_processor, stopping_criteria, generation_config, streamer=streamer, **kwargs
            )

        return write

    def _serves(self, model: Any, ids: Tensor, warpers: Any, criteria: Any, config: Any) -> bool:
        kinds = [type(one) for one in criteria if type(one) is not Stop]
        return (
            self.possible
            and ids.device == model.device
            and not config.return_dict_in_generate
            and config.prefill_chunk_size is None
            and all(type(one) in _WARPERS for one in warpers)
            and (config.do_sample or not warpers)
            and kinds in ([MaxLengthCriteria], [MaxLengthCriteria, EosTokenCriteria])
            and ids.shape[1] < criteria.max_length <= self.length
        )

    def _write(
        self, model: Any, ids: Tensor, warpers: Any, criteria: Any, config: Any, streamer: Any, kwargs: dict[str, Any]
    ) -> Tensor | None:
        """Token ids [rows, tokens] of the prompt and the generated text. None, with nothing streamed, if the model has
        inputs that cannot be prepared for later steps."""
        of_ends = [one.eos_token_id for one in criteria if type(one) is EosTokenCriteria]
        ends = [int(token) for tokens in of_ends for token in tokens.flatten().tolist()]
        stops = [one.stopped for one in criteria if type(one) is Stop]
        logits = model._prefill(ids, config, kwargs).logits[:, -1].to(copy=True, dtype=torch.float32)
        upcoming = UpcomingInputs(model, ids, kwargs, self.rows)
        if (tables := upcoming.tables()) is None:
            self.possible = False
            return None
        if self.step is None or not self.step.fits(upcoming.fixed, tables):
            self.step = Step(self.forward, upcoming.fixed, tables, (len(ids), self.length), logits.shape[-1])
        choose = _sampler(warpers, ids) if config.do_sample else None
        self.step.begin(ends, config.pad_token_id)
        self.step.take(choose(logits) if choose else greatest(logits))
        watch = Watch(criteria.max_length - ids.shape[1], self.step.token[:, 0], ends, streamer, stops)
        with model._optimize_model_for_decode():
            count = _decode(self.step, watch, upcoming, tables, choose)
        if streamer is not None:
            streamer.end()
        return torch.cat([ids, self.step.written[:, :count]], dim=-1)


def greatest(logits: Tensor) -> Tensor:
    """`argmax` of each row [rows, vocabulary], the first one of equal values. Faster on a GPU: it works in 64 parts."""
    parts = 64
    if logits.shape[1] % parts:
        return logits.argmax(-1)
    values, places = logits.unflatten(1, (parts, -1)).max(-1)
    part = values.argmax(-1, keepdim=True)
    found: Tensor = part * (logits.shape[1] // parts) + places.gather(1, part)
    return found.squeeze(1)


Choice = Callable[[Tensor], Tensor]  # from logits [rows, vocabulary] to tokens [rows]


def _decode(step: Step, watch: Watch, upcoming: UpcomingInputs, tables: Tables, choose: Choice | None) -> int:
    """Write all tokens after the first, until all rows have ended or the limit is reached. Returns the token count."""
    watch.note()
    count, finished = 1, watch.finished(0)
    while count < watch.new and not finished:
        if (count - 1) % upcoming.rows == 0:
            step.refill(tables if count == 1 else upcoming.tables())
        step.run(choose)
        count += 1
        watch.note()
        finished = watch.finished(AHEAD)
    watch.finished(0)
    return watch.ended or count


def _sampler(warpers: LogitsProcessorList, ids: Tensor) -> Choice:
    """A function that samples one token for each row of logits, as transformers does."""

    def choose(logits: Tensor) -> Tensor:
        scores: Tensor = warpers(ids, logits)  # type: ignore[arg-type]  # `_WARPERS` ignore the ids
        return torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)

    return choose


class UpcomingInputs:
    """The inputs of the next `rows` steps, as transformers prepares them.

    `fixed` holds inputs that are the same in each step. `tables` holds masks and positions: each step uses one index of
    the second last dimension of a mask, and of the last dimension of positions.
    """

    def __init__(self, model: Any, ids: Tensor, kwargs: dict[str, Any], rows: int) -> None:
        self.model, self.kwargs, self.rows = model, kwargs, rows
        self.ids = ids.new_zeros(ids.shape[0], rows)
        self.fixed: dict[str, Any] = {}

    def tables(self) -> Tables | None:
        """The tables of these steps. None if an input is neither mask nor position."""
        self.kwargs = self.model._update_model_kwargs_for_generation({}, self.kwargs, num_new_tokens=self.rows)
        inputs = self.model.prepare_inputs_for_generation(self.ids, next_sequence_length=self.rows, **self.kwargs)
        del inputs["input_ids"]
        tables: Tables = {}
        for name, value in inputs.items():
            parts = {(name, key): inner for key, inner in value.items()} if type(value) is dict else {(name,): value}
            tables |= {key: inner for key, inner in parts.items() if isinstance(inner, Tensor)}
        self.fixed = {k: v for k, v in inputs.items() if not isinstance(v, Tensor) and type(v) is not dict}
        masks = [t for key, t in tables.items() if key[0] == "attention_mask"]
        whole = all(isinstance(i, Tensor) for value in inputs.values() if type(value) is dict for i in value.values())
        shaped = all(t.dim() >= -_side(key) and t.shape[_side(key)] == self.rows for key, t in tables.items())
        return tables if masks and whole and shaped and all(mask.dim() == 4 for mask in masks) else None


def _side(key: tuple[str, ...]) -> int:
    return -2 if key[0] == "attention_mask" else -1


class Step:
    """One decoding step on its own memory. Each step prepares this memory for the next one.

    token: [rows, 1], the last token. written: [rows, length], all new tokens. done: [rows], whether a row has ended.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        fixed: dict[str, Any],
        tables: Tables,
        shape: tuple[int, int],
        vocabulary: int,
    ) -> None:
        self.forward, self.fixed = forward, fixed
        self.tables = {key: table.clone() for key, table in tables.items()}
        device = next(iter(tables.values())).device
        self.token = torch.zeros(shape[0], 1, dtype=torch.long, device=device)
        self.written = torch.zeros(shape, dtype=torch.long, device=device)
        self.done = torch.zeros(shape[0], dtype=torch.bool, device=device)
        self.ends = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        self.pad, self.at, self.row = (torch.zeros(1, dtype=torch.long, device=device) for _ in range(3))
        self.greedy = Graph(lambda: self.take(greatest(self._logits())), device, first=2)
        self.logits = Graph(self._logits, device, first=2)

    def fits(self, fixed: dict[str, Any], tables: Tables) -> bool:
        """Whether the step was made for inputs of these shapes, dtypes and fixed values."""
        same = fixed.keys() == self.fixed.keys() and all(fixed[k] is v or fixed[k] == v for k, v in self.fixed.items())
        return (
            same
            and tables.keys() == self.tables.keys()
            and all(t.shape == self.tables[k].shape and t.dtype == self.tables[k].dtype for k, t in tables.items())
        )

    def begin(self, ends: list[int], pad: int | None) -> None:
        """Start a new text. A row ends at any token of `ends`, and is then padded with `pad`, else with `ends[0]`."""
        for tensor in (self.done, self.at, self.ends):
            tensor.zero_()
        known = [token for token in ends if 0 <= token < len(self.ends)]
        self.ends[known] = True
        if ends:
            self.pad.fill_(ends[0] if pad is None else pad)

    def refill(self, tables: Tables | None) -> None:
        """Load the tables of the next steps."""
        assert tables is not None
        self.row.zero_()
        for key, table in tables.items():
            self.tables[key].copy_(table)

    def run(self, choose: Choice | None) -> None:
        """Run one step. `choose` maps logits [rows, vocabulary] to tokens; None for greedy search."""
        if choose is None:
            self.greedy()
        else:
            self.take(choose(self.logits()))

    def _logits(self) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": self.token, **self.fixed}
        for key, table in self.tables.items():
            now = table.index_select(_side(key), self.row)
            if len(key) == 1:
                inputs[key[0]] = now
            else:
                inputs.setdefault(key[0], {})[key[1]] = now
        logits: Tensor = self.forward(**inputs, return_dict=True).logits
        self.row.add_(1)
        return logits[:, -1].to(copy=True, dtype=torch.float32)

    def take(self, chosen: Tensor) -> None:
        """Write the chosen tokens [rows]. Rows that have ended get the padding token."""
        token = torch.where(self.done, self.pad, chosen)
        self.done.logical_or_(self.ends[token])
        self.token.copy_(token[:, None])
        self.written.index_copy_(1, self.at, token[:, None])
        self.at.add_(1)


class Watch:
    """Reads tokens on the host, to detect that all rows have ended and to feed a streamer.

    Tokens are copied asynchronously, and read after their copy is done. After each, `stops` are asked whether to end.
    Without end tokens, streamer and stops, it does nothing.
    """

    def __init__(
        self, new: int, token: Tensor, ends: list[int], streamer: Any, stops: Sequence[Callable[[], bool]]
    ) -> None:
        self.new, self.token, self.streamer, self.stops = new, token, streamer, stops
        self.active = bool(ends or stops) or streamer is not None
        self.gpu = token.device.type == "cuda"
        self.copies = torch.empty(
            new if self.active else 0, len(token), dtype=torch.long, pin_memory=self.gpu, device="cpu"
        )
        self.events: deque[Any] = deque()
        self.noted = self.seen = self.ended = 0
        self.ends, self.alive = set(ends), set(range(len(token)))

    def note(self) -> None:
        """Start to copy the tokens of the step that was launched last."""
        if not self.active:
            return
        self.copies[self.noted].copy_(self.token, non_blocking=True)
        self.noted += 1
        if self.gpu:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.token.device))
            self.events.append(event)

    def finished(self, lag: int) -> bool:
        """Read all but the last `lag` copies, waiting for them. True if all rows have ended, after `ended` tokens."""
        while self.seen < self.noted - lag and not self.ended:
            if self.gpu:
                self.events.popleft().synchronize()
            row = self.copies[self.seen]
            self.seen += 1
            if self.ends:
                self.alive -= {i for i, token in enumerate(row.tolist()) if token in self.ends}
            if self.streamer is not None:
                self.streamer.put(row.clone())
            self.ended = 0 if self.alive and not any(stopped() for stopped in self.stops) else self.seen
        return self.ended > 0
