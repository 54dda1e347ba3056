"""Verbs give the same result whatever a program has switched in PyTorch before it calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import fewbit as fb
from fewbit.texts.calibration import Calibration
from tests import models

State = Callable[[], AbstractContextManager[Any]]


@contextmanager
def switched(switch: Callable[[Any], object], value: Any, back: Any) -> Iterator[None]:
    switch(value)
    try:
        yield
    finally:
        switch(back)


class Watching(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def default_dtype(dtype: torch.dtype) -> State:
    return lambda: switched(torch.set_default_dtype, dtype, torch.float32)


def default_device(device: str) -> State:
    return lambda: switched(torch.set_default_device, device, None)


STATES: dict[str, State] = {
    "bfloat16": default_dtype(torch.bfloat16),
    "float16": default_dtype(torch.float16),
    "float64": default_dtype(torch.float64),
    "cpu": default_device("cpu"),
    "meta": default_device("meta"),
    "inference": torch.inference_mode,
    "no-grad": torch.no_grad,
    "deterministic": lambda: switched(torch.use_deterministic_algorithms, True, False),
    "flush-denormal": lambda: switched(torch.set_flush_denormal, True, False),
    "function-mode": Watching,
    "precision": lambda: switched(torch.set_float32_matmul_precision, "medium", "highest"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}
# A program that switches these asks for rounded products of its own calls. They change no result of a verb.
ROUNDING = ("precision", "autocast")
states = pytest.mark.parametrize("state", STATES)


@dataclass
class Made:
    files: dict[str, Tensor]
    perplexity: float
    text: str
    logits: Tensor


def made(source: Path, text: Path, out: Path, plan: str) -> Made:
    calibration = Calibration(str(text), samples=4, length=32)
    fb.quantize(source, out, plan=plan, calibration=calibration)
    measured = fb.evaluate(out, text=str(text), samples=2, length=32)
    said = fb.generate(out, "the model", max_new_tokens=4)
    model = fb.load(out, dtype=torch.float32)
    ids = torch.tensor([list(range(3, 43))], dtype=torch.int64, device="cpu")
    logits = model(input_ids=ids).logits.detach()
    return Made(models.tensors_of(out), measured.quality.perplexity.value, said.text, logits)


PLANS = ("gptq-4bit", "awq-4bit", "nf4", "int8")
plans = pytest.mark.parametrize("plan", PLANS)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(tmp_path_factory.mktemp("source"), "llama", dtype="float32", intermediate_size=128)


@pytest.fixture(scope="module")
def right(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    place = tmp_path_factory.mktemp("right")
    return {plan: made(source, text, place / plan, plan) for plan in PLANS}


@plans
@states
def test_what_a_program_has_switched_changes_no_result(
    state: str, plan: str, source: Path, text: Path, right: dict[str, Made], tmp_path: Path
) -> None:
    with STATES[state]():
        got = made(source, text, tmp_path / "out", plan)
    wanted = right[plan]
    assert got.files.keys() == wanted.files.keys()
    assert [name for name, tensor in got.files.items() if not torch.equal(tensor, wanted.files[name])] == []
    assert (got.perplexity, got.text) == (wanted.perplexity, wanted.text)
    if state not in ROUNDING:
        assert torch.equal(got.logits, wanted.logits)


@states
def test_settings_of_a_program_are_its_own_again_after(state: str, source: Path) -> None:
    def found() -> list[Any]:
        return [
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.is_inference_mode_enabled(),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_float32_matmul_precision(),
        ]

    with STATES[state]():
        before = found()
        fb.load(source)
        with pytest.raises(fb.FewbitError):
            fb.load(source / "missing")
        assert found() == before
