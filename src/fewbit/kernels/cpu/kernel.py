"""The CPU kernels, in C++ (csrc/). Each token reads the packed weight once, and no other copy of it.

The device layout is the canonical layout. Other engines interleave the rows of a weight, so that codes and activations
line up in a register. Here each row of activations is reordered instead, to match the order in which codes are
unpacked from their bytes. A row of activations is a thousand times smaller than a weight, `restore` has nothing to
undo, blocks stay on the mapped pages of their GGUF file, and an embedding shares its bytes with a tied head.

`cpu` rounds activations to int8, each row by itself. For each group of 32 columns, by = 127 / max|x| in float32, and
x * by is rounded to nearest, ties to even. So an entry changes by at most max|x| / 254 of its group, and y by at most
the sum of |w| max|x| / 254. For normally distributed x the relative change is 0.5 %. Integer products are exact and
summed in float32. Activations for sixteen-level schemes (NF4, FP4) and FP8 are not rounded: their values are no
integers. Those of MXFP4 and NVFP4 are, times two.

A row's result is the same bit for bit whatever the other rows are, and whatever the number of threads. Otherwise a
server's answers would depend on its other requests: a last bit that differs can change how an activation of the next
layer is rounded. If activations are not rounded, this holds for up to `FEW` rows. For more, tiles of W are decoded to
float32, each once, and multiplied by torch, which is faster: the products are the same, but float32 sums are added in
another order, so results differ by about 1e-7 of their norm.

Speed with one row of activations, one thread, and weights of 4096 x 14336 that are read from memory. On an EPYC of 2025
with AVX-512, as a share of a plain read of 34 to 42 GB/s (benchmarks/results/2026-11-cpu.md):

    int4-g128 89 %   int4-g32 82   int3-g64 72   int2-g64 70   int8-g128 80   mxfp4 89   fp8-row 81   fp8-b128 70
    q4_k 82          q6_k 87       q8_0 92       q2_k 70       q3_k 70        tq2_0 77   nf4-b64 72   nf4-b64-dq 57

Types with a codebook look up a word for each 4 or 8 columns, and that limits them: iq2_xxs reaches 6.0 GB/s, 23e9
weights a second, and iq3_xxs 6.1 GB/s, 16e9. On a Xeon of 2023, where a plain read reaches 13.4 to 13.9 GB/s, MXFP4
reaches 13.7, NVFP4 13.3, FP8 10.9 (rows) and 12.2 (blocks), and int4-g128 10.7; with AVX2 10.7, 11.3, 9.3, 6.1 and 9.8
(2026-11-floats.md there).

`product` multiplies by weights in 16 bits that are not quantized. One thread of an EPYC of 2025 reads a bfloat16 head
of 49152 x 576 at 31 GB/s with AVX-512, where a plain read reaches 36 and PyTorch's product 17 (one run).

`cpu_exact` never rounds activations. It is used if requested by name, or if `cpu` fails its check.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import ClassVar

from fewbit.errors import KernelError
from fewbit.kernels.base import Kernel, Prepared, Shapes, runs
from fewbit.lazy import Tensor, torch
from fewbit.registry import register
from fewbit.schemes.affine import Affine
from fewbit.schemes.base import Codec, Parts
from fewbit.schemes.fp8 import FP8
from fewbit.schemes.ggml import codebook
from fewbit.schemes.ggml.codec import Blocks
from fewbit.schemes.int8 import Int8
from fewbit.schemes.mxfp4 import MXFP4
from fewbit.schemes.nf4 import LEVELS, FourBit
from fewbit.schemes.nvfp4 import NVFP4
from fewbit.schemes.stacked import Stacked
from fewbit.system import ambient, native

_REMEDY = "install fewbit from source where a C++ compiler is, or a wheel that has the library"
FEW = 8  # rows that the library multiplies by itself if activations are not rounded: for more, torch is faster
MANY = 64  # rows of an expert that share a call with the rows of others, if activations are rounded
GROUP = 32  # columns that share a unit
_TILE = 1 << 19  # weights decoded at a time: 2 MB of float32 stay in a core's second cache

# Numbers of the layouts in csrc/fewbit.h.
_AFFINE, _INT8, _LEVELS, _LEVELS_DOUBLE, _FP8, _MXFP4, _NVFP4, _F16, _BF16 = range(9)
_BLOCKS = (
    *("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs"),
    *("iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq1_s", "iq1_m", "tq1_0", "tq2_0", "q1_0", "q2_0"),
)
_KINDS = {name: 16 + i for i, name in enumerate(_BLOCKS)}
_CODEBOOKS = {kind: name for name, kind in _KINDS.items() if name.startswith(("iq1", "iq2", "iq3"))}
_UNROUNDED = (_LEVELS, _LEVELS_DOUBLE, _FP8, _F16, _BF16)  # activations are not rounded
_OP = "fewbit::cpu_linear"
_ERRORS = {
    1: "the layout is unknown",
    2: "the shape does not fit the layout",
    3: "a buffer is too short",
    4: "out of memory",
}

Layout = tuple[int, int, int]  # kind; bits, or another number as in csrc/fewbit.h; columns that share a scale


class _Native(Kernel):
    """Base of both CPU kernels. The device layout is the canonical parts."""

    exact: ClassVar[bool]

    def unavailable(self) -> str | None:
        found = native.available()
        return found if isinstance(found, str) else None

    def missed(self) -> str | None:
        why = self.unavailable()
        return f"the compiled CPU library is missing, and packed weights compute slowly without it ({why}): {_REMEDY}"

    def why_not(self, codec: Codec, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device.type}"
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"activations in float32, bfloat16 or float16 only, not {str(dtype).removeprefix('torch.')}"
        layouts = [_layout(part, (n, shape[1])) for part, n in _segments(codec, shape)]
        return next((layout for layout in layouts if isinstance(layout, str)), None)

    def prepare(self, codec: Codec, parts: Parts, shape: tuple[int, int]) -> Prepared:
        _define()
        return super().prepare(codec, parts, shape)

    def why_not_grouped(self, codec: Codec, shape: Shapes) -> str | None:
        return None

    def grouped(self, x: Tensor, codec: Codec, prepared: Prepared, shape: Shapes, offsets: Tensor) -> Tensor:
        """Experts with up to `MANY` rows (or `FEW`) share one call of the library; the others take turns."""
        experts, n, k = shape
        if type(x) is not torch.Tensor or torch.compiler.is_compiling():
            return super().grouped(x, codec, prepared, shape, offsets)
        layout = _layout(codec, (n, k))
        assert not isinstance(layout, str)
        if self.exact and layout[0] not in _UNROUNDED:
            return super().grouped(x, codec, prepared, shape, offsets)
        groups = runs(offsets)
        if x.dtype not in _read():
            return self.grouped(x.float(), codec, prepared, shape, offsets).to(x.dtype)
        y = torch.empty(x.shape[0], n, dtype=x.dtype, device="cpu")
        y[groups[-1][2] if groups else 0 :] = 0
        most = FEW if layout[0] in _UNROUNDED else MANY
        few = [group for group in groups if group[2] - group[1] <= most]
        if few:
            _grouped(x.contiguous(), y, prepared, (*layout, experts, n, k), few)
        for expert, start, end in groups:
            if end - start > most:
                own = self.of_expert(codec, prepared, shape, expert)
                y[start:end] = self.linear(x[start:end], codec, own, (n, k))
        return y

    def linear(self, x: Tensor, codec: Codec, prepared: Prepared, shape: tuple[int, int]) -> Tensor:
        # The dispatcher takes as long as 200 rows of 576 columns; only those who look at the graph need it.
        plain = type(x) is torch.Tensor and not torch.compiler.is_compiling()
        multiply = _linear if plain else torch.ops.fewbit.cpu_linear
        y: Tensor
        # Dynamo warns of caches. It calls this only while it makes a graph.
        found = _products.__wrapped__ if torch.compiler.is_compiling() else _products
        if len(products := found(codec, shape)) == 1:
            ((layout, n, _, _),) = products
            y = multiply(x, prepared, *layout, n, self.exact)
            return y
        y = torch.cat([multiply(x, prepared[a:b], *layout, n, self.exact) for layout, n, a, b in products], 1)
        return y


@register("kernels", "cpu")
class Cpu(_Native):
    """The native library; activations are rounded to int8."""

    name: ClassVar[str] = "cpu"
    checked: ClassVar[tuple[int, ...]] = (4, 11)  # several rows of W are unpacked at once for more than 4
    activations: ClassVar[str] = f"int8 for each {GROUP} columns"
    priority: ClassVar[int] = 20
    exact: ClassVar[bool] = False

    def rounded(self, x: Tensor, codec: Codec) -> Tensor:
        if isinstance(codec, FourBit | FP8 | Stacked):
            return x
        groups = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
        top = groups.abs().amax(-1, keepdim=True)
        # Tensor.div_, because torch computes `127 / top` as 127 times a reciprocal, which rounds twice.
        by = torch.where(top >= 1e-30, torch.full_like(top, 127).div_(top), 0)
        unit = torch.where(top >= 1e-30, top.div(127), 0)
        values: Tensor = groups.mul(by).round_().mul_(unit).flatten(1)
        return values[:, : x.shape[1]]


@register("kernels", "cpu_exact")
class CpuExact(_Native):
    """The native library; activations are never rounded."""

    name: ClassVar[str] = "cpu_exact"
    priority: ClassVar[int] = 5
    exact: ClassVar[bool] = True


def _segments(codec: Codec, shape: tuple[int, int]) -> Sequence[tuple[Codec, int]]:
    """The parts of a weight that need separate products, each with its number of rows.

    Only stacked weights whose parts do not consist of rows have more than one: sixteen-level ones, and FP8 in blocks.
    """
    if isinstance(codec, Stacked) and all(isinstance(segment, FourBit | FP8) for segment, _ in codec.segments):
        return codec.segments
    return ((codec, shape[0]),)


@cache
def _products(codec: Codec, shape: tuple[int, int]) -> Sequence[tuple[Layout, int, int, int]]:
    """The products that make up one by such a weight: layout, rows, index of the first part, and end index."""
    found, start = [], 0
    for segment, n in _segments(codec, shape):
        layout = _layout.__wrapped__(segment, (n, shape[1]))
        assert not isinstance(layout, str)
        end = start + len(segment.part_specs((n, shape[1])))
        found.append((layout, n, start, end))
        start = end
    return found


@cache
def unquantized() -> dict[torch.dtype, int]:
    """The types of weights that the library multiplies as they are, by its numbers of layouts."""
    return {torch.float16: _F16, torch.bfloat16: _BF16}


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ for a weight [N, K] of a type in `unquantized`, summed in float32: [M, N] in the dtype of x [M, K].

    KernelError without the library, and for a weight that is not contiguous or not on the CPU.
    """
    return _linear(x, (weight,), unquantized()[weight.dtype], 0, 0, weight.shape[0], False)


