"""vLLM's own GPU kernels beside fewbit's: do they read fewbit's files, and how long does each product take?

    pip download --no-deps vllm==0.26.0 && unzip vllm-0.26.0-*.whl vllm/_C_stable_libtorch.abi3.so
    python -m benchmarks.servers_kernels --library vllm/_C_stable_libtorch.abi3.so [--check] [--tokens 1,8]

The version of vLLM must be one for the installed torch: 0.26 for torch 2.11. vLLM is not imported. torch loads the
library, and this file prepares weights as vLLM's loader does.

First a weight is quantized, and written as a gptq or awq file holds it. vLLM's operators repack these tensors and
multiply by them, and each product is compared with x times the decoded weight. vLLM casts a file's scales to the
dtype of the activations, so the decoded weight of its kernels has bfloat16 scales. --check stops there.

Then microseconds, as in gpu.py: medians of replays of a CUDA graph, on copies of the weights that are rotated so that
they come from memory. For each number of rows all kernels are timed in turn, and that three times. On a Hopper GPU vLLM
itself takes Machete for both kinds of file, and Marlin where Machete cannot.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu import CUDA, random_parts
from fewbit.formats.awq import AWQFormat
from fewbit.formats.base import Format, Stored
from fewbit.formats.gptq import GPTQFormat
from fewbit.kernels.nvidia import Nvidia
from fewbit.kernels.nvidia.tuning import COLD, microseconds
from fewbit.schemes import bits
from fewbit.schemes.base import QTensor, parse

GROUP, BF16 = 128, torch.bfloat16
SYMMETRIC, ASYMMETRIC = f"int4-g{GROUP}-sym", f"int4-g{GROUP}"
# An id of vLLM's scalar types has the mantissa's bits from bit 8, the bias from bit 17, and from bit 50 a 1: "IEEE".
UINT4, UINT4B8 = 1 << 50 | 4 << 8, 1 << 50 | 8 << 17 | 4 << 8
INTERLEAVED = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight columns each nibble of a word holds, from the lowest
LIMIT = 1e-2  # relative error of a product in bfloat16
ROUNDS = 3
CHECKED = ((1024, 2048), (4096, 4096))
OPERATORS = {  # -> the number of arguments that this file gives
    "marlin_gemm": 19,
    "gptq_marlin_repack": 6,
    "awq_marlin_repack": 5,
    "machete_mm": 10,
    "machete_prepack_B": 4,
}

Held = tuple[Tensor, ...]  # a weight, as a kernel reads it
Multiply = Callable[[Tensor, Held], Tensor]


def stored(weight: QTensor, form: Format) -> dict[str, Tensor]:
    """The tensors of a file, as the format writes them, on the GPU."""
    config = form.config([Stored("layer", weight.shape, parse(str(weight.codec)))], ())
    written = form.lay_out(weight.map(lambda part: part.cpu()), config)
    return {suffix: tensor.to(CUDA) for suffix, tensor in written.items()}


def permuted(rows: Tensor) -> Tensor:
    """Scales or zero points [groups, N] in Marlin's order: each 64 columns as an 8 x 8 matrix, transposed."""
    squares: Tensor = rows.unflatten(1, (-1, 8, 8))
    return squares.transpose(2, 3).flatten(1).contiguous()


def ordered(rows: Tensor, order: tuple[int, ...]) -> Tensor:
    eights: Tensor = rows.unflatten(1, (-1, 8))
    return eights[..., list(order)].flatten(1)


def plain(words: Tensor) -> Tensor:
    """The numbers [rows, N] in the words of an awq file."""
    inverse = tuple(INTERLEAVED.index(i) for i in range(8))
    return ordered(bits.unpack(words.view(torch.uint8), 4, words.shape[1] * 8), inverse)


def none() -> Tensor:
    return torch.empty(0, dtype=torch.int32, device=CUDA)


def marlin(kind: int, shape: tuple[int, int]) -> Multiply:
    (n, k), units = shape, torch.cuda.get_device_properties(CUDA).multi_processor_count
    locks, empty = torch.zeros(units, dtype=torch.int32, device=CUDA), none()

    def multiply(x: Tensor, held: Held) -> Tensor:
        codes, scales, zeros = held
        others = (len(x), n, k, True, False, True, False)  # ..., k full, atomic add, fp32 reduce, float zeros
        weight = (codes, None, scales, None, None, zeros, empty, empty)
        y: Tensor = torch.ops._C.marlin_gemm(x, None, *weight, locks, kind, *others)
        return y

    return multiply


