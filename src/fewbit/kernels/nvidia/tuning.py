"""Measure on this card which kernel and which sizes are fastest for how many rows of x: `fewbit doctor --tune`.

For each kind of weights (`sizes.MEASURED`) and each range of rows, all sizes that may be best multiply weights of three
shapes. A range keeps the built-in sizes unless others are faster, and slower for none of these shapes.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import permutations

import torch
from torch import Tensor

from fewbit.errors import KernelError
from fewbit.kernels.nvidia import Nvidia, in_cuda, layout, ops, sizes
from fewbit.kernels.nvidia.in_cuda import Sizes
from fewbit.kernels.nvidia.layout import Recipe
from fewbit.schemes.base import QTensor, parse
from fewbit.schemes.stacked import concatenated

K = 4096  # columns of the weights that are measured; a kernel is compiled for their number
N = (4096, 6144, 28672)  # rows: of Llama 8B o_proj, q_proj with k_proj and v_proj, and gate_proj with up_proj
ROWS = (1, *sizes.ENDS)  # rows of x
COLD = 300_000_000  # bytes that rotated weights take, five times the L2 of an H200
_NOISE = 0.02  # share of a time by which two measurements of one kernel may differ
_WARM = 5e-3  # seconds of replays before the measured ones, in which the clock rises
_TOLERANCE = 1e-2  # distance from the exact product at which a kernel is not used, as in `fewbit.nn.choose`

# (scheme, n, m, sizes) -> the microseconds of a product of m rows of x with a weight of n rows. Without sizes, the
# weight is dequantized. Infinite if the kernel fails, or computes something else.
Clock = Callable[[str, int, int, Sizes | None], float]


def microseconds(calls: Sequence[Callable[[], Tensor]], steps: int = 20, rounds: int = 7) -> float:
    """How long a call takes on the current GPU: the median of replays of a CUDA graph of at least `steps` calls.

    Calls of different weights are taken in turns, so that these come from memory and not from the cache.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    repeats = -(-steps // len(calls))
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):  # PyTorch's own stream for this is on one GPU
        for _ in range(repeats):
            for call in calls:
                call()
    begun = time.perf_counter()
    while time.perf_counter() - begun < _WARM:
        graph.replay()
        torch.cuda.synchronize()
    found: list[float] = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1e3 / (repeats * len(calls)))
    return statistics.median(found)


@dataclass(frozen=True)
class Times:
    """Microseconds of products with weights [n, k] of a scheme for each number of `ROWS`, built in and tuned."""

    scheme: str
    n: int
    k: int
    before: tuple[float, ...]
    after: tuple[float, ...]


@dataclass(frozen=True)
class Measured:
    """What was measured on a card. changed: of how many ranges the sizes are not the built-in ones. path: the file."""

    card: str
    rows: tuple[int, ...]
    times: tuple[Times, ...]
    ranges: int
    changed: int
    seconds: float
    path: str


def why_not(device: torch.device) -> str | None:
    """Why a GPU is too old to be tuned, as a sentence; None if it is not."""
    return Nvidia().why_not(parse(sizes.MEASURED[0]), (N[0], K), device, torch.bfloat16)


def tune(device: torch.device, tell: Callable[[int, int], None], clock: Clock | None = None) -> Measured:
    """Measure a GPU, keep what is fastest there, and use it from now on.

    tell: gets how many ranges are done, of how many. KernelError if a built-in kernel does not work there.
    """
    start, card, measure = time.perf_counter(), sizes.card(device), clock or _Clock(device)
    count = len(sizes.MEASURED) * len(sizes.ENDS)
    ranges, times, changed = dict[str, sizes.Ranges](), list[Times](), 0
    for scheme in sizes.MEASURED:
        run, found = _Scheme(scheme, device, measure), list[tuple[int, tuple[Sizes, ...]]]()
        for end in sizes.ENDS:
            tell(len(ranges) * len(sizes.ENDS) + len(found), count)
            found.append((end, run.fastest(end)))
        ranges[scheme] = tuple(found)
        changed += sum(several != sizes.within(run.built_in, end) for end, several in found)
        times += run.times(ranges[scheme])
    tell(count, count)
    path = sizes.write(card, ranges)
    ops.choose_again()
    return Measured(card.name, ROWS, tuple(times), count, changed, time.perf_counter() - start, str(path))


