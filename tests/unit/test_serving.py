"""What the server does with tokens and numbers, against their definitions."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fewbit.errors import ArgumentError, PlanError
from fewbit.models.decoding.choosing import Choosing, adjusted, drawn
from fewbit.models.decoding.continuous import News, _Request, _Router
from fewbit.models.skeleton import load_tokenizer
from fewbit.models.source import locate
from fewbit.serving.metrics import Histogram
from fewbit.serving.settings import Serving
from fewbit.serving.text import Written

TEXTS = ["Hello there, world.", "naïve – “quoted” 🙂🙂 日本語 text", " a\n\n  b", "🙂", "e\u0301\u0302"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(locate("tiny"))


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_the_text(text: str, tokenizer: Any) -> None:
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    written = Written(tokenizer)
    pieces = [written.add(token) for token in tokens]
    assert "".join(pieces) + written.finish() == tokenizer.decode(tokens, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(text) == 1 or sum(map(bool, pieces)) > 1
    assert len(written.starts) == len(tokens)


def test_characters_that_stay_incomplete_come_last(tokenizer: Any) -> None:
    tokens = tokenizer("a🙂", add_special_tokens=False)["input_ids"][:-1]
    assert len(tokens) > 1
    written = Written(tokenizer)
    assert "".join(written.add(token) for token in tokens) == "a"
    assert written.finish() == "\ufffd"


def test_special_tokens_that_belong_to_a_call_are_text(tokenizer: Any) -> None:
    text = "a<|im_start|>b<|im_end|>c"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    for skipped, wanted in ((None, "abc"), ({1, 2}, "abc"), ({0, 2}, "a<|im_start|>bc")):
        written = Written(tokenizer, (), skipped)
        assert "".join(written.add(token) for token in tokens) + written.finish() == wanted


@pytest.mark.parametrize("text", TEXTS)
def test_stop_sequences_are_found_where_str_find_does(text: str, tokenizer: Any) -> None:
    """Every sequence of up to six characters of the text, and one that is not there."""
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer.decode(tokens)
    for begin in range(len(whole)):
        for end in range(begin + 1, min(begin + 6, len(whole)) + 1):
            stops = ["not there", whole[begin:end]]
            written, told = Written(tokenizer, stops), ""
            for token in tokens:
                told += written.add(token)
                assert (whole + "!").startswith(told)
                if written.stopped:
                    break
            told += written.finish()
            assert (told, written.stopped) == (whole[: whole.find(stops[1])], True)
            assert written.length == len(told)


def test_what_only_begins_a_stop_sequence_comes_last(tokenizer: Any) -> None:
    tokens = tokenizer("one two", add_special_tokens=False)["input_ids"]
    written = Written(tokenizer, ["two three"])
    assert "".join(written.add(token) for token in tokens) == "one "
    assert (written.finish(), written.stopped) == ("two", False)


@pytest.mark.parametrize(
    "choosing",
    [Choosing(1.0), Choosing(0.5), Choosing(2.0, top_k=3), Choosing(1.0, top_p=0.7), Choosing(1.5, top_p=0.9, top_k=4)],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_transformers_would(choosing: Choosing) -> None:
    """Each token has an interval of uniform numbers whose length is its probability, here counted on a fine grid."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.tensor([0.3, 2.0, -1.0, 1.2, 0.0, 1.1, -3.0], dtype=torch.float32, device="cpu")
    wanted = TemperatureLogitsWarper(choosing.temperature)(None, logits[None])
    if choosing.top_k:
        wanted = TopKLogitsWarper(choosing.top_k)(None, wanted)
    if choosing.top_p < 1:
        wanted = TopPLogitsWarper(choosing.top_p)(None, wanted)
    count = 2000
    chosen = drawn(logits.expand(count, -1), choosing, [(i + 0.5) / count for i in range(count)])
    found = torch.bincount(chosen, minlength=len(logits)) / count
    assert torch.allclose(found, wanted[0].softmax(0), atol=2 / count)


def test_penalties_and_bias_are_those_of_openai() -> None:
    logits = torch.tensor([0.5, -1.0, 2.0, 3.0, 0.0], dtype=torch.float32, device="cpu")
    choosing = Choosing(presence_penalty=0.25, frequency_penalty=-0.5, logit_bias=((2, 100.0), (4, -7.5)))
    wanted = [0.5, -1.0 + 0.5 - 0.25, 2.0 + 100 + 3 * 0.5 - 0.25, 3.0, -7.5]
    assert adjusted(logits, {1: 1, 2: 3}, choosing).tolist() == wanted
    assert adjusted(logits, {1: 1, 2: 3}, Choosing()) is logits
    with pytest.raises(PlanError, match="from 0 to 4"):
        adjusted(logits, {}, Choosing(logit_bias=((5, 1.0),)))


