"""Layers whose scales are trained compute as their packed layers, and have the gradients of the dequantized ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fewbit.nn.layers import QEmbedding, QLinear
from fewbit.nn.tuned import TunedEmbedding, TunedLinear, TunedWeight
from fewbit.schemes.base import QTensor, parse

SCHEMES = ("int4-g32-sym", "int3-g32", "nf4-b32", "nf4-b32-dq", "fp8-row", "llm.int8", "nvfp4", "q4_k", "q4_1")


def packed(spec: str, n: int = 24, k: int = 256, permuted: bool = False) -> QTensor:
    generator = torch.Generator().manual_seed(0)
    scheme, w = parse(spec), torch.randn(n, k, generator=generator)
    order = torch.randperm(k, generator=generator) if permuted else None
    return QTensor(scheme, (n, k), scheme.pack(*scheme.nearest(w)), order)


def tuned_linear(weight: QTensor) -> tuple[QLinear, TunedLinear]:
    n, k = weight.shape
    plain = QLinear(k, n, nn.Parameter(torch.linspace(-1, 1, n))).adopt(weight, torch.float32)
    return plain, TunedLinear(plain, TunedWeight(plain.qtensor()))


@pytest.mark.parametrize("spec", SCHEMES)
def test_a_tuned_linear_computes_as_the_packed_one(spec: str) -> None:
    plain, tuned = tuned_linear(packed(spec))
    x = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(tuned(x), plain(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.as_tensor(tuned.weight + 0), torch.as_tensor(plain.weight + 0))
    assert tuned.weight.dtype == torch.float32


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("spec", SCHEMES)
def test_gradients_are_those_of_the_dense_product(spec: str, permuted: bool) -> None:
    weight = packed(spec, permuted=permuted)
    tuned = TunedWeight(weight)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(7, 256, generator=generator, requires_grad=True)
    upstream = torch.randn(7, 24, generator=generator)
    tuned.product(x).backward(upstream)
    found = [x.grad, *(delta.grad for delta in tuned.delta.values())]

    deltas = {name: torch.zeros_like(delta, requires_grad=True) for name, delta in tuned.delta.items()}
    floats = {name: start * (1 + deltas[name]) for name, start in tuned.start.items()}
    values = weight.codec.values(weight.parts, weight.shape, floats)
    if weight.permutation is not None:
        values = torch.zeros_like(values).index_copy(1, weight.permutation, values)
    dense = x.detach().requires_grad_()
    (dense @ values.T).backward(upstream)
    for own, expected in zip(found, [dense.grad, *(delta.grad for delta in deltas.values())], strict=True):
        assert own is not None
        assert expected is not None
        assert float((own - expected).norm()) <= 1e-5 * float(expected.norm())


def moved(weight: TunedWeight, by: float) -> TunedWeight:
    with torch.no_grad():
        for delta in weight.delta.values():
            delta.fill_(by)
    return weight


def test_the_product_is_that_of_the_stored_scales() -> None:
    weight = packed("int4-g32-sym-bf16")
    assert torch.equal(moved(TunedWeight(weight), 2**-11).tuned().parts["scale"], weight.parts["scale"])
    large = moved(TunedWeight(weight), 0.03)
    stored = large.tuned()
    assert not torch.equal(stored.parts["scale"], weight.parts["scale"])
    assert torch.equal(stored.parts["scale"].bfloat16().half(), stored.parts["scale"])
    x = torch.eye(256)
    with torch.no_grad():
        assert torch.allclose(large.product(x).T, stored.dequantize(), rtol=1e-6)


def test_a_file_of_a_narrower_type_decides_the_rounding() -> None:
    stored = moved(TunedWeight(packed("int4-g32-sym"), torch.bfloat16), 0.03).tuned().parts["scale"]
    assert torch.equal(stored.bfloat16().half(), stored)


def test_codes_stay() -> None:
    for spec in SCHEMES:
        weight = packed(spec)
        stored = moved(TunedWeight(weight), 0.03).tuned()
        scheme = parse(spec)
        was, now = (scheme.unpack(each.parts, each.shape)[0] for each in (weight, stored))
        assert torch.equal(was, now)
        assert not torch.equal(stored.dequantize(), weight.dequantize())


def test_shared_numbers_are_trained_as_one() -> None:
    one, other = TunedWeight(packed("nvfp4")), TunedWeight(packed("nvfp4", n=16))
    with torch.no_grad():
        other.start["global"].copy_(one.start["global"])
    other.share(one)
    assert other.delta["global"] is one.delta["global"]
    apart = TunedWeight(packed("fp8-row"))
    apart.share(TunedWeight(packed("fp8-row")))
    assert apart.delta["scale"].numel() == 24


def test_a_tied_embedding_and_head_train_one_weight() -> None:
    weight = packed("q6_k", n=12)
    shared = TunedWeight(weight)
    embedding = TunedEmbedding(QEmbedding(12, 256, scale=2.0).adopt(weight, torch.float32), shared)
    head = TunedLinear(QLinear(256, 12, None).adopt(weight, torch.float32), shared)
    ids = torch.tensor([[3, 3, 7]])
    out: Tensor = embedding(ids)
    assert torch.equal(out.detach(), 2 * weight.dequantize()[ids])
    out.sum().backward()
    used = shared.delta["d"].grad
    assert used is not None
    assert sorted(set(used.nonzero()[:, 0].tolist())) == [3, 7]
    head(torch.ones(1, 256)).sum().backward()
    assert shared.delta["d"].grad is not None
    assert len(set(shared.delta["d"].grad.nonzero()[:, 0].tolist())) == 12