def marlin_gptq(weight: QTensor) -> tuple[Held, Multiply]:
    (n, k), file = weight.shape, stored(weight, GPTQFormat())
    codes = torch.ops._C.gptq_marlin_repack(file["qweight"], none(), k, n, 4, False)
    return (codes, permuted(file["scales"].to(BF16)), none()), marlin(UINT4B8, weight.shape)


def marlin_awq(weight: QTensor) -> tuple[Held, Multiply]:
    (n, k), file = weight.shape, stored(weight, AWQFormat())
    codes = torch.ops._C.awq_marlin_repack(file["qweight"], k, n, 4, False)
    zeros = bits.words(bits.pack(ordered(permuted(plain(file["qzeros"])), INTERLEAVED), 4))
    return (codes, permuted(file["scales"].to(BF16)), zeros), marlin(UINT4, weight.shape)


def machete(words: Tensor, scales: Tensor, zeros: Tensor | None) -> tuple[Held, Multiply]:
    """words: int32 [K / 8, N], as a gptq file has them. zeros: zero points, already scaled and negated."""
    kind = UINT4B8 if zeros is None else UINT4
    # The operator takes [K / 8, N] with adjacent words of a row of the weight adjacent in memory.
    codes = torch.ops._C.machete_prepack_B(words.T.contiguous().T, BF16, kind, BF16)

    def multiply(x: Tensor, held: Held) -> Tensor:
        codes, scales, *rest = held
        grids = (scales, rest[0] if rest else None, GROUP)
        y: Tensor = torch.ops._C.machete_mm(x, codes, kind, None, *grids, None, None, None)
        return y

    return (codes, scales) if zeros is None else (codes, scales, zeros), multiply


def machete_gptq(weight: QTensor) -> tuple[Held, Multiply]:
    file = stored(weight, GPTQFormat())
    return machete(file["qweight"], file["scales"].to(BF16).contiguous(), None)


def as_gptq(words: Tensor) -> Tensor:
    """An awq file's codes [K, N / 8], as a gptq file holds them, [K / 8, N]."""
    return bits.words(bits.pack(plain(words).T.contiguous(), 4)).T.contiguous()


def machete_awq(weight: QTensor) -> tuple[Held, Multiply]:
    file = stored(weight, AWQFormat())
    scales = file["scales"].to(BF16).contiguous()
    return machete(as_gptq(file["qweight"]), scales, (-1.0 * scales * plain(file["qzeros"]).to(BF16)).contiguous())


def dense(weight: QTensor) -> tuple[Held, Multiply]:
    return (weight.dequantize(BF16),), lambda x, held: torch.nn.functional.linear(x, held[0])


def ours(weight: QTensor) -> tuple[Held, Multiply]:
    kernel, codec, shape = Nvidia(), weight.codec, weight.shape
    if reason := kernel.unavailable() or kernel.why_not(codec, shape, CUDA, BF16):
        raise RuntimeError(reason)
    return kernel.prepare(codec, weight.parts, shape), lambda x, held: kernel.linear(x, codec, held, shape)


@dataclass(frozen=True)
class Contender:
    name: str
    spec: str
    prepare: Callable[[QTensor], tuple[Held, Multiply]]
    rounds_scales: bool = False  # to bfloat16


CONTENDERS = (
    Contender("bf16 linear", SYMMETRIC, dense),
    Contender(f"fewbit {SYMMETRIC}", SYMMETRIC, ours),
    Contender("Marlin, gptq file", SYMMETRIC, marlin_gptq, True),
    Contender("Machete, gptq file", SYMMETRIC, machete_gptq, True),
    Contender(f"fewbit {ASYMMETRIC}", ASYMMETRIC, ours),
    Contender("Marlin, awq file", ASYMMETRIC, marlin_awq, True),
    Contender("Machete, awq file", ASYMMETRIC, machete_awq, True),
)


