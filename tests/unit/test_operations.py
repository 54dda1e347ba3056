"""A module with other operations can be copied: the copy computes with its own weights. Kernels are in tests/gpu."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from fewbit.kernels.nvidia import operators
from fewbit.models.decoding.operations import _Finder

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
called: list[str] = []


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch in place of the kernels."""

    def rms_norm(x: Tensor, weight: Tensor, eps: float, kind: int) -> Tensor:
        called.append("norm")
        rounded = functional.rms_norm(x.float(), (x.shape[-1],), eps=eps).to(x.dtype)
        return weight * rounded if kind == operators.ROUNDED else torch.zeros_like(x)

    def gated(a: Tensor, b: Tensor, kind: int) -> Tensor:
        called.append("gated")
        return functional.silu(a) * b if kind == operators.SILU else torch.zeros_like(a)

    monkeypatch.setattr(operators, "rms_norm", rms_norm)
    monkeypatch.setattr(operators, "gated", gated)
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
