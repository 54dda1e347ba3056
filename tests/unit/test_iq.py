"""The types with a codebook: the nearest of all vectors that can be stored, the best scales, GPTQ over vectors."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from fewbit.errors import NumericsError
from fewbit.methods import gptq
from fewbit.methods.gptq import GPTQ, in_order
from fewbit.schemes.base import Columns, Grids, parse
from fewbit.schemes.ggml import codebook, vectors
from fewbit.schemes.ggml.iq import IQ
from fewbit.schemes.ggml.vectors import VECTORS, Compiled, Errors, VectorGrids, Vectors
from fewbit.system import native
from tests.contract.cases import hard, inputs, ordinary, same_bytes, stats_of

names = pytest.mark.parametrize("name", VECTORS)


def all_signs(even: bool, columns: int) -> Tensor:
    """±1 [combinations, columns], float64: all, or those with an even number of minus signs."""
    bits = torch.arange(2**columns).unsqueeze(1) >> torch.arange(columns) & 1
    return 1.0 - 2.0 * bits[bits.sum(1) % 2 == 0 if even else slice(None)].double()


def storable(name: str, some: int, seed: int = 0) -> Tensor:
    """Vectors that can be stored, in units of d t, float64: all for one entry, else all signs of `some` of them."""
    kind, grid = VECTORS[name], codebook.grid(name, torch.device("cpu")).double() * codebook.UNITS[name]
    chosen = torch.randperm(len(grid), generator=torch.Generator().manual_seed(seed))[:some]
    found = grid[chosen]
    if kind.vector > kind.entry:
        found = torch.cat([found.repeat_interleave(some, 0), found.repeat(some, 1)], 1)
    return (found.unsqueeze(1) * all_signs(kind.even, kind.vector)).flatten(0, 1)


def grids_of(name: str, w: Tensor, importance: Tensor | None = None) -> VectorGrids:
    found = parse(name).fit(w, importance)
    assert isinstance(found, VectorGrids)
    return found


def check_nearest(name: str) -> None:
    """The chosen vectors can be stored, and none of a large sample of all that can be is nearer, under importances."""
    w, h = ordinary(4, 256), torch.rand(256, generator=torch.Generator().manual_seed(1)) + 0.1
    found, v = replace(grids_of(name, w), importance=h), VECTORS[name].vector
    codes = found.encode(w)
    assert torch.equal(vectors.unpack(name, vectors.pack(codes, found))[0], codes)
    error = (((found.decode(codes) - w).double().square() * h).unflatten(1, (-1, v))).sum(2)
    scale = found.scale.double().repeat_interleave(VECTORS[name].sub // v, 1)
    every = storable(name, 48 if v > VECTORS[name].entry else 1024)
    for row, at in ((0, 0), (1, 3), (2, 11), (3, 20), (3, 31)):
        x, weights = w[row, at * v : (at + 1) * v].double(), h[at * v : (at + 1) * v].double()
        others = ((every * scale[row, at] - x).square() * weights).sum(1)
        assert float(error[row, at]) <= float(others.min()) * (1 + 1e-5)


@names
def test_no_other_vector_is_nearer(name: str) -> None:
    check_nearest(name)


@names
def test_torch_finds_the_nearest_vectors_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "_compiled", lambda x: False)
    check_nearest(name)
    check_descent(name)


def given(name: str, rows: int, own: bool) -> tuple[Vectors, Tensor, Tensor, Tensor]:
    """Vectors with a 0 and odd and even signs, importances (of each row: `own`), and scales."""
    kind, seeded = VECTORS[name], torch.Generator().manual_seed(5)
    x = torch.randn(rows, 6, kind.vector, generator=seeded)
    x[:, 1, 0] = 0.0
    h = torch.rand(rows if own else 1, 6, kind.vector, generator=seeded) + 0.01
    return kind, x, h, torch.rand(7, rows, 6, generator=seeded) * 2 / kind.table[-1]


@names
@pytest.mark.parametrize("own", [False, True])
def test_the_library_finds_what_torch_finds(instructions: str, name: str, own: bool) -> None:
    kind, x, h, s = given(name, 40, own)
    definition, compiled = Errors(kind, x, h), Compiled(kind, x, h)
    assert torch.allclose(compiled.least(s), definition.least(s), rtol=1e-5, atol=1e-5)
    assert torch.equal(compiled.codes(s[0]), definition.codes(s[0]))
    for one, other in zip(compiled.sums(s[0]), definition.sums(s[0]), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
    # At a scale of 0 all entries are equally near.
    zero = torch.zeros_like(s[0])
    assert torch.equal(Compiled(kind, x, h).least(zero[None]), torch.zeros_like(zero)[None])


@names
def test_the_library_compares_the_same_vectors(instructions: str, name: str) -> None:
    kind, x, _, s = given(name, 300, False)
    mixed = inputs(64, kind.vector, seed=4)
    metric = mixed.T @ mixed / 64
    one, other = (
        each(kind, x[:, :1], metric.diagonal()[None, None]).under(s[0, :, 0], metric) for each in (Compiled, Errors)
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize(("entries", "both"), [(48, False), (64, False), (64, True)])
def test_the_library_refuses_what_it_cannot_search(library: ctypes.CDLL, entries: int, both: bool) -> None:
    """Its search takes 64 entries at a time, and gives no sums under a metric."""
    kind, x, h, s = given("iq2_xxs", 8, False)
    book = vectors._book("iq2_xxs")
    book = replace(book, grid=book.grid[:, :entries].contiguous(), ranks=book.ranks[:entries].contiguous())
    parts = {"metric": torch.eye(kind.vector), "codes": torch.empty(x.shape, dtype=torch.uint8)}
    if both:
        parts |= {"square": torch.empty(x.shape[:2]), "cross": torch.empty(x.shape[:2])}
    if entries % 64 or both:
        with pytest.raises(AssertionError, match=r"fewbit_nearest_vectors: [12]$"):
            native.nearest_vectors(book, x, h, s, **parts)
    else:
        native.nearest_vectors(book, x, h, s, **parts)


@names
def test_threads_and_instructions_change_no_code(library: ctypes.CDLL, name: str) -> None:
    kind, x, h, s = given(name, 200, True)
    found, threads = [], torch.get_num_threads()
    try:
        for isa, count in ((b"scalar", 1), (None, 1), (None, 3)):
            assert library.fewbit_force(isa) == 0
            torch.set_num_threads(count)
            compiled = Compiled(kind, x, h)
            under = Compiled(kind, x[:, :1], h[:1, :1]).under(s[0, :, 0], torch.eye(kind.vector))
            found.append((compiled.least(s), *compiled.sums(s[1]), compiled.codes(s[2]), under))
    finally:
        torch.set_num_threads(threads)
        library.fewbit_force(None)
    assert all(same_tensors(found[0], each) for each in found[1:])


def same_tensors(some: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


@names
def test_under_a_metric_few_vectors_are_nearer(name: str) -> None:
    """Of all vectors under a metric with correlations, the chosen one is within 15 % of the best on average."""
    v, n = VECTORS[name].vector, 12
    x = inputs(64, v, seed=4) + torch.randn(64, v, generator=torch.Generator().manual_seed(1))
    w, columns, metric = ordinary(n, 256), torch.arange(v, 2 * v), (x.T @ x / 64).double()
    found = grids_of(name, w)
    values = found.decode(found.encode_under(w[:, columns], columns, metric.float()), columns).double()
    by_diagonal = replace(found, importance=metric.diagonal().float().repeat(256 // v))
    without = by_diagonal.decode(by_diagonal.encode(w))[:, columns].double()
    every = storable(name, 40 if v > VECTORS[name].entry else 1024)
    scale = found.scale[:, v // VECTORS[name].sub].double()

    def cost(of: Tensor, row: int) -> float:
        missed = of - w[row, columns].double()
        return float(((missed @ metric) * missed).sum(1).min())

    lost, most = (sum(cost(of[row : row + 1], row) for row in range(n)) for of in (values, without))
    assert lost < 1.15 * sum(cost(every * scale[row], row) for row in range(n))
    assert lost < 0.9 * most


@names
def test_bytes_come_back(name: str) -> None:
    """All bits of a block mean something, and are where they were after reading and writing."""
    nbytes = VECTORS[name].nbytes
    rows = torch.randint(256, (15, nbytes), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    rows[:, 1] &= 0x3F  # d is finite and positive
    rows = rows.view(5, -1)
    codes, found = vectors.unpack(name, rows)
    assert torch.equal(vectors.pack(codes, found), rows)
    values = parse(name).dequantize({"blocks": rows}, (5, 768), torch.float32)
    assert torch.equal(found.decode(codes), values)


def test_codes_of_no_entry_are_refused() -> None:
    scheme, w = parse("iq2_xxs"), ordinary(2, 256)
    grids = scheme.fit(w)
    with pytest.raises(NumericsError, match="no entry of the codebook"):
        scheme.pack(torch.full((2, 256), 5, dtype=torch.uint8), grids)


@names
def test_scales_are_nearly_the_best(name: str) -> None:
    """No d of 20, with the best t for each sub-block, is better by more than 2 %."""
    kind, w = VECTORS[name], ordinary(2, 256, seed=7)
    h = torch.rand(256, generator=torch.Generator().manual_seed(3)) + 0.1
    found = grids_of(name, w, h)

    def by_sub(of: VectorGrids) -> Tensor:
        missed: Tensor = ((of.decode(of.encode(w)) - w).double().square() * h).unflatten(1, (-1, kind.sub))
        return missed.sum(2)

    reached, best = by_sub(found).sum(1), torch.full((2,), torch.inf, dtype=torch.float64)
    top = w.abs().amax(1, keepdim=True) / kind.table[-1]
    for share in torch.linspace(0.35, 1.4, 20).tolist():
        d = (top * share / 31).half().float()
        tried = [
            by_sub(replace(found, d=d, sc=torch.full_like(found.sc, t)))  # type: ignore[arg-type]
            for t in range(1, 32, 2)
        ]
        best = torch.minimum(best, torch.stack(tried).amin(0).sum(1))
    assert float(reached.sum()) < 1.02 * float(best.sum())


def check_descent(name: str) -> None:
    """Neither a refit nor a sweep raises tr(E H Eᵀ) in any row."""
    w, hessian = ordinary(6, 512), stats_of(inputs(1100, 512)).hessian
    scheme, order = parse(name), in_order(hessian.diagonal(), VECTORS[name].vector)
    grids: Grids = scheme.fit(w, hessian.diagonal())

    def rows(codes: Tensor, grids: Grids) -> Tensor:
        error = (grids.decode(codes) - w).double()
        return ((error @ hessian.double()) * error).sum(1)

    codes = grids.encode(w)
    before = first = rows(codes, grids)
    for _ in range(2):
        grids = scheme.refit(w, codes, grids, hessian)
        refitted = rows(codes, grids)
        assert (refitted <= before * (1 + 1e-5)).all()
        codes, grids = gptq.descend(w, codes, grids, hessian, order, run=scheme.run)
        before = rows(codes, grids)
        assert (before <= refitted * (1 + 1e-5)).all()
    assert before.sum() < 0.8 * first.sum()
    assert same_bytes(scheme.pack(*scheme.unpack(packed := scheme.pack(codes, grids), (6, 512))), packed)


@names
def test_no_refinement_raises_the_error(name: str) -> None:
    check_descent(name)


@dataclass
class Watched(Grids):
    """Grids that remember what they were asked to encode, vector by vector."""

    grids: Grids
    seen: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    @property
    def vector(self) -> int:
        return self.grids.vector

    def encode(self, w: Tensor, columns: Columns = slice(None)) -> Tensor:
        raise AssertionError

    def encode_under(self, w: Tensor, columns: Tensor, metric: Tensor) -> Tensor:
        codes = self.grids.encode_under(w, columns, metric)
        self.seen[int(columns[0])] = w.clone(), metric.clone(), codes
        return codes

    def decode(self, codes: Tensor, columns: Columns = slice(None)) -> Tensor:
        return self.grids.decode(codes, columns)


def check_definition(name: str) -> None:
    """Each vector is chosen for the values that minimize tr(E H Eᵀ) given the vectors before, and under the Hessian of
    the error that remains when those after it have adapted."""
    w, v = ordinary(3, 256, dtype=torch.float64), VECTORS[name].vector
    hessian = stats_of(inputs(1100, 256)).hessian.double()
    hessian = hessian.tril() + hessian.tril(-1).T
    order = in_order(hessian.diagonal(), v)
    inverse, damp = gptq.inverse_factor(hessian, order, 0.01)
    assert inverse is not None
    damped = hessian + damp * hessian.diagonal().mean() * torch.eye(256, dtype=torch.float64)
    watched = Watched(parse(name).fit(w))
    codes, _ = gptq.feed_back(w, watched, inverse, order)
    assert list(watched.seen) == order[::v].tolist()
    error = w - watched.decode(codes)
    for done in range(0, 256, 5 * v):
        before, here, after = order[:done], order[done : done + v], order[done + v :]
        left = order[done:]
        shift = torch.linalg.solve(damped[left][:, left], damped[left][:, before] @ error[:, before].T).T[:, :v]
        asked, metric, chosen = watched.seen[int(here[0])]
        assert torch.allclose(asked, w[:, here] + shift, rtol=0, atol=1e-9 * float(w.abs().max()))
        adapted = damped[here][:, after] @ torch.linalg.solve(damped[after][:, after], damped[after][:, here])
        assert torch.allclose(metric, damped[here][:, here] - adapted, rtol=1e-6, atol=1e-9 * float(metric.max()))
        assert torch.equal(chosen, codes[:, here])


@pytest.mark.parametrize("name", ["iq2_xs", "iq3_xxs", "iq3_s"])
def test_gptq_is_its_definition(name: str) -> None:
    check_definition(name)


def test_vectors_and_columns_are_quantized_in_one_call() -> None:
    """Each scheme of linears that read the same input keeps its own order of columns."""
    w, stats = [ordinary(4, 256, seed=i) for i in range(3)], stats_of(inputs(600, 256))
    schemes = [parse("iq2_s"), parse("q4_k"), parse("iq2_s")]
    together = GPTQ().quantize_alike(w, schemes, stats)
    for weight, scheme, choice in zip(w, schemes, together, strict=True):
        alone = GPTQ().quantize(weight, scheme, stats).weight
        assert choice.weight.codec == scheme
        assert same_bytes(choice.weight.parts, alone.parts)


def test_a_vector_is_ordered_by_its_sum() -> None:
    diagonal = torch.tensor([9.0, 0, 4, 6, 1, 1])
    assert in_order(diagonal, 2).tolist() == [2, 3, 0, 1, 4, 5]
    assert in_order(diagonal).tolist() == [0, 3, 2, 4, 5, 1]


@names
def test_all_importances_but_one_may_be_zero(name: str) -> None:
    w, h = hard(6, 256), torch.zeros(256)
    h[5] = 1.0
    grids = grids_of(name, w, h)
    values = grids.decode(grids.encode(w))
    assert torch.isfinite(values).all()
    missed = (values - w).abs()[:, 5] / w.abs().amax(1)
    assert float(missed.max()) < 0.05
    assert IQ.from_spec(name) == parse(name)
