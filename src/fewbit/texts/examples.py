"""What a model learns from: documents as token ids, with a mark on each token that it is to learn.

Of plain text every token is learned, of a completion those after the prompt, of a chat those of the assistant's
answers, with what the template puts at their end. The ids are those of the whole text; where an answer begins in them
is found by tokenizing the text up to there as well, which is what the model is given when it is asked, and seeing how
far the two are the same. So it needs no offsets, which tokenizers disagree about, and no marks in the template.
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
    """Token ids, and for each whether it is to be learned."""

    ids: list[int]
    learned: list[bool]


def examples(text: Text, tokenizer: Tokenizer, length: int) -> tuple[list[Example], list[str]]:
    """The examples that a text gives, of at most `length` tokens, and sentences on what had to be left out.

    Plain text is cut into windows, chats and completions are cut off. PlanError if nothing is left to learn, or if a
    chat meets a tokenizer without a template or a template that cannot tell its answers from the rest.
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
        kept = [e for e in short if any(e.learned[1:])]  # the first token of all is foretold by nothing
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
    """Examples to train on and those held out, drawn by `seed`; at least one of each unless the share is 0."""
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
    """A chat up to its last answer; or, where the template shows earlier turns differently once they are past (some
    leave out what was thought), each answer with what the model is shown when it is to give it."""
    so_far, answers = "", list[tuple[str, str]]()
    for i, message in enumerate(chat):
        if message["role"] != "assistant" or i == 0:  # what nobody asked for is no answer
            continue
        answered = render(chat[: i + 1], where, tokenizer)
        asked = render(chat[:i], where, tokenizer, answer_next=True)
        if not answered.startswith(asked):  # it may open the answer with words that are not kept
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
    """`whole` with what stands between the two beginnings of it in each pair to be learned."""
    ids, *beginnings = token_ids(tokenizer, [whole, *(text for pair in answers for text in pair)])
    learned = [False] * len(ids)
    for before, after in zip(beginnings[::2], beginnings[1::2], strict=True):
        for i in range(_alike(before, ids), _alike(after, ids)):
            learned[i] = True
    return Example(ids, learned)


def _alike(a: list[int], b: list[int]) -> int:
    """How many ids the two begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _ended(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]
