"""Requests of a server's engine that run together replay one CUDA graph."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit.models.decoding.choosing import Choosing
from fewbit.models.decoding.continuous import Engine, News
from fewbit.models.decoding.fuse import fuse
from fewbit.models.decoding.together import Together
from tests import models
from tests.e2e.test_together import PROMPTS, answers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(
        importlib.util.find_spec("transformers.generation.continuous_batching.cache_allocators") is None,
        reason="this version of transformers has other pages, so all steps are its own",
    ),
]


def answered(model: Any, new: int = 60) -> tuple[list[News], bool]:
    """The answers of an engine to three requests at once, and whether steps were replayed."""
    engine = Engine(model, 80 + new, 8, None)
    try:
        asked = [(prompt, new, Choosing(logprobs=1, ignore_eos=True)) for prompt in PROMPTS]
        found, together = answers(engine, asked), engine._together
        recorded = any(each._graph.recorded is not None for each in together._made.values())
        return found, recorded and together._tested
    finally:
        engine.stop(finish=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_texts_of_requests_that_run_together(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums in another order round differently, so texts are compared as far as their tokens agree."""
    fewbit.quantize("tiny", tmp_path / "out", plan="rtn-4bit", device="cuda")
    model = fewbit.load(tmp_path / "out", dtype=dtype, device="cuda")
    fuse(model)
    found, replayed = answered(model)
    monkeypatch.setattr(Together, "devices", ())
    wanted, alone = answered(model)
    assert (replayed, alone) == (True, False)
    assert agreeing(found, wanted) > 60


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_windows_of_attention(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistral has a window of 16 tokens in all layers, and Gemma 3 in some. Texts grow far beyond it."""
    folder = models.save(tmp_path / "model", family, head_dim=64)
    model = fewbit.load(folder, dtype=torch.float16, device="cuda")
    found, replayed = answered(model, 40)
    assert replayed
    monkeypatch.setattr(Together, "devices", ())
    assert agreeing(found, answered(model, 40)[0]) > 40


def agreeing(found: list[News], wanted: list[News]) -> int:
    """How many tokens agree, counted to the first of each text that does not. Their logprobs are about equal."""
    count = 0
    for ours, own in zip(found, wanted, strict=True):
        for a, b in zip(ours.likely, own.likely, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=0.1)
            count += a.token == b.token
            if a.token != b.token:
                break
    return count
