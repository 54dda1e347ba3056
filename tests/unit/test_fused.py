"""Stacked weights are the weights below one another, and a slice is the linear whose place it takes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbit.kernels.reference import Reference
from fewbit.nn.choose import TOLERANCE
from fewbit.nn.fused import Slice, packed_linears, slices
from fewbit.nn.layers import QLinear
from fewbit.schemes.base import QTensor, parse
from fewbit.schemes.stacked import Stacked, stack, unstack
from tests.contract.cases import EXAMPLES, ordinary, quantized, same_bytes, several_groups

ROWS = (16, 48, 32)
specs = pytest.mark.parametrize("spec", dict.fromkeys([*EXAMPLES, "int3-g16", "int4-g32-sym"]))


def weights(spec: str, permuted: bool = False) -> list[QTensor]:
    scheme, k = parse(spec), several_groups(spec)[1]
    order = torch.randperm(k, generator=torch.Generator().manual_seed(0)) if permuted else None
    made = [(n, quantized(scheme, ordinary(n, k, seed=n))) for n in ROWS]
    return [QTensor(scheme, (n, k), parts, order) for n, parts in made]


def linears(
    spec: str, dtype: torch.dtype = torch.float32, bias: bool = True, permuted: bool = False, kernel: str | None = None
) -> list[QLinear]:
    made = []
    for i, w in enumerate(weights(spec, permuted)):
        own = nn.Parameter(torch.randn(w.shape[0], generator=torch.Generator().manual_seed(i)).to(dtype))
        made.append(QLinear(w.shape[1], w.shape[0], own if bias else None, f"l{i}").adopt(w, dtype, kernel))
    return made


@specs
@pytest.mark.parametrize("permuted", [False, True])
def test_a_stack_is_its_weights_and_gives_them_back(spec: str, permuted: bool) -> None:
    each = weights(spec, permuted)
    whole = stack(each)
    assert whole.shape == (sum(ROWS), each[0].shape[1])
    assert torch.equal(whole.dequantize(), torch.cat([w.dequantize() for w in each]))
    whole.codec.check(whole.parts, whole.shape)
    assert whole.codec.why_not(whole.shape) is None
    for rows in (slice(0, 16), slice(10, 70), slice(63, 65), slice(95, 96)):
        part = whole.codec.dequantize(whole.parts, whole.shape, torch.float32, rows)
        plain = QTensor(whole.codec, whole.shape, whole.parts).dequantize()
        assert torch.equal(part.reshape(-1), plain[rows].reshape(-1))
    for before, after in zip(each, unstack(whole, ROWS), strict=True):
        assert same_bytes(before.parts, after.parts)
        assert after.shape == before.shape
        assert after.codec == before.codec


def test_what_refers_to_rows_alone_stays_an_ordinary_weight() -> None:
    kinds = {spec: type(stack(weights(spec)).codec) for spec in ("int4-g32", "llm.int8", "nf4-b64", "nf4-b64-dq")}
    assert [spec for spec, kind in kinds.items() if kind is Stacked] == ["nf4-b64-dq"]
    assert str(stack(weights("nf4-b64-dq")[:2]).codec) == "nf4-b64-dq x 16 over nf4-b64-dq x 48"
    assert stack(weights("nf4-b64-dq")).codec.why_not((7, 64)) == "its segments have 96 rows, not 7"


def test_blocks_that_cross_rows_stay_with_their_weight() -> None:
    scheme = parse("nf4-b64")
    each = [QTensor(scheme, (n, 96), quantized(scheme, ordinary(n, 96))) for n in (3, 5)]
    assert isinstance(stack(each).codec, Stacked)
    assert torch.equal(stack(each).dequantize(), torch.cat([w.dequantize() for w in each]))


@specs
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("permuted", [False, True])
def test_slices_multiply_as_the_linears_did(spec: str, dtype: torch.dtype, permuted: bool) -> None:
    each = linears(spec, dtype, permuted=permuted)
    made = slices(each)
    assert not isinstance(made, str), made
    x = torch.randn(2, 7, each[0].in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    for order in ((0, 1, 2), (2, 0, 1), (1, 1, 0, 2)):
        for i in order:
            got, wanted = made[i](x).detach().float(), each[i](x).detach().float()
            assert float((got - wanted).norm()) <= TOLERANCE[dtype] * float(wanted.norm())
            assert got.shape == wanted.shape
    assert [w.qtensor().shape for w in made] == [w.qtensor().shape for w in each]
    assert all(same_bytes(a.qtensor().parts, b.qtensor().parts) for a, b in zip(made, each, strict=True))


def test_one_multiplication_serves_all(monkeypatch: pytest.MonkeyPatch) -> None:
    made, calls = slices(linears("int4-g32", kernel="reference")), []
    assert not isinstance(made, str)
    plain = Reference.linear

    def counted(*arguments: Any) -> Tensor:
        calls.append(1)
        return plain(*arguments)

    monkeypatch.setattr(Reference, "linear", counted)
    x = torch.randn(3, made[0].in_features)
    for turn in range(2):
        for piece in made:
            piece(x)
        assert len(calls) == turn + 1
    assert made[0].product.kept is None  # nothing of the step stays
    made[0](x)
    made[1](x.clone())  # another tensor, though it is equal
    assert len(calls) == 4


def test_gradients_go_through() -> None:
    each = linears("int4-g32")
    made = slices(each)
    assert not isinstance(made, str)
    x = torch.randn(4, each[0].in_features)

    def gradient(layers: list[QLinear] | list[Slice]) -> Tensor:
        leaf = x.clone().requires_grad_()
        sum(layer(leaf).square().sum() for layer in layers).backward()
        assert leaf.grad is not None
        return leaf.grad

    wanted = gradient(each)
    assert float((gradient(made) - wanted).norm()) < 1e-5 * float(wanted.norm())


def test_bytes_count_once_and_copies_are_whole() -> None:
    each = linears("int4-g32")
    before = sum(t.nbytes for layer in each for t in (*layer.parameters(), *layer.buffers()))
    made = slices(each)
    assert not isinstance(made, str)
    model = nn.ModuleDict(dict(zip("qkv", made, strict=True)))
    assert sum(t.nbytes for t in (*model.parameters(), *model.buffers())) == before
    assert list(packed_linears(model)) == ["q", "k", "v"]
    x = torch.randn(2, each[0].in_features)
    twin: Any = copy.deepcopy(model).half()
    got = twin["k"](x.half())
    assert got.dtype == torch.float16
    assert twin["k"].product is twin["v"].product is not made[0].product
    assert torch.allclose(got.float(), each[1](x), atol=0.05)
    assert "slice 1" in repr(twin["k"])


def test_what_cannot_be_one_says_why() -> None:
    a, b = linears("int4-g32")[:2]
    other = QLinear(a.in_features, 4, None, "x")
    scheme = parse("int4-g32-sym")
    other.adopt(QTensor(scheme, (4, 96), quantized(scheme, ordinary(4, 96))), torch.float32)
    said = slices([a, b, other])
    assert said == "they differ in scheme: int4-g32, int4-g32-sym"
    b.adopt(b.qtensor(), torch.bfloat16)
    assert slices([a, b]) == "they differ in activations: torch.bfloat16, torch.float32"
    a, b = linears("int4-g32", permuted=True)[:2]
    b.permutation = None
    assert slices([a, b]) == "their columns are stored in different orders"


def test_a_better_kernel_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = parse("int4-g32-sym")
    each = [
        QLinear(64, 32, None, f"l{i}").adopt(
            QTensor(scheme, (32, 64), quantized(scheme, ordinary(32, 64, seed=i))), torch.bfloat16
        )
        for i in range(2)
    ]
    if each[0].kernel is None or each[0].kernel.name != "torch_int4":
        pytest.skip("PyTorch's 4-bit kernel does not serve this machine")
    made = slices(each)
    assert not isinstance(made, str)
    assert made[0].kernel is not None
    assert made[0].kernel.name == "torch_int4"
    kernel = type(each[0].kernel)
    monkeypatch.setattr(kernel, "why_not", lambda self, codec, shape, *a: "too tall" if shape[0] > 32 else None)
    assert slices(each) == "the kernel that each uses alone does not support [64, 64] of int4-g32-sym"
