"""What PyTorch lets a user switch for all code, such as the default dtype, changes no result of fewbit."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewbit
from fewbit import registry
from fewbit.errors import KernelError
from fewbit.kernels.cpu import kernel as cpu
from fewbit.methods.base import Method
from fewbit.schemes import nf4
from fewbit.schemes.base import parse
from fewbit.stats import Stats
from fewbit.system import ambient
from tests.contract.cases import EXAMPLES, KERNELS, METHODS, inputs, ordinary, quantized, several_groups, stats_of

SOURCE = Path(fewbit.__file__).parent
# What makes a tensor from nothing, in the default dtype and on the default device unless both are named.
MAKERS = {
    *("arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones"),
    *("rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "zeros"),
}


def unnamed(source: str) -> list[tuple[int, str]]:
    """Lines that make a tensor and leave its dtype or its device to the ambient default."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MAKERS):
            continue
        if isinstance(node.func.value, ast.Name) and node.func.value.id == "torch":
            missing = {"dtype", "device"} - {keyword.arg for keyword in node.keywords}
            if missing and not any(keyword.arg is None for keyword in node.keywords):
                found.append((node.lineno, f"torch.{node.func.attr} without {' and '.join(sorted(missing))}"))
    return found


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda file: str(file.relative_to(SOURCE)))
def test_every_new_tensor_names_its_dtype_and_device(file: Path) -> None:
    assert unnamed(file.read_text(encoding="utf-8")) == []


def test_a_tensor_of_the_default_dtype_is_found() -> None:
    assert unnamed("torch.empty(3, device=x.device)") == [(1, "torch.empty without dtype")]
    assert unnamed("torch.zeros(3, dtype=torch.int64)") == [(1, "torch.zeros without device")]
    assert unnamed("torch.zeros(3, dtype=d, device=x.device) + x.new_zeros(3) + torch.zeros_like(x)") == []


@pytest.fixture(params=["bfloat16", "float16", "float64", "meta", "inference"])
def switched(request: pytest.FixtureRequest) -> Iterator[None]:
    """A default dtype, a default device or inference mode."""
    if request.param == "inference":
        with torch.inference_mode():
            yield
    elif request.param == "meta":
        with torch.device("meta"):
            yield
    else:
        torch.set_default_dtype(getattr(torch, request.param))
        yield
        torch.set_default_dtype(torch.float32)


@dataclass
class Case:
    """A weight, what became of it by each method, its values, and products by each kernel."""

    weight: Tensor
    x: Tensor
    stats: Stats
    parts: dict[str, dict[str, Tensor]]
    values: Tensor
    products: dict[str, Tensor]


def tables() -> list[Any]:
    """The functions of fewbit that keep what they made."""
    modules = [module for name, module in sys.modules.items() if name.startswith("fewbit.schemes")]
    return [found for module in modules for found in vars(module).values() if hasattr(found, "cache_clear")]


def computed(spec: str, weight: Tensor, x: Tensor, stats: Stats) -> Case:
    scheme, shape = parse(spec), (weight.shape[0], weight.shape[1])
    parts = {name: method(name).quantize(weight, scheme, stats).weight.parts for name in METHODS}
    plain = quantized(scheme, weight)
    products = {}
    for name, kernel in KERNELS.items():
        if not kernel.unavailable() and not kernel.why_not(scheme, shape, torch.device("cpu"), x.dtype):
            prepared = kernel.prepare(scheme, plain, shape)
            products[name] = torch.cat([kernel.linear(rows, scheme, prepared, shape) for rows in (x, x[:3])])
    return Case(weight, x, stats, parts, scheme.dequantize(plain, shape, torch.float32), products)


def method(name: str) -> Method:
    found: Method = registry.get("methods", name)()
    return found


@cache
def right(spec: str) -> Case:
    n, k = several_groups(spec, 16)
    return computed(spec, ordinary(n, k), inputs(20, k), stats_of(inputs(64, k)))


@pytest.fixture
def wanted(request: pytest.FixtureRequest) -> Case:
    return right(request.param)


# `wanted` comes first: it is computed before anything is switched.
@pytest.mark.parametrize("wanted", EXAMPLES, indirect=True)
def test_schemes_methods_and_kernels_give_equal_numbers(
    wanted: Case, switched: None, request: pytest.FixtureRequest
) -> None:
    for table in tables():  # made anew, under what is switched
        table.cache_clear()
    got = computed(request.node.callspec.params["wanted"], wanted.weight, wanted.x, wanted.stats)
    for name, parts in wanted.parts.items():
        assert all(torch.equal(got.parts[name][part], tensor) for part, tensor in parts.items()), name
    assert torch.equal(got.values, wanted.values)
    assert got.products.keys() == wanted.products.keys()
    for name, product in wanted.products.items():
        assert torch.equal(got.products[name], product), name


def test_a_table_that_is_kept_serves_outside_inference_mode() -> None:
    nf4.levels.cache_clear()
    with torch.inference_mode():
        assert not nf4.levels("nf4", torch.device("cpu")).is_inference()


@pytest.mark.parametrize("place", ["activations", "part", "count"])
def test_the_library_gets_no_memory_that_it_could_not_use(place: str) -> None:
    kernel = KERNELS["cpu"]
    if kernel.unavailable():
        pytest.skip("there is no CPU library")
    scheme, shape = parse("int4-g32"), (16, 64)
    prepared, x = kernel.prepare(scheme, quantized(scheme, ordinary(*shape)), shape), inputs(3, 64)
    if place == "activations":
        x = x.to("meta")
    elif place == "part":
        prepared = tuple(part.to("meta") for part in prepared)
    else:
        x = inputs(3, 128)
    with pytest.raises(KernelError):
        kernel.linear(x, scheme, prepared, shape)


def test_a_buffer_of_another_dtype_or_size_is_refused() -> None:
    right = torch.zeros(4, dtype=torch.float32)
    assert cpu._start(right, torch.float32, 4) == right.data_ptr()
    wrong = [right.double(), right.bfloat16(), right[:3], right[::2], right.to("meta"), right.expand(1, 4)[:, ::2]]
    for tensor in wrong:
        with pytest.raises(KernelError, match="float32"):
            cpu._start(tensor, torch.float32, 4)


def test_the_last_thread_out_restores_the_defaults() -> None:
    first, second = ambient.defaults(), ambient.defaults()
    torch.set_default_dtype(torch.float64)
    try:
        with ThreadPoolExecutor(1) as other:
            other.submit(first.__enter__).result()
            with second:
                other.submit(first.__exit__, None, None, None).result()
                assert torch.get_default_dtype() == torch.float32
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
