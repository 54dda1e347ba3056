"""How long a multiplication by packed weights takes on this GPU, beside bf16 `linear` and PyTorch's int4 kernel.

    python benchmarks/gpu.py [--columns 8192] [--rows 8192,28672] [--tokens 1,8,16,32,64,256,2048] [SCHEME ...]

Microseconds, each the median of seven replays of a CUDA graph of many calls, on weights that are rotated so that they
come from memory and not from the cache. Weights are random parts; each product is compared with the reference's first.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from fewbit.kernels.nvidia import Nvidia
from fewbit.kernels.nvidia.tuning import COLD, microseconds
from fewbit.schemes.base import Parts, Scheme, parse
from fewbit.schemes.fp8 import FP8
from fewbit.schemes.ggml.layout import LAYOUTS
from fewbit.schemes.mxfp4 import MXFP4
from fewbit.schemes.nf4 import dynamic_map
from fewbit.schemes.nvfp4 import NVFP4

SCHEMES = (
    *("int4-g128", "int4-g128-sym", "int4-g32", "nf4-b64", "nf4-b64-dq", "q4_k", "q6_k", "q8_0", "int8-g128"),
    *("llm.int8", "int3-g128", "int2-g64", "q5_k", "q3_k", "q2_k", "iq4_xs"),
    *("fp8-row", "fp8-b128", "mxfp4", "nvfp4"),
)
CUDA = torch.device("cuda")


def random_parts(scheme: Scheme, shape: tuple[int, int]) -> Parts:
    parts: Parts = {}
    if isinstance(scheme, FP8 | MXFP4 | NVFP4):  # whose random bytes may be NaN: rounded weights, 128 rows repeated
        parts = scheme.pack(*scheme.nearest(torch.randn(128, shape[1], device=CUDA) * 0.02))
        times, specs = -(-shape[0] // 128), scheme.part_specs(shape)
        return {name: part.repeat(times, 1)[: specs[name].shape[0]] for name, part in parts.items()}
    for name, spec in scheme.part_specs(shape).items():
        if name == "map":
            parts[name] = dynamic_map().to(CUDA)
        elif spec.dtype.is_floating_point:
            parts[name] = (torch.rand(spec.shape, device=CUDA) * 0.01 + 0.002).to(spec.dtype)
        else:
            parts[name] = torch.randint(0, 256, spec.shape, device=CUDA, dtype=torch.uint8).view(spec.dtype)
    kind = LAYOUTS.get(str(scheme))
    if kind is not None:
        blocks = parts["blocks"].view(-1, kind.nbytes)
        for at in (kind.d, kind.dmin):
            if at >= 0:
                half = (torch.rand(len(blocks), 1, device=CUDA) * 0.001 + 0.0002).half()
                blocks[:, at : at + 2] = half.view(torch.uint8)
    return parts


def show(name: str, shape: tuple[int, int], nbytes: int, times: list[float]) -> None:
    cells = " | ".join(f"{t:.1f}" for t in times)
    print(f"| {name} | {shape[0]} x {shape[1]} | {nbytes / 1e6:.1f} | {cells} |", flush=True)


def packed(spec: str, shape: tuple[int, int], xs: list[Tensor]) -> None:
    scheme, kernel = parse(spec), Nvidia()
    if reason := kernel.unavailable() or kernel.why_not(scheme, shape, CUDA, torch.bfloat16):
        print(f"| {spec} | {reason} |")
        return
    parts = random_parts(scheme, shape)
    prepared = kernel.prepare(scheme, parts, shape)
    w = scheme.dequantize(parts, shape, torch.float32, slice(0, 256))
    for x in xs:
        got, exact = kernel.linear(x, scheme, prepared, shape)[:, :256].float(), x.float() @ w.T
        distance = float((got - exact).norm() / exact.norm())
        if not distance < 1e-2:
            raise SystemExit(f"{spec}, {len(x)} rows: differs from the reference by {distance:.1e}")
    del parts
    nbytes = sum(t.nbytes for t in prepared)
    copies = [prepared, *(tuple(t.clone() for t in prepared) for _ in range(COLD // nbytes))]
    times = [
        microseconds([lambda p=p, x=x: kernel.linear(x, scheme, p, shape) for p in copies])  # type: ignore[misc]
        for x in xs
    ]
    show(spec, shape, nbytes, times)


def others(shape: tuple[int, int], xs: list[Tensor]) -> None:
    n, k = shape
    ws = [torch.randn(n, k, device=CUDA, dtype=torch.bfloat16) for _ in range(3)]
    linear = torch.nn.functional.linear
    times = [microseconds([lambda w=w, x=x: linear(x, w) for w in ws]) for x in xs]  # type: ignore[misc]
    show("bf16 linear", shape, ws[0].nbytes, times)
    del ws
    codes = torch.randint(0, 256, (n, k // 2), device=CUDA, dtype=torch.uint8)
    packs = [torch.ops.aten._convert_weight_to_int4pack(codes, 2) for _ in range(1 + COLD // codes.nbytes)]
    pairs = torch.randn(k // 128, n, 2, device=CUDA, dtype=torch.bfloat16)
    multiply = torch.ops.aten._weight_int4pack_mm
    few = [x for x in xs if len(x) <= 64]
    times = [microseconds([lambda w=w, x=x: multiply(x, w, 128, pairs) for w in packs]) for x in few]  # type: ignore[misc]
    show("PyTorch int4-g128", shape, codes.nbytes + pairs.nbytes, times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schemes", nargs="*", default=SCHEMES, metavar="SCHEME")
    parser.add_argument("--columns", type=int, default=8192)
    parser.add_argument("--rows", default="8192,28672")
    parser.add_argument("--tokens", default="1,8,16,32,64,256,2048")
    args = parser.parse_args()
    tokens = [int(t) for t in args.tokens.split(",")]
    xs = [torch.randn(m, args.columns, device=CUDA, dtype=torch.bfloat16) for m in tokens]
    import triton

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}\n")
    print(f"| | shape | MB | {' | '.join(map(str, tokens))} |\n|---|---|---|{'---|' * len(tokens)}")
    for n in map(int, args.rows.split(",")):
        others((n, args.columns), xs)
        for spec in args.schemes:
            packed(spec, (n, args.columns), xs)


if __name__ == "__main__":
    main()
