"""Answers many requests at once with one model, by transformers' continuous batching.

Each step computes one token of every running request, and a piece of the prompts that wait. transformers has the
scheduler and the paged cache of keys and values. It has one setting of sampling for all requests, no seed of a request,
and no probabilities of other tokens, so `_Choosing` takes its place where tokens are chosen.

`ContinuousBatchingManager` and what it calls are not a stable interface. Only this file uses them (and `pages.py` and
`scoring.py` their cache), and `Engine` raises KernelError if a name is missing. Tested with transformers 5.17 and 5.24.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
import math
import queue
import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, RepetitionPenaltyLogitsProcessor

from fewbit import units
from fewbit.errors import FewbitError, KernelError, PlanError
from fewbit.models.decoding import operations
from fewbit.models.decoding.attention import growing_texts
from fewbit.models.decoding.choosing import Choosing, Likely, adjusted, drawn, likely, within
from fewbit.models.decoding.generate import text_settings
from fewbit.models.decoding.scoring import Scoring
from fewbit.models.decoding.single import Single
from fewbit.models.decoding.together import Together

try:
    from transformers import ContinuousBatchingConfig, LogitsProcessorList
    from transformers.generation.continuous_batching.cb_logits_processors import (
        ContinuousBatchingLogitsProcessor,
        ContinuousBatchingLogitsProcessorList,
    )
    from transformers.generation.continuous_batching.continuous_api import OutputRouter
except ImportError as missing:
    raise KernelError(
        f"this version of transformers has another continuous batching: {missing}",
        "fewbit serve is tested with transformers 5.17 to 5.24. Install one of them.",
    ) from missing

_log = logging.getLogger("fewbit")
_PAGE = 32  # tokens of the cache that are allocated at a time, and shared by prompts with the same beginning
_SHARE = {"cpu": 0.25, "cuda": 0.8}  # of the free memory, for keys and values
_PROMPT = {"cpu": 512, "cuda": 4096}  # prompt tokens of a step at most: the other requests wait for them
_DRAWN = 64  # rows drawn at once: each takes some 6 MB for 150,000 tokens
_WARM = 64  # rows up to which the kernels of a GPU are compiled before the first request


class Grammar(Protocol):
    """Which tokens an answer may consist of. It is asked before each token, and then told the token.

    complete: no token may follow. allowed: a byte for each token of the vocabulary, 0 if it may not come next. Both
    methods raise a FewbitError if the answer cannot be continued.
    """

    @property
    def complete(self) -> bool: ...

    def allowed(self) -> bytes: ...

    def accept(self, token: int) -> None: ...


@dataclass(frozen=True)
class News:
    """What is known of a request after a step: all its tokens, in order. likely: of each token, if asked for.

    prompt: the same for the tokens of the prompt.
    complete: its grammar allows no more tokens; the request must be cancelled if it has not finished.
    """

    tokens: tuple[int, ...]
    finished: bool
    error: str | None = None
    likely: tuple[Likely, ...] = ()
    complete: bool = False
    prompt: tuple[Likely, ...] = ()


@dataclass
class _Request:
    choosing: Choosing
    tell: Callable[[News], None]
    grammar: Grammar | None
    random: random.Random
    likely: list[Likely] = field(default_factory=list)
    error: str | None = None
    whole: int | None = None  # tokens at which the grammar was complete; a step may choose more before the request ends
    counts: Counter[int] = field(default_factory=Counter)  # of the answer's tokens
    plain: bool = False  # takes the most likely token, and reports nothing of others
    ids: Sequence[int] = ()
    scores: list[Likely] | None = None  # of the prompt's tokens, as far as the prompt was read; None: not asked for


class Engine:
    """One model that answers requests in a thread of its own. Any thread may call its methods.

    An error in a step, such as too little memory for a long prompt, ends all requests with this error. The engine then
    computes a token by itself: if it can, it goes on, and else it has failed.

    context: tokens of a prompt and its answer at most. lowered: the context, if the memory made it less than the
    model's. ends: the tokens that end an answer. failed: the error after which no request is answered any more.
    """

    def __init__(self, model: Any, context: int | None, rows: int, memory: int | None) -> None:
        """context: None is what the model and the memory allow. rows: requests computed at a time; the others wait.

        memory: bytes that are free on the model's device, of which keys and values get a share; None is not known.
        PlanError if the model cannot be served, or `context` tokens do not fit the memory. KernelError if this version
        of transformers has another interface.
        """
        owner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._names, self._requests = count(1), dict[str, _Request]()
        stated = owner.generation_config.eos_token_id
        self.ends: list[int] = [stated] if isinstance(stated, int) else list(stated or ())
        self.context, self.lowered, tokens = _room(owner, context, rows, memory)
        operations.replace(owner)
        _warm(owner)
        try:
            processors = owner._get_logits_processor(
                text_settings(owner.generation_config),
                input_ids_seq_length=1,  # not 0: else it warns that a penalty leaves out the prompt, which it does not
                device=owner.device,
            )
            self._manager = owner.init_continuous_batching(
                GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=1), _config(owner, tokens, rows)
            )
            self._scoring = Scoring(self._requests)
            listed, choosing = _Processors(self._scoring.begin), _Choosing(self._requests, processors, self.ends)
            listed.logits_processor.append(choosing)
            listed.tensors_required, listed.do_processing = 1, True
            self._manager.logit_processor = listed
            self._manager.output_router = _Router(self._requests)
            logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
            self._single = Single(self._manager.model, self._manager, self.context, choosing.choose)
            self._together = Together(self._manager.model, self._manager, choosing.choose)
            choosing.hear = [self._single.compare, self._together.compare]
            self._manager._generation_loop_body = self._steps(self._manager._generation_loop_body)
            self._manager.warmup()
        except (AttributeError, TypeError) as error:
            raise KernelError(
                f"this version of transformers has another continuous batching: {error}",
                "fewbit serve is tested with transformers 5.17 to 5.24. Install one of them.",
            ) from error
        except (ValueError, KeyError, RuntimeError) as error:
            raise _refused(error) from error
        self.failed: str | None = None
        self._changing, self._accepting, self._stopped = threading.Lock(), True, False
        with torch.inference_mode():
            self._manager.start()
        self._watcher = threading.Thread(target=self._watch, name="fewbit-engine-watcher")
        self._watcher.start()
        self._scoring.attach(self._manager.model)  # last: an engine that fails to start leaves no hooks

    def _steps(self, whole: Callable[[Any, bool], bool]) -> Callable[[Any, bool], bool]:
        """transformers' step, `whole`, and the quicker ones where they serve."""

        def step(processor: Any, bootstrapping: bool) -> bool:
            if self._single.step(processor) or self._together.step(processor):
                return True
            with growing_texts():  # each step has another number of keys
                return whole(processor, bootstrapping)

        return step

    @property
    def ready(self) -> bool:
        """Whether requests are accepted."""
        return self._accepting and self._manager.is_running()

    @property
    def unfinished(self) -> int:
        """The number of requests that run or wait."""
        return len(self._requests)

    def submit(
        self,
        ids: Sequence[int],
        new: int,
        choosing: Choosing,
        tell: Callable[[News], None],
        grammar: Grammar | None = None,
        scored: bool = False,
    ) -> str:
        """Answer the prompt `ids` with up to `new` tokens. Returns the request's name. KernelError unless `ready`.

        tell: gets the state after each token; it is called in the engine's thread, and must not wait. grammar: limits
        the tokens; it belongs to this request from now on. scored: report the prompt's log probabilities too.
        """
        if not self._accepting:
            raise KernelError("the engine takes no requests now")
        request = _Request(choosing, tell, grammar, random.Random(choosing.seed), ids=ids)
        request.scores = [Likely(ids[0], None, ())] if scored else None
        request.plain = grammar is None and replace(choosing, seed=None, ignore_eos=False) == Choosing()
        return self._begin(ids, new, request)

    def _begin(self, ids: Sequence[int], new: int, request: _Request) -> str:
        name = f"request-{next(self._names)}"
        self._requests[name] = request
        ends = [] if request.choosing.ignore_eos else self.ends
        accepted = self._manager.add_request(
            list(ids), name, max_new_tokens=new, streaming=True, eos_token_id=ends or -1
        )
        if accepted is None:
            self._requests.pop(name, None)
            raise KernelError("the engine takes no requests now")
        return name

    def cancel(self, name: str) -> None:
        """End a request: it is computed no further, and told no more. Nothing happens if it has ended."""
        if self._requests.pop(name, None) is not None:
            self._manager.cancel_request(name)

    def stop(self, *, finish: bool = True) -> None:
        """End the thread, after the requests that run or wait; without `finish`, they end too. May be called again."""
        if not finish:
            for name in list(self._requests):
                self.cancel(name)
        with self._changing:
            self._stopped, self._accepting = True, False
            if self._manager.is_running():
                self._manager.stop(block=True)
        self._watcher.join()
        # After an error, transformers keeps these: the cache, and a traceback with its tensors.
        self._manager.batch_processor = self._manager.background_thread_status.fatal_error = None
        for each in (self._scoring, self._single, self._together):
            each.release()

    def _watch(self) -> None:
        """Start the engine's thread again after an error, as long as the engine can compute."""
        while True:
            if (thread := self._manager._generation_thread) is not None:
                thread.join()
            with self._changing:
                if self._stopped:
                    return
                self._accepting = False
                status = self._manager.background_thread_status
                error, status.fatal_error = str(status.fatal_error), None  # its traceback keeps tensors
                for name in list(self._requests):  # requests that came in the moment of the error
                    if request := self._requests.pop(name, None):
                        request.tell(News((), True, error))
                self._together.forget()  # the next step may need the memory
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                if (still := self._error_of_a_step()) is not None:
                    self.failed = still
                    return
                self._accepting = True
            _log.warning("A step of the engine failed: %s. Its requests got this error. The engine goes on.", error)

    def _error_of_a_step(self) -> str | None:
        """Start the engine's thread, and compute a token."""
        answers = queue.SimpleQueue[News]()
        with torch.inference_mode():
            self._manager.start()
        try:
            self._begin([0], 1, _Request(Choosing(), answers.put, None, random.Random(0)))
        except KernelError as error:
            return error.message
        while True:
            try:
                return answers.get(timeout=0.1).error
            except queue.Empty:
                if not self._manager.is_running():
                    return "the engine's thread has ended"


