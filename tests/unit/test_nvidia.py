"""The layout of the kernels for NVIDIA GPUs, and the Triton ones run by Triton's interpreter, without a GPU."""

from __future__ import annotations

import json
import re
import traceback
from functools import cache
from importlib.util import find_spec

import pytest
import torch

from fewbit.kernels.nvidia import Nvidia, in_cuda, layout
from fewbit.kernels.nvidia.in_cuda import Sizes
from fewbit.kernels.nvidia.layout import Recipe
from fewbit.methods.rtn import RoundToNearest
from fewbit.nn.choose import TOLERANCE
from fewbit.schemes.base import QTensor, parse
from fewbit.schemes.nf4 import FourBit, levels
from fewbit.schemes.stacked import concatenated
from tests import interpreter
from tests.contract.cases import SPECS, hard, is_sentence, ordinary, quantized, same_bytes

CUDA = torch.device("cuda")
SERVED = [spec for spec in SPECS if isinstance(layout.recipe(parse(spec), 1024), Recipe)]


def shapes(spec: str) -> list[tuple[int, int]]:
    """Shapes in which the scheme is stored and multiplied."""
    scheme, found = parse(spec), [(33, 512), (20, 288)]
    if scheme.group == 16:
        found.append((18, 144))  # half a step of 32 columns at the end
    return [s for s in found if scheme.why_not(s) is None and isinstance(layout.recipe(scheme, s[1]), Recipe)]


TOLD = (
    *("int4-g128", "int4-g32-sym", "int4-row", "int3-g64", "int2-g16", "int5-g32", "int8-g32", "nf4-b64-dq"),
    *("fp4-b32", "llm.int8", "q4_1", "q5_0", "q3_k", "q4_k", "q6_k", "iq4_nl", "iq4_xs"),
    *("fp8-row", "fp8-tensor", "fp8-b128", "mxfp4", "nvfp4", "nvfp4-mul"),
)

interpreted = pytest.mark.skipif(
    find_spec("triton") is None or torch.cuda.is_available(),
    reason="Triton is not installed" if find_spec("triton") is None else "tests/gpu runs the kernels themselves",
)


@pytest.mark.parametrize("spec", SERVED)
def test_the_parts_come_back_byte_for_byte(spec: str) -> None:
    scheme = parse(spec)
    for n, k in ((33, 1024), (20, 288), (7, 512)):
        if scheme.why_not((n, k)) is None and isinstance(layout.recipe(scheme, k), Recipe):
            parts = quantized(scheme, hard(n, k))
            prepared = Nvidia().prepare(scheme, parts, (n, k))
            assert prepared[0].dtype == torch.int32
            assert same_bytes(Nvidia().restore(scheme, prepared, (n, k)), parts)


