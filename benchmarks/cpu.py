"""What the CPU library reaches: of the memory's speed for one row of activations, of torch's matmul for many.

Every figure is from one run on one machine. Copies of a weight are used in turn, more of them than the last cache
holds, so that each product reads its weight from memory; what a plain read (a sum of 1 GB) reaches stands beside.
Of repeated measurements the fastest and the median are given.

    python benchmarks/cpu.py --threads 1 2
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import torch

from fewbit import registry
from fewbit.advise.hardware import processor
from fewbit.kernels import native
from fewbit.schemes.base import Parts, Scheme, parse

SHAPE = (4096, 14336)
SPECS = (
    *("int4-g128", "int4-g128-sym", "int4-g32", "q4_k", "q6_k", "q8_0", "q4_0", "q5_k", "q3_k", "q2_k", "iq4_xs"),
    *("int2-g64", "int3-g64", "int8-g128", "llm.int8", "nf4-b64", "nf4-b64-dq"),
)


def times(run: Callable[[int], object], repeats: int) -> tuple[float, float]:
    """Fastest and median seconds of run(0), run(1) ..."""
    taken = []
    for i in range(repeats):
        begin = time.perf_counter()
        run(i)
        taken.append(time.perf_counter() - begin)
    return min(taken), sorted(taken)[len(taken) // 2]


def random_parts(scheme: Scheme, shape: tuple[int, int]) -> Parts:
    """Parts of plausible values: what is multiplied takes no time of its own."""
    return {
        name: torch.rand(spec.shape).to(spec.dtype)
        if spec.dtype.is_floating_point
        else torch.randint(0, 60, spec.shape, dtype=torch.uint8).to(spec.dtype)
        for name, spec in scheme.part_specs(shape).items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--specs", nargs="+", default=list(SPECS))
    parser.add_argument("--memory", type=float, default=1.2e9, help="bytes of the copies of one weight")
    parser.add_argument("--rows", type=int, default=512, help="activations of the second measurement; 0: none")
    options = parser.parse_args()
    kernel, (n, k) = registry.get("kernels", "cpu")(), SHAPE
    print(f"{processor()}, torch {torch.__version__}, Python {platform.python_version()}, {native.instructions()}")
    print(f"weights of {n} x {k}\n")
    for threads in options.threads:
        torch.set_num_threads(threads)
        plain = torch.ones(1 << 27, dtype=torch.int64)
        read = plain.nbytes / times(lambda _, t=plain: t.sum(), 5)[0] / 1e9  # type: ignore[misc]
        del plain
        x, many = torch.randn(1, k), torch.randn(max(options.rows, 1), k)
        print(f"## {threads} threads: a plain read reaches {read:.1f} GB/s\n")
        if options.rows:
            w, work = torch.randn(n, k), 2 * options.rows * n * k / 1e9
            full = work / times(lambda _, w=w, x=many: x @ w.T, 2)[0]  # type: ignore[misc]
            half, half_x = w.bfloat16(), many.bfloat16()
            bf16 = work / times(lambda _, w=half, x=half_x: x @ w.T, 2)[0]  # type: ignore[misc]
            print(f"torch, {options.rows} rows: float32 {full:.0f} GFLOP/s, bfloat16 {bf16:.0f} GFLOP/s\n")
            del w, half
        print("| scheme | one row, GB/s | median | of the read | many rows, GFLOP/s |\n|---|---|---|---|---|")
        for spec in options.specs:
            scheme = parse(spec)
            parts = random_parts(scheme, SHAPE)
            size = sum(part.nbytes for part in parts.values())
            copies = [
                {name: part.clone() for name, part in parts.items()} for _ in range(int(options.memory / size) + 1)
            ]
            held = [kernel.prepare(scheme, each, SHAPE) for each in copies]
            kernel.linear(x, scheme, held[0], SHAPE)
            best, median = times(
                lambda i, held=held, scheme=scheme, x=x: kernel.linear(x, scheme, held[i % len(held)], SHAPE),  # type: ignore[misc]
                2 * len(held),
            )
            cells = [spec, f"{size / best / 1e9:.1f}", f"{size / median / 1e9:.1f}", f"{size / best / 1e9 / read:.0%}"]
            if options.rows:
                fastest, _ = times(
                    lambda i, held=held, scheme=scheme, x=many: kernel.linear(x, scheme, held[i], SHAPE),  # type: ignore[misc]
                    2,
                )
                cells.append(f"{work / fastest:.0f}")
            print(f"| {' | '.join(cells)} |", flush=True)
        print()


if __name__ == "__main__":
    main()