class _Router(OutputRouter):
    """Passes the news of each request to the function that asked for them. Those of cancelled requests are dropped."""

    def __init__(self, requests: dict[str, _Request]) -> None:
        super().__init__()
        self._requests = requests

    def deliver(self, output: Any) -> None:
        request = self._requests.get(output.request_id)
        if request is None:
            return
        finished, tokens = output.is_finished(), tuple(output.generated_tokens)
        if finished:
            self._requests.pop(output.request_id, None)
        complete = request.grammar is not None and request.grammar.complete
        if complete and request.whole is None:
            request.whole = len(tokens)
        tokens = tokens[: request.whole]
        error = output.error or request.error
        prompt = tuple(request.scores or ())
        request.tell(News(tokens, finished, error, tuple(request.likely[: len(tokens)]), complete, prompt))

    def deliver_batch(self, outputs: list[Any]) -> None:
        for output in outputs:
            self.deliver(output)


class _Processors(ContinuousBatchingLogitsProcessorList):
    """Tells of each step's requests right before the step."""

    def __init__(self, begin: Callable[[list[Any]], None]) -> None:
        super().__init__(LogitsProcessorList([]))
        self._begin = begin

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: Tensor) -> Any:
        self._begin(requests_in_batch)
        return super().prepare_tensor_args(requests_in_batch, arg_storage)