def test_the_ends_of_the_interval_are_tokens() -> None:
    logits = torch.full((5,), 0.0, dtype=torch.float32, device="cpu")
    both = logits.expand(2, -1)
    assert drawn(both, Choosing(1.0), [0.0, 1 - 2**-53]).tolist() == [0, 4]
    assert int(drawn(both[:1], Choosing(1.0, top_p=0.3), [1 - 2**-53])) in range(5)


@pytest.mark.parametrize("choosing", [Choosing(0.7), Choosing(1.0, top_p=0.8), Choosing(1.3, top_k=7)])
def test_a_row_does_not_depend_on_the_others(choosing: Choosing) -> None:
    """Rows have many equal values, as those of bfloat16."""
    rows = (torch.randn(6, 300, generator=torch.Generator().manual_seed(0)) * 3).bfloat16().float()
    uniform = [0.0, 0.1, 0.3, 0.6, 0.9, 0.999999]
    alone = [drawn(rows[i : i + 1], choosing, uniform[i : i + 1]) for i in range(6)]
    assert torch.equal(drawn(rows, choosing, uniform), torch.cat(alone))


def test_a_histogram_counts_up_to_each_limit() -> None:
    histogram, values = Histogram(), [random.Random(0).expovariate(1) for _ in range(9)] + [0.1, 1e9]
    for value in values:
        histogram.add(value)
    lines = dict(line.rsplit(" ", 1) for line in histogram.lines("x"))
    for name, count in lines.items():
        if name.startswith("x_bucket"):
            limit = float(name.split('"')[1])
            assert int(count) == sum(value <= limit for value in values)
    assert int(lines["x_count"]) == len(values)
    assert float(lines["x_sum"]) == pytest.approx(sum(values))


@pytest.mark.parametrize(
    ("field", "value"),
    [("port", 65536), ("host", ""), ("api_key", ""), ("api_key", "a\nb"), ("max_num_seqs", 0), ("max_body", "much")],
)
def test_settings_are_checked_and_a_key_is_not_shown(field: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=field) as caught:
        Serving(**{field: value})
    assert field != "api_key" or repr(value)[1:-1] not in str(caught.value).partition("expected")[0] or not value
    assert Serving(max_body="2kB").max_body == 2000  # type: ignore[comparison-overlap]


class _Complete:
    """A grammar that allows no more tokens."""

    complete = True

    def allowed(self) -> bytes:
        raise AssertionError("the answer is complete")

    def accept(self, token: int) -> None:
        raise AssertionError("the answer is complete")


def test_tokens_after_the_end_of_a_grammar_are_not_told() -> None:
    """A step may choose one more before the request is cancelled, and a slow reader sees only the last news."""
    told: list[News] = []
    request = _Request(Choosing(), told.append, _Complete(), random.Random(0))
    router = _Router({"request": request})
    for tokens in ([5, 6], [5, 6, 7]):
        router.deliver(
            SimpleNamespace(request_id="request", is_finished=lambda: False, generated_tokens=tokens, error=None)
        )
    assert [each.tokens for each in told] == [(5, 6), (5, 6)]
    assert all(each.complete for each in told)


def test_bytes_that_are_no_text_do_not_hold_it_up(tokenizer: Any) -> None:
    """An incomplete character has up to three bytes. More of them are none, however many come."""
    broken = tokenizer("🙂", add_special_tokens=False)["input_ids"][0]
    written, tail = Written(tokenizer, ["!"]), tokenizer("a!b", add_special_tokens=False)["input_ids"]
    pieces = [written.add(token) for token in [broken] * 40]
    assert sum(map(bool, pieces)) >= 8
    for token in tail:
        pieces.append(written.add(token))
        if written.stopped:
            break
    assert ("".join(pieces), written.stopped) == ("\ufffd" * 40 + "a", True)


@pytest.mark.parametrize("stop", ["x" * 900 + "y", "xy" * 400 + "z", "\n\n\n", "yx"])
def test_the_begin_of_a_stop_sequence_is_its_longest(stop: str) -> None:
    from fewbit.serving.text import begun

    for text in ("", "x" * 50, "xyxyxyx", "a\n\n", "xyxyy", "zy"):
        lengths = [n for n in range(1, len(stop)) if text.endswith(stop[:n])]
        assert begun(text, stop) == max(lengths, default=0)