def weights_of(
    codec: Codec, prepared: Prepared, shape: tuple[int, int]
) -> list[tuple[ctypes.Array[native.Weight], int]]:
    """The library's descriptions of a weight, each with its number of rows. They hold no memory."""
    return [
        (_weight(*layout, n, shape[1], tuple(map(_buffer, prepared[a:b]))), n)
        for layout, n, a, b in _products(codec, shape)
    ]


@cache
def _layout(codec: Codec, shape: tuple[int, int]) -> Layout | str:
    """The library's layout for such a weight, or a sentence that says why it has none."""
    k = shape[1]
    if isinstance(codec, Blocks):
        return (_KINDS[codec.name], 0, 0) if codec.name in _KINDS else f"it does not read blocks of {codec}"
    if isinstance(codec, Affine):
        group, codes = codec.group or k, 1 if 8 % codec.bits else 8 // codec.bits
        step = 64 * codes
        if group != k and group % step and (step % group or group % max(8, 4 * codes)):
            return f"groups of {', '.join(map(str, _groups(codec.bits)))} or multiples of {step}, not {group}"
        return (_AFFINE, codec.bits, group)
    if isinstance(codec, Int8):
        return (_INT8, 0, k)
    if isinstance(codec, FourBit):
        if k % codec.group:
            return f"rows must be whole blocks: {codec.group} does not divide {k} columns"
        return (_LEVELS_DOUBLE if codec.double else _LEVELS, list(LEVELS).index(codec.kind), codec.group)
    if isinstance(codec, FP8):
        rows, columns = codec.block(shape)
        return (_FP8, rows, columns)
    if isinstance(codec, MXFP4):
        return (_MXFP4, 0, codec.group)
    if isinstance(codec, NVFP4):
        return (_NVFP4, int(codec.divides), codec.group)
    return f"it supports affine, ggml, float, 8-bit and 16-level weights only, not {codec}"


