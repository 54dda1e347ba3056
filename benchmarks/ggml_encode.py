"""What encoding in ggml's block types takes and loses, beside llama.cpp's encoders where llama-cpp-python is installed.

python benchmarks/ggml_encode.py [--device cuda] [--threads 1] [--rows 1024] [--columns 2048] [--no-importance]

Millions of weights a second from float32 to packed blocks, and the squared error weighed by importance as a share of
theirs. The weight is normal with heavy tails, its columns' importance log-normal.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from fewbit.schemes.base import Scheme, parse
from fewbit.schemes.ggml.iq import IQ
from fewbit.schemes.ggml.scheme import GGML
from fewbit.schemes.ggml.table import BLOCK_TYPES


def seconds(work: Callable[[], Tensor], device: str) -> tuple[float, Tensor]:
    """The least of three runs, and what it gave."""
    took = []
    for _ in range(3):
        start = time.perf_counter()
        out = work()
        if device != "cpu":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
    return min(took), out


def library() -> ctypes.CDLL | None:
    """llama.cpp's quantizers, of the package llama-cpp-python."""
    found = find_spec("llama_cpp")
    places = [] if found is None or found.origin is None else list(Path(found.origin).parent.glob("lib/*ggml-base.*"))
    if not places:
        return None
    library = ctypes.CDLL(str(min(places, key=lambda path: len(path.name))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    return library


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--no-importance", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    peer, (n, k) = library(), (args.rows, args.columns)
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) / 50
    w += torch.randn(n, k, generator=torch.Generator().manual_seed(1)) ** 3 / 500
    importance = torch.randn(k, generator=torch.Generator().manual_seed(2)).exp()
    there, told = w.to(args.device), importance.to(args.device)
    print(f"{n} x {k}, {args.device}, {args.threads} threads: millions of weights a second; error against llama.cpp's")
    for name in (*GGML.examples, *IQ.examples):
        if name.startswith("iq2") and args.no_importance:
            continue  # llama.cpp's encoders of these types end the process without importances
        scheme = parse(name)

        def encode(scheme: Scheme = scheme) -> Tensor:
            if args.no_importance:
                codes, grids = scheme.nearest(there)
            else:
                grids = scheme.fit(there, told)
                codes = grids.encode(there)
            return scheme.pack(codes, grids)["blocks"]

        def lost(blocks: Tensor, scheme: Scheme = scheme) -> float:
            values = scheme.dequantize({"blocks": blocks.cpu()}, (n, k), torch.float32)
            return float(((values - w).square() * (1.0 if args.no_importance else importance)).sum())

        took, blocks = seconds(encode, args.device)
        line = f"{name:8} {n * k / took / 1e6:8.2f}"
        if peer is not None:
            quantize, number, shape = peer.ggml_quantize_chunk, BLOCK_TYPES[name].number, blocks.shape

            def theirs(
                quantize: Callable[..., int] = quantize, number: int = number, shape: torch.Size = shape
            ) -> Tensor:
                out = torch.zeros(shape, dtype=torch.uint8)
                given = None if args.no_importance else importance.data_ptr()
                quantize(number, w.data_ptr(), out.data_ptr(), 0, n, k, given)
                return out

            took, other = seconds(theirs, "cpu")
            line += f"   llama.cpp, one thread {n * k / took / 1e6:8.2f}   error {lost(blocks) / lost(other):.4f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