def expected(weight: QTensor, rounds_scales: bool, rows: slice = slice(None)) -> Tensor:
    parts = weight.parts
    if rounds_scales:
        parts = {**parts, "scale": parts["scale"].to(BF16).to(parts["scale"].dtype)}
    return replace(weight, parts=parts).dequantize(torch.float32, rows)


def distance(y: Tensor, exact: Tensor) -> float:
    return float((y.float() - exact).norm() / exact.norm())


def why(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:400]}"


def load(path: Path) -> bool:
    """Whether torch loaded the library and each operator takes the arguments that this file gives."""
    try:
        torch.ops.load_library(str(path.resolve()))
    except Exception as error:
        print(f"{path} cannot be loaded: {why(error)}")
        return False
    fits = True
    for name, count in OPERATORS.items():
        try:
            schema = getattr(torch.ops._C, name).default._schema
        except AttributeError as error:
            print(f"{name}: not in the library ({error})")
            fits = False
            continue
        if len(schema.arguments) != count:
            print(f"{name}: {count} arguments given, but the library has {schema}")
            fits = False
    return fits


def check(contenders: tuple[Contender, ...]) -> bool:
    tokens, right = (1, 8, 16, 64, 100, 256), True
    print("Relative error of products by tensors that fewbit wrote. A wrong order gives more than 0.1.\n")
    print(f"| kernel | weight | {' | '.join(f'{m} rows' for m in tokens)} | |\n|---|---|{'---|' * (len(tokens) + 1)}")
    for seed, shape in enumerate(CHECKED):
        torch.manual_seed(seed)
        w = torch.randn(shape) * (torch.rand(shape[0], 1) * 0.04 + 0.002)  # rows of unlike scales
        w += torch.rand(shape[0], 1) * 0.06 - 0.03  # and of unlike zero points
        weights = {spec: quantized(w, spec) for spec in (SYMMETRIC, ASYMMETRIC)}
        for each in contenders:
            weight, errors = weights[each.spec], []
            try:
                held, multiply = each.prepare(weight)
                exact = expected(weight, each.rounds_scales)
                for m in tokens:
                    x = torch.randn(m, shape[1], device=CUDA, dtype=BF16)
                    errors.append(distance(multiply(x, held), x.float() @ exact.T))
                good = all(error < LIMIT for error in errors)
                verdict = " | ".join(f"{error:.1e}" for error in errors) + (" | OK" if good else " | WRONG")
            except Exception as error:
                good, verdict = False, why(error)
            print(f"| {each.name} | {shape[0]} x {shape[1]} | {verdict} |", flush=True)
            right &= good
        right &= same(weights[ASYMMETRIC])
    return right


def quantized(w: Tensor, spec: str) -> QTensor:
    scheme = parse(spec)
    parts = scheme.pack(*scheme.nearest(w))
    return QTensor(scheme, (w.shape[0], w.shape[1]), parts).map(lambda part: part.to(CUDA))


def same(weight: QTensor) -> bool:
    """Whether vLLM's two repackings make the same codes of a gptq file and of an awq file of one weight."""
    (n, k), equal = weight.shape, False
    try:
        gptq, awq = stored(weight, GPTQFormat())["qweight"], stored(weight, AWQFormat())["qweight"]
        one = torch.ops._C.gptq_marlin_repack(gptq, none(), k, n, 4, False)
        equal = torch.equal(one, torch.ops._C.awq_marlin_repack(awq, k, n, 4, False))
        verdict = "OK" if equal else "WRONG"
    except Exception as error:
        verdict = why(error)
    print(f"| same codes repacked from gptq and from awq | {n} x {k} | {verdict} |", flush=True)
    return equal