class _Choosing(ContinuousBatchingLogitsProcessor):
    """Chooses the next token of each request by the request's own settings.

    transformers then takes the largest score of each row. A row that samples is therefore minus infinity everywhere but
    at the token that was drawn. No row depends on the others, so a request does not depend on its neighbours.
    """

    def __init__(self, requests: dict[str, _Request], processors: Any, ends: list[int]) -> None:
        """processors: transformers' logits processors of the model's generation_config, such as penalties.

        ends: the tokens that end an answer.
        """
        self.supported_kwargs, self.ignored_kwargs = {}, ()
        self._requests, self._processors, self._ends = requests, processors, ends
        self._rows: list[tuple[_Request | None, Any]] = []
        self.hear: Sequence[Callable[[list[Any], Tensor], None]] = ()  # get the states and the scores of each step

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        # Graphs and batches in advance are off, so this is called right before the step of these requests.
        states = [each.state for each in requests_with_new_token]
        self._rows = [(self._requests.get(state.request_id), state) for state in states]
        return torch.zeros(len(states), dtype=torch.int32, device="cpu")

    def choose(self, states: list[Any], scores: Tensor) -> list[int]:
        """The next tokens of requests. scores: [requests, vocabulary]."""
        requests = [self._requests.get(state.request_id) for state in states]
        if not self._processors and all(request is not None and request.plain for request in requests):
            tokens = scores.argmax(-1)
            finite = scores.gather(-1, tokens[:, None])[:, 0].isfinite()  # the largest of a row with NaN is NaN
            found: list[int] = tokens.where(finite, -1).tolist()
            if min(found) >= 0:
                return found
        self._rows = list(zip(requests, states, strict=True))
        return self(scores).argmax(-1).tolist()

    def __call__(self, scores: Tensor, tensor_arg: Tensor | None = None) -> Tensor:
        for hear in self.hear:
            hear([state for _, state in self._rows], scores)
        chosen = scores.clone()
        finite = scores.amax(-1).isfinite().tolist()  # the maximum of a row with NaN is NaN
        sampled: dict[tuple[float, int, float], list[int]] = {}  # rows whose distributions are limited alike
        limited = list[tuple[int, _Request, Grammar | None]]()
        for i, (request, state) in enumerate(self._rows):
            if processors := self._of_request(request):
                tokens = [*state.initial_tokens, *state.generated_tokens]
                seen = torch.tensor([tokens], dtype=torch.int64, device=scores.device)
                chosen[i] = processors(seen, scores[i : i + 1].clone())[0]
            if request is None:
                continue
            if not finite[i]:
                request.error = "the model computed logits that are infinite or not a number"
                continue
            limits = request.grammar if request.error is None else None
            if limits is not None and limits.complete:
                continue
            how = request.choosing
            try:
                self._limit(i, request, state, scores, chosen, limits)
            except FewbitError as error:  # of this request alone
                request.error, limits = error.message, None
            else:
                if how.temperature > 0:
                    sampled.setdefault((how.temperature, how.top_k or 0, how.top_p), []).append(i)
            limited.append((i, request, limits))
        for rows in (alike[i : i + _DRAWN] for alike in sampled.values() for i in range(0, len(alike), _DRAWN)):
            requests = [request for i in rows if (request := self._rows[i][0]) is not None]
            drew = drawn(chosen[rows], requests[0].choosing, [request.random.random() for request in requests])
            chosen[rows] = -math.inf
            chosen[rows, drew] = 0.0
        for i, request, limits in limited:
            try:
                if limits is not None:
                    limits.accept(int(chosen[i].argmax()))
            except FewbitError as error:
                request.error = error.message
            if request.choosing.presence_penalty or request.choosing.frequency_penalty:
                request.counts[int(chosen[i].argmax())] += 1
            if request.choosing.logprobs is not None:
                request.likely += likely(scores[i : i + 1], [int(chosen[i].argmax())], request.choosing.logprobs)
        return chosen

    def _limit(
        self, i: int, request: _Request, state: Any, scores: Tensor, chosen: Tensor, limits: Grammar | None
    ) -> None:
        """Apply the penalties and limits of the request in row i to its row of `chosen`."""
        row = adjusted(chosen[i], request.counts, request.choosing)
        # transformers counts the answer so far as prompt if it has taken the request's pages for others meanwhile.
        answered = len(state.initial_tokens) + len(state.generated_tokens) - len(request.ids)
        if answered < request.choosing.min_tokens:
            known = [token for token in self._ends if 0 <= token < scores.shape[-1]]
            row[known] = -math.inf
        if limits is not None:
            row = within(row, scores[i], limits.allowed())
        if row.data_ptr() != chosen[i].data_ptr():
            chosen[i] = row

    def _of_request(self, request: _Request | None) -> Any:
        """The logits processors for a request, which may have a repetition penalty of its own."""
        if request is None or (penalty := request.choosing.repetition_penalty) is None:
            return self._processors
        others = [each for each in self._processors if not isinstance(each, RepetitionPenaltyLogitsProcessor)]
        return LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty), *others])


