"""`QLinear` is the linear layer of its dequantized weight, whatever is done to it, and takes no kernel's word."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from fewbit import registry
from fewbit.errors import KernelError, PlanError
from fewbit.kernels.base import Kernel, Prepared
from fewbit.kernels.reference import Reference
from fewbit.nn import choose as kernels_choose
from fewbit.nn import layers
from fewbit.nn.choose import TOLERANCE, choose, expected
from fewbit.nn.layers import QLinear
from fewbit.schemes.base import Codec, QTensor, parse
from fewbit.system import native
from tests.contract.cases import EXAMPLES, KERNELS, ordinary, quantized, same_bytes, several_groups

SPECS = list(dict.fromkeys([*EXAMPLES, "int4-g32", "int4-g32-sym", "int3-g16"]))
specs = pytest.mark.parametrize("spec", SPECS)
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(autouse=True)
def _own_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_choose, "_verdicts", {})


def weight_of(spec: str, n: int = 32, permuted: bool = False) -> QTensor:
    scheme, shape = parse(spec), several_groups(spec, n)
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(0)) if permuted else None
    return QTensor(scheme, shape, quantized(scheme, ordinary(*shape)), order)


def layer_of(weight: QTensor, dtype: torch.dtype = torch.float32, bias: bool = True) -> QLinear:
    n, k = weight.shape
    values = nn.Parameter(torch.linspace(-1, 1, n)) if bias else None
    return QLinear(k, n, values, "layer.7").adopt(weight, dtype)


def x_of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def close(y: Tensor, exact: Tensor, dtype: torch.dtype) -> bool:
    return bool((y.float() - exact.float()).norm() <= TOLERANCE[dtype] * exact.float().norm())


@specs
@dtypes
@pytest.mark.parametrize("permuted", [False, True])
def test_forward_is_the_dequantized_linear_for_any_shape(spec: str, dtype: torch.dtype, permuted: bool) -> None:
    weight = weight_of(spec, permuted=permuted)
    k = weight.shape[1]
    for bias in (True, False):
        layer = layer_of(weight, dtype, bias)
        for shape in ((k,), (1, k), (5, k), (2, 3, k), (2, 1, 3, k), (0, k), (2, 0, k)):
            x = x_of(*shape, dtype=dtype)
            y = layer(x)
            exact = nn.functional.linear(x.float(), weight.dequantize(), layer.bias)
            assert y.shape == exact.shape
            assert y.dtype == dtype
            assert close(y, exact, dtype)


@specs
@pytest.mark.parametrize("permuted", [False, True])
def test_the_gradient_is_the_dequantized_linears(spec: str, permuted: bool) -> None:
    weight = weight_of(spec, permuted=permuted)
    x, seed = x_of(2, 5, weight.shape[1]).requires_grad_(), x_of(2, 5, weight.shape[0])
    layer = layer_of(weight)
    layer(x).backward(seed)
    assert x.grad is not None
    assert layer.weight.grad is None
    exact = seed @ weight.dequantize()
    assert (x.grad - exact).norm() <= 1e-5 * exact.norm()
    assert layer.bias is not None
    torch.testing.assert_close(layer.bias.grad, seed.sum((0, 1)))


@dtypes
def test_a_gradient_has_the_dtype_of_the_activations(dtype: torch.dtype) -> None:
    weight = weight_of("int4-g32-sym")
    x = x_of(5, weight.shape[1], dtype=dtype).requires_grad_()
    y = layer_of(weight, dtype)(x)
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert close(x.grad, torch.ones(5, 32) @ weight.dequantize(), dtype)


@specs
def test_rows_are_dequantized_in_chunks_for_the_gradient(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "chunk_rows", lambda n, k: [slice(0, 3), slice(3, 20), slice(20, n)])
    test_the_gradient_is_the_dequantized_linears(spec, True)


@specs
def test_adopted_parts_come_back(spec: str) -> None:
    for permuted in (False, True):
        weight = weight_of(spec, permuted=permuted)
        for dtype in TOLERANCE:
            again = layer_of(weight, dtype).qtensor()
            assert again.codec == weight.codec
            assert again.shape == weight.shape
            assert same_bytes(again.parts, weight.parts)
            assert torch.equal(again.dequantize(), weight.dequantize())


CASTS: dict[str, Callable[[Any], Any]] = {
    "half": lambda layer: layer.half(),
    "bfloat16": lambda layer: layer.bfloat16(),
    "double": lambda layer: layer.double(),
    "to": lambda layer: layer.to(torch.bfloat16),
    "to device and dtype": lambda layer: layer.to("cpu", torch.float16),
    "type": lambda layer: layer.type(torch.float16),
    "in a model": lambda layer: nn.Sequential(layer).half()[0],
}


@specs
@pytest.mark.parametrize("cast", CASTS)
@dtypes
def test_a_cast_does_not_touch_the_weight(spec: str, cast: str, dtype: torch.dtype) -> None:
    weight = weight_of(spec, permuted=True)
    before = {name: part.clone() for name, part in weight.parts.items()}
    layer = CASTS[cast](layer_of(weight, dtype))
    assert same_bytes(layer.qtensor().parts, before)
    assert layer.permutation.dtype == torch.int64
    assert layer.bias.dtype != torch.float32
    x = x_of(3, weight.shape[1], dtype=dtype)
    assert close(layer(x), nn.functional.linear(x.float(), weight.dequantize(), layer.bias.float()), dtype)


@specs
def test_other_activations_are_served_by_preparing_again(spec: str) -> None:
    weight = weight_of(spec)
    for first in TOLERANCE:
        layer = layer_of(weight, first)
        for dtype in (*TOLERANCE, first):
            x = x_of(4, weight.shape[1], dtype=dtype)
            y = layer(x)
            assert y.dtype == dtype
            assert close(y, nn.functional.linear(x.float(), weight.dequantize(), layer.bias), dtype)
            assert same_bytes(layer.qtensor().parts, weight.parts)


@specs
def test_preparing_again_leaves_nothing_behind(spec: str) -> None:
    weight = weight_of(spec)
    for first in TOLERANCE:
        for then in TOLERANCE:
            layer = layer_of(weight, first)
            layer(x_of(1, weight.shape[1], dtype=then))
            assert set(layer.state_dict()) == set(layer_of(weight, then).state_dict())


def test_half_precision_may_use_another_kernel_on_the_cpu(without_library: None) -> None:
    layer = layer_of(weight_of("int4-g32-sym"), torch.bfloat16)
    assert layer.kernel is not None
    before = layer.kernel.name
    layer(x_of(1, 96))
    assert layer.kernel.name == "reference"
    layer(x_of(1, 96, dtype=torch.bfloat16))
    assert layer.kernel.name == before


@specs
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch"])
def test_copies_are_whole_and_apart(spec: str, how: str) -> None:
    weight = weight_of(spec, permuted=True)
    layer = layer_of(weight, torch.bfloat16)
    if how == "deepcopy":
        twin = copy.deepcopy(layer)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    x = x_of(3, weight.shape[1], dtype=torch.bfloat16)
    assert torch.equal(twin(x), layer(x))
    assert same_bytes(twin.qtensor().parts, weight.parts)
    twin.prepared[0].zero_()
    assert same_bytes(layer.qtensor().parts, weight.parts)


@specs
def test_parameters_sum_to_the_bytes_of_the_codes(spec: str) -> None:
    weight = weight_of(spec)
    layer = layer_of(weight, bias=False)
    (codes,) = layer.parameters()
    assert not codes.requires_grad
    assert not codes.is_floating_point()
    assert codes.nbytes == weight.parts[weight.codec.payload].nbytes
    held = sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))
    assert held == weight.nbytes


def test_tensors_are_awaited_and_taken() -> None:
    specs = parse("int4-g32").part_specs((32, 96))
    layer = QLinear(96, 32, None, "layer.7").await_tensors(specs)
    assert {name: (tuple(p.shape), p.dtype) for name, p in layer.named_parameters()} == {
        name: (spec.shape, spec.dtype) for name, spec in specs.items()
    }
    assert all(p.is_meta and not p.requires_grad for p in layer.parameters())
    assert set(layer.take_tensors()) == set(specs)
    assert list(layer.parameters()) == []
    with pytest.raises(AssertionError, match=r"layer\.7"):
        layer(x_of(1, 96))


def test_it_shows_what_it_is(without_library: None) -> None:
    assert "int4-g32-sym, kernel=reference" in repr(layer_of(weight_of("int4-g32-sym")))
    assert "empty" in repr(QLinear(96, 32, None))


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no C++ compiler was found."""
    for name in ("available", "library"):
        monkeypatch.setattr(native, name, lambda: "the CPU library was not built")


