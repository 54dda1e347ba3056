"""A conversation keeps keys and values between turns, answers as without them, and is driven from a terminal."""

from __future__ import annotations

import functools
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit as package
from fewbit.errors import KernelError, PlanError
from fewbit.models.decoding.chat import Conversation
from fewbit.models.decoding.decode import Resume
from fewbit.models.decoding.sampling import Sampling
from fewbit.models.load import load_model
from fewbit.models.loading import Loading
from fewbit.models.skeleton import load_tokenizer
from fewbit.models.source import locate
from tests import models
from tests.e2e.conftest import Fewbit

GREEDY = Sampling()


def opened(model: Any, **loading: Any) -> tuple[Conversation, list[int]]:
    """A conversation, and a list that gets the number of tokens of each forward pass."""
    source, fed = locate(model), list[int]()
    loaded = load_model(source, Loading("cpu", "float32", **loading))
    tokenizer = load_tokenizer(source)
    forward = loaded.forward

    @functools.wraps(forward)
    def counted(*args: Any, **kwargs: Any) -> Any:
        fed.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    loaded.forward = counted
    return Conversation(loaded, tokenizer, source.stated_context), fed


def said(conversation: Conversation, message: str, new: int = 8, **more: Any) -> str:
    pieces: list[str] = []
    told = conversation.answer(message, max_new_tokens=new, sampling=GREEDY, tell=pieces.append, **more)
    assert "".join(pieces).strip() == told.text.strip()
    return told.text


def anew(conversation: Conversation, message: str, new: int = 8) -> str:
    """The answer of a conversation with the same turns that reads all of them."""
    fresh = Conversation(conversation.model, conversation.tokenizer, conversation.limit)
    fresh.messages = list(conversation.messages)
    return said(fresh, message, new)


@pytest.mark.parametrize("plan", ["rtn-4bit", "q8_0"])
def test_a_second_turn_reads_only_what_is_new(plan: str, quantized: Path, tmp_path: Path) -> None:
    model = quantized
    if plan != "rtn-4bit":
        model = tmp_path / "out.gguf"
        package.quantize("tiny", model, plan=plan, calibration=package.Calibration("tiny", samples=2, length=32))
    conversation, fed = opened(model)
    said(conversation, "Hello there")
    held = len(conversation.read)
    assert fed == [held - 7, *[1] * 7]
    wanted = anew(conversation, "And then?")
    fed.clear()
    assert said(conversation, "And then?") == wanted
    total, new = conversation.prompt
    assert total > held
    assert new == total - held
    assert fed == [new, *[1] * 7]


@pytest.mark.parametrize("static", [False, True], ids=["growing", "as-on-a-gpu"])
@pytest.mark.parametrize("plan", ["rtn-4bit", "nf4"])
def test_a_fused_model_answers_the_same_and_keeps_its_cache(
    plan: str, static: bool, quantized: Path, tmp_path: Path
) -> None:
    model = quantized
    if plan != "rtn-4bit":
        model = tmp_path / "out"
        package.quantize("tiny", model, plan=plan)
    plain, _ = opened(model)
    fused, fed = opened(model, fuse=64)
    decoder = fused.model.generate.__self__
    decoder.static = static
    lengths = [0]
    for message in ("Hello there", "And then?", "Tell me more about it.", "Good."):
        fed.clear()
        assert said(fused, message, 16) == said(plain, message, 16)
        lengths.append(decoder.room)
        total, new = fused.prompt
        assert fed[0] == new
        assert new == (plain.prompt[1] if lengths[-1] == lengths[-2] else total)
        assert (decoder.loop is not None and decoder.loop.step is not None) == static
    assert lengths == [0, 64, 64, 128, 256]
    with pytest.raises(PlanError, match="the model was fused for 64"):
        fused.model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=62)
    fused.reset("Be short.")
    plain.reset("Be short.")
    assert said(fused, "Hello there") == said(plain, "Hello there")


def third(asked: Iterator[int]) -> bool:
    return next(asked) == 2


@pytest.mark.parametrize("static", [False, True], ids=["growing", "as-on-a-gpu"])
def test_a_fused_model_ends_an_answer_when_told_to(static: bool, quantized: Path) -> None:
    plain, _ = opened(quantized)
    fused, _ = opened(quantized, fuse=256)
    fused.model.generate.__self__.static = static
    texts = []
    for conversation in (plain, fused):
        asked = iter(range(100))
        said(conversation, "Hello there", 50, stopped=functools.partial(third, asked))
        assert next(asked) == 3
        texts.append((conversation.messages, said(conversation, "And then?")))
    assert texts[0] == texts[1]