def test_each_column_is_in_a_place_of_its_own() -> None:
    """One code that is not nought sets one bit field, in the word whose thread reads that column of x."""
    for spec in ("int4-g128-sym", "int4-g16-sym", "int2-g32-sym", "int8-g32-sym"):
        how = layout.recipe(parse(spec), 256)
        assert isinstance(how, Recipe)
        seen = set()
        for column in range(how.tile):
            codes = torch.zeros(1, how.tile, dtype=torch.uint8)
            codes[0, column] = 1
            (word,) = layout._gathered(codes, how, how.low, torch.int32)[0].nonzero().flatten().tolist()
            span, inside = divmod(column, 32)
            thread = inside % 16 // 4 if how.sub == 16 else inside // 8
            assert word // 4 == thread
            value = int(layout._gathered(codes, how, how.low, torch.int32)[0, word]) & 0xFFFFFFFF
            assert value == 1 << how.low * (span + column % 2 * how.lanes // 2)
            seen.add((word, value))
        assert len(seen) == how.tile


@pytest.mark.parametrize(
    ("spec", "k"), [("int7-g32", 256), ("int4-g24", 96), ("int4-row", 37), ("nf4-b64", 96), ("int4-row", 24)]
)
def test_what_it_cannot_serve_is_a_sentence(spec: str, k: int) -> None:
    assert is_sentence(str(layout.recipe(parse(spec), k)))


def test_it_says_why_it_does_not_serve() -> None:
    kernel, scheme, shape = Nvidia(), parse("int4-g128"), (64, 256)
    assert "not on cpu" in str(kernel.why_not(scheme, shape, torch.device("cpu"), torch.bfloat16))
    assert "float32" in str(kernel.why_not(scheme, shape, CUDA, torch.float32))
    if not torch.cuda.is_available():
        assert is_sentence(kernel.unavailable())


def test_the_macros_of_the_cuda_kernel_are_all_defined() -> None:
    how = layout.recipe(parse("int4-g128"), 256)
    assert isinstance(how, Recipe)
    for many, cluster, mark in ((0, 0, "defines:"), (1, 0, "on Hopper:"), (1, 2, "More macros:")):
        text = in_cuda.defined(how, (256, 32, 0), (0, False), Sizes(8, 1, 1, 1, many, cluster), True, True)
        defined = {line.split()[1].split("(")[0] for line in text.splitlines() if line.startswith("#define")}
        for named_after in {"defines:", mark}:
            named = re.findall(r"\b[A-Z_]{2,}\b", text.split(named_after)[1].split(".")[0])
            assert named
            assert set(named) <= defined


@pytest.mark.parametrize(("kilobytes", "of_x"), [(227, 16), (163, 8), (99, 8), (64, 4), (10, 1)])
def test_sizes_are_such_that_shared_memory_suffices(kilobytes: int, of_x: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_cuda, "_shared_room", lambda device: kilobytes << 10)
    how = layout.recipe(parse("int2-g64"), 1024)
    assert isinstance(how, Recipe)
    assert in_cuda.fitting(Sizes(8, 2, 16, 1, 1), how, CUDA) == Sizes(8, 2, of_x, 1, 1)


def test_sizes_are_such_that_blocks_fill_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbit.kernels.nvidia import ops, sizes

    monkeypatch.setattr(in_cuda, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(in_cuda, "_shared_room", lambda device: 227 << 10)
    monkeypatch.setattr(in_cuda, "unusable", lambda device: None)
    monkeypatch.setattr(sizes, "tuned", lambda device: None)
    monkeypatch.setattr(in_cuda, "hopper", lambda device: True)
    how = layout.recipe(parse("int4-g128"), 4096)
    assert isinstance(how, Recipe)
    for n, own in ((8192, (8, 2, 1, 2)), (6144, (8, 1, 1, 3)), (4096, (8, 1, 1, 2)), (28672, (8, 2, 1, 2))):
        assert ops.choose(1, n, 4096, how, CUDA) == (ops.CUDA, *own, 0, 0)
    of_fp4 = layout.recipe(parse("mxfp4"), 4096)
    assert isinstance(of_fp4, Recipe)
    for n, own in ((8192, (8, 2, 1, 2)), (6144, (8, 1, 1, 3)), (4096, (8, 1, 1, 2)), (28672, (8, 1, 1, 3))):
        assert ops.choose(1, n, 4096, of_fp4, CUDA) == (ops.CUDA, *own, 0, 0)
    monkeypatch.setattr(in_cuda, "hopper", lambda device: False)
    assert ops.choose(64, 4096, 4096, how, CUDA) == (ops.CUDA, 16, 1, 8, 1, 1, 0)
    assert ops.choose(256, 4096, 4096, how, CUDA) == (ops.CUDA, 8, 2, 16, 1, 1, 0)
    assert ops.choose(257, 4096, 4096, how, CUDA) == (ops.VALUES,)
    monkeypatch.setattr(in_cuda, "hopper", lambda device: True)
    for rows, of_w, of_x, cluster in ((64, 1, 8, 1), (65, 1, 16, 1), (129, 1, 24, 2), (2048, 1, 32, 2)):
        assert ops.choose(rows, 4096, 4096, how, CUDA) == (ops.CUDA, 8, of_w, of_x, 1, 1, cluster)
    assert ops.choose(2049, 4096, 4096, how, CUDA) == (ops.VALUES,)


def test_launches_in_graphs_have_counters_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs may be replayed at the same time."""
    device = torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(in_cuda, "_counters", cache(in_cuda._counters.__wrapped__))
    given = [in_cuda._done(device, 132) for _ in range(4000)]
    assert all(len(each) == 132 and not each.any() for each in given)
    starts = [each.storage_offset() for each in given]
    assert starts == list(range(0, 4000 * 132, 132))
    assert len({each.untyped_storage().data_ptr() for each in given}) == 1
    again = [in_cuda._done(device, 132).storage_offset() for _ in range(4000)]
    assert 0 in again  # from the start, when all were given
    assert max(again) + 132 <= 1 << 20


def test_experts_get_sizes_by_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbit.kernels.nvidia import ops

    monkeypatch.setattr(in_cuda, "unusable", lambda device: None)
    up, down, double = (
        layout.recipe(parse(s), k) for s, k in (("int4-g128", 2048), ("int4-g128", 768), ("nf4-b64-dq", 768))
    )
    assert isinstance(up, Recipe)
    assert isinstance(down, Recipe)
    assert isinstance(double, Recipe)
    for tokens, sizes in ((1, (4, 2, 1, 3)), (64, (4, 2, 1, 3)), (512, (4, 2, 2, 3))):
        assert ops.choose_grouped(8 * tokens, 1536, 2048, 128, up, CUDA) == (ops.CUDA, *sizes, 0, 0)
    assert ops.choose_grouped(8, 2048, 768, 128, down, CUDA) == (ops.CUDA, 6, 2, 1, 2, 0, 0)
    assert ops.choose_grouped(1 << 16, 2048, 768, 128, down, CUDA) == (ops.VALUES,)
    assert ops.choose_grouped(1 << 16, 2048, 768, 128, double, CUDA) == (ops.LOOP,)
    assert ops.choose_grouped(1 << 16, 2048, 7168, 256, up, CUDA) == (ops.LOOP,)  # too much to dequantize at once


@pytest.mark.parametrize("spec", ["nf4-b64", "nf4-b128-dq", "fp4-b64"])
def test_rounding_of_levels_does_not_shift_weights(spec: str) -> None:
    """Kernels look up levels in 16 bits, so all weights of a code get the same error. Its mean must be small."""
    n, k, scheme = 64, 8192, parse(spec)
    assert isinstance(scheme, FourBit)
    weight = (
        RoundToNearest().quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(0)), scheme, None).weight
    )
    how = layout.recipe(scheme, k)
    assert isinstance(how, Recipe)
    table = layout.prepared(scheme, weight.parts, (n, k))[-1]
    codes = scheme.unpack(weight.parts, (n, k))[0].long()
    exact = levels(scheme.kind, table.device)[codes]
    used = (table.bfloat16().float() * how.factor / how.divisor)[codes]
    assert abs(float((used - exact).mean())) < 1e-4 * float(exact.square().mean().sqrt())


def test_weights_of_experts_are_cut_from_the_layout() -> None:
    specs = ("int4-g128", "int3-g64", "nf4-b64", "q4_k", "fp8-row", "fp8-tensor", "fp8-b128", "mxfp4", "nvfp4")
    for spec, k in (*((spec, 512) for spec in specs), ("nvfp4-mul", 272), ("nf4-b64-dq", 1024)):
        kernel, scheme, shape = Nvidia(), parse(spec), (3, 32, k)
        if kernel.why_not_grouped(scheme, shape) is not None:
            shape = (3, 16 * 16, k)  # whole blocks of nested scales, or of FP8
        each = [QTensor(scheme, shape[1:], quantized(scheme, hard(*shape[1:]).roll(i, 0))) for i in range(3)]
        whole = concatenated(each)
        prepared = kernel.prepare(scheme, whole.parts, whole.shape)
        for expert, weight in enumerate(each):
            own = kernel.of_expert(scheme, prepared, shape, expert)
            assert same_bytes(kernel.restore(scheme, own, shape[1:]), weight.parts)


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("int4-g128", (4, 24, 256)),
        ("nf4-b64-dq", (4, 32, 64)),
        ("fp8-b128", (4, 192, 256)),
        ("int4-g128", (1 << 14, 4096, 4096)),
    ],
)
def test_experts_that_it_cannot_serve_are_a_sentence(spec: str, shape: tuple[int, int, int]) -> None:
    assert is_sentence(Nvidia().why_not_grouped(parse(spec), shape))


def check(spec: str) -> None:
    """The Triton kernels' products and values of a scheme in Triton's interpreter, beside those of the definition."""
    from fewbit.kernels.nvidia import ops

    scheme = parse(spec)
    assert shapes(spec)
    for n, k in shapes(spec):
        how = layout.recipe(scheme, k)
        assert isinstance(how, Recipe)
        parts = quantized(scheme, ordinary(n, k) + 0.02)
        prepared = list(Nvidia().prepare(scheme, parts, (n, k)))
        w = scheme.dequantize(parts, (n, k), torch.float32)
        got = ops.values(prepared, how, n, k, torch.float16)
        torch.testing.assert_close(got.float(), w, rtol=1e-3, atol=1e-6)
        for dtype in (torch.float16, torch.bfloat16):
            for m, config in ((1, (ops.GEMV, 4, 1)), (3, (ops.GEMV, 8, 2)), (5, (ops.VALUES,))):
                x = (torch.randn(m, k, generator=torch.Generator().manual_seed(m)) + 0.5).to(dtype)
                exact = x.float() @ w.T
                got = ops.linear(x, prepared, how, n, config).float()
                assert (got - exact).norm() <= TOLERANCE[dtype] * exact.norm(), (n, k, m, config)


def checked() -> dict[str, str]:
    """Scheme -> the traceback of its `check`; empty if that passed."""
    found = dict.fromkeys(TOLD, "")
    for spec in TOLD:
        try:
            check(spec)
        except Exception:
            found[spec] = traceback.format_exc()
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    """What `checked` returns in Triton's interpreter."""
    return interpreter.run("tests.unit.test_nvidia")  # type: ignore[no-any-return]


@interpreted
@pytest.mark.parametrize("spec", TOLD)
def test_the_kernels_products_and_values(spec: str, found: dict[str, str]) -> None:
    assert not found[spec], found[spec]


if __name__ == "__main__":
    print(json.dumps(checked()))
