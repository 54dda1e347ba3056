"""Training examples: documents as token ids, with a mask of the tokens that count in the loss.

In plain text all tokens count. In a completion the tokens after the prompt count. In a chat the assistant's answers
count, including what the template adds at their end. The ids are those of the whole text. To find where an answer
begins, the text before it (the model's prompt for that answer) is tokenized too: the answer begins where the two lists
of ids first differ. This needs neither character offsets, which tokenizers define differently, nor template marks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fewbit.errors import PlanError
from fewbit.texts.sources import Completion, Instruction, Message, Text, Tokenizer
from fewbit.texts.windows import begun, render, token_ids


@dataclass(frozen=True)
class Example:
    """Token ids, and for each whether it counts in the loss (`learned`)."""

    ids: list[int]
    learned: list[bool]


def examples(text: Text, tokenizer: Tokenizer, length: int) -> tuple[list[Example], list[str]]:
    """The training examples of a text, each of at most `length` tokens, and notes on what was left out.

    Plain text is split into windows of `length` tokens. Chats and completions are truncated. PlanError if no example
    has a token to train on, if the tokenizer has no chat template for a chat, or if the rendered question changes once
    it is answered, so that the answer cannot be located.
    """
    found, cut, empty = [], 0, 0
    for number, document in enumerate(text.documents):
        if isinstance(document, Instruction):
            document = document.shown(tokenizer)
        if isinstance(document, str):
            ids = _ended(begun(token_ids(tokenizer, [document])[0], tokenizer), tokenizer) if document.strip() else []
            pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
            whole = [Example(piece, [True] * len(piece)) for piece in pieces]
        elif isinstance(document, Completion):
            whole = [_completion(document, tokenizer)]
        else:
            whole = list(_answers(document, text.place(number), tokenizer))
        short = [Example(e.ids[:length], e.learned[:length]) for e in whole]
        cut += sum(len(e.ids) > length for e in whole)
        kept = [e for e in short if any(e.learned[1:])]  # no logits predict the first token
        empty += not kept
        found += kept
    if not found:
        raise PlanError(
            f"{text.name}: nothing to learn in {len(text.documents)} documents",
            "In chats, only the assistant's answers are trained on. "
            f"Each example is cut to its first {length} tokens (`length`).",
        )
    notes = [f"{cut} of {len(found)} examples are cut to a length of {length} tokens"] if cut else []
    if empty:
        notes.append(f"{empty} of {len(text.documents)} documents hold nothing to learn: left out")
    return found, notes


def split(every: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(training examples, held-out examples), drawn with `seed`. Each has at least one, unless `share` is 0."""
    if share and len(every) < 2:
        raise PlanError("one example cannot be both trained on and held out", "Give more data, or `held_out=0`.")
    order = torch.randperm(
        len(every), generator=torch.Generator().manual_seed(seed), dtype=torch.int64, device="cpu"
    ).tolist()
    count = min(max(1, round(share * len(every))), len(every) - 1) if share else 0
    return [every[i] for i in sorted(order[count:])], [every[i] for i in sorted(order[:count])]


def _completion(document: Completion, tokenizer: Tokenizer) -> Example:
    whole = document.prompt + document.completion
    marked = _marked(whole, [(document.prompt, whole)], tokenizer)
    ids = begun(marked.ids, tokenizer)
    learned = [False] * (len(ids) - len(marked.ids)) + marked.learned
    ended = _ended(ids, tokenizer)
    return Example(ended, learned + [True] * (len(ended) - len(ids)))


def _answers(chat: tuple[Message, ...], where: str, tokenizer: Tokenizer) -> Iterator[Example]:
    """The examples of a chat: normally one, up to the last answer.

    Some templates render earlier turns differently later on (they drop the reasoning, for example). Then a new example
    begins wherever the rendered history changes, so that each answer follows the prompt that the model really sees.
    """
    so_far, answers = "", list[tuple[str, str]]()
    for i, message in enumerate(chat):
        if message["role"] != "assistant" or i == 0:  # a first message has no question before it
            continue
        answered = render(chat[: i + 1], where, tokenizer)
        asked = render(chat[:i], where, tokenizer, answer_next=True)
        if not answered.startswith(asked):  # the generation prompt may add words that the finished chat lacks
            asked = render(chat[:i], where, tokenizer)
        if not answered.startswith(asked):
            raise PlanError(
                f"{where}: the chat template shows the question differently once it is answered",
                'Give {"prompt": ..., "completion": ...} lines instead.',
            )
        if not asked.startswith(so_far):
            yield _marked(so_far, answers, tokenizer)
            answers = []
        so_far = answered
        answers.append((asked, answered))
    if answers:
        yield _marked(so_far, answers, tokenizer)


def _marked(whole: str, answers: list[tuple[str, str]], tokenizer: Tokenizer) -> Example:
    """`whole` as an example. `answers`: pairs of prefixes of `whole`, (before the answer, after it); what lies
    between the two counts in the loss."""
    ids, *beginnings = token_ids(tokenizer, [whole, *(text for pair in answers for text in pair)])
    learned = [False] * len(ids)
    for before, after in zip(beginnings[::2], beginnings[1::2], strict=True):
        for i in range(_alike(before, ids), _alike(after, ids)):
            learned[i] = True
    return Example(ids, learned)


def _alike(a: list[int], b: list[int]) -> int:
    """Length of the common prefix of two lists of ids."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _ended(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]
