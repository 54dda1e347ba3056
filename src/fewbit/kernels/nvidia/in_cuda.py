"""The CUDA kernels: `few.cu` for a few rows of activations, `many.cu` and, on Hopper, `hopper.cu` for more.

They are compiled on first use by NVRTC, the compiler that comes with PyTorch.
"""

from __future__ import annotations

import ctypes
import math
import warnings
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fewbit.errors import KernelError
from fewbit.kernels.nvidia.layout import MAPPED, PLAIN, TABLE, WORDS, Recipe, operands

_FLOAT = 3  # storage of the scale s as float32, in addition to the kinds of a recipe
_PAIRS, _MAP = 256 * 32 * 4, 256 * 4  # bytes of shared memory for the level table and for a map of scales
_STAGES = 3  # tiles of x that `many` keeps in shared memory
_EVEN = 0.93  # the smallest share of the GPU's block slots for which an even split is preferred over using all slots
_LEAST = 4  # fewest tiles of W for which `many` starts a block, and `hopper` a cluster
_SHARERS = 4  # blocks of `hopper` that share a piece, beyond which their partial sums cost more than smaller pieces
_FETCHING = 4  # warps of a block of `hopper` that do not multiply; one of them fetches x


class Sizes(NamedTuple):
    """The tile sizes of a kernel."""

    warps: int  # warps per block; a multiple of four for `many`
    of_w: int  # tiles of 16 rows of W per warp
    of_x: int  # tiles of 8 rows of x
    resident: int  # blocks per multiprocessor that run at the same time
    many: int = 0  # 1: use `many.cu` or `hopper.cu`, 0: use `few.cu`
    cluster: int = 0  # blocks that share what they read of x, on Hopper: use `hopper.cu`; 0: another kernel

    @property
    def kernel(self) -> str:
        return "hopper" if self.cluster else "many" if self.many else "few"


