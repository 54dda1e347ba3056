"""A whole decoder block in one call of the CPU library: four products, and all that is between them.

For one token of a small model, PyTorch takes longer to start some sixty operations of a block than the products take:
SmolLM2 in q4_k_m makes 62.9 tokens a second with such calls and 27.7 without, on one thread of an EPYC with AVX2
(benchmarks/results/2026-11-cpu.md). Products round activations as the kernel `cpu` does, and all else is in float32. A
text's result is the same bit for bit whatever the other texts are, and whatever the number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import KernelError
from fewbit.kernels.cpu.kernel import weights_of
from fewbit.schemes.base import Codec
from fewbit.system import native

SILU, TANH, ERF, RELU, RELU2, QUICK = range(6)  # see `fewbit_activation` in csrc/fewbit.h
HALVES, NEIGHBORS, IN_ORDER = range(3)  # see `fewbit_pairs` in csrc/fewbit.h


@dataclass(frozen=True)
class Rows:
    """A packed weight [N, K] with the kernel's device tensors. bias: [N]. order: the columns of x in its order [K]."""

    codec: Codec
    prepared: tuple[Tensor, ...]
    shape: tuple[int, int]
    bias: Tensor | None = None
    order: Tensor | None = None


@dataclass(frozen=True)
class Norm:
    """x / sqrt(mean(x²) + eps) · weight + bias; centered: (x - mean) / sqrt(var + eps) · weight + bias."""

    weight: Tensor
    eps: float
    bias: Tensor | None = None
    centered: bool = False


@dataclass(frozen=True)
class Wiring:
    """The parts of a block, and how they are wired: see `fewbit_block` in csrc/fewbit.h.

    qkv: q, k and v, or all three stacked. gated: gate and up, or both stacked; up alone if `plain`. Without them and
    `down`, the block ends after attention. norms: before attention, after it, before the MLP, after it, of q, and of k.
    whole: the norms of q and k are over all heads. late: they come after positions. mixed: the columns of q, k and v
    are by heads. parallel: the MLP reads what attention reads. together: gate and up are stacked below
    q, k and v. sinks: [heads]. cap: 0 is none.
    """

    qkv: Sequence[Rows]
    output: Rows
    gated: Sequence[Rows]
    down: Rows | None
    norms: Sequence[Norm | None]
    heads: int
    shared: int
    head: int
    rotated: int
    scale: float
    activation: int = SILU
    pairs: int = HALVES
    whole: bool = False
    late: bool = False
    mixed: bool = False
    parallel: bool = False
    plain: bool = False
    together: bool = False
    sinks: Tensor | None = None
    cap: float = 0.0
    residual: float = 1.0


@dataclass
class Cached:
    """Keys and values [B, shared, L, head], contiguous. Tokens `first` to `end` are known, and new ones follow them."""

    keys: Tensor
    values: Tensor
    first: int
    end: int


@dataclass
class Slots:
    """Where the tokens of a step are, for many texts in one cache: int64 tensors.

    write: the slot of each new token [T]. The token sees `count` [T] of the slots `read` from `begin` [T] on, with its
    own among them. most: the largest count. last: the largest slot.
    """

    write: Tensor
    read: Tensor
    begin: Tensor
    count: Tensor
    most: int = 0
    last: int = 0

    def __post_init__(self) -> None:
        self.most, self.last = int(self.count.max()), max(int(each.max()) for each in (self.write, self.read))
        least = min(int(each.min()) for each in (self.write, self.read, self.begin, self.count - 1))
        if least < 0 or int((self.begin + self.count).max()) > len(self.read):
            raise KernelError("a step reads slots that are not there")


@dataclass(frozen=True)
class Pages:
    """Keys and values of many texts in slots, [slots, shared, head] each."""

    keys: Tensor
    values: Tensor
    slots: Slots


