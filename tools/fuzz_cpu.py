"""The CPU library over random shapes, schemes and bytes, each buffer exactly as long as it must be.

Meant to run under sanitizers (`make native-test`); it fails too where a product is not the reference's.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import torch

from fewbit import registry
from fewbit.kernels.base import Kernel
from fewbit.kernels.cpu.kernel import product
from fewbit.schemes.base import QTensor, Scheme, parse
from fewbit.schemes.ggml.iq import IQ
from fewbit.schemes.stacked import concatenated
from fewbit.system import native

ROOT = Path(__file__).resolve().parents[1]
HALVES = (torch.float16, torch.bfloat16)
SPECS = (
    *("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs"),
    *("iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "tq1_0", "tq2_0", "q1_0", "q2_0"),
    *(f"int{bits}-{group}{sym}" for bits in range(2, 9) for group in ("g32", "g128", "row") for sym in ("", "-sym")),
    *("int4-g16", "int2-g16", "int8-g16", "nf4-b64", "nf4-b32-dq", "fp4-b128", "llm.int8"),
    *("fp8-row", "fp8-tensor", "fp8-b128", "mxfp4", "nvfp4", "nvfp4-mul"),
)


def grouped(kernel: Kernel, scheme: Scheme, shape: tuple[int, int], isa: str) -> None:
    """Several experts in one call give what one call for each gives, bit for bit."""
    counts = [random.choice((0, 0, 1, 2, 5, 9)) for _ in range(random.randint(1, 6))]
    weights = [QTensor(scheme, shape, scheme.pack(*scheme.nearest(torch.randn(*shape)))) for _ in counts]
    whole = concatenated(weights)
    prepared = kernel.prepare(scheme, {key: part.clone() for key, part in whole.parts.items()}, whole.shape)
    x = torch.randn(sum(counts), shape[1]).to(random.choice((torch.float32, torch.bfloat16)))
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    y = kernel.grouped(x, scheme, prepared, (len(counts), *shape), ends)
    if not torch.equal(y, Kernel.grouped(kernel, x, scheme, prepared, (len(counts), *shape), ends)):
        raise SystemExit(f"{scheme}, {len(counts)} x {shape}, rows {counts}, {isa}: not what each gives alone")


def rounded(isa: str) -> None:
    """FP8 codes and loss of a weight, from buffers without a byte to spare, are those of PyTorch's operations."""
    n, k, dtype = random.randint(1, 150), random.randint(1, 400), random.choice((torch.float32, torch.bfloat16))
    w, scheme = torch.randn(n, k).to(dtype), parse(random.choice(("fp8-row", "fp8-b128")))
    parts = {key: part.clone() for key, part in scheme.pack(*scheme.nearest(w.clone())).items()}
    double = scheme.pack(*scheme.nearest(w.double()))
    error, exact = scheme.lost(w, parts)[0], float((scheme.dequantize(parts, (n, k), torch.float32) - w).square().sum())
    if not torch.equal(parts["codes"], double["codes"]) or abs(error - exact) > 1e-4 * exact:
        raise SystemExit(f"{scheme} {n} x {k} of {dtype}, {isa}: codes or their loss are not the definition's")


def unquantized(isa: str) -> None:
    """Products with a weight in 16 bits, from a buffer without a byte to spare."""
    n, k, dtype = random.randint(1, 70), random.randint(1, 300), random.choice(HALVES)
    weight, x = torch.randn(n, k).to(dtype), torch.randn(random.randint(1, 12), k)
    exact = x.double() @ weight.double().T
    if (distance := float((product(x, weight) - exact).norm() / exact.norm())) > 1e-5:
        raise SystemExit(f"{dtype} {n} x {k}, {len(x)} rows, {isa}: off by {distance:.1e}")


def encoded(isa: str) -> None:
    """Vectors of a codebook that are chosen under a metric can be stored."""
    scheme, n = IQ.from_spec(random.choice(IQ.examples)), random.randint(1, 40)
    assert scheme is not None
    w, v = torch.randn(n, 256), scheme.vector
    grids, mixed = scheme.fit(w, torch.rand(256)), torch.randn(v, v)
    codes = grids.encode(w)
    codes[:, v : 2 * v] = grids.encode_under(w[:, v : 2 * v], torch.arange(v, 2 * v), mixed @ mixed.T)
    if not torch.equal(scheme.unpack(scheme.pack(codes, grids), (n, 256))[0], codes):
        raise SystemExit(f"{scheme} {n} x 256, {isa}: other codes come back")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    torch.manual_seed(options.seed)
    sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []
    from tests import block_cases

    library = native.library()
    if isinstance(library, str):
        raise SystemExit(library)
    known = ("scalar", "avx2", "avxvnni", "avx512", "avx512vbmi", "neon", "neondot")
    sets = [name for name in known if not library.fewbit_force(name.encode())]
    tried = 0
    for case in range(options.cases):
        scheme, isa = parse(SPECS[case % len(SPECS)]), random.choice(sets)
        library.fewbit_force(isa.encode())
        torch.set_num_threads(random.randint(1, 4))
        rounded(isa)
        encoded(isa)
        unquantized(isa)
        seed, dtype = random.randrange(1 << 30), random.choice((torch.float32, *HALVES))
        if (off := block_cases.distance(block_cases.drawn(seed, dtype))) > 2e-2:
            raise SystemExit(f"block of seed {seed} in {dtype}, {isa}: off by {off:.1e}")
        n, k = (
            random.choice((random.randint(1, 70), random.randint(71, 300))),
            random.choice((1, 31, 32, 37, 96, 128, 160, 256, 384, 576, 768, 1024)),
        )
        for name in ("cpu", "cpu_exact"):
            kernel = registry.get("kernels", name)()
            if scheme.why_not((n, k)) or kernel.why_not(scheme, (n, k), torch.device("cpu"), torch.float32):
                continue
            parts = scheme.pack(*scheme.nearest(torch.randn(n, k)))
            # From malloc, and not one byte more.
            parts = {key: part.clone() for key, part in parts.items()}
            x = torch.randn(random.randint(1, 12), k)
            exact = kernel.rounded(x, scheme) @ scheme.dequantize(parts, (n, k), torch.float32).T
            y = kernel.linear(x, scheme, kernel.prepare(scheme, parts, (n, k)), (n, k))
            distance = float((y - exact).norm() / exact.norm().clamp(min=1e-20))
            if not distance <= 1e-5:
                raise SystemExit(f"{scheme} {n} x {k}, {len(x)} rows, {isa}: off by {distance:.1e}")
            held, narrow = kernel.prepare(scheme, parts, (n, k)), x[:8].to(random.choice(HALVES))
            y, wide = (kernel.linear(rows, scheme, held, (n, k)) for rows in (narrow, narrow.float()))
            if not torch.equal(y, wide.to(y.dtype)):
                raise SystemExit(f"{scheme} {n} x {k}, {len(narrow)} rows of {y.dtype}, {isa}: not float32's, rounded")
            grouped(kernel, scheme, (n, k), isa)
            tried += 1
    print(f"{tried} products and {options.cases} blocks on {', '.join(sets)}: all agree")


if __name__ == "__main__":
    main()