def test_a_fused_model_may_be_used_between_turns(quantized: Path) -> None:
    plain, _ = opened(quantized)
    fused, _ = opened(quantized, fuse=256)
    other = Conversation(fused.model, fused.tokenizer, fused.limit)
    for message in ("Hello there", "And then?", "Good."):
        assert said(fused, message) == said(plain, message)
        ids = torch.tensor([fused.read])
        hidden = torch.ones_like(ids)
        hidden[:, :8] = 0  # the same tokens, with other keys and values
        with torch.inference_mode():
            got = [fused.model.generate(ids, max_new_tokens=3).tolist() for _ in range(2)]
            fused.model.generate(torch.tensor([[5, 6, 7], [8, 9, 10]]), max_new_tokens=3)
            fused.model.generate(ids, attention_mask=hidden, max_new_tokens=3)
        assert got == 2 * [plain.model.generate(ids, max_new_tokens=3).tolist()]
        other.messages = list(fused.messages)
        said(other, "Good.")
        assert other.prompt[0] == other.prompt[1]


@pytest.mark.parametrize("static", [False, True], ids=["growing", "as-on-a-gpu"])
def test_a_prompt_with_one_new_token_is_read(static: bool, quantized: Path) -> None:
    """A step of one token is recorded, but this one reads the prompt."""
    plain, fused = (load_model(locate(quantized), Loading("cpu", "float32", fuse=fuse)) for fuse in (None, 64))
    reader = Resume(64)
    decoder = fused.generate.__self__
    decoder.static = static
    with torch.inference_mode():
        text = fused.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, eos_token_id=None, resume=reader)
        longer = torch.cat([text, torch.tensor([[9]])], dim=1)
        got = fused.generate(longer[:, [0, 1, 2, 3, 4, 5, 7]], max_new_tokens=4, eos_token_id=None, resume=reader)
        assert reader.kept == 6
        assert decoder.graph is None
        assert got.tolist() == plain.generate(got[:, :7], max_new_tokens=4, eos_token_id=None).tolist()