# --- the choice of a kernel ------------------------------------------------------------------------------------------


class Liar(Reference):
    """Says that it can, and cannot."""

    name: ClassVar[str] = "liar"
    priority: ClassVar[int] = 1000

    def linear(self, x: Tensor, codec: Codec, prepared: Prepared, shape: tuple[int, int]) -> Tensor:
        return super().linear(x, codec, prepared, shape) * 1.1


class Broken(Reference):
    """Fails, as where a compiler or a driver does."""

    name: ClassVar[str] = "broken"
    priority: ClassVar[int] = 1000

    def linear(self, x: Tensor, codec: Codec, prepared: Prepared, shape: tuple[int, int]) -> Tensor:
        raise RuntimeError("no such instruction")


class Choosy(Reference):
    """Refuses all."""

    name: ClassVar[str] = "choosy"
    priority: ClassVar[int] = 1000

    def why_not(self, codec: Codec, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> str | None:
        return "it does not like any weight"


@pytest.fixture
def liar(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(registry.entries("kernels"), "liar", Liar)
    return "liar"


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(registry.entries("kernels"), "broken", Broken)
    return "broken"


@pytest.fixture
def choosy(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(registry.entries("kernels"), "choosy", Choosy)
    return "choosy"


def test_a_kernel_that_lies_is_refused_with_a_warning(liar: str, without_library: None) -> None:
    weight = weight_of("int3-g16")
    with pytest.warns(UserWarning, match=r"kernel liar differs from the reference by 1\.\de-01 on int3-g16"):
        layer = layer_of(weight)
    assert layer.kernel is not None
    assert layer.kernel.name == "reference"
    x = x_of(3, weight.shape[1])
    assert close(layer(x), nn.functional.linear(x, weight.dequantize(), layer.bias), torch.float32)


class LiarOfMany(Reference):
    """Right for few rows."""

    name: ClassVar[str] = "liar_of_many"
    priority: ClassVar[int] = 1000
    checked: ClassVar[tuple[int, ...]] = (4, 64)

    def linear(self, x: Tensor, codec: Codec, prepared: Prepared, shape: tuple[int, int]) -> Tensor:
        return super().linear(x, codec, prepared, shape) * (1.1 if len(x) > 16 else 1.0)


def test_a_kernel_that_lies_of_many_rows_is_refused_too(monkeypatch: pytest.MonkeyPatch, without_library: None) -> None:
    monkeypatch.setitem(registry.entries("kernels"), "liar_of_many", LiarOfMany)
    with pytest.warns(UserWarning, match="liar_of_many differs from the reference by 1.0e-01"):
        layer = layer_of(weight_of("int3-g16"))
    assert layer.kernel is not None
    assert layer.kernel.name == "reference"


def test_a_kernel_that_lies_cannot_be_forced(liar: str) -> None:
    with pytest.warns(UserWarning, match="liar"), pytest.raises(KernelError, match="liar: differs"):
        choose(weight_of("int3-g16"), torch.device("cpu"), torch.float32, liar)


def test_a_kernel_that_fails_is_refused_with_a_warning(broken: str, without_library: None) -> None:
    with pytest.warns(UserWarning, match=r"kernel broken fails \(RuntimeError: no such instruction\) on int3-g16"):
        layer = layer_of(weight_of("int3-g16"))
    assert layer.kernel is not None
    assert layer.kernel.name == "reference"


def test_a_kernel_that_refuses_cannot_be_forced(choosy: str, without_library: None) -> None:
    with pytest.raises(KernelError, match="choosy: it does not like any weight"):
        choose(weight_of("int3-g16"), torch.device("cpu"), torch.float32, choosy)
    assert choose(weight_of("int3-g16"), torch.device("cpu"), torch.float32).name == "reference"


def test_when_none_can_every_reason_is_told(
    choosy: str, without_library: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reference, "unavailable", lambda self: "it is out of order")
    with pytest.raises(KernelError) as raised:
        choose(weight_of("int3-g16"), torch.device("cpu"), torch.float32)
    assert "choosy: it is out of order" in raised.value.hint
    for name in KERNELS:
        assert f"{name}: " in raised.value.hint
    assert "int3-g16" in raised.value.message


def test_an_unknown_kernel_gets_the_nearest_names() -> None:
    with pytest.raises(PlanError, match="Did you mean reference"):
        choose(weight_of("int3-g16"), torch.device("cpu"), torch.float32, "refrence")


@pytest.mark.parametrize("activations", ["exact", ""])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("spec", EXAMPLES)
def test_the_expected_kernel_is_the_chosen_one(
    spec: str, dtype: torch.dtype, activations: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEWBIT_ACTIVATIONS", activations)
    scheme, shape, cpu = parse(spec), several_groups(spec, 16), torch.device("cpu")
    weight = QTensor(scheme, shape, quantized(scheme, ordinary(*shape)))
    assert expected(scheme, shape, cpu, dtype) == choose(weight, cpu, dtype).name


def test_a_kernel_is_checked_once_for_each_scheme_and_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Counted(Reference):
        name: ClassVar[str] = "counted"
        priority: ClassVar[int] = 1000

        def linear(self, x: Tensor, codec: Codec, prepared: Prepared, shape: tuple[int, int]) -> Tensor:
            calls.append(shape)
            return super().linear(x, codec, prepared, shape)

    monkeypatch.setitem(registry.entries("kernels"), "counted", Counted)
    for _ in range(3):
        assert choose(weight_of("int3-g16"), torch.device("cpu"), torch.float32).name == "counted"
    assert len(calls) == 1
    choose(weight_of("int3-g16", 64), torch.device("cpu"), torch.float32)
    assert len(calls) == 2


def test_a_chosen_kernel_stays_when_the_activations_change() -> None:
    weight = weight_of("int4-g32-sym")
    layer = QLinear(weight.shape[1], 32, None).adopt(weight, torch.bfloat16, "reference")
    layer(x_of(1, weight.shape[1]))
    layer(x_of(1, weight.shape[1], dtype=torch.bfloat16))
    assert isinstance(layer.kernel, Kernel)
    assert layer.kernel.name == "reference"
