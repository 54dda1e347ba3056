"""A module with other operations can be copied, and is told from one that keeps its own. Kernels are in tests/gpu."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb

from fewbit.kernels.nvidia import operators
from fewbit.models.decoding.operations import _Finder, serve_blocks
from tests import architectures, models

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
called: list[str] = []


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch in place of the kernels."""

    def rms_norm(x: Tensor, weight: Tensor, eps: float, kind: int) -> Tensor:
        called.append("norm")
        exact = functional.rms_norm(x.float(), (x.shape[-1],), eps=eps)
        return {
            operators.ROUNDED: weight * exact.to(x.dtype),
            operators.SCALED: (weight.float() * exact).to(x.dtype),
            operators.ONE: ((1 + weight.float()) * exact).to(x.dtype),
        }[kind]

    def gated(a: Tensor, b: Tensor, kind: int) -> Tensor:
        called.append("gated")
        approximate = "tanh" if kind == operators.TANH else "none"
        return (functional.silu(a) if kind == operators.SILU else functional.gelu(a, approximate=approximate)) * b

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return tuple(apply_rotary_pos_emb(q, k, cos, sin))

    monkeypatch.setattr(operators, "rms_norm", rms_norm)
    monkeypatch.setattr(operators, "gated", gated)
    monkeypatch.setattr(operators, "rotate", rotate)
    monkeypatch.setattr(operators, "serves", lambda x: True)
    called.clear()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_has_weights_of_its_own(copied: object) -> None:
    norm = LlamaRMSNorm(64).bfloat16()
    mlp = LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=96)).bfloat16()
    with torch.inference_mode():
        for module, name in ((norm, "norm"), (mlp, "gated")):
            expected = module(X)
            forward = _Finder(torch.bfloat16).forward_of(module)
            assert forward is not None
            vars(module)["forward"] = forward
            called.clear()
            assert torch.equal(module(X), expected)
            assert called == [name]
            other = copied(module)  # type: ignore[operator]
            last = other.weight if name == "norm" else other.down_proj.weight
            last.mul_(2)
            assert torch.equal(other(X), 2 * expected)
            assert torch.equal(module(X), expected)


# Not gemma2, whose attention is its own code: it caps logits.
WHOLE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3")


def replaced(model: Any) -> set[str]:
    """The modules that would get another forward on a GPU."""
    finder = _Finder(torch.bfloat16)
    with torch.inference_mode():
        return {name for name, module in model.named_modules() if finder.forward_of(module) is not None}


@pytest.mark.parametrize("family", models.FAMILIES)
def test_blocks_are_served_if_all_their_operations_are(family: str) -> None:
    model = models.build(family, dtype="bfloat16")
    found = replaced(model)
    whole = family in WHOLE
    assert serve_blocks(model, found) == whole, found
    if whole:
        last = [name for name in found if ".layers.1." in name]
        assert len(last) >= 4
        for name in last:  # without any one of them, PyTorch can still compile something
            assert not serve_blocks(model, found - {name}), name
        model.config._attn_implementation = "eager"
        assert not serve_blocks(model, found)


def test_an_activation_without_a_module_is_no_attention() -> None:
    """A model's own code may hold a function."""
    model = models.build("llama", dtype="bfloat16")
    for block in model.model.layers:
        del block.mlp.act_fn
        block.mlp.act_fn = functional.silu
    found = replaced(model)
    assert serve_blocks(model, found)
    assert not serve_blocks(model, {name for name in found if not name.endswith("self_attn")})


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_blocks_with_experts_keep_operations(kind: str) -> None:
    model = AutoModelForCausalLM.from_config(architectures.config(kind), dtype=torch.bfloat16).eval()
    found = replaced(model)
    assert any(name.endswith("norm") for name in found)
    assert not serve_blocks(model, found)
