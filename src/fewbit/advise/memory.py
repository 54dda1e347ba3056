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
    quantizing   the block with the most parameters in float32 (on a GPU in 16 bits), and
                   its packed weights, which wait in main memory until the block is finished
                   needs text  4 h samples x length, the hidden states (on a GPU 2 h); of each distinct input of K
                               columns 4 K² (GPTQ; with a target 16 K²) or 4 K, but only of one group of linears
                               (pipeline/groups.py); with a target, for 16384 tokens or a quarter of them all, the
                               original model's hidden states twice, and what its linears read (if there is no room
                               for that, the block and what its linears read in 2048 tokens); and the most of
                                 twice 2048 tokens (experts on a GPU: 32768) through that block, in float32 (16 bits):
                                 what they take, and what statistics and the allocator keep of them
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

from fewbit.checks import CACHE_TYPES
from fewbit.formats.base import Shape
from fewbit.models.experts import is_of_expert
from fewbit.models.outline import Geometry
from fewbit.pipeline.groups import by_module, distinct_inputs, groups_of, room_for_statistics, statistics_bytes
from fewbit.stats import Need

_PIECE = 1 << 22  # values that are decoded at once: schemes.base.chunk_rows
_BATCH, _BATCH_OF_EXPERTS = 2048, 32768  # tokens of calibration text computed at once: pipeline/capture.py
_COMPARED = 16384  # tokens that are compared with the original model, but at least a quarter: pipeline/capture.py
_CUDA_LIBRARIES = 1_100_000_000  # in main memory; measured on an H100 with torch 2.11
_ON_THE_WAY = 24_000_000


@dataclass(frozen=True)
class Use:
    """A workload: `batch` texts of `context` tokens at once, with a KV cache of type `cache`."""

    context: int
    batch: int = 1
    cache: str = "bf16"
    activation: int = 2  # bytes


def use_of(longest: int, context: int | None = None, batch: int = 1, cache: str = "bf16") -> Use:
    """A workload. longest: the model's context; its texts have as many tokens by default, at most 4096."""
    tokens = min(4096, longest) if context is None else context
    return Use(context=tokens, batch=batch, cache=cache, activation=4 if cache == "float32" else 2)


def cache_bytes(g: Geometry, use: Use) -> int:
    """Bytes of the KV cache for `batch` texts of `context` tokens."""
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
    """The block with the most parameters, the shapes of its linears by name, and whether it has experts."""

    parameters: int
    linears: Mapping[str, Shape]
    experts: bool = False

    def widest(self, hidden: int, a: int) -> int:
        """Bytes for each token at the widest moment of an MLP or attention; experts get few tokens each."""
        widths = [0]
        for names in by_module(name for name in self.linears if not is_of_expert(name)):
            *into, last = (self.linears[name] for name in names)
            mlp = len(into) <= 2 and all(n in (last[1], 2 * last[1]) for n, _ in into)
            rows = sum(n for n, _ in into)
            widths.append(a * (3 * hidden + (rows + last[1] if mlp else 2 * (rows + last[0]))))
        return max(widths)


@dataclass(frozen=True)
class Work:
    """How a plan quantizes: the statistics it needs, the calibration windows and tokens in each, the bits per weight,
    and the bytes of all packed weights in memory; unquantized ones are read in place from a mapped file."""

    need: Need
    samples: int
    length: int
    bits: float
    packed_bytes: int


@dataclass(frozen=True)
class Device:
    """What computes: the bytes of a weight and of an activation, its memory, and whether it is a GPU."""

    activation: int
    memory: int
    gpu: bool = False


def quantization_peak(g: Geometry, block: Block, work: Work, device: Device) -> int:
    """The most that quantizing takes on the device that computes, beyond Python and its imports."""
    a = device.activation
    within = a * block.parameters + (0 if device.gpu else packed_block(block, work))
    largest = max(n * k for n, k in block.linears.values())
    if work.need > Need.NOTHING:
        tokens, hessian = work.samples * work.length, work.need >= Need.HESSIAN
        room = room_for_statistics(device.memory)
        groups = groups_of(block.linears, work.need, room)
        kept = max(statistics_bytes({name: block.linears[name] for name in names}, work.need) for names in groups)
        at_once = min(_BATCH_OF_EXPERTS if device.gpu and block.experts else _BATCH, tokens)
        # A config's inner size is that of dense blocks.
        widest = block.widest(g.hidden, a) if block.experts else max(_widest(g, a), block.widest(g.hidden, a))
        replay = 2 * at_once * widest
        working = max((4 * k * k if hessian else 0) + 16 * n * k for n, k in block.linears.values())
        within += a * tokens * g.hidden + kept + max(replay, working)
        if work.need >= Need.SHIFT:  # the original model's states, and what its linears read or else its block
            compared = tokens / max(1, min(4, tokens // _COMPARED))
            dense = {name: shape for name, shape in block.linears.items() if not is_of_expert(name)}
            read = a * sum(distinct_inputs(dense))
            within += round(compared * 2 * a * g.hidden)
            within += round(compared * read) if compared * read <= room else a * block.parameters + at_once * read
    else:
        within += 9 * min(largest, 1 << 24)
    return max(within, work.packed_bytes + _decoded(g)) + _ON_THE_WAY


def packed_block(block: Block, work: Work) -> int:
    """Bytes of the packed weights of the block."""
    return round(work.bits / 8 * sum(n * k for n, k in block.linears.values()))


def host_peak(block: Block, work: Work) -> int:
    """The most main memory that quantizing on a GPU takes, beyond Python and its imports: packed weights of a block,
    and CUDA's libraries."""
    return packed_block(block, work) + _CUDA_LIBRARIES


def _decoded(g: Geometry) -> int:
    return 2 * 4 * min(_PIECE, g.hidden * g.inner)
