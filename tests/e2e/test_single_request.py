"""A request that runs alone takes a shorter path, and its text is the same."""

from __future__ import annotations

import contextlib
import importlib.util
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit.models.decoding import unquantized
from fewbit.models.decoding.choosing import Choosing
from fewbit.models.decoding.continuous import Engine, News
from fewbit.models.decoding.single import _Parts
from fewbit.plans.plan import find
from fewbit.system import native
from tests import models
from tests.limits import HANG

PROMPT = list(range(5, 16))
SAMPLED = Choosing(temperature=1.0, top_p=0.9, seed=3, logprobs=2, frequency_penalty=0.5)

pytestmark = [
    pytest.mark.skipif(isinstance(native.available(), str), reason="the CPU library was not built"),
    pytest.mark.skipif(
        importlib.util.find_spec("transformers.generation.continuous_batching.cache_allocators") is None,
        reason="this version of transformers has other pages, so blocks run their own code",
    ),
]


@pytest.fixture(autouse=True)
def rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations are rounded, as for users: exact products are not the library's blocks."""
    monkeypatch.delenv("FEWBIT_ACTIVATIONS")


@contextlib.contextmanager
def engine(model: Any) -> Iterator[Engine]:
    made = Engine(model, 128, 8, None)
    try:
        yield made
    finally:
        made.stop(finish=False)


class Asked:
    """A request whose news are counted. joined: called at its tenth token."""

    def __init__(self, engine: Engine, prompt: list[int], new: int, choosing: Choosing, joined: Any = None) -> None:
        self.news, self.joined = queue.SimpleQueue[News](), joined
        engine.submit(prompt, new, choosing, self._tell)

    def _tell(self, news: News) -> None:
        if self.joined is not None and len(news.tokens) >= 10:
            self.joined, joined = None, self.joined
            joined()
        self.news.put(news)

    def answer(self) -> News:
        while not (news := self.news.get(timeout=HANG)).finished:
            pass
        assert news.error is None
        return news


@contextlib.contextmanager
def counted(engine: Engine) -> Iterator[list[int]]:
    """The positions of the tokens that took the shorter path."""
    taken, logits = list[int](), engine._single.logits

    def noted(parts: Any, token: int, position: int) -> Any:
        taken.append(position)
        return logits(parts, token, position)

    engine._single.logits = noted  # type: ignore[method-assign]
    yield taken
    engine._single.logits = logits  # type: ignore[method-assign]


def without(engine: Engine, *args: Any) -> News:
    """The answer by transformers' own steps."""
    step = engine._single.step
    engine._single.step = lambda processor: False  # type: ignore[method-assign]
    try:
        return Asked(engine, *args).answer()
    finally:
        engine._single.step = step  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("single") / "tiny"
    fewbit.quantize("tiny", folder, plan=find("w4a16").changed(method="rtn"), device="cpu")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_text_is_the_same(dtype: torch.dtype, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unquantized, "_LEAST", 1)  # the library multiplies by the head, too
    with engine(fewbit.load(tiny, dtype=dtype, device="cpu")) as made:
        for choosing in (Choosing(), SAMPLED):
            wanted = without(made, PROMPT, 60, choosing)
            with counted(made) as taken:
                assert Asked(made, PROMPT, 60, choosing).answer() == wanted
            # The prompt's step has the first token, and the last is not read. The first step of an engine is compared.
            assert len(taken) >= len(wanted.tokens) - 2 >= 30
            assert max(taken) == len(PROMPT) + len(wanted.tokens) - 2  # two or three pages


def test_another_request_joins_and_leaves(tiny: Path) -> None:
    with engine(fewbit.load(tiny, dtype=torch.float32, device="cpu")) as made:
        wanted, other = (without(made, prompt, new, Choosing()) for prompt, new in ((PROMPT, 60), (PROMPT[3:], 12)))
        guests = list[Asked]()
        with counted(made) as taken:
            first = Asked(made, PROMPT, 60, Choosing(), lambda: guests.append(Asked(made, PROMPT[3:], 12, Choosing())))
            assert first.answer().tokens == wanted.tokens
            assert guests[0].answer().tokens == other.tokens
        assert 30 < len(taken) < 55  # those before and after


def test_a_request_is_cancelled(tiny: Path) -> None:
    with engine(fewbit.load(tiny, dtype=torch.float32, device="cpu")) as made:
        came = threading.Event()
        name = made.submit(PROMPT, 100, Choosing(), lambda news: came.set() if len(news.tokens) > 5 else None)
        assert came.wait(HANG)
        made.cancel(name)
        assert made.unfinished == 0
        assert len(Asked(made, PROMPT, 5, Choosing()).answer().tokens) == 5
        with counted(made) as taken:
            assert Asked(made, PROMPT, 5, Choosing()).answer().tokens
        assert taken


def test_a_model_that_computes_otherwise_keeps_its_code(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = _Parts.logits
    monkeypatch.setattr(_Parts, "logits", lambda *args: logits(*args) + 1)
    with engine(fewbit.load(tiny, dtype=torch.float32, device="cpu")) as made:
        wanted = without(made, PROMPT, 20, Choosing())
        with counted(made) as taken:
            assert Asked(made, PROMPT, 20, Choosing()).answer() == wanted
        assert len(taken) == 1  # it was compared once


@pytest.mark.parametrize(
    ("family", "steps"),
    [("qwen2", None), ("qwen3", None), ("phi3", None), ("gpt-neox", None), ("gpt2", 1), ("gemma2", 0)],
)
def test_families(family: str, steps: int | None, tmp_path: Path) -> None:
    """GPT-2 adds positions before the first block, and Gemma 2 has windows: their steps are transformers' own."""
    fewbit.quantize(models.save(tmp_path / "model", family), tmp_path / "out", plan="rtn-4bit", device="cpu")
    with engine(fewbit.load(tmp_path / "out", dtype=torch.float32, device="cpu")) as made:
        wanted = without(made, PROMPT, 20, Choosing(logprobs=1))
        with counted(made) as taken:
            assert Asked(made, PROMPT, 20, Choosing(logprobs=1)).answer() == wanted
        assert len(wanted.tokens) > 10
        assert len(taken) == (len(wanted.tokens) - 1 if steps is None else steps)
