"""Requests that run together take a recorded step on a GPU, and their texts are the same. Here it runs on a CPU."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import logging
import queue
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import RequestState

import fewbit
from fewbit.errors import PlanError
from fewbit.kernels.nvidia import operators
from fewbit.models.decoding import continuous, operations
from fewbit.models.decoding.choosing import Choosing, drawn
from fewbit.models.decoding.continuous import Engine, News
from fewbit.models.decoding.together import Together
from tests import models
from tests.limits import HANG
from tests.served import until

PROMPTS = ([5, 6, 7, 8], list(range(20, 51)), list(range(9, 80)))
SAMPLED = Choosing(temperature=1.0, top_p=0.9, seed=3, logprobs=2, frequency_penalty=0.5)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers.generation.continuous_batching.cache_allocators") is None,
    reason="this version of transformers has other pages, so all steps are its own",
)


def attended(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, pages: Tensor, scale: float) -> Tensor:
    """The definition of `operators.attend_pages`."""
    rows = list[Tensor]()
    for one, count, own in zip(q, lengths.tolist(), pages, strict=True):
        slots = (own.long()[:, None] + torch.arange(operators.PAGE)).flatten()[:count]
        keys, values = (x[slots].transpose(0, 1).repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (k, v))
        rows.append(((one @ keys.transpose(1, 2) * scale).softmax(-1) @ values)[:, 0])
    return torch.stack(rows)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(Together, "devices", ("cpu",))
    monkeypatch.setattr(operators, "attends_pages", lambda q, k, v: True)
    monkeypatch.setattr(operators, "attend_pages", attended)
    return monkeypatch


@contextlib.contextmanager
def engine(rows: int = 8, room: int | None = None) -> Iterator[Engine]:
    """room: tokens whose keys and values fit the memory."""
    model = fewbit.load("tiny", dtype=torch.float32, device="cpu")
    heads, width = model.config.num_key_value_heads, model.config.head_dim
    each = 2 * model.config.num_hidden_layers * heads * width * model.dtype.itemsize
    made = Engine(model, 160, rows, None if room is None else room * each * 4)  # they get a quarter
    try:
        yield made
    finally:
        made.stop(finish=False)


def answers(engine: Engine, asked: list[tuple[list[int], int, Choosing]]) -> list[News]:
    """The last news of requests that are made one right after the other."""
    told = [queue.SimpleQueue[News]() for _ in asked]
    for (prompt, new, choosing), own in zip(asked, told, strict=True):
        engine.submit(prompt, new, choosing, own.put)
    found = list[News]()
    for own in told:
        while not (news := own.get(timeout=HANG)).finished:
            pass
        assert news.error is None
        found.append(news)
    return found


def rows_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many requests each step of `Together` has; the list grows."""
    taken, logits = list[int](), Together._logits

    def noted(self: Together, states: Any) -> Tensor:
        taken.append(len(states))
        return logits(self, states)

    monkeypatch.setattr(Together, "_logits", noted)
    return taken


ASKED = [(PROMPTS[0], 50, Choosing()), (PROMPTS[1], 20, SAMPLED), (PROMPTS[2], 35, Choosing(logprobs=1))]


@pytest.fixture(scope="module")
def wanted() -> list[News]:
    """The answers by transformers' own steps."""
    with engine() as made:
        assert not made._together._allocators
        return answers(made, ASKED)


def same(found: list[News], wanted: list[News]) -> None:
    for ours, own in zip(found, wanted, strict=True):
        assert ours.tokens == own.tokens
        for a, b in zip(ours.likely, own.likely, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-3)


def test_the_texts_are_the_same(here: pytest.MonkeyPatch, wanted: list[News]) -> None:
    """Pages begin and end at different tokens of each text, and texts end one after another."""
    with engine() as made:
        taken = rows_of(here)
        same(answers(made, ASKED), wanted)
        assert len(taken) >= 40
        assert {1, 2, 3} <= set(taken)  # as requests end
        before = len(taken)
        same(answers(made, ASKED[:1]), wanted[:1])
        assert len(taken) >= before + 45


@pytest.mark.parametrize("failed", [False, True])
def test_a_stopped_engine_keeps_no_cache(failed: bool, here: pytest.MonkeyPatch) -> None:
    """Its pages and graphs are most of the memory that is not weights."""

    def broken(*_: Any) -> bool:
        raise RuntimeError("the GPU is gone")

    with engine() as made:
        answers(made, ASKED[:1])
        made._single._of(made._manager.batch_processor)
        held = [weakref.ref(made._single._cache), *map(weakref.ref, made._together._made.values())]
        if failed:
            here.setattr(logging.getLogger("ContinuousBatchingLogger"), "disabled", True)  # pytest keeps tracebacks
            here.setattr(Together, "step", broken)
            made.submit(PROMPTS[0], 5, Choosing(), lambda news: None)
            until(lambda: made.failed is not None)
    assert len(held) > 1
    gc.collect()
    assert [each() for each in held] == [None] * len(held)
    assert not made._manager.model._forward_hooks