def test_a_cache_that_does_not_fit_leaves_the_conversation(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = opened(quantized)
    fused, _ = opened(quantized, fuse=64)
    assert said(fused, "Hello there") == said(plain, "Hello there")
    before = list(fused.messages)

    def full(self: Any, *args: Any, **kwargs: Any) -> None:
        torch.empty(1 << 60, dtype=torch.uint8, device="cpu")

    with monkeypatch.context() as patched:
        patched.setattr("fewbit.models.decoding.caches.ReservedLayer._allocate", full)
        with pytest.raises(KernelError, match=r"memory of cpu is too small for a text of \d+ \+ 60 tokens"):
            said(fused, "Tell me more about it.", 60)
    assert fused.messages == before
    assert fused.model.generate.__self__.room == 64
    assert said(fused, "And then?") == said(plain, "And then?")


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_a_long_conversation_answers_as_without_a_cache(family: str, tmp_path: Path) -> None:
    """Random models write invalid UTF-8, so that a turn reads back other tokens; windows of 16 tokens have passed."""
    changes = {"dtype": "float32"} if family == "llama" else {}
    conversation, _ = opened(models.save(tmp_path / "model", family, chat=models.CHAT, **changes))
    for message in ("the a", "scale in row", "bits"):
        wanted = anew(conversation, message)
        assert said(conversation, message) == wanted
    conversation.reset("small")
    assert said(conversation, "the a") == anew_after_reset(conversation)


def anew_after_reset(conversation: Conversation) -> str:
    fresh = Conversation(conversation.model, conversation.tokenizer, conversation.limit)
    fresh.reset("small")
    return said(fresh, "the a")


def test_an_adapter_takes_part(quantized: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    data = tmp_path / "data.txt"
    data.write_text("Yes yes yes yes yes yes yes yes. " * 200, encoding="utf-8")
    package.finetune(quantized, data=data, out=tmp_path / "adapter", tuning=package.Tuning(steps=2, length=32, rank=2))
    conversation, _ = opened(quantized, adapter=tmp_path / "adapter")
    said(conversation, "Hello there")
    wanted = anew(conversation, "And then?")
    assert said(conversation, "And then?") == wanted
    total, new = conversation.prompt
    assert new < total


def test_an_ended_answer_stays_and_an_error_changes_nothing(quantized: Path) -> None:
    conversation, _ = opened(quantized)
    asked: list[bool] = []

    def stopped() -> bool:
        asked.append(True)
        return len(asked) == 3

    text = said(conversation, "Hello there", 50, stopped=stopped)
    assert conversation.messages[-1] == {"role": "assistant", "content": text}
    assert len(asked) == 3
    before = list(conversation.messages)

    def broken(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.answer("More", max_new_tokens=8, sampling=GREEDY, tell=broken)
    assert conversation.messages == before
    assert said(conversation, "And then?") == anew_of(conversation, before)


def anew_of(conversation: Conversation, messages: list[dict[str, str]]) -> str:
    fresh = Conversation(conversation.model, conversation.tokenizer, conversation.limit)
    fresh.messages = list(messages)
    return said(fresh, "And then?")


def test_a_full_context_is_an_error_and_the_last_answer_fits(tmp_path: Path) -> None:
    conversation, _ = opened(models.save(tmp_path / "model", "llama", chat=models.CHAT, dtype="float32"))
    said(conversation, "the a", 10_000)
    assert len(conversation.read) == models.CONTEXT - 1
    with pytest.raises(PlanError, match="and there is room for 128"):
        said(conversation, "the a")


def given(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))


def test_a_prompt_on_a_pipe_is_answered_once(quantized: Path, fewbit: Fewbit, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = fewbit("generate", quantized, "Hello there", "--chat", "--max-new-tokens", 8, "--json").json["text"]
    given(monkeypatch, b"Hello there\n")
    done = fewbit("chat", quantized, "--max-new-tokens", 8, "--verbose")
    assert (done.code, done.out) == (0, f"{wanted}\n")
    assert ("path: " in done.err) is not torch.cuda.is_available()  # it says how a CPU computes
    assert re.search(r"\[8 tokens, [0-9.]+ tokens/s; (\d+) of \1 prompt tokens read in ", done.err)
    given(monkeypatch, b"Hello there")
    other = fewbit("chat", quantized, "--max-new-tokens", 8, "--system", "Say only: no.", "--max-length", 99)
    assert other.code == 0
    assert other.out != done.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--max-length", "0"), "--max-length 0"),
        (("--max-new-tokens", "0"), "--max-new-tokens 0"),
        (("--top-p", "0.5"), "--top-p 0.5"),
        (("--kernel", "nope"), "unknown kernel"),
    ],
)
def test_bad_flags_are_refused(arguments: tuple[str, ...], words: str, quantized: Path, fewbit: Fewbit) -> None:
    done = fewbit("chat", quantized, *arguments)
    assert done.code == 2
    assert words in done.err


def test_a_model_without_a_template_is_refused(tmp_path: Path, fewbit: Fewbit, monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, b"Hello")
    done = fewbit("chat", models.save(tmp_path / "model", "llama"))
    assert done.code == 2
    assert "has no chat template" in done.err
    assert "fewbit generate" in done.err
    given(monkeypatch, b"")
    done = fewbit("chat", "tiny")
    assert "no message: stdin is empty" in done.err
    assert "Start chat in a terminal" in done.err
    given(monkeypatch, b"")
    done = fewbit("chat", "missing.gguf")
    assert (done.code, "missing.gguf: no such file" in done.err) == (2, True)
    given(monkeypatch, b"a word " * 600)
    done = fewbit("chat", "tiny")
    assert (done.code, "With an answer it exceeds the context of 512" in done.err) == (2, True)


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
@pytest.mark.filterwarnings("ignore:.*forkpty")
def test_a_session_in_a_terminal(quantized: Path, tmp_path: Path) -> None:
    pexpect = pytest.importorskip("pexpect")
    terminal = pexpect.spawn(
        sys.executable,
        ["-m", "fewbit", "chat", str(quantized), "--verbose"],
        encoding="utf-8",
        timeout=60,
        cwd=tmp_path,
        env={**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"},
    )
    ready = r"> ?\x08?\x1b\[2C"
    terminal.expect(ready)
    terminal.send("two \\\rlines\r")
    terminal.expect(r"\n[A-Z][a-z]+ ")  # the first word of the answer
    terminal.send("\x03")
    terminal.expect(r"\[(\d+) tokens.*; (\d+) of (\d+) prompt tokens read")
    count, fed, total = map(int, terminal.match.groups())
    assert count < 512 - total
    assert fed == total
    terminal.expect(ready)
    terminal.send("/save chat.json\r")
    terminal.expect("Saved 2 messages")
    terminal.expect(ready)
    terminal.send("/save chat.json\r")
    terminal.expect("chat.json exists")
    terminal.expect(ready)
    terminal.send("/sing\r")
    terminal.expect("unknown command /sing")
    terminal.expect(ready)
    terminal.send("/system Be brief.\r")
    terminal.expect("begins anew")
    terminal.expect(ready)
    terminal.send("/system\r")
    terminal.expect(r"Be brief\.\r\n")
    terminal.expect(ready)
    terminal.send("\x03")  # at the prompt, it drops the line
    terminal.expect(ready)
    terminal.send("/exit\r")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
    saved = json.loads((tmp_path / "chat.json").read_text(encoding="utf-8"))["messages"]
    assert [each["role"] for each in saved] == ["user", "assistant"]
    assert saved[0]["content"] == "two \nlines"
