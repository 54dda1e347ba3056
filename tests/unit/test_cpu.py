"""The native library: each instruction set, any number of threads, under the compiler, and what it refuses."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from torch import Tensor

from fewbit import registry
from fewbit.advise import doctor
from fewbit.errors import KernelError
from fewbit.kernels.base import Kernel
from fewbit.kernels.cpu.kernel import product
from fewbit.nn.choose import choose
from fewbit.nn.fused import slices
from fewbit.nn.layers import QLinear
from fewbit.schemes.base import QTensor, parse
from fewbit.schemes.ggml import codebook
from fewbit.schemes.ggml.codec import ReadOnly
from fewbit.system import native
from tests.contract.cases import EXAMPLES, ordinary, quantized

SPECS = [*EXAMPLES, "int4-g32", "int3-g16", "int3-g320", "int3-row", "int2-g32", "int8-g32", "int4-row", "int2-row"]
specs = pytest.mark.parametrize("spec", dict.fromkeys(SPECS))


def kernel_of(name: str) -> Kernel:
    made: Kernel = registry.get("kernels", name)()
    return made


def weight_of(spec: str, n: int = 33, k: int = 1280) -> QTensor:
    scheme = parse(spec)
    k = k if scheme.why_not((n, k)) is None else 1024
    return QTensor(scheme, (n, k), quantized(scheme, ordinary(n, k) + 0.02))


def x_of(m: int, k: int) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m)) + 0.3


@specs
def test_every_instruction_set_gives_the_product(instructions: str, spec: str) -> None:
    assert native.instructions() == instructions
    weight = weight_of(spec)
    for name in ("cpu", "cpu_exact"):
        kernel = kernel_of(name)
        prepared = kernel.prepare(weight.codec, weight.parts, weight.shape)
        for m in (1, 2, 3, 4, 8, 9, 70):
            x = x_of(m, weight.shape[1])
            exact = kernel.rounded(x, weight.codec) @ weight.dequantize().T
            y = kernel.linear(x, weight.codec, prepared, weight.shape)
            assert (y - exact).norm() <= 1e-5 * exact.norm()
            if name == "cpu" and m <= 8:
                last = kernel.linear(x[-1:], weight.codec, prepared, weight.shape)
                assert torch.equal(y[-1:], last), "a row depends on the number of rows"


@pytest.mark.parametrize("name", ["iq1_s", "iq1_m"])
def test_types_that_are_only_read_are_multiplied(instructions: str, name: str) -> None:
    codec, shape = ReadOnly(name), (33, 1280)
    random = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (33 * 5, codec.type.nbytes), generator=random, dtype=torch.uint8)
    blocks = codebook.with_scale(name, blocks, torch.rand(33 * 5, 1, generator=random) - 0.5)
    parts = {"blocks": blocks.view(33, -1)}
    for kernel, m in itertools.product(map(kernel_of, ("cpu", "cpu_exact")), (1, 5, 9)):
        x = x_of(m, 1280)
        exact = kernel.rounded(x, codec) @ codec.dequantize(parts, shape, torch.float32).T
        y = kernel.linear(x, codec, kernel.prepare(codec, parts, shape), shape)
        assert (y - exact).norm() <= 1e-5 * exact.norm()


TAILS = [
    (spec, k)
    for spec in dict.fromkeys(SPECS)
    for k in (96, 160, 384, 576)
    if parse(spec).why_not((5, k)) is None
    and kernel_of("cpu").why_not(parse(spec), (5, k), torch.device("cpu"), torch.float32) is None
]


@pytest.mark.parametrize(("spec", "k"), TAILS)
def test_rows_that_end_within_a_step_stop_there(instructions: str, spec: str, k: int) -> None:
    weight, kernel, x = weight_of(spec, 5, k), kernel_of("cpu"), x_of(3, k)
    exact = kernel.rounded(x, weight.codec) @ weight.dequantize().T
    y = kernel.linear(x, weight.codec, kernel.prepare(weight.codec, weight.parts, weight.shape), weight.shape)
    assert (y - exact).norm() <= 1e-5 * exact.norm()


SMALL = [*((spec, 96) for spec in ("q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "q8_0")), ("q2_0", 192), ("q1_0", 384)]


@pytest.mark.parametrize(("spec", "k"), SMALL)
def test_a_row_does_not_see_the_next_one_spoilt(instructions: str, spec: str, k: int) -> None:
    weight, kernel, x = weight_of(spec, 2, k), kernel_of("cpu"), x_of(1, k)
    before = kernel.linear(x, weight.codec, kernel.prepare(weight.codec, weight.parts, (2, k)), (2, k))
    parts = {name: part.clone() for name, part in weight.parts.items()}
    whole = parts[weight.codec.payload].view(torch.uint8).flatten()
    whole[len(whole) // 2 :] = 0x7C  # 0x7c7c is not a number
    after = kernel.linear(x, weight.codec, kernel.prepare(weight.codec, parts, (2, k)), (2, k))
    assert torch.equal(after[:, 0], before[:, 0])
    assert bool(after[:, 1].isnan().all())


@specs
def test_results_depend_on_neither_threads_nor_rows_beside(library: ctypes.CDLL, spec: str) -> None:
    weight, kernel, threads = weight_of(spec, 257), kernel_of("cpu"), torch.get_num_threads()
    x = x_of(8, weight.shape[1])
    prepared = kernel.prepare(weight.codec, weight.parts, weight.shape)
    found = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(kernel.linear(x, weight.codec, prepared, weight.shape))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(y, found[0]) for y in found)
    for m in (1, 2, 3, 5):
        assert torch.equal(kernel.linear(x[:m], weight.codec, prepared, weight.shape), found[0][:m])


@specs
def test_rounding_activations_costs_half_a_percent(library: ctypes.CDLL, spec: str) -> None:
    weight, kernel = weight_of(spec), kernel_of("cpu")
    x = x_of(8, weight.shape[1])
    read = kernel.rounded(x, weight.codec)
    assert (read - x).norm() <= 0.006 * x.norm()
    groups = x.unflatten(1, (-1, 32))
    assert bool(((read - x).unflatten(1, (-1, 32)).abs() <= groups.abs().amax(-1, keepdim=True) / 253).all())


def test_what_is_not_finite_stays_so(library: ctypes.CDLL) -> None:
    weight, kernel = weight_of("q4_k"), kernel_of("cpu")
    x = x_of(3, weight.shape[1])
    x[1, 7], x[2, 9] = torch.nan, torch.inf
    y = kernel.linear(x, weight.codec, kernel.prepare(weight.codec, weight.parts, weight.shape), weight.shape)
    assert bool(y[0].isfinite().all())
    assert not bool(y[1:].isfinite().any())


HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


@HALVES
@pytest.mark.parametrize("spec", ["int4-g128", "nf4-b64"])
def test_16_bits_are_read_exactly_and_written_to_the_nearest(
    library: ctypes.CDLL, spec: str, dtype: torch.dtype
) -> None:
    weight, kernel = weight_of(spec, 400), kernel_of("cpu")
    prepared = kernel.prepare(weight.codec, weight.parts, weight.shape)
    x = x_of(5, weight.shape[1]).to(dtype)
    x[1, 3], x[2, 4], x[3] = torch.nan, torch.inf, 0
    got = kernel.linear(x, weight.codec, prepared, weight.shape)
    exact = kernel.linear(x.float(), weight.codec, prepared, weight.shape)
    assert got.dtype == dtype
    torch.testing.assert_close(got, exact.to(dtype), rtol=0, atol=0, equal_nan=True)


@HALVES
def test_every_number_in_16_bits_is_read(instructions: str, dtype: torch.dtype) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).short().view(dtype)
    every = every.where(every.isfinite(), 0).view(-1, 64)
    same = torch.cat([product(rows, torch.eye(64, dtype=dtype)) for rows in every.split(8)])
    assert torch.equal(same, every)
    assert torch.equal(product(torch.eye(64), every), every.float().T)


@HALVES
@pytest.mark.parametrize("n", [4000, 4013])
def test_sums_in_16_bits_are_rounded_to_the_nearest(instructions: str, dtype: torch.dtype, n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scales = 10.0 ** (torch.rand(n, 1, generator=generator) * 14 - 9)  # some sums overflow float16, some underflow
    weight, x = (ordinary(n, 64) * scales).to(dtype), x_of(4, 64).to(dtype)
    exact, got = product(x.float(), weight).to(dtype), product(x, weight)
    assert torch.equal(got, exact)
    if dtype == torch.float16:
        small = got.abs()[got != 0].min()
        assert bool(got.isinf().any())
        assert small < 2**-20


@HALVES
@pytest.mark.parametrize("k", [1, 31, 96, 1000])
def test_weights_in_16_bits_are_multiplied_as_they_are(instructions: str, dtype: torch.dtype, k: int) -> None:
    weight = (ordinary(37, k) + 0.02).to(dtype)
    for m in (1, 2, 3, 5, 8, 9, 70):
        x = x_of(m, k)
        exact = x.double() @ weight.double().T
        y = product(x, weight)
        assert (y - exact).norm() <= 3e-7 * exact.norm()
        if m <= 8:
            assert torch.equal(y[-1:], product(x[-1:], weight)), "a row depends on the number of rows"
            theirs = torch.nn.functional.linear(x.to(dtype), weight).double()
            exact = x.to(dtype).double() @ weight.double().T
            assert (product(x.to(dtype), weight) - exact).norm() <= 1.05 * (theirs - exact).norm() + 1e-7


@HALVES
def test_a_row_in_16_bits_does_not_see_the_next_one(instructions: str, dtype: torch.dtype) -> None:
    weight, x = ordinary(3, 41).to(dtype), x_of(1, 41)
    before = product(x, weight)
    weight[1] = torch.nan
    after = product(x, weight)
    assert torch.equal(after[:, ::2], before[:, ::2])
    assert bool(after[:, 1].isnan())
    weight[1, 3], weight[1, 4:] = torch.inf, 0
    assert bool(product(x.abs(), weight[1:2].nan_to_num(0, torch.inf)).isinf())


@pytest.mark.parametrize("k", [1024, 1037])
def test_a_weight_that_no_cache_keeps_is_read_whole(instructions: str, k: int) -> None:
    """One row reads such a weight past the caches, two rows do not."""
    n = (1 << 24) // k + 1
    generator = torch.Generator().manual_seed(k)
    weight = torch.randn(n, k, generator=generator).bfloat16()
    x = torch.randn(2, k, generator=generator).bfloat16()
    assert torch.equal(product(x[:1], weight), product(x, weight)[:1])


@HALVES
def test_threads_do_not_change_products_in_16_bits(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    weight, x, threads = ordinary(1031, 200).to(dtype), x_of(5, 200), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(product(x, weight))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(y, found[0]) for y in found)


def test_weights_in_16_bits_that_are_not_whole_are_refused(library: ctypes.CDLL) -> None:
    weight = ordinary(8, 64).bfloat16()
    with pytest.raises(KernelError, match="not contiguous"):
        product(x_of(1, 32), weight[:, ::2])
    with pytest.raises(KernelError, match="too short"):
        product(x_of(1, 128), weight)


def test_it_is_an_op_that_the_compiler_understands(library: ctypes.CDLL) -> None:
    weight = weight_of("q4_k", 16, 256)
    arguments = (x_of(2, 256), list(weight.parts.values()), 16 + 7, 0, 0, 16, False)
    torch.library.opcheck(torch.ops.fewbit.cpu_linear.default, arguments)


def test_short_scattered_and_foreign_buffers_are_refused(library: ctypes.CDLL) -> None:
    weight = weight_of("int4-g128", 16, 256)
    codes, scale, zero = (weight.parts[name] for name in ("codes", "scale", "zero"))
    op, x = torch.ops.fewbit.cpu_linear, x_of(1, 256)
    wide = torch.zeros(16, 256, dtype=torch.uint8)
    for x_, parts, bits, group, words in (
        (x, [codes[:-1], scale, zero], 4, 128, "too short"),
        (x, [codes, scale[:1], zero], 4, 128, "too short"),
        (x, [codes, scale, zero[:1]], 4, 128, "too short"),
        (x, [wide[:, ::2], scale, zero], 4, 128, "not contiguous"),
        (x, [codes, scale.double(), zero], 4, 128, "unknown dtype"),
        (x_of(1, 512), [codes, scale, zero], 4, 128, "too short"),
        (x, [codes, scale, zero], 4, 96, "does not fit"),
        (x, [codes, scale, zero], 9, 128, "does not fit"),
        (x[0], [codes, scale, zero], 4, 128, "dimensions"),
    ):
        with pytest.raises(KernelError, match=words):
            op(x_, parts, 0, bits, group, 16, False)
    odd = torch.zeros(4 * 16 + 1, dtype=torch.uint8)[1:].view(torch.uint8)
    with pytest.raises(KernelError, match="unknown"):
        op(x, [odd], 99, 0, 0, 16, False)


def test_a_kernel_that_rounds_serves_unless_exact_is_set(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, cpu = weight_of("q4_k"), torch.device("cpu")
    assert choose(weight, cpu, torch.float32).name == "cpu_exact"
    assert choose(weight, cpu, torch.float32, "cpu").name == "cpu"
    monkeypatch.delenv("FEWBIT_ACTIVATIONS")
    assert choose(weight, cpu, torch.float32).name == "cpu"
    assert choose(weight, cpu, torch.float32, "cpu_exact").name == "cpu_exact"


@pytest.mark.parametrize("k", [64, 100, 200, 384])
def test_blocks_of_fp8_end_where_they_must(instructions: str, k: int) -> None:
    scheme = parse("fp8-b128")
    w = (
        ordinary(300, k)
        * 10.0
        ** torch.randint(-2, 3, (3, 3), generator=torch.Generator().manual_seed(0))
        .repeat_interleave(128, 0)
        .repeat_interleave(128, 1)[:300, :k]
    )
    parts = quantized(scheme, w)
    for name in ("cpu", "cpu_exact"):
        for m in (1, 3, 9):
            x = x_of(m, k)
            exact = x @ scheme.dequantize(parts, (300, k), torch.float32).T
            y = kernel_of(name).linear(x, scheme, kernel_of(name).prepare(scheme, parts, (300, k)), (300, k))
            assert (y - exact).norm(dim=0).le(1e-5 * exact.norm(dim=0) + 1e-5 * x.norm() * w.norm(dim=1)).all()


@pytest.mark.parametrize("spec", ["nvfp4", "nvfp4-mul"])
def test_each_row_has_its_global_scale(instructions: str, spec: str) -> None:
    """Weights of other makers have any global scale, and each keeps its own when they are fused."""
    weight = weight_of(spec, 8, 160)
    weight.parts["global"] = torch.logspace(-2, 3, 8)[:, None] * 1.7
    exact = x_of(3, 160) @ weight.dequantize().T
    kernel = kernel_of("cpu_exact")
    y = kernel.linear(x_of(3, 160), weight.codec, kernel.prepare(weight.codec, weight.parts, (8, 160)), (8, 160))
    assert ((y - exact).norm(dim=0) <= 1e-5 * exact.norm(dim=0)).all()
    rounded = kernel_of("cpu").rounded(x_of(3, 160), weight.codec) @ weight.dequantize().T
    y = kernel_of("cpu").linear(
        x_of(3, 160), weight.codec, kernel.prepare(weight.codec, weight.parts, (8, 160)), (8, 160)
    )
    assert ((y - rounded).norm(dim=0) <= 1e-5 * rounded.norm(dim=0)).all()


@pytest.mark.parametrize("spec", ["q4_k", "nf4-b64-dq", "fp8-b128", "fp8-row", "mxfp4", "nvfp4"])
def test_fused_weights_are_served_too(library: ctypes.CDLL, spec: str) -> None:
    weights = [weight_of(spec, n, 512) for n in (8, 24)]
    linears = [QLinear(512, w.shape[0], None).adopt(w, torch.float32) for w in weights]
    made = slices(linears)
    assert not isinstance(made, str)
    assert made[0].kernel.name == "cpu_exact"
    x = x_of(2, 512)
    for one, linear in zip(made, linears, strict=True):
        assert (one(x) - linear(x)).norm() <= 1e-5 * linear(x).norm()


def look_again() -> None:
    native.available.cache_clear()
    native.library.cache_clear()


def test_doctor_says_what_is_lost_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    look_again()
    monkeypatch.setenv("FEWBIT_CPU_LIBRARY", "none")
    try:
        found = doctor.look()
        assert "switched off" in (found.kernels["cpu"] or "")
        assert any("ten times as long" in line and "compiler" in line for line in found.advice)
        assert choose(weight_of("q4_k"), torch.device("cpu"), torch.float32).name == "reference"
        monkeypatch.setenv("FEWBIT_CPU_LIBRARY", "/no/such/file")
        look_again()
        assert "names no file" in str(native.library())
    finally:
        look_again()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [1, 200])
@pytest.mark.parametrize("name", ["cpu", "cpu_exact"])
def test_the_default_dtype_changes_no_product(library: ctypes.CDLL, name: str, rows: int, dtype: torch.dtype) -> None:
    weight, kernel = weight_of("int4-g32"), kernel_of(name)
    prepared = kernel.prepare(weight.codec, weight.parts, weight.shape)
    x = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(0))
    expected = kernel.linear(x, weight.codec, prepared, weight.shape)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device("meta"):
            got = kernel.linear(x, weight.codec, prepared, weight.shape)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(got, expected)