def _refused(error: Exception) -> PlanError:
    return PlanError(
        f"this model cannot be served: transformers' continuous batching does not take it ({error})",
        "fewbit chat and fewbit generate run it for one user.",
    )


def _config(owner: Any, tokens: int, rows: int) -> Any:
    config = owner.config.get_text_config()
    names = {each.name for each in fields(ContinuousBatchingConfig)}
    paged = "page_size" in names
    given: dict[str, Any] = {
        "page_size" if paged else "block_size": _PAGE,
        "num_blocks": tokens // _PAGE * (1 if paged else _groups(config)),
        "max_batch_tokens": max(_PROMPT[owner.device.type], rows),
        "max_requests_per_batch": rows,
        # `_Choosing` works on the host between the steps, which neither allows.
        "use_cuda_graph": False,
        "use_async_batching": False,
        "auto_switch_to_flash": False,  # it may download a kernel, and recorded steps attend to pages themselves
    }
    return ContinuousBatchingConfig(**{name: value for name, value in given.items() if name in names})


def _groups(config: Any) -> int:
    """Groups of layers for which older versions of transformers allocate blocks of their own: see their cache.py."""
    if importlib.util.find_spec("transformers.generation.continuous_batching.cache_allocators") is not None:
        return 1
    kinds = list(getattr(config, "layer_types", None) or ())
    sizes = [kinds.count(kind) for kind in set(kinds)]
    return len(kinds) // math.gcd(*sizes) if sizes else 1


