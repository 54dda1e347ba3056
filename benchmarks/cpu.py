"""What the CPU library reaches: of the memory's speed for one row of activations, of torch's matmul for many.

Every figure is from one run on one machine. Copies of a weight are used in turn, more of them than the last cache
holds, so that each product reads its weight from memory. A plain read of as many bytes (torch's sum of integers) and
torch's product in bfloat16 take turns with what they are compared with, so that what else the machine does meets both;
of repeated measurements the fastest and the median are given, and shares of either.

    python benchmarks/cpu.py --threads 1 2
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import torch

from fewbit import registry
from fewbit.schemes.base import Parts, Scheme, parse
from fewbit.system import native
from fewbit.system.machine import processor

SHAPE = (4096, 14336)
SPECS = (
    *("int4-g128", "int4-g128-sym", "int4-g128-sym@torch_int4", "int4-g32", "q4_k", "q6_k", "q8_0", "q4_0", "q4_1"),
    *("q5_0", "q5_1", "q5_k", "q3_k", "q2_k", "iq4_nl", "iq4_xs", "int2-g64", "int3-g64", "int8-g128", "llm.int8"),
    *("nf4-b64", "nf4-b64-dq", "fp8-row", "fp8-b128", "mxfp4", "nvfp4"),
    *("iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "tq1_0", "tq2_0", "q1_0", "q2_0"),
)


def in_turns(repeats: int, *runs: Callable[[int], object]) -> list[tuple[float, float]]:
    """Fastest and median seconds of each of the runs, which are called with 0, 1 ... one after the other."""
    taken: list[list[float]] = [[] for _ in runs]
    for i in range(repeats):
        for run, seconds in zip(runs, taken, strict=True):
            begin = time.perf_counter()
            run(i)
            seconds.append(time.perf_counter() - begin)
    return [(min(seconds), sorted(seconds)[len(seconds) // 2]) for seconds in taken]


def random_parts(scheme: Scheme, shape: tuple[int, int]) -> Parts:
    """Parts of plausible values: what is multiplied takes no time of its own."""
    return {
        name: torch.rand(spec.shape).to(spec.dtype)
        if spec.dtype.is_floating_point
        else torch.randint(64, 120, spec.shape, dtype=torch.uint8).to(spec.dtype)
        for name, spec in scheme.part_specs(shape).items()
    }


class Measured:
    """A scheme with a kernel, in as many copies as memory is given for."""

    def __init__(self, spec: str, memory: float) -> None:
        name, _, kernel = spec.partition("@")
        self.scheme, self.kernel = parse(name), registry.get("kernels", kernel or "cpu")()
        # torch's kernel serves this type of activations alone, and is as fast as it is.
        self.dtype = torch.bfloat16 if kernel else torch.float32
        parts = random_parts(self.scheme, SHAPE)
        self.size = sum(part.nbytes for part in parts.values())
        self.held = [
            self.kernel.prepare(self.scheme, {key: part.clone() for key, part in parts.items()}, SHAPE)
            for _ in range(int(memory / self.size) + 1)
        ]

    def product(self, x: torch.Tensor) -> Callable[[int], object]:
        x = x.to(self.dtype)
        return lambda i: self.kernel.linear(x, self.scheme, self.held[i % len(self.held)], SHAPE)

    def read(self, plain: torch.Tensor) -> Callable[[int], object]:
        pieces = plain[: len(plain) // (self.size // 8) * (self.size // 8)].view(-1, self.size // 8)
        return lambda i: pieces[i % len(pieces)].sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--specs", nargs="+", default=list(SPECS), metavar="SCHEME[@KERNEL]")
    parser.add_argument("--memory", type=float, default=1.2e9, help="bytes of the copies of one weight")
    parser.add_argument("--repeats", type=int, default=3, help="times each copy is multiplied by")
    parser.add_argument("--rows", type=int, default=512, help="activations of the second measurement; 0: none")
    options = parser.parse_args()
    n, k = SHAPE
    print(f"{processor()}, torch {torch.__version__}, Python {platform.python_version()}, {native.instructions()}")
    print(f"weights of {n} x {k}\n")
    plain, x, many = torch.ones(1 << 27, dtype=torch.int64), torch.randn(1, k), torch.randn(max(options.rows, 1), k)
    half, half_x, work = torch.randn(n, k).bfloat16(), many.bfloat16(), 2 * options.rows * n * k / 1e9
    for threads in options.threads:
        torch.set_num_threads(threads)
        print(f"## {threads} threads\n")
        columns = ["scheme", "GB/s", "median", "plain read", "median", "share", "of medians"]
        columns += [f"{options.rows} rows, GFLOP/s", "bfloat16", "ratio"] if options.rows else []
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for spec in options.specs:
            measured = Measured(spec, options.memory)
            one = measured.product(x)
            one(0)
            (best, median), (read, usual) = in_turns(options.repeats * len(measured.held), one, measured.read(plain))
            speeds = [f"{measured.size / seconds / 1e9:.1f}" for seconds in (best, median, read, usual)]
            cells = [spec, *speeds, f"{read / best:.0%}", f"{usual / median:.0%}"]
            if options.rows:
                (fastest, _), (bf16, _) = in_turns(3, measured.product(many), lambda _: half_x @ half.T)
                cells += [f"{work / fastest:.0f}", f"{work / bf16:.0f}", f"{bf16 / fastest:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)
        print()


if __name__ == "__main__":
    main()
