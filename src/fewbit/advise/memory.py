"""How much memory a model takes, from its sizes: stated peaks, held to measurements (benchmarks/estimate.py).

Letters: T tokens computed at once (batch x context, when a whole context is read), h hidden size, i inner size of the
MLP, r query rows (heads x width), v key-value rows, V vocabulary, L layers, a bytes of an activation. All in bytes.

    cache        batch x sum over layers of min(context, window) x 2 v x bytes of its type
    activations  T x the widest moment of a block, and the last token's logits:
                   MLP        a (3 h + 3 i)        embeddings, residual, norm's output; gate, up, their product
                   attention  a (3 h + 3 r + 4 v)  the same three; q, q rotated, output; k, k rotated, v and a copy
                   norm       a 3 h + 8 h          the same three; a float32 copy and its square
                 + batch x V (a + 4) + a table of positions; and, over packed weights, one decoded piece of a weight,
                 at most 4 Mi values in float32 twice (`chunk_rows`)
    quantizing   the block with the most parameters in float32, and
                   needs text  4 h samples x length, the hidden states; of each distinct input of K columns 4 K² (GPTQ)
                               or 4 K; and the most of
                                 twice 2048 tokens through that block, as above, in float32: what they take, and what
                                 statistics and the allocator keep of them
                                 4 K² + 16 N K of a linear (GPTQ: a factor of the Hessian, four copies of the weight)
                   else        two copies of the largest linear and its codes, 9 N K, at most 16 Mi values at once
                 or the packed weights as the output is opened again and a piece of one is decoded, whichever is more;
                 and 24 MB for what Python and its libraries take on the way, which is most of it for a small model

Scores of attention are not counted: transformers' default (`sdpa`) never holds them all. Python and its imports are
not counted either, about 0.4 GB, nor what a CUDA context takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fewbit.errors import PlanError
from fewbit.formats.base import Shape
from fewbit.models.outline import Geometry
from fewbit.stats import Need

CACHE_TYPES = {"float32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
_PIECE = 1 << 22  # values that are decoded at once: schemes.base.chunk_rows
_BATCH = 2048  # tokens of calibration text computed at once: pipeline/blocks.py
_ON_THE_WAY = 24_000_000


@dataclass(frozen=True)
class Use:
    """A workload: `batch` texts of `context` tokens at once, with a KV cache of type `cache`."""

    context: int
    batch: int = 1
    cache: str = "bf16"
    activation: int = 2  # bytes


def cache_bytes(g: Geometry, use: Use) -> int:
    """Bytes of the KV cache for `batch` texts of `context` tokens."""
    if use.cache not in CACHE_TYPES:
        raise PlanError(f"`cache={use.cache}`: unknown KV cache type", f"Known: {', '.join(CACHE_TYPES)}.")
    tokens = sum(min(use.context, window or use.context) for window in g.windows)
    return round(use.batch * tokens * 2 * g.values * CACHE_TYPES[use.cache])


def activation_peak(g: Geometry, use: Use, *, packed: bool) -> int:
    """The most that computing `batch` texts of `context` tokens takes besides weights and cache."""
    logits = use.batch * g.vocab * (use.activation + 4)
    decoded = _decoded(g) if packed else 0
    return use.batch * use.context * _widest(g, use.activation) + logits + decoded


def _widest(g: Geometry, a: int) -> int:
    """Bytes for each token at the widest moment of a block."""
    mlp = a * (3 * g.hidden + 3 * g.inner)
    attention = a * (3 * g.hidden + 3 * g.rows + 4 * g.values)
    norm = (3 * a + 8) * g.hidden
    return max(mlp, attention, norm)


@dataclass(frozen=True)
class Block:
    """The block with the most parameters, and the shapes of its linears by name."""

    parameters: int
    linears: Mapping[str, Shape]


def quantization_peak(g: Geometry, block: Block, need: Need, samples: int, length: int, packed_bytes: int) -> int:
    """The most that quantizing takes on the device that computes, beyond Python and its imports.

    `packed_bytes`: of the quantized weights in memory; unquantized ones are read in place from a mapped file.
    """
    within = 4 * block.parameters
    largest = max(n * k for n, k in block.linears.values())
    if need > Need.NOTHING:
        tokens, columns = samples * length, _inputs(block.linears)
        hessian = need >= Need.HESSIAN
        kept = sum(4 * k * k if hessian else 4 * k for k in columns)
        replay = 2 * min(_BATCH, tokens) * _widest(g, 4)
        working = max((4 * k * k if hessian else 0) + 16 * n * k for n, k in block.linears.values())
        within += 4 * tokens * g.hidden + kept + max(replay, working)
    else:
        within += 9 * min(largest, 1 << 24)
    return max(within, packed_bytes + _decoded(g)) + _ON_THE_WAY


def _decoded(g: Geometry) -> int:
    return 2 * 4 * min(_PIECE, g.hidden * g.inner)


def _inputs(linears: Mapping[str, Shape]) -> list[int]:
    """Columns of each distinct input: linears of a module share one, but for its last, which reads what they made."""
    members: dict[str, list[str]] = {}
    for name in linears:
        members.setdefault(name.rpartition(".")[0], []).append(name)
    found = set()
    for parent, names in members.items():
        for name in names:
            found.add((parent, linears[name][1], name == names[-1]))
    return [columns for _, columns, _ in found]