def _groups(bits: int) -> list[int]:
    """The supported group sizes that are smaller than a step of the kernel."""
    codes = 1 if 8 % bits else 8 // bits
    return [g for g in (16, 32, 64, 128) if 4 * codes <= g < 64 * codes]


# ---- the op --------------------------------------------------------------------------------------------------------


@cache
def _define() -> None:
    """Make the op known to torch, before the first weight is prepared."""
    torch.library.define(
        _OP,
        "(Tensor x, Tensor[] parts, int kind, int bits, int group, int n, bool exact) -> Tensor",
        tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
    )
    torch.library.register_fake(_OP)(_shape)
    torch.library.impl(_OP, "CPU")(_linear)


@cache
def _aligned() -> dict[torch.dtype, int]:
    """Type of a part -> what its address must be a multiple of."""
    return {torch.uint8: 1, torch.int8: 1, torch.float16: 1, torch.bfloat16: 1, torch.float32: 4}


@cache
def _read() -> dict[torch.dtype, int]:
    """The types that the library reads and writes, by its numbers."""
    return {getattr(torch, name): number for name, number in native.TYPES.items()}


def _shape(x: Tensor, parts: Sequence[Tensor], kind: int, bits: int, group: int, n: int, exact: bool) -> Tensor:
    return x.new_empty(x.shape[0], n)


