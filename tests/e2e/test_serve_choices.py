"""Several answers, stop sequences, and prompts that are echoed, asked by OpenAI's own client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit.models.skeleton import load_tokenizer
from fewbit.models.source import locate
from tests.served import ask, said, served, with_ends

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

EXACT = True


@pytest.mark.parametrize("stream", [False, True])
def test_n_answers_have_a_seed_each(stream: bool, client: Any) -> None:
    """Answer i is that of a request with the seed plus i."""
    given: dict[str, Any] = {"temperature": 1.0, "logprobs": True}
    alone = [ask(client, new=8, seed=40 + i, **given) for i in range(3)]
    more: dict[str, Any] = {"stream_options": {"include_usage": True}} if stream else {}
    answer = ask(client, new=8, seed=40, n=3, stream=stream, **given, **more)
    texts, ends, tokens = [""] * 3, dict[int, str](), [list[str]() for _ in range(3)]
    if stream:
        with answer:
            chunks = list(answer)
        usage = chunks[-1].usage
        for choice in [choice for chunk in chunks for choice in chunk.choices]:
            assert choice.index not in ends
            texts[choice.index] += choice.delta.content or ""
            tokens[choice.index] += [each.token for each in choice.logprobs.content] if choice.logprobs else []
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
        assert [c.choices[0].index for c in chunks if c.choices and c.choices[0].delta.role] == [0, 1, 2]
    else:
        usage = answer.usage
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        texts = [choice.message.content for choice in answer.choices]
        tokens = [[each.token for each in choice.logprobs.content] for choice in answer.choices]
        ends = {choice.index: choice.finish_reason for choice in answer.choices}
    assert texts == [said(each) for each in alone]
    assert tokens == [[each.token for each in one.choices[0].logprobs.content] for one in alone]
    assert len(set(texts)) == 3
    assert ends == dict.fromkeys(range(3), "length")
    prompt = alone[0].usage.prompt_tokens
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (prompt, 24, prompt + 24)


def test_n_answers_end_at_different_times(client: Any) -> None:
    texts = [said(ask(client, new=30, seed=i, temperature=1.0)) for i in range(4)]
    stop = texts[2][5:10]
    wanted = [text.partition(stop)[0] for text in texts]
    answer = ask(client, new=30, seed=0, temperature=1.0, n=4, stop=stop)
    assert [choice.message.content for choice in answer.choices] == wanted
    assert answer.choices[2].finish_reason == "stop"
    assert "length" in {choice.finish_reason for choice in answer.choices}


def test_a_prompt_is_echoed(client: Any, quantized: Path) -> None:
    ids = load_tokenizer(locate(quantized))("The garden")["input_ids"]
    given: dict[str, Any] = {"model": "tiny-4bit", "temperature": 1.0, "seed": 3, "n": 2}
    for prompt in ("The garden", ids, ["The garden"]):
        plain = client.completions.create(prompt=prompt, **given)
        answer = client.completions.create(prompt=prompt, echo=True, **given)
        wanted = ["The garden" + choice.text for choice in plain.choices]
        assert [choice.text for choice in answer.choices] == wanted
        assert answer.usage == plain.usage
        assert (answer.usage.completion_tokens, answer.usage.prompt_tokens) == (32, len(ids))
        with client.completions.create(prompt=prompt, echo=True, stream=True, **given) as stream:
            chunks = [chunk.choices[0] for chunk in stream]
        assert ["".join(c.text for c in chunks if c.index == i) for i in range(2)] == wanted


def _streamed(client: Any, **more: Any) -> tuple[str, str | None, Any]:
    with ask(client, stream=True, stream_options={"include_usage": True}, **more) as stream:
        chunks = list(stream)
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    return "".join(c.delta.content or "" for c in choices), choices[-1].finish_reason, chunks[-1].usage


def test_a_stop_sequence_at_any_place(client: Any) -> None:
    """At the first token, inside of tokens, at the end, and one that only begins."""
    whole = said(ask(client, new=14))
    stops = [whole[i : i + length] for i in range(0, len(whole), 7) for length in (1, 4)] + [whole[-1:], whole]
    for stop in stops:
        answer = ask(client, new=14, stop=stop, logprobs=True)
        wanted = whole.partition(stop)[0]
        assert (said(answer), answer.choices[0].finish_reason) == (wanted, "stop")
        assert "".join(each.token for each in answer.choices[0].logprobs.content).startswith(wanted)
        assert _streamed(client, new=14, stop=stop) == (wanted, "stop", answer.usage)
    first = ask(client, new=14, stop=whole[0])
    assert (said(first), first.usage.completion_tokens) == ("", 1)
    begun = [whole[i : i + 6] + "\x00" for i in range(0, len(whole), 3)][-16:]
    assert _streamed(client, new=14, stop=begun)[:2] == (whole, "length")
    assert said(ask(client, new=14, stop=begun)) == whole


def test_a_special_token_may_be_a_stop_sequence(client: Any) -> None:
    """It has no text, but ends the answer."""
    given: dict[str, Any] = {"new": 24, "logit_bias": {"2": 100}}  # <|im_end|>, which ends no answer of this model
    assert ask(client, **given).usage.completion_tokens == 24
    for stop in ("<|im_end|>", ["\n\n", "<|im_end|>"]):
        answer = ask(client, **given, stop=stop)
        assert (said(answer), answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("", "stop", 1)
    assert ask(client, **given, stop="<|im_start|>").usage.completion_tokens == 24


def test_bad_stop_sequences_are_named(client: Any) -> None:
    for stop in ("", ["a", ""], ["a"] * 17, "x" * 1001):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, stop=stop)
        assert caught.value.param == "stop"
    assert ask(client, stop=[]).usage.completion_tokens == 8


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_have_n_answers_each(stream: bool, client: Any, quantized: Path) -> None:
    """Answer i to prompt p has the index p * n + i, as with OpenAI and vLLM, and is that of a request of its own."""
    prompts = ["The garden", "One two three", "Why is"]
    tokenizer = load_tokenizer(locate(quantized))
    given: dict[str, Any] = {"model": "tiny-4bit", "temperature": 1.0, "seed": 3, "n": 2, "echo": True}
    alone = [client.completions.create(prompt=prompt, **given) for prompt in prompts]
    wanted = [choice.text for one in alone for choice in one.choices]
    for asked in (prompts, tokenizer(prompts)["input_ids"]):
        if stream:
            options = {"include_usage": True}
            with client.completions.create(prompt=asked, stream=True, stream_options=options, **given) as stream_:
                chunks = list(stream_)
            choices = [choice for chunk in chunks for choice in chunk.choices]
            assert ["".join(c.text for c in choices if c.index == i) for i in range(6)] == wanted
            assert sorted(c.index for c in choices if c.finish_reason) == list(range(6))
            usage = chunks[-1].usage
        else:
            answer = client.completions.create(prompt=asked, **given)
            assert [(choice.index, choice.text) for choice in answer.choices] == list(enumerate(wanted))
            usage = answer.usage
        assert usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone)
        assert usage.completion_tokens == 6 * 16


def scores(model: Path, ids: list[int]) -> list[float]:
    """The log probability of each token after the first, by one pass over the model."""
    loaded = fewbit.load(model, device="cpu", dtype="float32")
    with torch.inference_mode():
        logprobs = loaded(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return [float(logprobs[i, token]) for i, token in enumerate(ids[1:])]


LONG = "Once upon a time there was a garden. " * 30  # more than a page, and some of it is in the cache by then


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("new", [0, 1, 3])
def test_log_probabilities_of_a_prompt(new: int, stream: bool, client: Any, quantized: Path) -> None:
    tokenizer = load_tokenizer(locate(quantized))
    prompts = [LONG, "The garden was very", LONG, "The"]
    given: dict[str, Any] = {"model": "tiny-4bit", "temperature": 0, "echo": True, "logprobs": 2, "max_tokens": new}
    made = client.completions.create(prompt=prompts, stream=stream, **given)
    if stream:
        with made:
            choices = [choice for chunk in made for choice in chunk.choices]
    else:
        choices = made.choices
        assert made.usage.completion_tokens == 4 * new
    for i, prompt in enumerate(prompts):
        pieces = [choice for choice in choices if choice.index == i]
        text = "".join(piece.text for piece in pieces)
        found = {
            name: [each for piece in pieces for each in getattr(piece.logprobs, name)]
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
        ids = tokenizer(prompt)["input_ids"]
        assert text.startswith(prompt)
        assert {len(each) for each in found.values()} == {len(ids) + new}
        assert pieces[-1].finish_reason == "length"
        assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
        assert found["token_logprobs"][1 : len(ids)] == pytest.approx(scores(quantized, ids), abs=1e-3)
        assert "".join(found["tokens"]) == text
        for token, value, top, at in list(zip(*found.values(), strict=True))[1:]:
            assert text[at:].startswith(token)
            assert len(top) == 2
            assert max(top.values()) >= value


def test_who_asks_for_no_tokens_must_want_the_prompt(client: Any) -> None:
    for given in ({}, {"echo": True}, {"logprobs": 1}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="tiny-4bit", prompt="x", max_tokens=0, **given)
        assert caught.value.param == "max_tokens"


def test_the_end_is_a_token_of_a_scored_prompt(quantized: Path, tmp_path: Path) -> None:
    """lm-evaluation-harness leaves out the last token, which it takes for the new one."""
    with served(with_ends(quantized, tmp_path / "ends", list(range(4000)))) as server, server.client() as client:
        given: dict[str, Any] = {"model": "ends", "prompt": "The garden", "max_tokens": 1, "logprobs": 1}
        answer = client.completions.create(echo=True, **given).choices[0]
        assert (answer.text, answer.finish_reason) == ("The garden", "stop")
        assert len(answer.logprobs.tokens) == 1 + len(load_tokenizer(locate(quantized))("The garden")["input_ids"])
        assert client.completions.create(**given).choices[0].logprobs.tokens == []