class Timed:
    """A contender with copies of one weight, or with the reasons why it has none or no time."""

    def __init__(self, each: Contender, weight: QTensor) -> None:
        self.name, self.nbytes = each.name, 0
        self.copies: list[Held] = []
        self.times: list[float | None] = []
        self.reasons: list[str] = []
        try:
            held, self.multiply = each.prepare(weight)
            self.exact = expected(weight, each.rounds_scales, slice(0, 256))
            self.nbytes = sum(t.nbytes for t in held)
            self.copies = [held, *(tuple(t.clone() for t in held) for _ in range(max(1, COLD // self.nbytes)))]
        except Exception as error:
            self.reasons.append(why(error))

    def verify(self, x: Tensor) -> None:
        """Note if the product is not that of the reference."""
        if self.copies:
            try:
                error = distance(self.multiply(x, self.copies[0])[:, :256], x.float() @ self.exact.T)
                if not error < LIMIT:
                    self.reasons.append(f"{len(x)} rows: the product differs from the reference by {error:.1e}")
            except Exception as error:
                self.reasons.append(f"{len(x)} rows: {why(error)}")

    def time(self, x: Tensor) -> float | None:
        try:
            calls = [lambda held=held: self.multiply(x, held) for held in self.copies]
            return microseconds(calls) if calls else None
        except Exception as error:
            self.reasons.append(f"{len(x)} rows: {why(error)}")
            return None


def ratios(timed: dict[str, Timed]) -> list[tuple[str, list[float | None]]]:
    """Names of two contenders, and the time of the first over that of the second, which is fewbit's."""
    rows = []
    for each in CONTENDERS:
        ruler = f"fewbit {each.spec}"
        if each.rounds_scales and each.name in timed and ruler in timed:
            pairs = zip(timed[each.name].times, timed[ruler].times, strict=True)
            rows.append((f"{each.name} / {ruler}", [a / b if a and b else None for a, b in pairs]))
    return rows


def compare(shape: tuple[int, int], contenders: tuple[Contender, ...], tokens: list[int]) -> None:
    weights: dict[str, QTensor] = {}
    for spec in sorted({each.spec for each in contenders}):
        weights[spec] = QTensor(parse(spec), shape, random_parts(parse(spec), shape))
    timed = {each.name: Timed(each, weights[each.spec]) for each in contenders}
    for m in tokens:
        x = torch.randn(m, shape[1], device=CUDA, dtype=BF16)
        rounds: dict[str, list[float | None]] = {name: [] for name in timed}
        for one in timed.values():
            one.verify(x)
        for _ in range(ROUNDS):
            for name, one in timed.items():
                rounds[name].append(one.time(x))
        for name, one in timed.items():
            found = [t for t in rounds[name] if t is not None]
            one.times.append(statistics.median(found) if found else None)

    def cells(values: list[float | None], digits: int) -> str:
        return " | ".join("-" if value is None else f"{value:.{digits}f}" for value in values)

    size = f"{shape[0]} x {shape[1]}"
    print(f"\n| microseconds | weight | MB | {' | '.join(map(str, tokens))} |\n|---|---|---|{'---|' * len(tokens)}")
    for one in timed.values():
        mb = "-" if not one.copies else f"{one.nbytes / 1e6:.1f}"
        print(f"| {one.name} | {size} | {mb} | {cells(one.times, 1)} |")
    print(f"\n| ratio | weight | {' | '.join(map(str, tokens))} |\n|---|---|{'---|' * len(tokens)}")
    for name, values in ratios(timed):
        print(f"| {name} | {size} | {cells(values, 2)} |")
    for one in timed.values():
        for reason in list(dict.fromkeys(one.reasons))[:5]:
            print(f"\n{one.name}, {size}: {reason}")
    print()
    print(json.dumps({"shape": shape, "rows": tokens, "us": {o.name: o.times for o in timed.values()}}), flush=True)
    del timed, weights
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--check", action="store_true", help="compare products only")
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="NAME", help="kernels whose names contain one of these"
    )
    parser.add_argument("--columns", type=int, default=8192)
    parser.add_argument("--rows", default="8192,28672")
    parser.add_argument("--tokens", default="1,8,16,32,64,128,256,2048")
    args = parser.parse_args()
    import triton

    size = args.library.stat().st_size
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"{args.library.name}, {size} bytes\n")
    fits = load(args.library)
    chosen = tuple(c for c in CONTENDERS if not args.only or any(part in c.name for part in args.only))
    right = check(chosen)
    print(f"\n{'All products are right.' if right else 'NOT all products are right.'}")
    if not args.check:
        for n in map(int, args.rows.split(",")):
            compare((n, args.columns), chosen, [int(t) for t in args.tokens.split(",")])
    sys.exit(0 if fits and right else 1)


if __name__ == "__main__":
    main()
