"""Weights of a packed model that stay in 16 bits are multiplied by the CPU library while the model decodes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrize, prune
from transformers import AutoModelForCausalLM

import fewbit as fb
from fewbit.advise import doctor
from fewbit.kernels.cpu import kernel
from fewbit.models.decoding import compiled_blocks, unquantized
from fewbit.models.decoding.stand_in import PLACE
from fewbit.system import native
from tests import models
from tests.e2e.test_compiled_blocks import apart, ids_of, outputs

pytestmark = [
    pytest.mark.skipif(isinstance(native.available(), str), reason="needs the compiled CPU library"),
    pytest.mark.usefixtures("rounded_activations"),
]
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
PARTS = (7, 1, 1, 3)


@pytest.fixture(autouse=True)
def small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The heads of tests are smaller than those that are worth it."""
    monkeypatch.setattr(unquantized, "_LEAST", 1)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the number of rows of each product."""
    multiply, seen = kernel.product, list[int]()

    def noted(x: Tensor, weight: Tensor) -> Tensor:
        seen.append(len(x))
        return multiply(x, weight)

    monkeypatch.setattr(kernel, "product", noted)
    return seen


def decoded(model: Any) -> list[Tensor]:
    return outputs(model, ids_of(1, sum(PARTS)), PARTS)


def found(model: Any) -> list[Any]:
    return list(compiled_blocks.unquantized(model))


@HALVES
def test_a_head_gives_the_logits_of_its_own_code(llama: Path, dtype: torch.dtype, rows: list[int]) -> None:
    model = fb.load(llama, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unquantized, "_LEAST", 1 << 62)
        plain = decoded(fb.load(llama, dtype=dtype))
    assert not rows
    own = decoded(model)
    assert rows[-len(PARTS) :] == list(PARTS)
    assert found(model) == [model.lm_head]
    assert apart(own, plain) <= (1e-3 if dtype == torch.float16 else 8e-3)
    assert PLACE not in vars(model.lm_head)


def test_the_blocks_of_a_model_in_float16_are_computed(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fb.load(llama, dtype=torch.float16)
    found = decoded(model)
    assert len(compiled_blocks.computed(model)) == 2
    compiled_blocks.remove(model)
    own = decoded(model)
    monkeypatch.setenv("FEWBIT_ACTIVATIONS", "exact")
    exact = decoded(fb.load(llama, dtype=torch.float32))
    assert apart(found, exact) <= 1.2 * apart(own, exact) <= 6e-2


def test_a_bias_is_added_before_the_sum_is_rounded() -> None:
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(96, 40).bfloat16().requires_grad_(False)
    x = torch.randn(2, 3, 96, generator=generator).bfloat16()
    exact = x.double() @ linear.weight.double().T + linear.bias.double()
    with torch.inference_mode():
        y, theirs = unquantized.Product(linear).forward(x), linear(x)
    assert y.shape == theirs.shape
    assert y.dtype == theirs.dtype
    assert (y - exact).norm() <= 1.02 * (theirs - exact).norm()


def test_more_rows_are_left_to_pytorch_where_it_is_faster(llama: Path, rows: list[int]) -> None:
    model = fb.load(llama, dtype=torch.bfloat16)
    decoded(model)
    rows.clear()
    outputs(model, ids_of(1, 30), (29, 1))
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert rows == ([1] if fast else [29, 1])


def test_rows_that_no_cache_holds_are_left_to_pytorch(rows: list[int]) -> None:
    linear = torch.nn.Linear(4096, 8, bias=False).bfloat16().requires_grad_(False)
    forward = unquantized.Product(linear).forward
    with torch.inference_mode():
        for count in (1, 2, 3, 8):
            forward(torch.ones(count, 4096, dtype=torch.bfloat16))
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert rows == ([1, 2] if fast else [1, 2, 3, 8])


def test_plain_instructions_leave_16_bits_to_pytorch(llama: Path) -> None:
    library: Any = native.library()
    try:
        library.fewbit_force(b"scalar")
        assert not found(fb.load(llama, dtype=torch.bfloat16))
    finally:
        library.fewbit_force(None)
    assert found(fb.load(llama, dtype=torch.bfloat16))


def test_training_runs_its_own_code(llama: Path, rows: list[int]) -> None:
    model = fb.load(llama, dtype=torch.bfloat16)
    before = decoded(model)
    rows.clear()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # no longer tied
    out = model(input_ids=ids_of(1, 4), labels=ids_of(1, 4), use_cache=True)
    out.loss.backward()
    assert not rows
    assert bool(model.lm_head.weight.grad.any())
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    after = decoded(model)
    assert rows
    assert all(map(torch.equal, after, [2 * y for y in before]))


def test_a_product_that_needs_gradients_has_them(rows: list[int]) -> None:
    linear = torch.nn.Linear(96, 40, bias=False).bfloat16()
    x = torch.ones(1, 96, dtype=torch.bfloat16, requires_grad=True)
    unquantized.Product(linear).forward(x).sum().backward()
    assert not rows
    assert all(grad is not None and bool(grad.any()) for grad in (linear.weight.grad, x.grad))


class Twice(torch.nn.Module):
    def forward(self, parameter: Tensor) -> Tensor:
        return parameter * 2


CHANGES: dict[str, Callable[[Any], Any]] = {
    "float32": torch.nn.Linear.float,
    "float64": torch.nn.Linear.double,
    "another weight": lambda linear: parametrize.register_parametrization(linear, "weight", Twice()),
    "another bias": lambda linear: parametrize.register_parametrization(linear, "bias", Twice()),
    "pruned": lambda linear: prune.random_unstructured(linear, "weight", 0.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_linear_that_changes_runs_its_own_code(change: str, rows: list[int]) -> None:
    linear = torch.nn.Linear(96, 40).bfloat16().requires_grad_(False)
    forward = unquantized.Product(linear).forward
    CHANGES[change](linear)
    x = torch.ones(1, 96, dtype=linear.weight.dtype)
    with torch.inference_mode():
        assert torch.equal(forward(x), linear(x))
    assert not rows


def test_a_model_in_another_type_is_computed(llama: Path) -> None:
    model = fb.load(llama, dtype=torch.bfloat16)
    decoded(model)
    model.double()
    own = decoded(model)
    compiled_blocks.remove(model)
    assert all(map(torch.equal, own, decoded(model)))


def test_a_head_that_is_hooked_or_replaced_is_seen(llama: Path) -> None:
    model = fb.load(llama, dtype=torch.bfloat16)
    before = decoded(model)
    handle = model.lm_head.register_forward_hook(lambda module, args, out: out * 0)
    assert not any(bool(y.any()) for y in decoded(model))
    handle.remove()
    assert all(map(torch.equal, decoded(model), before))
    wide = torch.nn.Linear(64, 5, bias=False).bfloat16()
    model.lm_head = wide
    assert [y.shape[-1] for y in decoded(model)] == [5] * len(PARTS)


def test_a_model_is_copied_and_pickled_as_before(llama: Path) -> None:
    model = fb.load(llama, dtype=torch.bfloat16)
    before = decoded(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(map(torch.equal, decoded(copied), before))
        assert found(copied) == [copied.lm_head]
        assert found(model) == [model.lm_head]


def test_the_compiler_sees_the_head_of_pytorch(rows: list[int]) -> None:
    linear = torch.nn.Linear(96, 40, bias=False).bfloat16().requires_grad_(False)
    x, forward = torch.ones(1, 96, dtype=torch.bfloat16), unquantized.Product(linear).forward
    with torch.inference_mode():
        assert torch.equal(torch.compile(forward, backend="eager", fullgraph=True)(x), linear(x))
        assert not rows
        forward(x)
    assert rows == [1]


def test_models_of_others_are_left_as_they_are(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "model", "llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert not model._forward_pre_hooks
    assert not found(model)
    assert not found(fb.load(folder))


def test_doctor_counts_weights_in_16_bits(llama: Path) -> None:
    told = doctor.path_of(llama)
    assert told.unquantized == 1
    assert ("16-bit weights", "1 by the CPU library") in told.lines
