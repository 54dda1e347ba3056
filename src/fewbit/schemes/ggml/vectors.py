"""The grids of the types with a codebook (iq2, iq3): a few vectors of 8 or 4 magnitudes, signs, and a scale.

    w = ± (d t) unit grid[entry],        t = 1, 3 ... 31 for each sub-block of 16 or 32 columns

d is the fp16 scale of a block of 256 columns. The codes of a vector of columns are chosen together, because only the
entries of the codebook can be stored. In iq2_xxs, iq2_xs and iq3_xxs the number of minus signs among 8 columns is even.

For importances h the error of entry g at scale s is, up to a constant,

    s² sum h g² - 2 s sum h |x| g,

so two matrix products give the errors of all entries at all scales. If the signs of x have the wrong parity, one is
flipped; in column i this adds 4 s h_i |x_i| g_i, and the entry is chosen together with the best column to flip. So the
nearest vector is exact, for importances. Under a metric with correlations (`encode_under`), the vectors that are
nearest under its diagonal are compared.

A code is the index of a value among all signed magnitudes in rising order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from fewbit.errors import NumericsError
from fewbit.lazy import Tensor, torch
from fewbit.schemes.base import ALL, Columns, chunk_rows
from fewbit.schemes.ggml import codebook
from fewbit.schemes.ggml.grids import BlockGrids
from fewbit.schemes.ggml.layout import Layout
from fewbit.system import ambient, native

_CHUNK = {"cpu": 1 << 20}  # errors of entries computed at a time; on a CPU they fit its cache
_COMPILED = 1 << 19  # weights that the CPU library takes at a time: their importances stay in its cache
_COMPARED = 8  # vectors compared under a metric with correlations, and entries for each half; 32 gain under 0.2 %
_DAMP = 1e-6  # share of its mean diagonal that is added to a metric


@dataclass(frozen=True)
class Vectors(Layout):
    """A type with a codebook. even: whether the minus signs of 8 columns are even. vector: columns chosen together."""

    name: str = ""
    even: bool = False
    vector: int = 8

    @property
    def unit(self) -> float:
        """The factor of the codebook's magnitudes."""
        return codebook.UNITS[self.name]

    @property
    def entry(self) -> int:
        """Columns of an entry of the codebook."""
        return codebook.GRIDS[self.name][1]

    @property
    def table(self) -> tuple[float, ...]:
        """The level of each code."""
        magnitudes = [self.unit * x for x in codebook.GRIDS[self.name][3]]
        return (*(-x for x in reversed(magnitudes)), *magnitudes)

    def step(self, sc: Tensor) -> Tensor:
        """The nearest scales of sub-blocks that can be stored: odd numbers."""
        return ((sc - 1) / 2).round_().clamp_(0, 15).mul_(2).add_(1)


VECTORS = {
    kind.name: kind
    for kind in (
        Vectors(256, 66, 32, (), sc=(1, 31), name="iq2_xxs", even=True),
        Vectors(256, 74, 16, (), sc=(1, 31), name="iq2_xs", even=True),
        Vectors(256, 82, 16, (), sc=(1, 31), name="iq2_s"),
        Vectors(256, 98, 32, (), sc=(1, 31), name="iq3_xxs", even=True),
        Vectors(256, 110, 32, (), sc=(1, 31), name="iq3_s", vector=4),
    )
}


@cache
@ambient.defaults()
def entries(name: str, device: torch.device) -> Tensor:
    """The codebook times its unit, float32 [entries, columns]."""
    return codebook.grid(name, device) * codebook.UNITS[name]


@cache
@ambient.defaults()
def _ranks(name: str, device: torch.device) -> Tensor:
    """The rank of each magnitude of the codebook, int64 [entries, columns]."""
    magnitudes = torch.tensor(codebook.GRIDS[name][3], dtype=torch.float32, device=device)
    return torch.searchsorted(magnitudes, codebook.grid(name, device))


@cache
@ambient.defaults()
def _indices(name: str, device: torch.device) -> Tensor:
    """The index of the entry whose ranks are the digits of a number, the first one lowest; -1 if there is none."""
    ranks, base = _ranks(name, device), len(codebook.GRIDS[name][3])
    found = torch.full((base ** ranks.shape[1],), -1, dtype=torch.int64, device=device)
    found[_number(ranks, base)] = torch.arange(len(ranks), dtype=torch.int64, device=device)
    return found


