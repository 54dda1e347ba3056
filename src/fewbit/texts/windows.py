"""Texts as windows of tokens."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import FormatError, PlanError
from fewbit.texts.sources import Completion, Instruction, Message, Text, Tokenizer
from fewbit.units import counted


def encode(text: Text, tokenizer: Tokenizer) -> Tensor:
    """The whole text as one stream of token ids, int64 [tokens].

    Consecutive plain documents are joined by an empty line. Chats are rendered by the tokenizer's own template, plain
    text is not. The BOS token is put in front once, if the tokenizer adds it by default. PlanError if a chat needs a
    template that the tokenizer lacks, or if the template raises an error.
    """
    pieces: list[str] = []
    shown = [d.shown(tokenizer) if isinstance(d, Instruction) else d for d in text.documents]
    documents = [d.prompt + d.completion if isinstance(d, Completion) else d for d in shown]
    for plain, run in itertools.groupby(enumerate(documents), key=lambda numbered: isinstance(numbered[1], str)):
        if plain:
            pieces.append("\n\n".join(document for _, document in run if isinstance(document, str)))
        else:
            pieces += [render(chat, text.place(i), tokenizer) for i, chat in run if not isinstance(chat, str)]
    ids = [token for piece in token_ids(tokenizer, pieces) for token in piece]
    return torch.tensor(begun(ids, tokenizer), dtype=torch.int64, device="cpu")


def within(ids: Tensor, rows: int | None, tokenizer: Any, where: str) -> Tensor:
    """Return `ids` unchanged. FormatError if an id has no row in an embedding of `rows` rows (None: not checked)."""
    if rows is not None and ids.numel() and int(ids.max()) >= rows:
        wrong = int(ids.max())
        name = tokenizer.convert_ids_to_tokens(wrong)
        raise FormatError(
            f"{where}: token {name!r} has the id {wrong}, and the model's embedding has {rows} rows",
            "The tokenizer has tokens that the model was never given. Resize the model's embedding, or use a text or a "
            "chat template without them.",
        )
    return ids


def continued(ids: Tensor, new: int, context: int | None) -> Tensor:
    """Return prompt `ids` [1, n] unchanged. PlanError if they and `new` tokens exceed the context (None: no limit)."""
    if context is not None and ids.shape[1] + new > context:
        raise PlanError(
            f"the prompt has {counted(ids.shape[1], 'token')}. "
            f"With {counted(new, 'new token')} it exceeds the model's context of {context:,}",
            "Give a shorter prompt, or a smaller `max_new_tokens`.",
        )
    return ids


def begun(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """`ids` with the BOS token in front, if the tokenizer adds it by default."""
    beginning = token_ids(tokenizer, ["a"], special=True)[0][:1]
    return beginning + ids if beginning == [tokenizer.bos_token_id] and ids[:1] != beginning else ids


def sample(tokens: Tensor, samples: int, length: int, seed: int) -> Tensor:
    """Distinct windows of `tokens`, chosen and ordered by `seed`: int64 [at most `samples`, length].

    There are fewer than `samples` only if the text has fewer windows. With the same seed, a larger `samples` begins
    with the same windows. PlanError if the text is shorter than one window.
    """
    every = windows(tokens, length)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed), dtype=torch.int64, device="cpu")
    return every[order[: _positive("samples", samples)]]


def windows(tokens: Tensor, length: int, limit: int | None = None) -> Tensor:
    """The first `limit` windows of `tokens` in order (None: all): int64 [windows, length].

    PlanError if the text is shorter than one window.
    """
    count = len(tokens) // _positive("length", length)
    if not count:
        raise PlanError(
            f"the text has {counted(len(tokens), 'token')}, too few for one window of {length:,}",
            f"Give a longer text, or a `length` of at most {len(tokens)}.",
        )
    count = count if limit is None else min(count, _positive("limit", limit))
    return tokens[: count * length].reshape(count, length)


def digest(tokens: Tensor) -> str:
    """SHA-256, in hex, of the ids as little-endian int64, so that it is the same on every machine."""
    return hashlib.sha256(tokens.to("cpu", torch.int64).numpy().astype("<i8").tobytes()).hexdigest()


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise PlanError(f"{name} is {value}", f"{name} must be at least 1.")
    return value


def token_ids(tokenizer: Tokenizer, pieces: list[str], *, special: bool = False) -> list[list[int]]:
    """The ids of each piece of text. `special`: with the special tokens that the tokenizer adds by default."""
    # verbose=False: transformers would warn that the stream is longer than the model's context, which is intended.
    encoded = tokenizer(pieces, add_special_tokens=special, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def render(chat: tuple[Message, ...], where: str, tokenizer: Tokenizer, *, answer_next: bool = False) -> str:
    """A chat rendered by the tokenizer's own template. `answer_next`: with the generation prompt at the end.

    PlanError, naming the chat's place `where`, if there is no template or the template raises an error.
    """
    if not tokenizer.chat_template:
        raise PlanError(f"{where}: a chat, but the tokenizer has no chat template", "Give a plain text.")
    try:
        return str(tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=answer_next))
    except Exception as error:  # a template is third-party code and may raise anything
        roles = ", ".join(message["role"] for message in chat)
        raise PlanError(f"{where}: the chat template refuses a chat of the roles {roles}: {error}") from error
