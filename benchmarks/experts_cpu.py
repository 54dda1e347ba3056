"""Packed experts on a CPU: how fast a few tokens pass through all experts of a layer.

For each number of tokens, each of which goes to K of E experts: the layer's two products (gate and up, then down) by
one call for all experts, the same by a loop over the experts, a plain read of the bytes of the experts that were
reached, and the whole layer with routing and activation. They take turns, so that what else the machine does meets
all of them. Layers rotate, so that weights come from memory. Times are medians; shares are those of the plain read, by
medians and by the fastest of all repetitions.

    python -m benchmarks.experts_cpu --threads 1 2
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.cpu import in_turns, random_parts
from fewbit.kernels.base import Kernel
from fewbit.nn.experts import QExperts
from fewbit.schemes.base import QTensor, Scheme, parse
from fewbit.system import native
from fewbit.system.machine import processor


def experts(scheme: Scheme, count: int, n: int, k: int) -> QExperts:
    weight = QTensor(scheme, (count * n, k), random_parts(scheme, (count * n, k)))
    return QExperts(count, k, n).adopt(weight, torch.float32)


class Layer:
    """Gate and up [E, 2I, H], down [E, H, I]."""

    def __init__(self, scheme: Scheme, count: int, hidden: int, inner: int) -> None:
        self.up, self.down = experts(scheme, count, 2 * inner, hidden), experts(scheme, count, hidden, inner)
        self.count, self.inner = count, inner
        self.sizes = [sum(t.nbytes for t in e.prepared) // count for e in (self.up, self.down)]
        self.plain = [torch.cat([t.view(-1).view(torch.uint8) for t in e.prepared]) for e in (self.up, self.down)]

    def products(self, x: Tensor, mid: Tensor, ends: Tensor) -> None:
        self.up(x, ends)
        self.down(mid, ends)

    def loop(self, x: Tensor, mid: Tensor, ends: Tensor) -> None:
        for each, rows in ((self.up, x), (self.down, mid)):
            assert each.kernel is not None
            Kernel.grouped(each.kernel, rows, each.codec, each.prepared, (self.count, each.rows, rows.shape[1]), ends)

    def read(self, chosen: Sequence[int]) -> int:
        total = 0
        for plain, size in zip(self.plain, self.sizes, strict=True):
            for expert in chosen:
                total += int(plain[expert * size : (expert + 1) * size // 8 * 8].view(torch.int64).sum())
        return total

    def whole(self, hidden: Tensor, top: Tensor, weights: Tensor) -> Tensor:
        """What models/experts.py does in `forward`."""
        tokens, k = top.shape
        chosen, order = top.reshape(-1).sort(stable=True)
        ends = torch.searchsorted(chosen, torch.arange(self.count), right=True, out_int32=True)
        gate, up = self.up(hidden[order // k], ends).chunk(2, -1)
        y = self.down(torch.nn.functional.silu(gate) * up, ends)
        y = torch.zeros_like(y).index_copy(0, order, y)
        return (y * weights.reshape(-1, 1)).view(tokens, k, -1).sum(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=768)
    parser.add_argument("--active", type=int, default=8)
    parser.add_argument("--layers", type=int, default=3, help="layers in turn")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--schemes", nargs="+", default=["int4-g128", "q4_k", "nf4-b64-dq"])
    args = parser.parse_args()
    print(f"{processor()}, torch {torch.__version__}, Python {platform.python_version()}, {native.instructions()}")
    print(f"E {args.experts}, H {args.hidden}, I {args.inner}, {args.active} active; float32 activations\n")
    columns = ["threads", "scheme", "tokens", "MB read", "one call, ms", "GB/s", "loop, ms", "read, ms", "share"]
    print(f"| {' | '.join([*columns, 'of fastest', 'layer, ms', 'share', 'of fastest'])} |")
    print(f"|{'---|' * 13}")
    for spec in args.schemes:
        layers = [Layer(parse(spec), args.experts, args.hidden, args.inner) for _ in range(args.layers)]
        for threads in args.threads:
            torch.set_num_threads(threads)
            for tokens in args.tokens:
                row(spec, layers, threads, tokens, args)


def row(spec: str, layers: list[Layer], threads: int, tokens: int, args: argparse.Namespace) -> None:
    routed = []
    for i in range(args.repeats):
        generator = torch.Generator().manual_seed(i)
        top = torch.stack([torch.randperm(args.experts, generator=generator)[: args.active] for _ in range(tokens)])
        ends = torch.bincount(top.flatten(), minlength=args.experts).cumsum(0, dtype=torch.int32)
        routed.append((top, ends, top.unique().tolist()))
    rows = tokens * args.active
    hidden, x, mid = (torch.randn(m, k) for m, k in ((tokens, args.hidden), (rows, args.hidden), (rows, args.inner)))
    weights = torch.rand(tokens, args.active)

    def of(i: int) -> Layer:
        return layers[i % len(layers)]

    runs: list[Callable[[int], object]] = [
        lambda i: of(i).products(x, mid, routed[i][1]),
        lambda i: of(i + 1).loop(x, mid, routed[i][1]),
        lambda i: of(i + 2).read(routed[i][2]),
        lambda i: of(i + 1).whole(hidden, routed[(i + 1) % args.repeats][0], weights),
    ]
    for run in runs:
        run(0)
    (best, one), (_, loop), (quickest, read), (least, whole) = in_turns(args.repeats, *runs)
    size = sum(layers[0].sizes) * statistics.mean(len(each[2]) for each in routed) / 1e6
    cells = [threads, spec, tokens, f"{size:.1f}", f"{one * 1e3:.2f}", f"{size / one / 1e3:.1f}", f"{loop * 1e3:.2f}"]
    cells += [f"{read * 1e3:.2f}", f"{read / one:.0%}", f"{quickest / best:.0%}"]
    cells += [f"{whole * 1e3:.2f}", f"{read / whole:.0%}", f"{quickest / least:.0%}"]
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
