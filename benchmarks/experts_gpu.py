"""Packed experts on an NVIDIA GPU: how long the tokens of a step take through the experts of one layer.

    python -m benchmarks.experts_gpu [--tokens 1,8,64,512] [--try] [SCHEME ...]

Microseconds, each the median of seven replays of a CUDA graph. Layers rotate, so that weights come from memory and not
from the cache. "products" are gate with up, and down. "bf16" is `torch._grouped_mm` on weights in bfloat16. "layer"
adds what models/experts.py does: routing, activation, and the weighted sum. The loop over experts needs the host, so it
cannot be recorded; it is timed as it runs. "of read" is the time of a device-to-device copy of half as many bytes
(which reads and writes) over that of the products. --try: compare sizes of the kernel.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu import random_parts
from fewbit.kernels.base import Kernel
from fewbit.kernels.nvidia import layout, ops
from fewbit.kernels.nvidia.layout import Recipe
from fewbit.kernels.nvidia.tuning import microseconds
from fewbit.nn.experts import QExperts
from fewbit.schemes.base import QTensor, parse
from fewbit.schemes.stacked import concatenated

CUDA = torch.device("cuda")
ROUTES = 8  # random choices of experts, in turn


def routes(tokens: int, experts: int, active: int) -> list[tuple[Tensor, Tensor]]:
    made = []
    for seed in range(ROUTES):
        generator = torch.Generator().manual_seed(seed)
        top = torch.stack([torch.randperm(experts, generator=generator)[:active] for _ in range(tokens)]).to(CUDA)
        made.append((top, torch.bincount(top.flatten(), minlength=experts).cumsum(0, dtype=torch.int32)))
    return made


def wall(call: Callable[[], object], repeats: int = 5) -> float:
    """Microseconds of a call that waits for the GPU."""
    call()
    taken = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        taken.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(taken)


class Layer:
    def __init__(self, spec: str, experts: int, hidden: int, inner: int) -> None:
        self.count, shapes = experts, ((2 * inner, hidden), (hidden, inner))
        made, scheme = [], parse(spec)
        for n, k in shapes:
            weight = concatenated([QTensor(scheme, (n, k), random_parts(scheme, (n, k))) for _ in range(experts)])
            made.append(QExperts(experts, k, n).adopt(weight, torch.bfloat16))
        self.up, self.down = made
        self.size = sum(t.nbytes for e in made for t in e.prepared) // experts  # of one expert

    def products(self, x: Tensor, mid: Tensor, ends: Tensor) -> Tensor:
        self.up(x, ends)
        y: Tensor = self.down(mid, ends)
        return y

    def loop(self, x: Tensor, mid: Tensor, ends: Tensor) -> Tensor:
        for each, rows in ((self.up, x), (self.down, mid)):
            assert each.kernel is not None
            shape = (self.count, each.rows, rows.shape[1])
            y = Kernel.grouped(each.kernel, rows, each.codec, each.prepared, shape, ends)
        return y

    def whole(self, hidden: Tensor, top: Tensor, weights: Tensor) -> Tensor:
        tokens, k = top.shape
        chosen, order = top.reshape(-1).sort(stable=True)
        ends = torch.searchsorted(chosen, torch.arange(self.count, device=CUDA), right=True, out_int32=True)
        gate, up = self.up(hidden[order // k], ends).chunk(2, -1)
        y = self.down(torch.nn.functional.silu(gate) * up, ends)
        y = torch.zeros_like(y).index_copy(0, order, y)
        return (y * weights.reshape(-1, 1)).view(tokens, k, -1).sum(1)


def check(layer: Layer, x: Tensor, mid: Tensor, ends: Tensor) -> None:
    for each, rows in ((layer.up, x), (layer.down, mid)):
        y, start = each(rows, ends), 0
        for expert, end in enumerate(ends.tolist()):
            if start < end and expert % 7 == 3:
                exact = rows[start:end].float() @ each.of_expert(expert).dequantize().T
                distance = float((y[start:end].float() - exact).norm() / exact.norm())
                if not distance < 1e-2:
                    raise SystemExit(f"expert {expert}, {end - start} rows: differs by {distance:.1e}")
            start = end


class Case:
    """Some tokens and several layers, of which call i takes one in turn."""

    def __init__(self, layers: list[Layer], wide: list[Tensor], tokens: int, active: int) -> None:
        self.layers, self.wide = layers, wide
        _, n, k = wide[1].shape
        self.chosen = routes(tokens, layers[0].count, active)
        self.x, self.mid = (torch.randn(tokens * active, size, device=CUDA, dtype=torch.bfloat16) for size in (n, k))
        self.hidden = torch.randn(tokens, n, device=CUDA, dtype=torch.bfloat16)
        self.weights = torch.rand(tokens, active, device=CUDA)

    def layer(self, i: int) -> Layer:
        return self.layers[i % len(self.layers)]

    def products(self, i: int) -> Tensor:
        return self.layer(i).products(self.x, self.mid, self.chosen[i][1])

    def whole(self, i: int) -> Tensor:
        return self.layer(i).whole(self.hidden, self.chosen[i][0], self.weights)

    def loop(self) -> Tensor:
        return self.layer(1).loop(self.x, self.mid, self.chosen[1][1])

    def plain(self, i: int) -> Tensor:
        for x, w in zip((self.x, self.mid), self.wide, strict=True):
            y = torch._grouped_mm(x, w.transpose(1, 2), offs=self.chosen[i][1])
        return y

    def sized(self, name: str, config: tuple[int, ...], i: int) -> Tensor:
        held: QExperts = getattr(self.layer(i), name)
        x = self.x if name == "up" else self.mid
        how = layout.recipe(held.codec, x.shape[1])
        assert isinstance(how, Recipe)
        return ops.grouped(x, list(held.prepared), how, self.chosen[i][1], held.rows, config)

    def sizes(self) -> None:
        """Times of several sizes of the kernel for each of the two products."""
        for name, x in (("up", self.x), ("down", self.mid)):
            held: QExperts = getattr(self.layers[0], name)
            how = layout.recipe(held.codec, x.shape[1])
            assert isinstance(how, Recipe)
            tiles, average, found = -(-x.shape[1] // how.tile), len(x) / held.experts, []
            for nt in (1,) if average <= 4 else (1, 2, 4) if average < 40 else (2, 4):
                for warps in sorted({w for w in (3, 4, 6, 8) if tiles % w == 0}):
                    for of_w, resident in ((2, 2), (1, 2), (1, 3), (1, 4), (2, 3)):
                        if warps * resident <= 24 and (nt < 4 or of_w == 1):
                            config = (ops.CUDA, warps, of_w, nt, resident, 0)
                            time = microseconds([partial(self.sized, name, config, i) for i in range(ROUTES)])
                            found.append((time, config[1:5]))
            print(f"  {name}: " + ", ".join(f"{t:.1f} {c}" for t, c in sorted(found)[:6]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schemes", nargs="*", default=["int4-g128"], metavar="SCHEME")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=768)
    parser.add_argument("--active", type=int, default=8)
    parser.add_argument("--tokens", default="1,8,64,512")
    parser.add_argument("--try", action="store_true", dest="sizes")
    args = parser.parse_args()
    e, h, inner = args.experts, args.hidden, args.inner
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; E {e}, H {h}, I {inner}, {args.active} active\n")
    big = torch.empty(1 << 28, dtype=torch.int32, device=CUDA)
    speed = big.nbytes / microseconds([lambda: big[: 1 << 27].copy_(big[1 << 27 :])])  # bytes read and written
    print(f"copy: {speed / 1e6:.2f} TB/s\n")
    wide = [torch.randn(e, n, k, device=CUDA, dtype=torch.bfloat16) for n, k in ((2 * inner, h), (h, inner))]
    columns = ["scheme", "tokens", "MB", "products", "of read", "layer", "loop", "bf16", "bf16 / products"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for spec in args.schemes:
        layers = [Layer(spec, e, h, inner) for _ in range(4)]
        for tokens in map(int, args.tokens.split(",")):
            case = Case(layers, wide, tokens, args.active)
            check(layers[0], case.x, case.mid, case.chosen[0][1])
            mb = layers[0].size * statistics.mean(len(top.unique()) for top, _ in case.chosen) / 1e6
            products, whole, plain = (
                microseconds([partial(run, i) for i in range(ROUTES)])
                for run in (case.products, case.whole, case.plain)
            )
            cells = [spec, tokens, f"{mb:.1f}", f"{products:.1f}", f"{mb * 1e6 / speed / products:.0%}"]
            cells += [f"{whole:.1f}", f"{wall(case.loop):.0f}", f"{plain:.1f}", f"{plain / products:.2f}"]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
            if args.sizes:
                case.sizes()


if __name__ == "__main__":
    with torch.no_grad():
        main()