def test_a_model_on_several_devices_is_not_recorded() -> None:
    parameters = [torch.empty(0, device=device) for device in ("cpu", "meta", "cpu")]
    model = SimpleNamespace(parameters=lambda: parameters, config=SimpleNamespace(_attn_implementation="sdpa"))
    assert Together(model, None, lambda *_: [])._why_not(None) == "it lies on several devices: cpu, meta"


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma3"])
def test_families(family: str, here: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Mistral has a window of 16 tokens in all layers, and Gemma 3 in some. Texts grow far beyond it."""
    folder = models.save(tmp_path / "model", family)

    def asked() -> list[News]:
        made = Engine(fewbit.load(folder, dtype=torch.float32, device="cpu"), 128, 8, None)
        try:
            return answers(made, [(prompt, 40, Choosing(logprobs=1, ignore_eos=True)) for prompt in PROMPTS])
        finally:
            made.stop(finish=False)

    here.setattr(Together, "devices", ())
    wanted = asked()
    here.setattr(Together, "devices", ("cpu",))
    taken = rows_of(here)
    same(asked(), wanted)
    assert len(taken) >= 35


def test_a_full_engine_while_others_wait(here: pytest.MonkeyPatch, wanted: list[News]) -> None:
    with engine(rows=2) as made:
        taken, waiting = rows_of(here), list[int]()
        step = made._together.step

        def noted(processor: Any) -> bool:
            done = step(processor)
            if done:
                waiting.append(len(processor.scheduler.waiting_requests))
            return done

        here.setattr(made._together, "step", noted)
        same(answers(made, ASKED), wanted)
        assert waiting.count(1) >= 5
        assert max(taken) == 2


def test_a_request_whose_pages_others_need(here: pytest.MonkeyPatch) -> None:
    """transformers reads it again later, with its answer so far as prompt. `min_tokens` counts the whole answer."""
    again, own = list[int](), RequestState.create_equivalent_initial_request

    def noted(self: RequestState) -> RequestState:
        again.append(len(self.generated_tokens))
        return own(self)

    here.setattr(RequestState, "create_equivalent_initial_request", noted)
    with engine() as made:
        choosing = Choosing(min_tokens=60, logit_bias=((made.ends[0], 100.0),))
        asked = [(prompt, 100, choosing) for prompt in PROMPTS]
        wanted = answers(made, asked)
    assert not again
    with engine(room=256) as made:
        taken = rows_of(here)
        same(answers(made, asked), wanted)
    assert again[0] > 0
    assert [len(news.tokens) for news in wanted] == [61, 61, 61]
    assert len(taken) > 60


def test_many_rows_are_drawn_in_parts(here: pytest.MonkeyPatch) -> None:
    """A row of a large vocabulary takes megabytes."""
    asked = [(prompt, 8, Choosing(temperature=1.0, seed=i, ignore_eos=True)) for i, prompt in enumerate(PROMPTS)]
    drew, own = list[int](), drawn

    def noted(logits: Tensor, choosing: Choosing, uniform: Sequence[float]) -> Tensor:
        drew.append(len(uniform))
        return own(logits, choosing, uniform)

    here.setattr(continuous, "drawn", noted)
    with engine() as made:
        wanted = answers(made, asked)
        assert max(drew) == 3
        here.setattr(continuous, "_DRAWN", 2)
        drew.clear()
        same(answers(made, asked), wanted)
    assert max(drew) == 2


def test_the_first_step_is_compared(here: pytest.MonkeyPatch, wanted: list[News], caplog: Any) -> None:
    here.setattr(operators, "attend_pages", lambda *given: attended(*given) * 1.5)
    here.setattr(operations, "tolerance", lambda model: 0.03)
    with engine() as made:
        taken = rows_of(here)
        same(answers(made, ASKED), wanted)
        assert len(taken) == 1
    assert "not recorded as CUDA graphs: its logits differ by" in caplog.text


@pytest.mark.parametrize("error", [RuntimeError("no such kernel"), KeyError("cache")])
def test_a_model_that_cannot_is_left_to_transformers(
    error: Exception, here: pytest.MonkeyPatch, wanted: list[News], caplog: Any
) -> None:
    def fail(*given: Any) -> Tensor:
        raise error

    here.setattr(operators, "attend_pages", fail)
    with engine() as made:
        taken = rows_of(here)
        same(answers(made, ASKED), wanted)
        assert len(taken) == 1
    assert "not recorded as CUDA graphs" in caplog.text


@pytest.mark.parametrize("error", [RuntimeError("no such kernel"), torch.OutOfMemoryError("no memory")])
def test_a_later_step_that_fails(error: Exception, here: pytest.MonkeyPatch, wanted: list[News], caplog: Any) -> None:
    """Such as the first step of three requests. Only for lack of memory, it is tried again."""
    failed = list[int]()

    def some(*given: Any) -> Tensor:
        if len(given[0]) == 4:  # three requests and one row of none
            failed.append(4)
            raise error
        return attended(*given)

    here.setattr(operators, "attend_pages", some)
    with engine() as made:
        taken = rows_of(here)
        same(answers(made, ASKED[:1]), wanted[:1])
        before = len(taken)
        same(answers(made, ASKED), wanted)
        again = isinstance(error, torch.OutOfMemoryError)
        assert (len(failed) > 1) == again
        assert (len(taken) > before + 10) == again
    assert ("not recorded as CUDA graphs: RuntimeError: no such kernel" in caplog.text) != again


def test_an_error_frees_the_graphs(here: pytest.MonkeyPatch, wanted: list[News]) -> None:
    """The step that failed for lack of memory may need theirs."""
    with engine() as made:
        same(answers(made, ASKED[:1]), wanted[:1])
        assert made._together._made
        step, errors = made._single.step, iter([RuntimeError("a step failed")])

        def once(processor: Any) -> bool:
            if processor.scheduler.active_requests and (error := next(errors, None)) is not None:
                raise error
            return step(processor)

        here.setattr(made._single, "step", once)
        told = queue.SimpleQueue[News]()
        made.submit(*ASKED[0], told.put)
        while (news := told.get(timeout=HANG)).error is None:
            pass
        assert news.error == "a step failed"
        until(lambda: not made._together._made)
        until(lambda: made.ready)
        same(answers(made, ASKED), wanted)
        assert made._together._made


def test_an_engine_that_fails_to_start_leaves_no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(manager: Any) -> None:
        raise RuntimeError("no pages")

    model = fewbit.load("tiny", dtype=torch.float32, device="cpu")
    before = [*model._forward_pre_hooks, *model._forward_hooks]
    monkeypatch.setattr(ContinuousBatchingManager, "warmup", fail)
    with pytest.raises(PlanError, match=r"cannot be served.*no pages"):
        Engine(model, 160, 8, None)
    assert [*model._forward_pre_hooks, *model._forward_hooks] == before


def test_steps_do_not_use_cudnn() -> None:
    """It plans anew for each number of keys: 54 ms on an H200."""
    seen = list[bool]()
    with engine() as made:
        model = made._manager.model
        model.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
        answers(made, [(PROMPTS[0], 5, Choosing(logprobs=1))])
    assert len(seen) >= 5
    assert not any(seen)
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize(
    ("family", "attention", "why"),
    [("gemma2", None, "its attention is paged|eager"), ("llama", "eager", "its attention is paged|eager")],
)
def test_it_is_said_why_steps_are_not_recorded(
    family: str, attention: str | None, why: str, here: pytest.MonkeyPatch, caplog: Any, tmp_path: Path
) -> None:
    folder = models.save(tmp_path / "model", family)
    model = fewbit.load(folder, dtype=torch.float32, device="cpu")
    if attention is not None:
        model.set_attn_implementation(attention)
    made = Engine(model, 128, 8, None)
    try:
        assert len(answers(made, [(PROMPTS[0], 5, Choosing(ignore_eos=True))])[0].tokens) == 5
        assert not made._together._allocators
    finally:
        made.stop(finish=False)
    assert caplog.text.count("not recorded as CUDA graphs") == 1
    assert why in caplog.text


def test_a_model_whose_sensitivity_is_not_known(here: pytest.MonkeyPatch, wanted: list[News], caplog: Any) -> None:
    def fail(model: Any) -> float:
        raise TypeError("no inputs_embeds")

    here.setattr(operations, "tolerance", fail)
    with engine() as made:
        same(answers(made, ASKED), wanted)
    assert "not recorded as CUDA graphs: TypeError: no inputs_embeds" in caplog.text


def test_a_cancelled_request_leaves_the_others(here: pytest.MonkeyPatch, wanted: list[News]) -> None:
    with engine() as made:
        first, told = queue.SimpleQueue[News](), queue.SimpleQueue[News]()
        made.submit(*ASKED[0], told.put)
        name = made.submit(PROMPTS[1], 60, Choosing(), first.put)
        while len(first.get(timeout=HANG).tokens) < 8:
            pass
        made.cancel(name)
        while not (news := told.get(timeout=HANG)).finished:
            pass
        assert news.tokens == wanted[0].tokens