def _linear(x: Tensor, parts: Sequence[Tensor], kind: int, bits: int, group: int, n: int, exact: bool) -> Tensor:
    lib = native.library()
    if isinstance(lib, str):
        raise KernelError(lib, native.HINT)
    if x.dim() != 2:
        raise KernelError(f"activations have {x.dim()} dimensions, expected 2: [rows, columns]")
    if not x.is_cpu:
        raise KernelError(f"activations are on {x.device.type}, and the packed weight is on the CPU")
    m, k = x.shape
    weight = _weight(kind, bits, group, n, k, tuple(map(_buffer, parts)))
    threads = torch.get_num_threads()
    if m <= FEW if kind in _UNROUNDED else not exact:
        if (of := _read().get(x.dtype)) is None:
            return _linear(x.float(), parts, kind, bits, group, n, exact).to(x.dtype)
        x = x.contiguous()
        y = torch.empty(m, n, dtype=x.dtype, device="cpu")
        read, written = _start(x, x.dtype, m * k), _start(y, x.dtype, m * n)
        _check(lib.fewbit_linear(weight, read, m, written, of, threads), n, k)
        return y
    wide = x.float().contiguous()
    columns = lib.fewbit_columns(weight)
    _check(-min(columns, 0), n, k)
    arranged = torch.empty(m, columns, dtype=torch.float32, device="cpu")
    read, written = _start(wide, torch.float32, m * k), _start(arranged, torch.float32, m * columns)
    _check(lib.fewbit_arrange(weight, read, m, written, threads), n, k)
    y = torch.empty(m, n, dtype=x.dtype, device="cpu")
    step = max(16, _TILE // columns // 16 * 16)
    tile = torch.empty(min(step, n), columns, dtype=torch.float32, device="cpu")
    decoded = _start(tile, torch.float32, min(step, n) * columns)
    for start in range(0, n, step):
        end = min(start + step, n)
        _check(lib.fewbit_decode(weight, start, end, decoded, threads), n, k)
        y[:, start:end] = arranged @ tile[: end - start].T
    return y


def _grouped(
    x: Tensor,
    y: Tensor,
    parts: Sequence[Tensor],
    layout: tuple[int, int, int, int, int, int],
    groups: Sequence[tuple[int, int, int]],
) -> None:
    """Write the rows of `groups` (expert, start, end) of y.

    parts: of the stacked weights. layout: kind, bits, group, E, N, K.
    """
    lib = native.library()
    if isinstance(lib, str):
        raise KernelError(lib, native.HINT)
    experts, n, k = layout[3:]
    (m, columns), of = x.shape, _read()[x.dtype]
    if not x.is_cpu or columns != k:
        raise KernelError(f"activations of {columns} columns on {x.device}; the packed weights have {k}, on the CPU")
    weights = _weights(layout, tuple(map(_buffer, parts)))
    begin, end = (ctypes.c_int64 * experts)(), (ctypes.c_int64 * experts)()
    for expert, first, last in groups:
        begin[expert], end[expert] = first, last
    read, written = _start(x, x.dtype, m * k), _start(y, x.dtype, m * n)
    _check(lib.fewbit_grouped(weights, experts, begin, end, read, m, written, of, torch.get_num_threads()), n, k)


def _start(tensor: Tensor, dtype: torch.dtype, count: int) -> int:
    """The address of a tensor of `count` numbers. KernelError if the library would read or write outside its memory."""
    if not (tensor.is_cpu and tensor.is_contiguous() and tensor.dtype == dtype and tensor.numel() == count):
        raise KernelError(
            f"a tensor {list(tensor.shape)} of {tensor.dtype} on {tensor.device} where the CPU library "
            f"needs {count} contiguous numbers of {dtype} on the CPU"
        )
    return tensor.data_ptr()


def _buffer(part: Tensor) -> tuple[int, int]:
    """Address and size in bytes of a part. KernelError if the library cannot read it as it is stored."""
    if not part.is_cpu or not part.is_contiguous():
        raise KernelError(f"a part {list(part.shape)} of a packed weight is not contiguous, or not on the CPU")
    start = part.data_ptr()
    aligned = _aligned()
    if part.dtype not in aligned or start % aligned[part.dtype]:
        raise KernelError(f"a part of a packed weight ({part.dtype}) has an unknown dtype or a misaligned address")
    return start, part.nbytes


@lru_cache(maxsize=1 << 14)
def _weight(
    kind: int, bits: int, group: int, n: int, k: int, buffers: tuple[tuple[int, int], ...]
) -> ctypes.Array[native.Weight]:
    """The C description of a weight. It owns no memory, so it can be cached by the addresses of the parts."""
    if kind in (_LEVELS, _LEVELS_DOUBLE):
        table = _levels(bits)
        buffers = (*buffers, (ctypes.addressof(table), ctypes.sizeof(table)))
    if kind in _CODEBOOKS:
        buffers = (*buffers, _buffer(_codebook(_CODEBOOKS[kind])))
    weight = (native.Weight * 1)()
    held = weight[0]
    held.kind, held.bits, held.group, held.n, held.k = kind, bits, group, n, k
    for i, (start, size) in enumerate(buffers):
        held.part[i], held.bytes[i] = start, size
    return weight


@lru_cache(maxsize=1 << 10)
def _weights(
    layout: tuple[int, int, int, int, int, int], buffers: tuple[tuple[int, int], ...]
) -> ctypes.Array[native.Weight]:
    """The C descriptions of stacked weights, each of an equal piece of every part. `layout` as in `_grouped`."""
    kind, bits, group, experts, n, k = layout
    weights = (native.Weight * experts)()
    for e in range(experts):
        own = tuple((start + e * (size // experts), size // experts) for start, size in buffers)
        ctypes.memmove(
            ctypes.byref(weights[e]), _weight.__wrapped__(kind, bits, group, n, k, own), ctypes.sizeof(weights[e])
        )
    return weights


@cache
def _levels(which: int) -> ctypes.Array[ctypes.c_float]:
    return (ctypes.c_float * 16)(*(level + 0.0 for level in list(LEVELS.values())[which]))


@cache
@ambient.defaults()
def _codebook(name: str) -> Tensor:
    """The codes of a codebook as csrc/codebooks.inl reads them, uint8 [entries, columns]. They are kept for ever."""
    if name.startswith("iq1"):
        return (codebook.grid("iq1", torch.device("cpu")) + 1).to(torch.uint8)
    return (codebook.grid(name, torch.device("cpu")) + (16 if name == "iq3_s" else 64)).to(torch.uint8)


def _check(status: int, n: int, k: int) -> None:
    if status:
        raise KernelError(f"the CPU library rejects a packed weight of {n} x {k}: {_ERRORS.get(status, status)}")