@dataclass
class Block:
    """A block whose tensors are known to the library. It keeps them alive."""

    wiring: Wiring
    dtype: torch.dtype
    kept: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        wiring, found = self.wiring, native.Block()
        found.type = native.TYPES[str(self.dtype).removeprefix("torch.")]
        for name in ("heads", "shared", "head", "rotated", "activation", "pairs", "scale", "cap", "residual"):
            setattr(found, name, getattr(wiring, name))
        for name in ("whole", "late", "mixed", "parallel", "plain", "together"):
            setattr(found, name, getattr(wiring, name))
        found.sinks = None if wiring.sinks is None else self._float(wiring.sinks)
        down = () if wiring.down is None else (wiring.down,)
        found.width, found.inner = wiring.output.shape[0], down[0].shape[1] if down else 0
        for i, norm in enumerate(wiring.norms):
            if norm is not None:
                bias = None if norm.bias is None else self._float(norm.bias)
                found.norm[i] = native.Norm(self._float(norm.weight), bias, norm.eps, norm.centered)
        for i, parts in enumerate((wiring.qkv, (wiring.output,), wiring.gated, down)):
            rows = [one for part in parts for one in self._rows(part)]
            if len(rows) > 3:
                raise KernelError(f"{len(rows)} products where a block has at most 3")
            found.counts[i] = len(rows)
            for j, one in enumerate(rows):
                found.products[i][j] = one
        self.found, self.width = found, found.width

    def _float(self, tensor: Tensor) -> int:
        """The address of a float32 copy."""
        copy = tensor.detach().to(torch.float32).contiguous()
        self.kept.append(copy)
        return copy.data_ptr()

    def _rows(self, part: Rows) -> list[native.Rows]:
        made, start = [], 0
        for weight, n in weights_of(part.codec, part.prepared, part.shape):
            self.kept += [weight, part.prepared]
            one = native.Rows(w=weight)
            if part.bias is not None:
                one.bias = self._float(part.bias[start : start + n])
            if part.order is not None:
                order = part.order.to(torch.int64).contiguous()
                self.kept.append(order)
                one.order = order.data_ptr()
            made.append(one)
            start += n
        return made

    def __call__(
        self, x: Tensor, cached: Cached | Pages, angles: tuple[Tensor, Tensor] | None, mask: Tensor | None = None
    ) -> Tensor:
        """The block's output [B, T, width] for x [B, T, width]. Writes the new keys and values into the cache.

        angles: cosine and sine, float32 [B or 1, T, rotated]; None if nothing is rotated. mask: [B or 1, 1, T,
        end - first + T], bool, or float32 numbers that are added to the scores; None: each token sees all before it.
        With pages, B is 1, T are the new tokens of all texts, and there is no mask.
        """
        lib = native.library()
        if isinstance(lib, str):
            raise KernelError(lib, native.HINT)
        y = torch.empty_like(x)
        _check(lib.fewbit_decode_block(self.found, self.call(x, y, cached, angles, mask), torch.get_num_threads()))
        return y

    def call(
        self, x: Tensor, y: Tensor, cached: Cached | Pages, angles: tuple[Tensor, Tensor] | None, mask: Tensor | None
    ) -> native.Call:
        """The checked arguments of a call that writes its output to y. They do not keep the tensors alive."""
        (batch, tokens, width), call = x.shape, native.Call()
        if not (x.is_contiguous() and x.dtype == self.dtype and width == self.width):
            raise KernelError(
                f"activations {list(x.shape)} of {x.dtype}, expected [B, T, {self.width}] of {self.dtype}"
            )
        call.x, call.y, call.batch, call.tokens = x.data_ptr(), y.data_ptr(), batch, tokens
        if angles is not None:
            cosine, sine = angles
            call.cosine, call.sine = cosine.data_ptr(), sine.data_ptr()
            call.turn = cosine.stride(0) if cosine.shape[0] > 1 else 0
        self._in_pages(call, cached) if isinstance(cached, Pages) else self._in_order(call, cached)
        if mask is not None:
            if mask.dtype == torch.bool:
                call.allowed = mask.data_ptr()
            else:
                call.added = mask.data_ptr()
            call.text, call.row = mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(2)
        return call

    def _in_order(self, call: native.Call, cached: Cached) -> None:
        whole = (call.batch, self.wiring.shared, cached.keys.shape[2], self.wiring.head)
        for each in (cached.keys, cached.values):
            if each.shape != whole or each.dtype != self.dtype or not each.is_contiguous():
                raise KernelError(f"a cache {list(each.shape)} of {each.dtype}, expected {list(whole)} of {self.dtype}")
        if cached.end + call.tokens > whole[2]:
            raise KernelError(f"a cache for {whole[2]} tokens, and {cached.end + call.tokens} are needed")
        call.filled, call.length = cached.end - cached.first, whole[2]
        skipped = cached.first * whole[3] * cached.keys.element_size()
        call.keys, call.values = cached.keys.data_ptr() + skipped, cached.values.data_ptr() + skipped

    def _in_pages(self, call: native.Call, cached: Pages) -> None:
        slots, each_slot = cached.slots, (self.wiring.shared, self.wiring.head)
        step = cached.keys.stride(0)
        for each in (cached.keys, cached.values):
            if each.shape[1:] != each_slot or each.dtype != self.dtype or each.stride() != (step, each_slot[1], 1):
                raise KernelError(f"slots {list(each.shape)} of {each.dtype}, expected {each_slot} of {self.dtype}")
            if slots.last >= len(each):
                raise KernelError(f"{len(each)} slots, and slot {slots.last} is needed")
        if len(slots.write) != call.tokens:
            raise KernelError(f"slots for {len(slots.write)} tokens, and there are {call.tokens}")
        call.keys, call.values = cached.keys.data_ptr(), cached.values.data_ptr()
        places = [each.data_ptr() for each in (slots.write, slots.read, slots.begin, slots.count)]
        call.pages = ctypes.pointer(native.Pages(*places, step, slots.most))


