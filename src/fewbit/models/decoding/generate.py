"""Continue a text with a loaded model, through transformers' `generate`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, TextStreamer
from transformers.generation.streamers import BaseStreamer

from fewbit.brief import brief
from fewbit.errors import KernelError, NumericsError, PlanError
from fewbit.models.decoding.attention import growing_texts
from fewbit.models.decoding.decode import Decoder
from fewbit.models.decoding.exclusive import exclusive
from fewbit.models.decoding.sampling import Sampling
from fewbit.system.files import unwritable
from fewbit.system.processes import is_out_of_memory

_KEPT = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens", "bad_words_ids"),
    *("repetition_penalty", "no_repeat_ngram_size", "top_k", "top_p", "min_p", "typical_p"),
)

_AT_ONCE = {"cpu": 32}  # texts that `written` makes at a time; on a GPU 256, as a step takes as long for one
_GREEDY = Sampling()
_CHECKED = 64  # tokens that `_check_finite` reads
_random = Lock()


@brief
@dataclass(frozen=True)
class Continuation:
    """The generated text, which `str` returns.

    tokens: number of new tokens. to_first: seconds until the first token. after_first: seconds from the first token to
    the last.
    """

    text: str
    tokens: int
    to_first: float
    after_first: float

    def __str__(self) -> str:
        return self.text

    @property
    def rate(self) -> float | None:
        """Tokens per second after the first token; None if there is only one."""
        return (self.tokens - 1) / self.after_first if self.tokens > 1 else None


class _Clock(BaseStreamer):
    """Records the time of each token, and passes the token on to `shown`."""

    def __init__(self, shown: BaseStreamer | None) -> None:
        self.shown = shown
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        value = value.cpu()  # waits for the GPU
        self.times.append(time.perf_counter())
        if self.shown is not None:
            self.shown.put(value)

    def end(self) -> None:
        if self.shown is not None:
            self.shown.end()


def prompt_ids(tokenizer: Any, prompt: str, *, chat: bool = False) -> Tensor:
    """Token ids [1, n] of a prompt; with `chat`, of a user message in the model's chat template.

    PlanError if the prompt is empty or not valid Unicode, or if the chat template is missing or fails.
    """
    if reason := unwritable(prompt):
        raise PlanError(f"the prompt: {reason}", "Give the prompt in UTF-8.")
    if chat:
        if not tokenizer.chat_template:
            raise PlanError("this model has no chat template", "Leave out `chat`.")
        prompt = in_template(tokenizer, [{"role": "user", "content": prompt}])
    ids: Tensor = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)["input_ids"].long()
    if not ids.numel():
        raise PlanError("the prompt is empty", "Give some text to continue.")
    return ids


def in_template(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    options: Mapping[str, Any] | None = None,
) -> str:
    """A conversation in the chat template, up to where the model's answer begins.

    messages: `role` and `content` of each. tools: functions that the model may call, as in OpenAI's interface;
    templates without a place for them leave them out. options: further arguments of `apply_chat_template`. PlanError if
    the template fails.
    """
    more = {"add_generation_prompt": True, **(options or {}), **({"tools": list(tools)} if tools else {})}
    # Templates of models with images may take a list of parts only, and leave out a string without an error.
    written, failed = list[str](), None
    for parts in (False, True):
        try:
            given = [
                {**each, "content": [{"type": "text", "text": each["content"]}] if parts else each["content"]}
                for each in messages
            ]
            written.append(tokenizer.apply_chat_template(given, tokenize=False, **more))
        except Exception as error:  # a template is code of the model's author: it can raise anything
            failed = failed or error
        else:
            if messages[-1]["content"].strip() in written[-1]:
                return written[-1]
    if written:
        return written[0]
    raise PlanError(f"the model's chat template refuses the prompt: {failed}", "Leave out `chat`.") from failed


def text_settings(config: GenerationConfig) -> GenerationConfig:
    """What of a model's generation_config applies to one text that is written token by token."""
    kept = {name: value for name in _KEPT if (value := getattr(config, name, None)) is not None}
    return GenerationConfig(**kept)


@contextmanager
def _one_text(model: Any) -> Iterator[None]:
    """Inside this context, the model writes texts token by token, by the settings `_KEPT` of its generation_config."""
    owner = model.get_base_model() if hasattr(model, "get_base_model") else model
    with exclusive(owner):
        before = owner.generation_config
        owner.generation_config = text_settings(before)
        try:
            with growing_texts():
                yield
        finally:
            owner.generation_config = before


@contextmanager
def _seeded(sampling: Sampling) -> Iterator[None]:
    """Inside this context, sampling uses the random seed. One thread at a time: PyTorch has one generator for all.

    Greedy decoding neither waits nor sets the seed.
    """
    if sampling.temperature == 0:
        yield
        return
    with _random:
        torch.manual_seed(sampling.seed)
        yield


