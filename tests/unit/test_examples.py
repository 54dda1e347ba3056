"""Exactly what is to be learned is marked, with any template, and the ids are those that the model is asked with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fewbit.errors import FormatError, PlanError
from fewbit.texts.examples import Example, examples, split
from fewbit.texts.sources import Completion, Message, Text, load_text
from fewbit.texts.windows import encode
from tests import models

CHATML = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
# Leaves out what was thought, but in the last turn; some published templates do.
FORGETFUL = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}(thinking)\n{% endif %}"
    "{{ m['content'] }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
# Opens the answer with words that it does not keep once it is there.
OPENING = CHATML.replace("<s>assistant\n{% endif %}", "<s>assistant\n<think>{% endif %}")
CHANGING = "{{ messages | length }} messages{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"


def chat(*contents: str, first: str = "user") -> tuple[Message, ...]:
    second = {"user": "assistant", "assistant": "user"}[first]
    return tuple({"role": (first, second)[i % 2], "content": c} for i, c in enumerate(contents))


def made(*documents: Any, template: str | None = CHATML, length: int = 128) -> tuple[Any, list[Example]]:
    tokenizer = models.tokenizer(template)
    return tokenizer, examples(Text("data", documents), tokenizer, length)[0]


def learned(tokenizer: Any, example: Example) -> list[str]:
    """The runs of learned tokens as text."""
    runs: list[list[int]] = []
    for i, (token, wanted) in enumerate(zip(example.ids, example.learned, strict=True)):
        if wanted and (i == 0 or not example.learned[i - 1]):
            runs.append([])
        if wanted:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


def test_of_a_chat_exactly_the_answers_are_learned() -> None:
    for template in (CHATML, OPENING, models.CHAT):
        end = "\n" if template == models.CHAT else "</s>\n"
        opened = "<s>assistant\n" if template == OPENING else ""  # cannot be told from the answer
        tokenizer, (example,) = made(
            chat("What is a grid?", "The set of values.", "And", " a  code\n"), template=template
        )
        assert learned(tokenizer, example) == [f"{opened}The set of values.{end}", f"{opened} a  code\n{end}"]


def test_the_question_is_tokenized_as_when_it_is_asked() -> None:
    tokenizer, (example,) = made(chat("What is a weight?", "The small error of a block."))
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is a weight?"}], tokenize=True, add_generation_prompt=True
    )["input_ids"]
    assert example.ids[: len(asked)] == asked
    assert example.learned == [False] * len(asked) + [True] * (len(example.ids) - len(asked))
    everything = tokenizer.apply_chat_template(list(chat("What is a weight?", "The small error of a block.")))
    assert example.ids == everything["input_ids"]


def test_what_is_outside_the_answers_is_not_learned() -> None:
    tokenizer, (example,) = made(chat("Hello.", "A question?", "An answer.", "Bye.", first="assistant"))
    assert learned(tokenizer, example) == ["An answer.</s>\n"]
    assert "Bye" not in tokenizer.decode(example.ids)


def test_a_template_that_forgets_gives_one_example_an_answer() -> None:
    tokenizer, found = made(chat("one", "two", "three", "four"), template=FORGETFUL)
    assert [learned(tokenizer, example) for example in found] == [["(thinking)\ntwo</s>\n"], ["(thinking)\nfour</s>\n"]]
    assert tokenizer.decode(found[1].ids) == (
        "<s>user\none</s>\n<s>assistant\ntwo</s>\n<s>user\nthree</s>\n<s>assistant\n(thinking)\nfour</s>\n"
    )


def test_a_template_that_rewrites_the_question_is_refused() -> None:
    with pytest.raises(PlanError, match="data, document 2: the chat template"):
        made("plain", chat("one", "two"), template=CHANGING)
    with pytest.raises(PlanError, match="no chat template"):
        made(chat("one", "two"), template=None)


def test_of_a_completion_what_follows_the_prompt_is_learned() -> None:
    tokenizer, found = made(Completion("The small grid", " of a block."), Completion("The small gr", "id of a block."))
    assert learned(tokenizer, found[0]) == [" of a block.</s>"]
    assert tokenizer.decode(found[0].ids) == tokenizer.decode(found[1].ids)
    assert "id of a block.</s>" in learned(tokenizer, found[1])[0]  # with the token that it begins in the midst of


def test_plain_text_is_cut_into_windows_and_all_of_it_is_learned() -> None:
    text = models.sentences(20)
    tokenizer, found = made(text, length=16)
    ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    assert [token for example in found for token in example.ids] == ids
    assert {len(example.ids) for example in found[:-1]} == {16}
    assert all(all(example.learned) for example in found)


def test_long_examples_are_cut_and_empty_ones_dropped_with_notes() -> None:
    tokenizer = models.tokenizer(CHATML)
    documents = (chat("a", models.sentences(20)), chat("a"), chat(models.sentences(20), "b"), "", Completion("a", "b"))
    found, notes = examples(Text("data", documents), tokenizer, 32)
    assert [len(example.ids) for example in found] == [32, 3]
    assert notes == [
        "2 of 2 examples are cut to a length of 32 tokens",
        "3 of 5 documents hold nothing to learn: left out",
    ]
    with pytest.raises(PlanError, match="nothing to learn"):
        examples(Text("data", (chat("a"),)), tokenizer, 32)


def test_what_is_held_out_is_not_trained_on() -> None:
    every = [Example([i], [True]) for i in range(40)]
    training, held_out = split(every, 0.1, 0)
    assert len(held_out) == 4
    assert sorted(e.ids[0] for e in training + held_out) == list(range(40))
    assert split(every, 0.1, 0) == (training, held_out) != split(every, 0.1, 1)
    assert split(every, 0, 0) == (every, [])
    assert [len(part) for part in split(every[:2], 0.01, 0)] == [1, 1]
    with pytest.raises(PlanError, match="held_out=0"):
        split(every[:1], 0.1, 0)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (models.CHAT, "<user>double the row\n\n4\n<assistant>8\n"),
        (None, "### Instruction:\ndouble the row\n\n4\n\n### Response:\n8"),
    ],
)
def test_instructions_are_chats_or_alpaca(template: str | None, expected: str, tmp_path: Path) -> None:
    file, tokenizer = tmp_path / "data.jsonl", models.tokenizer(template)
    file.write_text('{"instruction": "double the row", "input": "4", "output": "8"}\n', encoding="utf-8")
    text = load_text(file)
    (example,), _ = examples(text, tokenizer, 512)
    shown = str(tokenizer.decode(encode(text, tokenizer), skip_special_tokens=True))
    assert shown.strip() == expected.strip()
    learned = str(tokenizer.decode([i for i, learn in zip(example.ids, example.learned, strict=True) if learn]))
    assert learned.removesuffix(str(tokenizer.eos_token)).strip() == "8"
    file.write_text('{"instruction": "double", "output": 8}\n', encoding="utf-8")
    with pytest.raises(FormatError, match=r"line 1: 'instruction', 'input' and 'output' are not all strings"):
        load_text(file)