def _number(digits: Tensor, base: int) -> Tensor:
    powers = torch.tensor([base**i for i in range(digits.shape[-1])], dtype=torch.int64, device=digits.device)
    return (digits * powers).sum(-1)


class Errors:
    """The errors of all entries for vectors x [R, V, columns] with importances h [1 or R, V, columns], both float32.

    `columns` are those that must be chosen together: 8, or the 4 of an entry. `Compiled` has the same methods.
    """

    def __init__(self, kind: Vectors, x: Tensor, h: Tensor) -> None:
        self.kind, self.x = kind, x
        self.grid = entries(kind.name, x.device)
        halves = (-1, kind.entry)
        self.u = (h * x.abs()).unflatten(2, halves)
        self.square = h.unflatten(2, halves) @ self.grid.square().T
        self.cross = self.u @ self.grid.T  # [R, V, halves, entries]
        self._score = torch.empty_like(self.cross)
        if kind.even:
            least, tried = torch.mul(self.u[..., :1], self.grid[:, 0]), self._score
            for i in range(1, kind.entry):
                torch.minimum(least, torch.mul(self.u[..., i : i + 1], self.grid[:, i], out=tried), out=least)
            self.odd = (x < 0).sum(2) % 2 == 1
            flipped = torch.sub(self.cross, least, alpha=2, out=least)  # with the best sign flipped
            if self.u.shape[2] == 1:
                self.cross = torch.where(self.odd[..., None, None], flipped, self.cross)
            else:
                self.flipped = flipped

    def scores(self, s: Tensor, cross: Tensor) -> Tensor:
        """The error of each entry at scales s [R, V], up to a constant and divided by s. It is overwritten later."""
        return torch.mul(self.square, s[..., None, None], out=self._score).sub_(cross, alpha=2)

    def least(self, s: Tensor) -> Tensor:
        """The least error of each vector at scales s >= 0 [tries, R, V], up to a constant."""
        return torch.stack([self._least(each) for each in s])

    def _least(self, s: Tensor) -> Tensor:
        found = self.scores(s, self.cross).amin(3)
        if not (self.kind.even and found.shape[2] == 2):
            return found.sum(2).mul_(s)
        flipped = self.scores(s, self.flipped).amin(3)
        lost = torch.where(self.odd, (flipped - found).amin(2), 0.0)
        return found.sum(2).add_(lost).mul_(s)

    def _best(self, s: Tensor, cross: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Index, h g g and h |x| g of the best entries at scales s [R, V]: [R, V, halves] each."""
        scores = self.scores(s, cross)
        # Several times as fast as `argmin` on a CPU.
        places = torch.arange(scores.shape[3], dtype=scores.dtype, device=scores.device)
        index = torch.where(scores == scores.amin(3, keepdim=True), places, float(len(self.grid) - 1)).amin(3).long()
        best = index.unsqueeze(3)
        square = self.square.expand(len(best), -1, -1, -1).gather(3, best)
        return index, square.squeeze(3), cross.gather(3, best).squeeze(3)

    def sums(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Sums [R, V] of h g g and h x g over the best entries at scales s >= 0 [R, V]."""
        _, square, cross, _ = self._at(s)
        return square, cross

    def _at(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The best entries at scales s >= 0 [R, V]: index [R, V, halves], and sums [R, V] of h g g and h x g.

        The last: which half [R, V] has the flipped sign, of vectors with two halves and odd signs; else None.
        """
        index, square, cross = self._best(s, self.cross)
        if not (self.kind.even and index.shape[2] == 2):
            return index, square.sum(2), cross.sum(2), None
        index_f, square_f, cross_f = self._best(s, self.flipped)
        lost = (s.unsqueeze(2) * (square_f - square)).sub_(cross_f - cross, alpha=2)
        which = (lost[..., 1] < lost[..., 0]).long()
        here = self.odd.unsqueeze(2) & (which.unsqueeze(2) == torch.arange(2, dtype=torch.int64, device=s.device))
        index, square, cross = (
            torch.where(here, f, x) for f, x in ((index_f, index), (square_f, square), (cross_f, cross))
        )
        return index, square.sum(2), cross.sum(2), which

    def codes(self, s: Tensor) -> Tensor:
        """The codes uint8 [R, V, columns] of the nearest vectors at scales s >= 0 [R, V]."""
        index, _, _, which = self._at(s)
        negative = (self.x < 0).unflatten(2, (-1, self.kind.entry))
        if self.kind.even:
            at = (self.u * self.grid[index]).min(3, keepdim=True).indices
            flip = self.odd[..., None, None].expand_as(at)
            if which is not None:
                flip = flip & (which[..., None, None] == torch.arange(2, dtype=torch.int64, device=s.device)[:, None])
            negative = negative.scatter(3, at, negative.gather(3, at) ^ flip)
        return signed_codes(self.kind, index, negative).flatten(2)

    def under(self, s: Tensor, metric: Tensor) -> Tensor:
        """Codes uint8 [R, columns] of the one vector in each row at scales s [R], chosen under a metric
        [columns, columns] among those that are nearest under its diagonal, which is h."""
        index, negative = _candidates(self, s)
        tried = signed_codes(self.kind, index, negative).flatten(2)
        missed = _levels(self.kind, tried) * s[:, None, None] - self.x
        best = ((missed @ metric) * missed).sum(2).min(1).indices
        return tried.gather(1, best[:, None, None].expand(-1, 1, self.kind.vector)).squeeze(1)


class Compiled:
    """`Errors` by the CPU library, in one pass over the codebook for each vector."""

    def __init__(self, kind: Vectors, x: Tensor, h: Tensor) -> None:
        self.book, self.x, self.h = _book(kind.name), x.contiguous(), h.contiguous()

    def least(self, s: Tensor) -> Tensor:
        found = torch.empty_like(s, memory_format=torch.contiguous_format)
        native.nearest_vectors(self.book, self.x, self.h, s.contiguous(), least=found)
        return found

    def sums(self, s: Tensor) -> tuple[Tensor, Tensor]:
        square, cross = (torch.empty(s.shape, dtype=torch.float32, device="cpu") for _ in range(2))
        native.nearest_vectors(self.book, self.x, self.h, s[None].contiguous(), square=square, cross=cross)
        return square, cross

    def codes(self, s: Tensor) -> Tensor:
        codes = torch.empty(self.x.shape, dtype=torch.uint8, device="cpu")
        native.nearest_vectors(self.book, self.x, self.h, s[None].contiguous(), codes=codes)
        return codes

    def under(self, s: Tensor, metric: Tensor) -> Tensor:
        codes, metric = torch.empty(self.x.shape, dtype=torch.uint8, device="cpu"), metric.contiguous()
        native.nearest_vectors(self.book, self.x, self.h, s[None, :, None].contiguous(), metric=metric, codes=codes)
        return codes.squeeze(1)


@cache
@ambient.defaults()
def _book(name: str) -> native.Book:
    kind, device = VECTORS[name], torch.device("cpu")
    ranks = _ranks(name, device).to(torch.uint8)
    halves, magnitudes = kind.vector // kind.entry, len(kind.table) // 2
    return native.Book(entries(name, device).T.contiguous(), ranks, magnitudes, halves, kind.even)


def errors(kind: Vectors, x: Tensor, h: Tensor) -> Errors | Compiled:
    """The errors of all entries for vectors x with importances h: see `Errors`."""
    return Compiled(kind, x, h) if _compiled(x) else Errors(kind, x, h)


def chunks(kind: Vectors, x: Tensor) -> list[slice]:
    """Rows of x [R, columns] whose errors are computed at a time."""
    if _compiled(x):
        return chunk_rows(x.shape[0], x.shape[1], _COMPILED)
    wide = x.shape[1] // kind.entry * len(entries(kind.name, x.device))
    return chunk_rows(len(x), wide, _CHUNK.get(x.device.type, 1 << 26))


def _compiled(x: Tensor) -> bool:
    return x.is_cpu and not isinstance(native.library(), str)


def signed_codes(kind: Vectors, index: Tensor, negative: Tensor) -> Tensor:
    """Codes uint8 [..., columns] of entries [...] with signs bool [..., columns]."""
    ranks, magnitudes = _ranks(kind.name, index.device)[index], len(kind.table) // 2
    return torch.where(negative, magnitudes - 1 - ranks, magnitudes + ranks).to(torch.uint8)


@dataclass(frozen=True)
class VectorGrids(BlockGrids):
    """`sc`: t of the formula, odd. `importance` [K]: the vectors that are nearest under it are chosen; None: equal."""

    importance: Tensor | None = None

    @property
    def kind(self) -> Vectors:
        return VECTORS[self.name]

    @property
    def vector(self) -> int:
        return self.kind.vector

    def plain(self) -> None:
        return None

    def encode(self, w: Tensor, columns: Columns = ALL) -> Tensor:
        """Codes of the nearest vectors. `columns`: whole vectors, each in the order of the weight."""
        kind = self.kind
        scale, importance = self._of_vectors(columns)
        x, h = (each.float().unflatten(1, (-1, kind.vector)) for each in (w, importance))
        codes = torch.empty(x.shape, dtype=torch.uint8, device=w.device)
        for rows in chunks(kind, w):
            s = scale[rows].float()
            codes[rows] = errors(kind, x[rows].masked_fill(s.unsqueeze(2) == 0, 0.0), h).codes(s)
        return codes.flatten(1)

    def _of_vectors(self, columns: Columns) -> tuple[Tensor, Tensor]:
        """Scales [N, vectors] and importances [1, columns]."""
        kind, k = self.kind, self.d.shape[1] * self.kind.columns
        every = torch.arange(k, dtype=torch.int64, device=self.d.device)[columns]
        importance = (
            torch.ones_like(every, dtype=torch.float32) if self.importance is None else self.importance[columns]
        )
        return self.scale[:, every[:: kind.vector] // kind.sub], importance.unsqueeze(0)

    def encode_under(self, w: Tensor, columns: Tensor, metric: Tensor) -> Tensor:
        kind = self.kind
        s = self.scale[:, columns[:1] // kind.sub].squeeze(1).float()
        metric = metric.float()
        diagonal = metric.diagonal()
        h = torch.maximum(diagonal, _DAMP * diagonal.mean())
        codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
        for rows in chunks(kind, w):
            x = w[rows].float().masked_fill(s[rows].unsqueeze(1) == 0, 0.0)
            codes[rows] = errors(kind, x.unsqueeze(1), h[None, None]).under(s[rows], metric)
        return codes


def _levels(kind: Vectors, codes: Tensor) -> Tensor:
    return torch.tensor(kind.table, dtype=torch.float32, device=codes.device)[codes.int()]


def _candidates(errors: Errors, s: Tensor) -> tuple[Tensor, Tensor]:
    """Entries [R, count, halves] and signs [R, count, halves, columns] of the nearest of vectors x [R, 1, columns]."""
    kind, scores = errors.kind, errors.scores(s.unsqueeze(1), errors.cross)
    negative = (errors.x < 0).unflatten(2, (-1, kind.entry))
    if errors.u.shape[2] == 1:
        index = scores.topk(_COMPARED, 3, largest=False).indices.permute(0, 1, 3, 2)[:, 0]
        return index, _flipped(errors, index, negative, errors.odd if kind.even else None)
    few, fewer = _COMPARED, _COMPARED // 2
    near = scores[:, 0].topk(few, 2, largest=False).indices  # [R, 2, few]
    flipped = errors.scores(s.unsqueeze(1), errors.flipped)[:, 0].topk(few, 2, largest=False).indices
    odd = errors.odd[:, :, None]  # [R, 1, 1]
    pairs = []
    for half in (0, 1):
        # This half has the flipped sign, where the signs are odd.
        one = torch.where(odd[:, 0], flipped[:, half], near[:, half])[:, :few]
        other = near[:, 1 - half, :fewer]
        both = [one.repeat_interleave(fewer, 1), other.repeat(1, few)]
        index = torch.stack(both if half == 0 else both[::-1], 2)
        here = errors.odd[:, :, None] & (torch.arange(2, dtype=torch.int64, device=s.device) == half)
        pairs.append((index, _flipped(errors, index, negative, here)))
    return torch.cat([index for index, _ in pairs], 1), torch.cat([signs for _, signs in pairs], 1)


def _flipped(errors: Errors, index: Tensor, negative: Tensor, flip: Tensor | None) -> Tensor:
    """Signs [R, count, halves, columns]: `negative` [R, 1, halves, columns], with the best one of an entry flipped.

    flip: whether to, [R, 1] or [R, 1, halves].
    """
    negative = negative.expand(*index.shape, -1)
    if flip is None:
        return negative
    flip = flip.view(len(index), 1, -1, 1).expand(*index.shape, 1)
    at = (errors.u * errors.grid[index]).min(3, keepdim=True).indices
    return negative.scatter(3, at, negative.gather(3, at) ^ flip)


def unpack(name: str, rows: Tensor) -> tuple[Tensor, VectorGrids]:
    """The codes uint8 [N, K] and grids of the part `blocks`, whose rows are uint8 [N, bytes]."""
    kind, n = VECTORS[name], len(rows)
    found = codebook.fields(name, rows.reshape(-1, kind.nbytes))
    negative = (found.signs < 0).unflatten(1, (-1, kind.entry))
    codes = signed_codes(kind, found.entry.long(), negative).flatten(1)
    sc = (2 * found.s + 1).to(torch.int16)
    return codes.view(n, -1), VectorGrids(name, found.d.view(n, -1), None, sc.view(n, -1), None)


def pack(codes: Tensor, grids: BlockGrids) -> Tensor:
    """The part `blocks`, uint8 [N, bytes]: the inverse of `unpack`. NumericsError for codes of no entry."""
    kind, n = VECTORS[grids.name], len(codes)
    assert grids.sc is not None
    flat, half = codes.reshape(-1, kind.columns).long(), len(kind.table) // 2
    negative = flat < half
    ranks = torch.where(negative, half - 1 - flat, flat - half).unflatten(1, (-1, kind.entry))
    index = _indices(grids.name, codes.device)[_number(ranks, half)]
    if (index < 0).any():
        raise NumericsError(f"codes that are no entry of the codebook of {grids.name}")
    d = grids.d.reshape(-1, 1).to(torch.float16).view(torch.uint8)
    s = (grids.sc.reshape(-1, kind.subs) // 2).long()
    blocks = torch.cat([d, _PACKERS[grids.name](index, negative, s)], 1)
    return blocks.view(n, -1)


def _joined(fields: Tensor, bits: int, total: int = 8) -> Tensor:
    """Words of `total` bits from fields of `bits`, lowest first: the inverse of `codebook._lanes`, in int64."""
    shifts = torch.arange(0, total, bits, dtype=torch.int64, device=fields.device)
    words: Tensor = (fields.long().unflatten(1, (-1, len(shifts))) << shifts).sum(2)
    return words


def _bytes(words: Tensor, count: int) -> Tensor:
    """Words [B, n] as `count` bytes each, lowest first: uint8 [B, n count]."""
    shifts = torch.arange(0, 8 * count, 8, dtype=torch.int64, device=words.device)
    return (words.unsqueeze(2) >> shifts & 255).to(torch.uint8).flatten(1)


def _seven(negative: Tensor) -> Tensor:
    """Seven of each eight signs, as numbers [B, 32]."""
    return _joined(negative, 1) & 127


def _iq2_xxs(index: Tensor, negative: Tensor, s: Tensor) -> Tensor:
    words = _joined(_seven(negative), 7, 28) | s << 28
    return torch.cat([_bytes(index, 1).unflatten(1, (8, 4)), _bytes(words, 4).unflatten(1, (8, 4))], 2).flatten(1)


def _iq2_xs(index: Tensor, negative: Tensor, s: Tensor) -> Tensor:
    return torch.cat([_bytes(index | _seven(negative) << 9, 2), _bytes(_joined(s, 4), 1)], 1)


def _iq2_s(index: Tensor, negative: Tensor, s: Tensor) -> Tensor:
    parts = (index & 255, _joined(negative, 1), _joined(index >> 8, 2), _joined(s, 4))
    return torch.cat([_bytes(part, 1) for part in parts], 1)


def _iq3_xxs(index: Tensor, negative: Tensor, s: Tensor) -> Tensor:
    return torch.cat([_bytes(index, 1), _bytes(_joined(_seven(negative), 7, 28) | s << 28, 4)], 1)


def _iq3_s(index: Tensor, negative: Tensor, s: Tensor) -> Tensor:
    parts = (index & 255, _joined(index >> 8, 1), _joined(negative, 1), _joined(s, 4))
    return torch.cat([_bytes(part, 1) for part in parts], 1)


_PACKERS = {"iq2_xxs": _iq2_xxs, "iq2_xs": _iq2_xs, "iq2_s": _iq2_s, "iq3_xxs": _iq3_xxs, "iq3_s": _iq3_s}