class _Scheme:
    """The times of one scheme on a GPU."""

    def __init__(self, scheme: str, device: torch.device, clock: Clock) -> None:
        how = layout.recipe(parse(scheme), K)
        assert isinstance(how, Recipe)
        self.scheme, self.how, self.device, self.hopper = scheme, how, device, in_cuda.hopper(device)
        self.built_in = sizes.built_in(how, self.hopper)
        self._time = cache(partial(clock, scheme))

    def fastest(self, end: int) -> tuple[Sizes, ...]:
        """The sizes for the range up to `end` rows with the least sum of times, each as a share of the built-in."""
        points = [(n, m) for n in N for m in ((1, end) if end == sizes.ENDS[0] else (end,))]
        best = sizes.within(self.built_in, end)
        base = [self._of(best, n, m) for n, m in points]
        if not all(map(math.isfinite, base)):
            raise KernelError(f"{self.device}: the kernel for {self.scheme} and {end} rows of activations fails there")
        least = len(base) * (1 - _NOISE)
        for several in _lists(sizes.candidates(end, self.hopper), end):
            shares = [self._of(several, n, m) / own for (n, m), own in zip(points, base, strict=True)]
            if max(shares) <= 1 + _NOISE and sum(shares) < least:
                best, least = several, sum(shares)
        return best

    def times(self, ranges: sizes.Ranges) -> list[Times]:
        """For each shape, with the built-in sizes and with `ranges`."""
        both = [
            [[self._of(sizes.within(table, m), n, m) for m in ROWS] for table in (self.built_in, ranges)] for n in N
        ]
        return [Times(self.scheme, n, K, *map(tuple, pair)) for n, pair in zip(N, both, strict=True)]

    def _of(self, several: tuple[Sizes, ...], n: int, m: int) -> float:
        return self._time(n, m, sizes.fullest(several, n, self.how, self.device))


def _lists(several: Sequence[Sizes], rows: int) -> Iterator[tuple[Sizes, ...]]:
    """What a range may have. Sizes of `many.cu` are full for any weight, so none after them would be used."""
    if sizes.dequantizes(rows):
        yield ()
    for count in range(1, sizes.MOST + 1):
        yield from (
            chosen for chosen in permutations(several, count) if not any(each.kernel == "many" for each in chosen[:-1])
        )


class _Clock:
    """The times of a GPU. It holds the weights of one scheme at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.scheme = device, ""
        self.weights: dict[int, tuple[list[tuple[Tensor, ...]], Tensor]] = {}
        seeded = torch.Generator(device).manual_seed(0)
        self.x = torch.randn(ROWS[-1], K, generator=seeded, dtype=torch.float32, device=device).bfloat16()

    def __call__(self, scheme: str, n: int, m: int, of: Sizes | None) -> float:
        if scheme != self.scheme:
            self.weights, self.scheme = {}, scheme
        how = layout.recipe(parse(scheme), K)
        assert isinstance(how, Recipe)
        with torch.cuda.device(self.device), torch.no_grad():
            if n not in self.weights:
                self.weights[n] = _weights(scheme, n, self.device)
            copies, exact = self.weights[n]
            x, config = self.x[:m], (ops.VALUES,) if of is None else (ops.CUDA, *of)
            try:
                expected = x.float() @ exact.T
                got = ops.linear(x, copies[0], how, n, config)[:, : len(exact)].float()
                if not (got - expected).norm() <= _TOLERANCE * expected.norm():
                    return math.inf
                calls = [partial(ops.linear, x, tensors, how, n, config) for tensors in copies]
                return microseconds(calls, steps=10, rounds=5)
            except Exception:  # compilers and drivers raise errors of any type, such as for too much shared memory
                return math.inf


def _weights(scheme: str, n: int, device: torch.device) -> tuple[list[tuple[Tensor, ...]], Tensor]:
    """Copies of a packed weight [n, K] that do not fit the cache together, and its first rows in float32."""
    codec = parse(scheme)
    seeded = torch.Generator(device).manual_seed(0)
    w = torch.randn(math.gcd(*N), K, generator=seeded, dtype=torch.float32, device=device) * 0.02
    part = QTensor(codec, (len(w), K), codec.pack(*codec.nearest(w)))
    whole = concatenated([part] * (n // len(w)))
    prepared = layout.prepared(codec, whole.parts, whole.shape)
    copies = [prepared]
    for _ in range(COLD // sum(tensor.nbytes for tensor in prepared)):
        copies.append(tuple(tensor.clone() for tensor in prepared))
    return copies, codec.dequantize(part.parts, part.shape, torch.float32, slice(0, 256))
