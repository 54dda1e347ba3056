"""The operators of a step besides products: each is its definition in float64, and models use them where they fit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import fewbit
from fewbit.api import quantize
from fewbit.kernels.nvidia import operators
from fewbit.models.decoding import operations
from fewbit.plans.plan import find
from tests import models

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
DTYPES = (torch.float16, torch.bfloat16)
LAST = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # half a unit in the last place


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to("cuda", dtype)


def close(found: Tensor, exact: Tensor, dtype: torch.dtype, roundings: int = 2) -> None:
    assert found.dtype == dtype
    assert (found.double() - exact).norm() <= roundings * LAST[dtype] * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [64, 96, 4096, 16384])
def test_norm(k: int, dtype: torch.dtype) -> None:
    x, weight = drawn(2, 5, k, dtype=dtype), drawn(k, dtype=dtype)
    for rows in (x, drawn(2, 5, 3 * k, dtype=dtype)[..., k : 2 * k], drawn(2, 5, 4, k, dtype=dtype).transpose(1, 2)):
        exact = rows.double() / (rows.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
        close(operators.rms_norm(rows, weight, 1e-6, operators.SCALED), exact * weight.double(), dtype)
        close(operators.rms_norm(rows, weight, 1e-6, operators.ROUNDED), exact * weight.double(), dtype)
        close(operators.rms_norm(rows, weight, 1e-6, operators.ONE), exact * (1 + weight.double()), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [3, 70])  # a program takes one head, and eight heads
@pytest.mark.parametrize("r", [128, 64])
def test_rotary_positions(r: int, tokens: int, dtype: torch.dtype) -> None:
    whole = drawn(2, tokens, 14 * 128, dtype=dtype)
    q, k = (part.unflatten(-1, (-1, 128)).transpose(1, 2) for part in whole.split([8 * 128, 6 * 128], -1))
    for batch in (1, 2):
        cos, sin = drawn(2, batch, tokens, r, dtype=dtype).unbind()
        for found, x in zip(operators.rotate(q, k, cos, sin), (q, k), strict=True):
            a, b = x.double()[..., :r].chunk(2, -1)
            exact = x.double()[..., :r] * cos.double()[:, None] + torch.cat([-b, a], -1) * sin.double()[:, None]
            close(found[..., :r], exact, dtype)
            assert torch.equal(found[..., r:], x[..., r:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_activation(dtype: torch.dtype) -> None:
    a, b = drawn(2, 3, 2 * 1500, dtype=dtype).chunk(2, -1)
    silu, tanh, erf = (operators.gated(a, b, kind) for kind in (operators.SILU, operators.TANH, operators.ERF))
    close(silu, functional.silu(a.double()) * b.double(), dtype)
    close(tanh, functional.gelu(a.double(), approximate="tanh") * b.double(), dtype)
    close(erf, functional.gelu(a.double()) * b.double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "heads", "shared", "length", "dk", "dv"),
    [
        (1, 32, 8, 512, 128, 128),
        (32, 32, 8, 300, 128, 128),
        (2, 6, 2, 100, 80, 80),
        (3, 4, 4, 70, 64, 48),
        (1, 16, 1, 5, 256, 256),
    ],
)
def test_attention_of_one_token(
    batch: int, heads: int, shared: int, length: int, dk: int, dv: int, dtype: torch.dtype
) -> None:
    q = drawn(batch, 1, heads, dk, dtype=dtype).transpose(1, 2)
    k, v = drawn(batch, shared, length, dk, dtype=dtype), drawn(batch, shared, length, dv, dtype=dtype)
    seen = torch.rand(batch, 1, 1, length, device="cuda") < 0.5
    seen[..., 0], seen[..., length * 2 // 3 :] = True, False
    k[:, :, -1] = float("nan")  # of a place that is not written yet
    added = torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)
    for mask in (seen, added, seen[:1]):
        keep = (mask == 0 if mask.dtype == dtype else mask).expand(batch, 1, 1, length)
        logits = q.double() @ k.double().nan_to_num().repeat_interleave(heads // shared, 1).transpose(2, 3) * 0.3
        exact = logits.masked_fill(~keep, -torch.inf).softmax(-1) @ v.double().repeat_interleave(heads // shared, 1)
        if mask is not added:
            close(operators.attend(q, k, v, mask, 0.3), exact[:, :, 0], dtype)
        else:
            close(operators.attend(q, k.nan_to_num(), v, mask, 0.3), exact[:, :, 0], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "shared", "dk", "dv"), [(32, 8, 128, 128), (6, 2, 80, 64), (4, 4, 64, 48)])
def test_attention_over_pages(heads: int, shared: int, dk: int, dv: int, dtype: torch.dtype) -> None:
    """Texts of one key to many pages, whose pages lie anywhere. What lies in other slots may be anything."""
    lengths = torch.tensor([1, 32, 33, 700, 2048], dtype=torch.int32, device="cuda")
    count, size = 64, operators.PAGE
    k, v = drawn(6 * count * size, shared, dk, dtype=dtype), drawn(6 * count * size, shared, dv, dtype=dtype)
    order = torch.randperm(5 * count, generator=torch.Generator().manual_seed(0)).view(5, count).to("cuda", torch.int32)
    pages = order * size
    k[5 * count * size :] = v[5 * count * size :] = float("nan")
    q = drawn(5, 1, heads, dk, dtype=dtype).transpose(1, 2)
    found = operators.attend_pages(q, k, v, lengths, pages, 0.3)
    for row, length in enumerate(lengths.tolist()):
        slots = (pages[row].long()[:, None] + torch.arange(size, device="cuda")).flatten()[:length]
        keys, values = (x[slots].double().transpose(0, 1).repeat_interleave(heads // shared, 0) for x in (k, v))
        exact = (q[row].double() @ keys.transpose(1, 2) * 0.3).softmax(-1) @ values
        close(found[row], exact[:, 0], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cache_gets_one_token_after_another(dtype: torch.dtype) -> None:
    keys, values = drawn(3, 2, 40, 80, dtype=dtype), drawn(3, 2, 40, 48, dtype=dtype)
    at, ticket = torch.tensor(7, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
    for position in (7, 8):
        k, v = drawn(3, 1, 2, 80, dtype=dtype).transpose(1, 2) + position, drawn(3, 2, 1, 48, dtype=dtype)
        expected = keys.clone(), values.clone()
        expected[0][:, :, position : position + 1], expected[1][:, :, position : position + 1] = k, v
        assert operators.stores(keys, values, k, v)
        operators.store(keys, values, k, v, at, ticket)
        assert torch.equal(keys, expected[0])
        assert torch.equal(values, expected[1])
        assert (int(at), int(ticket)) == (position + 1, 0)


REPLACED = {  # family -> the kinds of modules that get another forward
    "llama": {"norm", "attn", "mlp"},
    "mistral": {"norm", "attn", "mlp"},
    "qwen2": {"norm", "attn", "mlp"},
    "qwen3": {"norm", "attn", "mlp"},
    "gemma2": {"norm", "attn", "mlp"},
    "gpt2": set(),
}


@pytest.mark.parametrize("family", REPLACED)
def test_models_use_them_and_keep_their_logits(family: str, tmp_path: Path) -> None:
    quantize.quantize(models.save(tmp_path / "original", family), tmp_path / "out", plan=find("rtn-4bit"))
    ids = torch.randint(3, models.VOCAB, (2, 9), generator=torch.Generator().manual_seed(1)).cuda()
    plain: Any = fewbit.load(tmp_path / "out", dtype=torch.bfloat16, device="cuda")
    with torch.inference_mode():
        expected = plain(ids).logits.float()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing had to be undone
            names = operations.replace(plain)
        got = plain(ids).logits.float()
    kinds = {kind for name in names for kind in ("norm", "attn", "mlp") if name.rpartition(".")[2].endswith(kind)}
    assert kinds == REPLACED[family], names
    assert (got - expected).norm() <= 0.02 * expected.norm()


def test_what_changes_a_model_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize.quantize(models.save(tmp_path / "original", "llama"), tmp_path / "out", plan=find("rtn-4bit"))
    model: Any = fewbit.load(tmp_path / "out", dtype=torch.bfloat16, device="cuda")
    monkeypatch.setattr(operations, "tolerance", lambda model: -1.0)
    with pytest.warns(UserWarning, match="are not used: they change its logits"):
        assert operations.replace(model) == []
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_norms_that_are_trained_keep_their_gradient(tmp_path: Path) -> None:
    quantize.quantize(models.save(tmp_path / "original", "llama"), tmp_path / "out", plan=find("rtn-4bit"))
    model: Any = fewbit.load(tmp_path / "out", dtype=torch.bfloat16, device="cuda")
    assert operations.replace(model)
    norms = [module.weight for name, module in model.named_modules() if name.endswith("norm")]
    for weight in norms:
        weight.requires_grad_()
    model(torch.arange(8, device="cuda")[None]).logits.float().square().mean().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in norms)
