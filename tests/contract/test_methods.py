"""What every method keeps: valid codes of the scheme asked for, the same each time, and its inputs as they were."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from fewbit import registry
from fewbit.methods.base import Method, make
from fewbit.schemes.base import parse
from fewbit.stats import Need, Stats
from tests.contract.cases import EXAMPLES, METHODS, hard, inputs, ordinary, same_bytes, several_groups, stats_of

SPECS = list(dict.fromkeys([*EXAMPLES, "int3-row"]))
methods = pytest.mark.parametrize("name", METHODS)
specs = pytest.mark.parametrize("spec", SPECS)


def stats_for(method: Method, k: int) -> Stats | None:
    return stats_of(inputs(k + 50, k), method.needs) if method.needs != Need.NOTHING else None


def check_choice(method: Method, spec: str) -> None:
    """Well-formed parts, equal on a second run, with the weight and the statistics untouched."""
    scheme = parse(spec)
    n, k = several_groups(spec)
    w, stats = ordinary(n, k), stats_for(method, k)
    before, measured = w.clone(), None if stats is None else dict_of(stats)
    choice = method.quantize(w, scheme, stats)
    assert choice.weight.codec == scheme
    assert choice.weight.shape == (n, k)
    assert choice.weight.permutation is None
    scheme.check(choice.weight.parts, (n, k))
    codes, grids = scheme.unpack(choice.weight.parts, (n, k))
    assert same_bytes(scheme.pack(codes, grids), choice.weight.parts)
    values = choice.weight.dequantize()
    assert torch.equal(grids.decode(grids.encode(values)), values)  # the codes too, where no value has two
    assert (values - w).norm() < w.norm()
    assert torch.equal(w, before)
    assert stats is None or measured is None or same_bytes(dict_of(stats), measured)
    assert same_bytes(method.quantize(w, scheme, stats).weight.parts, choice.weight.parts)


def dict_of(stats: Stats) -> dict[str, torch.Tensor]:
    """A copy of all that was measured. What a Hessian has twice is filled in when it is read."""
    if stats.need >= Need.HESSIAN:
        assert len(stats.hessian) == stats.columns
    return {key: value.clone() for key, value in vars(stats).items() if isinstance(value, torch.Tensor)}


@methods
@specs
def test_choice(name: str, spec: str) -> None:
    check_choice(make(name), spec)


@methods
@specs
def test_what_is_measured_pays(name: str, spec: str) -> None:
    method = make(name)
    n, k = several_groups(spec)
    w, x = ordinary(n, k), inputs(k + 50, k)
    weight = method.quantize(w, parse(spec), stats_for(method, k)).weight
    nearest = Method().quantize(w, parse(spec), None).weight

    def error(values: torch.Tensor) -> float:
        return float(((values - w) @ x.T).square().mean())

    if method.needs == Need.NOTHING:
        assert error(weight.dequantize()) <= error(nearest.dequantize()) * 1.0001
    elif method.needs < Need.HESSIAN:  # it knows how large each column's input is, and not how they go together
        lost, most = ((q.dequantize() - w).square() @ x.square().mean(0) for q in (weight, nearest))
        assert lost.sum() < most.sum()
    else:
        assert error(weight.dequantize()) < 0.9 * error(nearest.dequantize())


@methods
@specs
def test_hard_weights_stay_finite(name: str, spec: str) -> None:
    method = make(name)
    n, k = several_groups(spec)
    w = hard(n, k)
    assert torch.isfinite(method.quantize(w, parse(spec), stats_for(method, k)).weight.dequantize()).all()


@methods
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_taken_at_their_value(name: str, dtype: torch.dtype) -> None:
    method = make(name)
    w, stats = ordinary(6, 96).to(dtype), stats_for(method, 96)
    whole = method.quantize(w.float(), parse("int4-g32"), stats).weight
    assert same_bytes(method.quantize(w, parse("int4-g32"), stats).weight.parts, whole.parts)


@methods
def test_its_fields_are_its_options(name: str) -> None:
    """Each has a default, is read back from its own text, and has help."""
    cls = registry.get("methods", name)
    assert make(name) == cls()
    assert make(name, {f.name: str(f.default) for f in fields(cls) if f.default is not None}) == cls()
    for option in fields(cls):
        assert option.metadata["help"].endswith(".")
        assert (option.default is None) == bool(option.metadata["optional"])
