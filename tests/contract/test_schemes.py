"""What every scheme keeps: codes, grids and parts turn into one another without loss, and sizes are known before."""

from __future__ import annotations

from dataclasses import is_dataclass

import pytest
import torch
from torch import Tensor

from fewbit import registry
from fewbit.errors import FewbitError, FormatError, NumericsError, PlanError
from fewbit.schemes.base import Grids, Scheme, chunk_rows, parse
from tests.contract.cases import (
    EXAMPLES,
    SPECS,
    hard,
    is_sentence,
    ordinary,
    quantized,
    same_bytes,
    several_groups,
    shape_for,
)

specs = pytest.mark.parametrize("spec", SPECS)


def same_grids(a: object, b: object) -> bool:
    """Equal in every field, and in theirs."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if is_dataclass(a) and type(a) is type(b):
        return all(same_grids(value, vars(b)[name]) for name, value in vars(a).items())
    return a == b


def check_grids(scheme: Scheme, w: Tensor) -> None:
    """Encoding takes the nearest value, decoding is undone by it, and columns are the same however asked for."""
    grids = scheme.fit(w)
    codes = grids.encode(w)
    values = grids.decode(codes)
    assert codes.dtype == torch.uint8
    assert codes.shape == values.shape == w.shape
    assert torch.isfinite(values).all()
    assert torch.equal(grids.encode(values), codes)
    assert grids.vector == scheme.vector
    if scheme.vector > 1:
        check_vectors(grids, w)
        return
    reached = (values - w).abs()
    top = int(codes.max())
    for code in range(0, top + 1, max(1, top // 32)):
        other = (grids.decode(torch.full_like(codes, code)) - w).abs()
        assert (reached <= other + 1e-6 * w.abs()).all()
    k = w.shape[1]
    shuffled = torch.randperm(k, generator=torch.Generator().manual_seed(0))
    for columns in (slice(None), slice(k // 3, k - 1), shuffled, shuffled[: k // 2]):
        assert torch.equal(grids.encode(w[:, columns], columns), codes[:, columns])
        assert torch.equal(grids.decode(codes[:, columns], columns), values[:, columns])
    for column in (0, 1, 15, 16, 17, 31, 32, k // 2, k - 1):
        assert torch.equal(grids.encode(w[:, column], column), codes[:, column])
        assert torch.equal(grids.decode(codes[:, column], column), values[:, column])


def check_vectors(grids: Grids, w: Tensor) -> None:
    """Whole vectors of columns are encoded the same however asked for. `test_iq` compares them with all vectors."""
    codes, v = grids.encode(w), grids.vector
    values, every = grids.decode(codes), torch.arange(w.shape[1]).unflatten(0, (-1, v))
    shuffled = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
    for columns in (slice(v, 5 * v), every[shuffled].flatten(), every[shuffled[:3]].flatten()):
        assert torch.equal(grids.encode(w[:, columns], columns), codes[:, columns])
        assert torch.equal(grids.decode(codes[:, columns], columns), values[:, columns])
    for column in (0, v - 1, v, w.shape[1] - 1):
        assert torch.equal(grids.decode(codes[:, column], column), values[:, column])


def check_parts(scheme: Scheme, w: Tensor) -> None:
    """`pack` and `unpack` are inverse, `part_specs` tells the truth, and `dequantize` is `decode`, of any rows."""
    shape = (w.shape[0], w.shape[1])
    grids = scheme.fit(w)
    codes = grids.encode(w)
    parts = scheme.pack(codes, grids)
    found = {name: (tuple(part.shape), part.dtype) for name, part in parts.items()}
    assert found == {name: (spec.shape, spec.dtype) for name, spec in scheme.part_specs(shape).items()}
    assert scheme.nbytes(shape) == sum(part.nbytes for part in parts.values())
    assert scheme.payload in parts
    scheme.check(parts, shape)
    codes_again, grids_again = scheme.unpack(parts, shape)
    assert torch.equal(codes_again, codes)
    assert same_grids(grids_again, grids)
    assert same_bytes(scheme.pack(codes_again, grids_again), parts)
    values = grids.decode(codes)
    assert torch.equal(scheme.dequantize(parts, shape, torch.float32), values)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(scheme.dequantize(parts, shape, dtype), values.to(dtype))
    for rows in (slice(0, 1), slice(1, 4), slice(shape[0] - 1, shape[0]), slice(2, None)):
        assert torch.equal(scheme.dequantize(parts, shape, torch.float32, rows), values[rows])


def check_weighted_fit(scheme: Scheme, w: Tensor, importance: Tensor) -> None:
    """A fit that knows which columns matter is at least as good for them as one that does not.

    This holds for each row, or for rows together that share a fit.
    """

    def error(grids: Grids) -> Tensor:
        lost = ((grids.decode(grids.encode(w)) - w).double().square() * importance.double()).sum(1)
        return torch.stack([rows.sum() for rows in lost.split(scheme.rows or len(w))])

    plain, weighted = error(scheme.fit(w)), error(scheme.fit(w, importance))
    assert (weighted <= plain * (1 + 1e-6)).all()


@specs
def test_a_spec_names_one_scheme_and_back(spec: str) -> None:
    assert str(parse(spec)) == spec
    assert parse(str(parse(spec))) == parse(spec)
    assert hash(parse(spec)) == hash(parse(spec))


def test_distinct_specs_are_distinct_schemes() -> None:
    assert len({parse(spec) for spec in SPECS}) == len(SPECS)


@pytest.mark.parametrize("spec", EXAMPLES)
def test_an_example_belongs_to_its_family(spec: str) -> None:
    assert spec in registry.entries("schemes")[parse(spec).family].examples


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("int4-g128-symm", "int4-g128-sym"),
        ("in4-g128", "int4-g128"),
        ("int8-row-sim", "int8-row-sym"),
        ("INT4-G128-SIM", "int4-g128-sym"),
        ("int4", "int4-g128"),
        ("int3", "int3-g128"),
        ("int4-g128 ", "int4-g128"),
        ("int4-g128-sym-sym", "int4-g128-sym"),
        ("int4-g-128", "int4-g128"),
        ("", "Known:"),
        ("int1-g128", "2 to 8 bits"),
        ("int9-row", "2 to 8 bits"),
        ("int4-g8", "16 to 1024"),
        ("int4-g2048", "16 to 1024"),
    ],
)
def test_a_malformed_spec_is_answered_with_what_would_be_right(spec: str, told: str) -> None:
    with pytest.raises(PlanError) as raised:
        parse(spec)
    assert repr(spec) in raised.value.message
    assert told in raised.value.hint


@specs
def test_grids(spec: str) -> None:
    check_grids(parse(spec), hard(*shape_for(spec)))
    check_grids(parse(spec), ordinary(*several_groups(spec)))


@specs
def test_parts(spec: str) -> None:
    check_parts(parse(spec), hard(*shape_for(spec)))
    check_parts(parse(spec), ordinary(*several_groups(spec)))


@specs
def test_weighted_fit(spec: str) -> None:
    n, k = several_groups(spec)
    importance = torch.rand(k, generator=torch.Generator().manual_seed(3)) ** 4
    check_weighted_fit(parse(spec), ordinary(n, k), importance)
    for odd in (importance, torch.eye(k)[k // 2], importance.round(), torch.zeros(k), importance * 1e8):
        check_weighted_fit(parse(spec), hard(n, k), odd)


@pytest.mark.parametrize("spec", EXAMPLES)
def test_importance_pays(spec: str) -> None:
    n, k = several_groups(spec, 16)
    w, importance = ordinary(n, k), torch.rand(k, generator=torch.Generator().manual_seed(3)) ** 4
    plain, weighted = parse(spec).fit(w), parse(spec).fit(w, importance)

    def error(grids: Grids) -> float:
        return float(((grids.decode(grids.encode(w)) - w).square() * importance).sum())

    # The codes of q1_0 are signs, whatever the importances, so only its scale gains; tests/unit/test_few.py has that.
    assert error(weighted) < (1.0 if spec == "q1_0" else 0.98) * error(plain)


@specs
def test_zeros_stay_zero_and_constants_stay_near(spec: str) -> None:
    n, k = shape_for(spec)
    least = 2.0**-17 if "-bf16" in spec else 2.0**-24  # the smallest scale
    for constant in (0.0, 1e-7, -1e-7, 0.3, -1.0, 6e4, -65504.0):
        w = torch.full((n, k), constant)
        # No entry of a codebook has the largest magnitude only, so a grid that spans the range has no constants.
        grids = parse(spec).fit(w) if parse(spec).vector == 1 else parse(spec).nearest(w)[1]
        assert ((grids.decode(grids.encode(w)) - w).abs() <= least * (constant != 0) + 0.34 * abs(constant)).all()


@specs
def test_what_cannot_be_stored_is_refused(spec: str) -> None:
    w = ordinary(*shape_for(spec))
    for attempt in (parse(spec).fit, parse(spec).nearest):
        for empty in (w[:0], w[:, :0]):
            with pytest.raises(NumericsError, match="no elements"):
                attempt(empty)
        for bad in (float("nan"), float("inf"), float("-inf")):
            w[-1, -1] = bad
            with pytest.raises(NumericsError, match="has NaN or Inf"):
                attempt(w)


WIDE = ("nf4", "fp4", "fp8", "mxfp4", "nvfp4")  # families whose scales have the range of float32


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.startswith(("nf4", "fp4", "fp8"))])
def test_float32_scales_store_large_values(spec: str) -> None:
    w = ordinary(*shape_for(spec))
    w[-1, -1] = 1e30
    grids = parse(spec).fit(w)
    assert grids.decode(grids.encode(w))[-1, -1] == pytest.approx(1e30, rel=0.01)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if not spec.startswith(WIDE)])
def test_values_beyond_16_bit_scales_are_refused(spec: str) -> None:
    w = ordinary(*shape_for(spec))
    w[-1, -1] = 1e30
    with pytest.raises(NumericsError, match="beyond the range of"):
        parse(spec).fit(w)


@specs
def test_float64_in_float64_out(spec: str) -> None:
    w = ordinary(*several_groups(spec), dtype=torch.float64)
    grids = parse(spec).fit(w)
    codes = grids.encode(w)
    assert grids.decode(codes).dtype == torch.float64
    assert torch.equal(grids.encode(grids.decode(codes)), codes)
    # The grids are the stored ones: float64 adds no digit that a file would lose.
    parts, shape = parse(spec).pack(codes, grids), (w.shape[0], w.shape[1])
    assert torch.equal(parse(spec).dequantize(parts, shape, torch.float32), grids.decode(codes).float())


IN_ROWS = [spec for spec in SPECS if parse(spec).by_rows(several_groups(spec, 2 * (parse(spec).rows or 3)))]


@pytest.mark.parametrize("spec", IN_ROWS)
def test_pieces_make_the_whole(spec: str) -> None:
    """The head of a model is quantized in pieces of rows, where the parts consist of rows."""
    scheme, (n, k) = parse(spec), several_groups(spec, 2 * (parse(spec).rows or 3))
    w = ordinary(n, k)
    pieces = [w[rows] for rows in chunk_rows(n, k, 1, scheme.rows or 1)]
    agreed = scheme.for_all(pieces)
    parts = [quantized(agreed, piece) for piece in pieces]
    assert same_bytes({name: torch.cat([own[name] for own in parts]) for name in parts[0]}, quantized(scheme, w))


@specs
def test_half_precision_weights_are_taken_at_their_value(spec: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        w = ordinary(*shape_for(spec)).to(dtype)
        assert same_bytes(quantized(parse(spec), w), quantized(parse(spec), w.float()))


@specs
def test_a_fit_leaves_the_weight_alone(spec: str) -> None:
    w = ordinary(*shape_for(spec))
    before, importance = w.clone(), torch.ones(w.shape[1])
    quantized(parse(spec), w)
    parse(spec).fit(w, importance)
    assert torch.equal(w, before)
    assert (importance == 1).all()


@specs
def test_a_shape_is_refused_in_words(spec: str) -> None:
    scheme = parse(spec)
    assert scheme.why_not(shape_for(spec)) is None
    if scheme.group:
        odd = scheme.group * 2 - 1
        reason = scheme.why_not((4, odd))
        if reason is None:  # its groups do not end where a row does
            check_parts(scheme, ordinary(4, odd))
            check_grids(scheme, ordinary(3, odd))
        else:
            assert is_sentence(reason)
            assert str(odd) in reason


@specs
def test_check_names_tensor_and_part(spec: str) -> None:
    scheme, shape = parse(spec), shape_for(spec)
    parts = quantized(scheme, ordinary(*shape))
    for name, part in parts.items():
        for wrong in (part[:-1], part[..., :-1], part.to(torch.float64)):
            with pytest.raises(FormatError, match=rf"layer\.7.*{name}"):
                scheme.check(parts | {name: wrong}, shape, "layer.7")
        with pytest.raises(FormatError, match=r"layer\.7"):
            scheme.check({key: value for key, value in parts.items() if key != name}, shape, "layer.7")
    with pytest.raises(FewbitError, match="surplus"):
        scheme.check(parts | {"surplus": torch.zeros(1)}, shape, "layer.7")