def linear(x: Tensor, y: Tensor, tensors: Sequence[Tensor], how: Recipe, sizes: Sizes) -> None:
    """Write y [M, N] = x [M, K] Wᵀ for packed W [N, K]."""
    (m, k), n = x.shape, y.shape[1]
    places = _operands(x, how, tensors)
    shape = (k, tensors[0].shape[1] * WORDS, 0)
    kernel = _compiled(how, shape, _stored(how, places), sizes, x.dtype, x.device, hopper(x.device))
    grid, more = _split(x, n, tensors[0].shape[1], sizes)
    first = _tensor_map(x.data_ptr(), m, k, 8 * sizes.of_x // sizes.cluster) if sizes.cluster else x
    threads = 32 * (sizes.warps + (_FETCHING if sizes.cluster else 0))
    _launch(kernel, grid, threads, [first, y, *places, m, n, *more], _shared(how, sizes))


def _split(x: Tensor, n: int, tiles: int, sizes: Sizes) -> tuple[tuple[int, int, int], list[Tensor | int]]:
    """The grid of a product of x with a weight of n rows of so many tiles, and the kernel's last arguments."""
    rows, over = 16 * sizes.of_w, -(-len(x) // (8 * sizes.of_x))
    room, cluster = _multiprocessors(x.device) * sizes.resident, max(sizes.cluster, 1)
    if not sizes.many:
        return (min(-(-n // rows), room), over, 1), []
    room = max(1, room // cluster)
    pieces = -(-n // (rows * sizes.warps * cluster))
    if sizes.cluster:  # a block takes pieces of different rows of x one after another
        pieces, over = pieces * over, 1
    # Clusters of blocks that each take as many whole pieces, or share a piece in equal parts, leave fewer partial sums.
    rounds = -(-pieces // room)
    even = 0 if pieces % rounds else pieces // rounds * max(1, room // pieces)
    clusters = min(even if even >= _EVEN * room else room, -(-pieces * tiles // _LEAST))
    sums = clusters * cluster * over * rows * sizes.warps * 8 * sizes.of_x
    left = torch.empty(sums if sizes.cluster else 2 * sums, device=x.device, dtype=torch.float32)
    counters = clusters * cluster if sizes.cluster else pieces * over
    return (clusters * cluster, over, 1), [left, _done(x.device, counters)]


def grouped(
    x: Tensor, y: Tensor, tensors: Sequence[Tensor], how: Recipe, sizes: Sizes, experts: int, ends: Tensor
) -> None:
    """Write y [M, N]: rows of x [M, K] times the transposes of their experts' packed weights, [experts · N, K].

    ends: int32 [experts], where the rows of each expert end.
    """
    (m, k), n = x.shape, y.shape[1]
    places = _operands(x, how, tensors)
    shape = (k, tensors[0].shape[1] * WORDS, experts)
    kernel = _compiled(how, shape, _stored(how, places), sizes, x.dtype, x.device, hopper(x.device))
    runs = min(m, experts) + m // (8 * sizes.of_x)  # the most that there can be
    room = _multiprocessors(x.device) * sizes.resident
    grid = (min(-(-n // (16 * sizes.of_w)) * runs, room), 1, 1)
    _launch(kernel, grid, 32 * sizes.warps, [x, y, *places, m, n, ends], _shared(how, sizes))


def _operands(x: Tensor, how: Recipe, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    if tensors[0].device != x.device:  # the driver would take any address
        raise KernelError(f"the activations are on {x.device} and the packed weight is on {tensors[0].device}")
    return operands(how, tensors)


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute with an integer value."""

    _fields_: ClassVar = [("id", ctypes.c_int), ("unused", ctypes.c_int), ("value", ctypes.c_int * 16)]


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_: ClassVar = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


_OVERLAPS = _Attribute(id=6, value=(1,))  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


@lru_cache(maxsize=1024)
def _tensor_map(address: int, m: int, k: int, rows: int) -> ctypes.Array[ctypes.c_char]:
    """The CUtensorMap of x [m, k], 16 bits a value, for copies of `rows` rows and 64 columns with permuted parts."""
    held = ctypes.create_string_buffer(128 + 64)
    found = (ctypes.c_char * 128).from_buffer(held, -ctypes.addressof(held) % 64)
    sizes, stride = (ctypes.c_uint64 * 2)(k, m), (ctypes.c_uint64 * 1)(2 * k)
    box, steps = (ctypes.c_uint32 * 2)(64, rows), (ctypes.c_uint32 * 2)(1, 1)
    # Numbers: values of 16 bits, two axes; no interleaving, swizzle of 128 bytes, 128 bytes into the L2, zeros outside.
    args = (found, 1, 2, ctypes.c_void_p(address), sizes, stride, box, steps, 0, 3, 2, 0)
    if code := _driver().cuTensorMapEncodeTiled(*args):
        raise RuntimeError(f"cuTensorMapEncodeTiled: CUDA error {code}")
    return found


def _launch(kernel: Any, grid: tuple[int, int, int], threads: int, args: list[Any], shared: int) -> None:
    """Launch a kernel on the current GPU and stream. args: tensors, integers, and tensor maps.

    This calls the driver directly. PyTorch's launch function takes no tensor map, and it needs 130 to 200 µs of a
    processor for each launch, many times as long as the kernel runs: it opens the driver's library each time.

    In a CUDA graph (from compute capability 9.0 on), the kernel overlaps the kernel before it: it starts while that is
    still ending, and loads weights into the cache meanwhile; see `turn` in decode.cuh.
    """
    # Eight bytes for each argument. Of an integer, the driver reads the lower four.
    values = (ctypes.c_uint64 * len(args))(*[a if isinstance(a, int) else _address(a) for a in args])
    start = ctypes.addressof(values)
    places = (ctypes.c_void_p * len(args))(*range(start, start + 8 * len(args), 8))
    if isinstance(args[0], ctypes.Array):  # a tensor map is passed by value
        places[0] = values[0]
    stream = torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice())
    if torch.cuda.is_current_stream_capturing() and torch.cuda.get_device_capability() >= (9, 0):
        config = _Config(grid, (threads, 1, 1), shared, stream, ctypes.pointer(_OVERLAPS), 1)
        code = _driver().cuLaunchKernelEx(ctypes.byref(config), kernel.func, places, None)
    else:
        size = (*grid, threads, 1, 1, shared)
        code = _driver().cuLaunchKernel(kernel.func, *size, ctypes.c_void_p(stream), places, None)
    if code:
        raise RuntimeError(f"launching a kernel: CUDA error {code}")


def _address(argument: Tensor | ctypes.Array[ctypes.c_char]) -> int:
    return argument.data_ptr() if isinstance(argument, Tensor) else ctypes.addressof(argument)


@cache
def _driver() -> ctypes.CDLL:
    driver: ctypes.CDLL = torch.cuda._utils._get_gpu_runtime_library()  # Windows has another name for it
    return driver


def driver_version() -> int:
    """The CUDA version of the driver, such as 13000."""
    found = ctypes.c_int()
    if code := _driver().cuDriverGetVersion(ctypes.byref(found)):
        raise RuntimeError(f"cuDriverGetVersion: CUDA error {code}")
    return found.value


@cache
def hopper(device: torch.device) -> bool:
    """Whether the GPU has Hopper's wgmma: four warps multiply together and read x from shared memory."""
    return torch.cuda.get_device_capability(device) == (9, 0)


def fullness(sizes: Sizes, n: int, device: torch.device) -> float:
    """The share of the GPU's block slots that n rows of W fill in the rounds they need; 1 for more than two rounds.

    Blocks of `hopper` share pieces of W. At most `_SHARERS` of them count for each piece.
    """
    room = _multiprocessors(device) * sizes.resident
    if sizes.cluster:
        return min(1.0, _SHARERS * -(-n // (16 * sizes.of_w * sizes.warps)) / room)
    if sizes.many:
        return 1.0
    rounds = -(-n // (16 * sizes.of_w)) / room
    return rounds / math.ceil(rounds) if rounds <= 2 else 1.0


def fitting(sizes: Sizes, how: Recipe, device: torch.device) -> Sizes:
    """`sizes`, with fewer rows of x per block if the GPU does not have enough shared memory."""
    while sizes.many and not sizes.cluster and sizes.of_x > 1 and _shared(how, sizes) > _shared_room(device):
        sizes = sizes._replace(of_x=sizes.of_x // 2)
    return sizes


@cache
def _shared_room(device: torch.device) -> int:
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 48 << 10))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _done(device: torch.device, count: int) -> Tensor:
    """Counters, all 0. The block that finds one complete resets it to 0.

    `many` has one for each piece of W's rows: how many blocks have finished it. `hopper` has one for each block: how
    many others have left the partial sums that it waits for.

    Kernels that run at the same time must not share counters. So each stream has its own, and each launch in a CUDA
    graph: graphs may be replayed on several streams. These come from one set in turns. It is allocated before the first
    capture: during a capture, filling it with zeros would only be recorded, and not done.
    """
    of_graphs = _counters(device, None)
    if torch.cuda.is_current_stream_capturing():
        return of_graphs.next(count)
    return _counters(device, torch.cuda.current_stream(device)).all


class _Counters:
    """all: a million for CUDA graphs, enough for thousands of launches, else 65,536."""

    def __init__(self, device: torch.device, size: int) -> None:
        self.all, self._taken = torch.zeros(size, dtype=torch.int32, device=device), 0

    def next(self, count: int) -> Tensor:
        """So many that were not given for the longest time."""
        start = self._taken if self._taken + count <= len(self.all) else 0
        self._taken = start + count
        return self.all[start : start + count]


@cache
def _counters(device: torch.device, stream: torch.cuda.Stream | None) -> _Counters:
    return _Counters(device, 1 << (20 if stream is None else 16))


@cache
def unusable(device: torch.device) -> str | None:
    """None if CUDA kernels can be compiled for the device, else a sentence that says why not. It also warns, once."""
    text = 'extern "C" __global__ void nothing(int* x) { *x = 1; }'
    try:
        with torch.cuda.device(device):
            torch.cuda._compile_kernel(text, "nothing")  # type: ignore[attr-defined,unused-ignore]
    except Exception as error:  # without NVRTC or CUDA headers, or with an old driver, PyTorch raises various types
        reason = f"the CUDA kernels cannot be compiled, slower kernels are used: {str(error).strip()[:200]}"
        warnings.warn(reason, stacklevel=2)
        return reason
    return None


def _depth(how: Recipe, sizes: Sizes) -> int:
    """Stages of 64 columns of x that `hopper` keeps in the 227 KB of shared memory."""
    tables = (_PAIRS if how.level == TABLE else 0) + (_MAP if how.scale == MAPPED else 0)
    return min(8, ((228 << 10) // sizes.resident - 2304 - tables) // (8 * sizes.of_x * 128))


def _shared(how: Recipe, sizes: Sizes) -> int:
    tables = (_PAIRS if how.level == TABLE else 0) + (_MAP if how.scale == MAPPED else 0)
    if sizes.cluster:
        return 1024 + tables + _depth(how, sizes) * 8 * sizes.of_x * 128
    if sizes.many:
        return 1024 + tables + _STAGES * 8 * sizes.of_x * how.tile * 2
    return tables + sizes.warps * 8 * sizes.of_x * (16 * sizes.of_w + 1) * 4


def _stored(how: Recipe, places: tuple[Tensor, ...]) -> tuple[int, bool]:
    scale = _FLOAT if how.scale == PLAIN and how.divisor == 1 and places[2].dtype == torch.float32 else how.scale
    return scale, places[3].dtype == torch.int8


@cache
def source(name: str) -> str:
    """The source of a kernel, without the macros that specialize it."""
    folder = Path(__file__).parent
    files = ("decode.cuh", f"{name}.cu") if name == "few" else ("decode.cuh", "numbers.cuh", f"{name}.cu")
    return "".join((folder / file).read_text(encoding="utf-8") for file in files)


def defined(
    how: Recipe, shape: tuple[int, int, int], stored: tuple[int, bool], sizes: Sizes, bfloat: bool, wgmma: bool
) -> str:
    """The source of a kernel with the macros that specialize it. shape: K, words of a row, and experts or 0."""
    k, row_words, experts = shape
    macros: dict[str, int | str] = {
        **how.constants,
        "SCALE": stored[0],
        "K": k,
        "ROW_WORDS": row_words,
        "GROUPS": how.groups(k),
        "BLOCKS": k // how.block,
        "SIGNED": int(stored[1]),
        "BFLOAT": int(bfloat),
        "WARPS": sizes.warps,
        "MT": sizes.of_w,
        "NT": sizes.of_x,
        "RESIDENT": sizes.resident,
        "MANY": sizes.many,
        "EXPERTS": experts,
        "NATURAL": int(sizes.cluster > 0),
        "CLUSTER": sizes.cluster,
        "DEPTH": _depth(how, sizes),
    }
    if sizes.many and wgmma:
        macros["WGMMA(d, a, x)"] = _wgmma(8 * sizes.of_x, "bf16" if bfloat else "f16")
    text = source(sizes.kernel)
    return "".join(f"#define {name} {value}\n" for name, value in macros.items()) + text


def _wgmma(n: int, dtype: str) -> str:
    """The wgmma instruction: d [n / 2] += a [4] times the matrix that descriptor x points to.

    The result is 64 x n sums, in the registers of four warps.
    """
    sums = n // 2
    places = ", ".join(f"%{i}" for i in range(sums))
    of_a = ", ".join(f"%{sums + i}" for i in range(4))
    text = f"{{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{dtype}.{dtype} "
    text += f"{{{places}}}, {{{of_a}}}, %{sums + 4}, p, 1, 1, 0; }}"
    outs = ", ".join(f'"+f"((d)[{i}])' for i in range(sums))
    ins = ", ".join(f'"r"((a)[{i}])' for i in range(4))
    return f'asm volatile("{text}" : {outs} : {ins}, "l"(x))'


@cache
def _compiled(
    how: Recipe,
    shape: tuple[int, int, int],
    stored: tuple[int, bool],
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device,
    wgmma: bool,
) -> Any:
    text = defined(how, shape, stored, sizes, dtype == torch.bfloat16, wgmma)
    with torch.cuda.device(device):
        kernel: Any = torch.cuda._compile_kernel(  # type: ignore[attr-defined,unused-ignore]
            text, sizes.kernel, "90a" if wgmma else None
        )
        kernel.set_shared_memory_config(_shared(how, sizes))
    return kernel