def _room(owner: Any, context: int | None, rows: int, memory: int | None) -> tuple[int, int | None, int]:
    """The context, the context again if it is less than the model's for lack of memory, and the cache's tokens."""
    config = owner.config.get_text_config()
    stated = getattr(config, "max_position_embeddings", None) or 2048
    try:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    except AttributeError as error:  # no attention, or layers that differ
        raise _refused(error) from error
    each = 2 * config.num_hidden_layers * heads * width * owner.dtype.itemsize
    most = int((memory or 2**32) * _SHARE[owner.device.type]) // each // _PAGE * _PAGE
    wanted = context or stated
    needed = math.ceil((wanted + 1) / _PAGE) * _PAGE
    if context is not None and needed > most:
        raise PlanError(
            f"`max_model_len={context}`: its keys and values take {units.size(needed * each)}, and "
            f"{units.size(most * each)} are free for them",
            f"The largest that fits is {most - _PAGE}.",
        )
    if needed > most:
        if most < 8 * _PAGE:
            raise PlanError("there is no memory left for keys and values", "Use a smaller model.")
        return most - _PAGE, most - _PAGE, most
    return wanted, None, min(most, needed * rows)


@torch.inference_mode()
def _warm(owner: Any) -> None:
    """Compile the kernels of a GPU for the numbers of rows that a step may have, so that no request waits for it."""
    if owner.device.type != "cuda":
        return
    for rows in range(1, _WARM + 1):
        owner(input_ids=torch.zeros(1, rows, dtype=torch.int64, device=owner.device), use_cache=False)