class Chain:
    """Blocks one after the other, for one new token of one text. All arguments that stay the same are made once.

    x: the first block's input [1, 1, width]. The caller fills it, and the angles of the blocks, before a call.
    """

    @torch.inference_mode(False)  # what is made in that mode cannot be written outside of it
    def __init__(
        self, blocks: Sequence[Block], caches: Sequence[Cached | Pages], angles: Sequence[tuple[Tensor, Tensor] | None]
    ) -> None:
        """caches, angles: of each block. Angles are float32 [1, 1, rotated]; None if nothing is rotated."""
        first = blocks[0]
        self.x = torch.zeros(1, 1, first.width, dtype=first.dtype, device="cpu")
        self.blocks = blocks
        self._calls, self._kept = list[tuple[native.Block, native.Call]](), list[Any]([angles])
        x = self.x
        for block, cache, turned in zip(blocks, caches, angles, strict=True):
            y = torch.empty_like(x)
            self._calls.append((block.found, block.call(x, y, cache, turned, None)))
            self._kept.append(y)
            x = y
        self._y = x

    def run(self) -> Tensor:
        """The last block's output [1, 1, width], which the next call overwrites."""
        lib, threads = native.library(), torch.get_num_threads()
        if isinstance(lib, str):
            raise KernelError(lib, native.HINT)
        for block, call in self._calls:
            _check(lib.fewbit_decode_block(block, call, threads))
        return self._y


class GrowingChain(Chain):
    """The same with a cache of its own for each block."""

    def next(self, caches: Sequence[Cached]) -> Tensor:
        """The last block's output for a token. caches: of each block, with room for its keys and values."""
        for block, (_, call), cached in zip(self.blocks, self._calls, caches, strict=True):
            block._in_order(call, cached)
        return self.run()


class PagedChain(Chain):
    """The same in pages, for a text of `length` tokens at most."""

    def __init__(
        self,
        blocks: Sequence[Block],
        pages: Sequence[tuple[Tensor, Tensor]],
        angles: Sequence[tuple[Tensor, Tensor] | None],
        length: int,
    ) -> None:
        """pages: keys and values of each block, [slots, shared, head]."""
        zero = torch.zeros(1, dtype=torch.int64, device="cpu")
        known = Slots(zero, zero, zero, zero + 1)
        super().__init__(blocks, [Pages(keys, values, known) for keys, values in pages], angles)
        self._kept.append(pages)
        self._length, self._slots = length, min(len(each) for pair in pages for each in pair)
        self._write, self._begin, self._count = ((ctypes.c_int64 * 1)(0) for _ in range(3))
        self._read, self._seen = (ctypes.c_int64 * length)(), 0
        places = [ctypes.addressof(each) for each in (self._write, self._read, self._begin, self._count)]
        self._pages = native.Pages(*places, pages[0][0].stride(0), 1)
        for (_, call), (keys, _) in zip(self._calls, pages, strict=True):
            if keys.stride(0) != self._pages.step:
                raise KernelError("slots of different sizes")
            call.pages = ctypes.pointer(self._pages)

    def sees(self, slots: Sequence[int]) -> None:
        """The slots of the text's tokens from the first on, also of those that are still to come."""
        if len(slots) > self._length or not 0 <= min(slots) <= max(slots) < self._slots:
            raise KernelError("a text reads slots that are not there")
        self._read[: len(slots)], self._seen = list(slots), len(slots)

    def at(self, position: int) -> Tensor:
        """The last block's output for the token at this position."""
        if not 0 <= position < self._seen:
            raise KernelError(f"slots for {self._seen} tokens, and there is one at {position}")
        self._write[0], self._count[0] = self._read[position], position + 1
        self._pages.most = position + 1
        return self.run()


def _check(status: int) -> None:
    if status:
        raise KernelError(f"the CPU library rejects a block of a model: status {status}")