def _not_finite() -> NumericsError:
    return NumericsError("the model computed logits that are infinite or not a number", "Its weights may be damaged.")


@contextmanager
def _sampled() -> Iterator[None]:
    """NumericsError in place of PyTorch's error on a CPU for sampling from logits that are not finite."""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        raise _not_finite() from None


def _check_finite(model: Any, new: Tensor) -> None:
    """NumericsError if a model that wrote the tokens `new` [1, n] computes NaN. `generate` itself does not say so.

    It takes token 0 then, the first maximum of a row of NaN. If 0 ends a text, the text is empty and looks right.
    """
    if int(new[0, -1]) == 0:
        logits = model(new[:, -_CHECKED:]).logits[0, -1]
        if not logits.amax().isfinite():  # the maximum of a row with NaN is NaN
            raise _not_finite()


def continue_text(
    model: Any,
    tokenizer: Any,
    ids: Tensor,
    *,
    max_new_tokens: int,
    sampling: Sampling = _GREEDY,
    stream: bool = False,
    beside: Mapping[str, Tensor] | None = None,
) -> Continuation:
    """Generate up to `max_new_tokens` after `ids` [1, n]. stream: print the text while it is generated.

    beside: what the model takes besides token ids, such as pixels.

    From generation_config.json, special tokens, suppressed tokens, penalties and sampling limits apply. Beams, multiple
    sequences, stop strings, forced tokens and lengths are ignored: the result is one text, token by token.
    """
    shown = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    return continue_ids(model, tokenizer, ids, max_new_tokens, sampling=sampling, shown=shown, more=beside or {})[1]


def continue_ids(
    model: Any,
    tokenizer: Any,
    ids: Tensor,
    max_new_tokens: int,
    *,
    sampling: Sampling,
    shown: BaseStreamer | None,
    more: Mapping[str, Any],
) -> tuple[Tensor, Continuation]:
    """As `continue_text`. Returns all token ids [1, n] too. shown: gets the tokens. more: arguments of `generate`."""
    ids = ids.to(model.device)
    end = model.generation_config.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
    clock = _Clock(shown)
    try:
        with _seeded(sampling), torch.inference_mode(), _one_text(model):
            with _sampled():
                out = model.generate(
                    ids,
                    **{"attention_mask": torch.ones_like(ids), **more},
                    max_new_tokens=max_new_tokens,
                    pad_token_id=pad[0] if isinstance(pad, list) else pad,
                    streamer=clock,
                    **sampling.options(),
                )
            _check_finite(model, out[:, ids.shape[1] :])
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise KernelError(
            f"the memory of {model.device} is too small for a text of {ids.shape[1]} + {max_new_tokens} tokens",
            "Give a shorter prompt, or a smaller `max_new_tokens`.",
        ) from error
    start, first, *_ = clock.times  # the streamer gets the prompt before any computation
    return out, Continuation(
        text=str(tokenizer.decode(out[0][ids.shape[1] :], skip_special_tokens=True)),
        tokens=len(clock.times) - 1,
        to_first=first - start,
        after_first=clock.times[-1] - first,
    )


def written(model: Any, tokenizer: Any, count: int, length: int, seed: int) -> Tensor:
    """Texts that the model writes by itself: token ids [count, length], sampled from its own distribution.

    Each begins with the token that begins or ends a document. A text does not end before `length`. PlanError if the
    tokenizer has no such token.
    """
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise PlanError(
            "the tokenizer has no token that begins or ends a text, so the model cannot write one by itself"
        )
    never = {*_tokens(model.generation_config.eos_token_id), *_tokens(model.generation_config.suppress_tokens)}
    sampling = Sampling(temperature=1.0, top_k=0, top_p=1.0, seed=seed)
    options = {"max_new_tokens": length - 1, "pad_token_id": first, "suppress_tokens": sorted(never) or None}
    texts, left, rows = list[Tensor](), count, _AT_ONCE.get(model.device.type, 256)
    decoder = Decoder(model, length)
    with _seeded(sampling), torch.inference_mode(), _one_text(model):
        while left:
            ids = torch.full((min(rows, left), 1), first, dtype=torch.int64, device=model.device)
            try:
                with _sampled():
                    out = decoder.generate(ids, attention_mask=torch.ones_like(ids), **options, **sampling.options())
            except RuntimeError as error:
                if rows == 1 or not is_out_of_memory(error):
                    raise
                rows //= 2
                decoder = Decoder(model, length)
            else:
                texts.append(out.cpu())
                left -= len(out)
    return torch.cat(texts)


def _tokens(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
