"""Random decoder blocks for the CPU library, and what they compute, in PyTorch's operations."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewbit import registry
from fewbit.kernels.cpu import block as library
from fewbit.kernels.cpu.block import Block, Cached, Norm, Rows, Wiring
from fewbit.schemes.base import parse

SPECS = ("int4-g32", "q8_0", "q4_1", "int8-g32")
ACTIVATIONS: dict[int, Any] = {
    library.SILU: nn.functional.silu,
    library.TANH: lambda x: nn.functional.gelu(x, approximate="tanh"),
    library.ERF: nn.functional.gelu,
    library.RELU: nn.functional.relu,
    library.RELU2: lambda x: nn.functional.relu(x).square(),
    library.QUICK: lambda x: x * torch.sigmoid(1.702 * x),
}


@dataclass
class Case:
    """A block and one call of it. dtype: of the activations, which x, keys and values fit; they are float32 here."""

    wiring: Wiring
    x: Tensor
    cached: Cached
    angles: tuple[Tensor, Tensor] | None
    mask: Tensor | None
    dtype: torch.dtype = torch.float32

    def found(self) -> tuple[Tensor, ...]:
        """The library's output, and the cache after it."""
        keys, values = (each.to(self.dtype, copy=True) for each in (self.cached.keys, self.cached.values))
        cached = Cached(keys, values, self.cached.first, self.cached.end)
        y = Block(self.wiring, self.dtype)(self.x.to(self.dtype), cached, self.angles, self.mask)
        return y.float(), keys.float(), values.float()

    def expected(self) -> tuple[Tensor, ...]:
        w, x = self.wiring, self.x
        batch, tokens, _ = x.shape
        first, end = self.cached.first, self.cached.end
        both, columns = _product(w.qkv, _normed(x, w.norms[0])), (w.heads + 2 * w.shared) * w.head
        q, k, v = _split(w, both[..., :columns])
        q, k = (self._prepared(each, norm) for each, norm in ((q, w.norms[4]), (k, w.norms[5])))
        keys, values = self.cached.keys.clone(), self.cached.values.clone()
        keys[:, :, end : end + tokens], values[:, :, end : end + tokens] = k.transpose(1, 2), v.transpose(1, 2)
        seen = [each[:, :, first : end + tokens].repeat_interleave(w.heads // w.shared, 1) for each in (keys, values)]
        scores = q.transpose(1, 2) @ seen[0].transpose(2, 3) * w.scale
        scores = w.cap * torch.tanh(scores / w.cap) if w.cap else scores
        if self.mask is None:
            hidden = torch.ones(tokens, end - first + tokens, dtype=torch.bool).tril(end - first).logical_not()
            scores = scores.masked_fill(hidden, -torch.inf)
        else:
            scores = scores.masked_fill(~self.mask, -torch.inf) if self.mask.dtype == torch.bool else scores + self.mask
        if w.sinks is not None:
            scores = torch.cat([scores, w.sinks[None, :, None, None].expand(batch, -1, tokens, 1)], -1)
        weights = scores.softmax(-1)[..., : end - first + tokens]
        attended = (weights @ seen[1]).transpose(1, 2).reshape(batch, tokens, -1)
        h = x + w.residual * _normed(_product([w.output], attended), w.norms[1])
        if w.down is None:
            return h, keys, values
        up = both[..., columns:] if w.together else _product(w.gated, _normed(x if w.parallel else h, w.norms[2]))
        gate, by = (up, None) if w.plain else up.chunk(2, -1)
        inside = ACTIVATIONS[w.activation](gate)
        down = _product([w.down], inside if by is None else inside * by)
        return h + w.residual * _normed(down, w.norms[3]), keys, values

    def _prepared(self, x: Tensor, norm: Norm | None) -> Tensor:
        """Norms and positions of heads [B, T, heads, head]."""
        w = self.wiring
        x = x if w.late else _of_heads(x, norm, w.whole)
        if self.angles is not None:
            r = w.rotated
            cosine, sine = (each[:, :, None] for each in self.angles)
            turned = x[..., :r]
            if w.pairs == library.HALVES:
                a, b = turned.chunk(2, -1)
                turned = turned * cosine + torch.cat([-b, a], -1) * sine
            else:
                a, b = turned[..., ::2], turned[..., 1::2]
                pick = [slice(None, None, 2), slice(1, None, 2)]
                pick = pick if w.pairs == library.NEIGHBORS else [slice(r // 2)] * 2
                left = a * cosine[..., pick[0]] - b * sine[..., pick[0]]
                turned = torch.stack([left, b * cosine[..., pick[1]] + a * sine[..., pick[1]]], -1).flatten(-2)
            x = torch.cat([turned, x[..., r:]], -1)
        return _of_heads(x, norm, w.whole) if w.late else x


def _product(rows: Sequence[Rows], x: Tensor) -> Tensor:
    kernel, flat, outputs = registry.get("kernels", "cpu")(), x.reshape(-1, x.shape[-1]), []
    for each in rows:
        read = flat if each.order is None else flat[:, each.order]
        y = kernel.linear(read.contiguous(), each.codec, each.prepared, each.shape)
        outputs.append(y if each.bias is None else y + each.bias)
    return torch.cat(outputs, -1).view(*x.shape[:-1], -1)


def _normed(x: Tensor, norm: Norm | None) -> Tensor:
    if norm is None:
        return x
    x = x - x.mean(-1, keepdim=True) if norm.centered else x
    y = x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight
    return y if norm.bias is None else y + norm.bias


def _of_heads(x: Tensor, norm: Norm | None, whole: bool) -> Tensor:
    return _normed(x.flatten(-2), norm).view(x.shape) if whole else _normed(x, norm)


def _split(w: Wiring, y: Tensor) -> list[Tensor]:
    """q, k and v [B, T, heads, head]."""
    if not w.mixed:
        parts = y.split([w.heads * w.head, w.shared * w.head, w.shared * w.head], -1)
        return [part.unflatten(-1, (-1, w.head)) for part in parts]
    groups = y.unflatten(-1, (w.shared, w.heads // w.shared + 2, w.head))
    return [groups[..., :-2, :].flatten(2, 3), groups[..., -2, :], groups[..., -1, :]]


def drawn(seed: int, dtype: torch.dtype = torch.float32) -> Case:
    """A random block and call, of sizes that are no multiples of a vector's."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def maybe() -> bool:
        return draw.random() < 0.5

    shared, head = draw.choice((1, 2, 3)), draw.choice((4, 20, 32))
    heads = shared * draw.choice((1, 2, 5))
    width, inner = 32 * draw.randint(1, 4), 32 * draw.randint(1, 5)
    while heads * head % 32:
        heads *= 2
    scheme = parse(draw.choice(SPECS))
    kernel = registry.get("kernels", "cpu")()

    def rows(n: int, k: int) -> Rows:
        parts = scheme.pack(*scheme.nearest(normal(n, k) * k**-0.5))
        order = torch.randperm(k, generator=generator) if draw.random() < 0.2 else None
        return Rows(scheme, kernel.prepare(scheme, parts, (n, k)), (n, k), normal(n) if maybe() else None, order)

    def norm(k: int, chance: float = 0.5) -> Norm | None:
        if draw.random() > chance:
            return None
        return Norm(1 + 0.1 * normal(k), draw.choice((1e-5, 1e-2)), normal(k) if maybe() else None, maybe())

    mixed, plain, parallel, half = maybe(), maybe(), maybe(), draw.random() < 0.2
    together = parallel and not half and maybe()
    whole = not mixed and maybe()
    sizes = [heads * head, shared * head, shared * head]
    ups = [inner] if plain else draw.choice(([inner, inner], [2 * inner]))
    stacked = together or mixed or maybe()
    before = [sum(sizes) + (sum(ups) if together else 0)] if stacked else sizes
    rotated = draw.choice((0, head, head // 2))
    wiring = Wiring(
        [rows(n, width) for n in before], rows(width, heads * head),
        [] if half or together else [rows(n, width) for n in ups],
        None if half else rows(width, inner),
        [norm(width, 0.8), norm(width, 0.2), norm(width, 0.8), norm(width, 0.2),
         norm(sizes[0] if whole else head, 0.3), norm(sizes[1] if whole else head, 0.3)],
        heads, shared, head, rotated, scale=head**-0.5, activation=draw.choice(list(ACTIVATIONS)),
        pairs=draw.choice((library.HALVES, library.NEIGHBORS, library.IN_ORDER)), whole=whole, late=maybe(),
        mixed=mixed, parallel=parallel and not half, plain=plain, together=together,
        sinks=normal(heads) if maybe() else None,
        cap=draw.choice((0.0, 5.0)), residual=draw.choice((1.0, 0.7)),
    )  # fmt: skip
    batch, tokens = draw.choice((1, 1, 3)), draw.choice((1, 1, 2, 5))
    first, known, spare = draw.choice((0, 3)), draw.choice((0, 1, 9, 33)), draw.choice((0, 4))
    end = first + known
    keys, values = (normal(batch, shared, end + tokens + spare, head).to(dtype).float() for _ in range(2))
    turned = normal(draw.choice((1, batch)), tokens, rotated)
    mask = None
    if maybe():
        allowed = torch.rand(draw.choice((1, batch)), 1, tokens, known + tokens, generator=generator) < 0.7
        allowed[..., -1] = True
        mask = allowed if maybe() else torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
    angles = (turned.cos(), turned.sin()) if rotated else None
    x = normal(batch, tokens, width).to(dtype).float()
    return Case(wiring, x, Cached(keys, values, first, end), angles, mask, dtype)


def distance(case: Case) -> float:
    """How far the library's results are from the expected ones, relative to these."""
    pairs = zip(case.found(), case.expected(), strict=True)
    return max(float((a - b).norm() / b.norm().clamp(min=1e-20)) for a, b in pairs)
