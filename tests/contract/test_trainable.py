"""Trained scales: the gradient of every codec is that of its values, and its parts store the result."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewbit.schemes.base import Codec, Parts, parse
from fewbit.schemes.ggml import BLOCK_TYPES, codec
from tests.contract.cases import SPECS, is_sentence, ordinary, several_groups, shape_for

READ_ONLY = [name for name in BLOCK_TYPES if name not in SPECS or name == "mxfp4"]
Case = tuple[Codec, tuple[int, int], Parts]


def written(spec: str) -> Case:
    scheme, shape = parse(spec), several_groups(spec)
    return scheme, shape, scheme.pack(*scheme.nearest(ordinary(*shape)))


def random_blocks(name: str) -> Case:
    """Blocks of random bytes with ordinary scales."""
    kind, (n, blocks) = codec(name), (3, 2)
    shape, nbytes = (n, blocks * BLOCK_TYPES[name].columns), BLOCK_TYPES[name].nbytes
    made = torch.randint(0, 128, (n, blocks * nbytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    if isinstance(kind.trainable, str):
        return kind, shape, {"blocks": made}
    return kind, shape, kind.with_floats({"blocks": made}, {"d": torch.linspace(0.5, 1.5, n * blocks).view(n, blocks)})


CASES = [pytest.param(written, spec, id=spec) for spec in SPECS]
CASES += [pytest.param(random_blocks, name, id=f"read-{name}") for name in READ_ONLY]
cases = pytest.mark.parametrize(("make", "name"), CASES)


def moved(floats: dict[str, Tensor]) -> dict[str, Tensor]:
    """The numbers, each a few percent larger or smaller."""
    generator = torch.Generator().manual_seed(1)
    return {name: value * (1 + 0.05 * torch.randn(value.shape, generator=generator)) for name, value in floats.items()}


@cases
def test_trainable_numbers_have_names_or_a_reason(make: object, name: str) -> None:
    codec, _, parts = make(name)  # type: ignore[operator]
    if isinstance(codec.trainable, str):
        assert is_sentence(codec.trainable)
        assert codec.floats(parts) == {}
    else:
        assert list(codec.floats(parts)) == list(codec.trainable)
        assert set(codec.shared) <= set(codec.trainable)


@cases
def test_values_are_those_of_the_stored_numbers(make: object, name: str) -> None:
    codec, shape, parts = make(name)  # type: ignore[operator]
    floats = codec.floats(parts)
    for rows in (slice(None), slice(1, 3)):
        expected = codec.dequantize(parts, shape, torch.float32, rows)
        assert torch.equal(codec.values(parts, shape, floats, rows), expected)


@cases
def test_the_gradient_is_the_numeric_one(make: object, name: str) -> None:
    codec, shape, parts = make(name)  # type: ignore[operator]
    plain = codec.floats(parts)
    floats = {key: value.clone().requires_grad_() for key, value in plain.items()}
    if not floats:
        pytest.skip("nothing to train")
    rows = slice(1, None)
    values = codec.values(parts, shape, floats, rows)
    weight = torch.randn(values.shape, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad(values, list(floats.values()), weight)
    for (key, value), gradient in zip(plain.items(), found, strict=True):
        step = value * 2.0**-3  # values are linear or nearly so in each number: the step may be large
        ends = [
            (codec.values(parts, shape, {**plain, key: value + sign * step}, rows).double() * weight).sum()
            for sign in (1, -1)
        ]
        numeric, expected = float(ends[0] - ends[1]) / 2, float((gradient.double() * step).sum())
        size = float((gradient.double() * step).abs().sum())
        # NVFP4's global scale divides: the third derivative counts, 2^-6 of the whole.
        assert abs(numeric - expected) <= (0.02 if key == "global" else 1e-5) * size


@cases
def test_trained_numbers_are_stored_as_they_are(make: object, name: str) -> None:
    codec, shape, parts = make(name)  # type: ignore[operator]
    floats = codec.rounded(parts, moved(codec.floats(parts)))
    stored = codec.with_floats(parts, floats)
    codec.check(stored, shape)
    again = codec.floats(stored)
    assert all(torch.equal(again[key], value) for key, value in floats.items())
    expected = codec.values(parts, shape, floats)
    assert torch.equal(codec.dequantize(stored, shape, torch.float32), expected)
    unchanged = codec.with_floats(parts, codec.floats(parts))
    assert all(torch.equal(unchanged[key], part) for key, part in parts.items())
    rounded_again = codec.rounded(parts, again)
    assert all(torch.equal(rounded_again[key], value) for key, value in floats.items())


def test_a_shared_number_stays_one_number() -> None:
    for spec in ("nvfp4", "nvfp4-mul", "fp8-tensor"):
        scheme, shape = parse(spec), shape_for(spec)
        parts = scheme.pack(*scheme.nearest(ordinary(*shape)))
        floats = scheme.floats(parts)
        assert {value.numel() for value in floats.values()} == {1}
        stored = scheme.with_floats(parts, moved(floats))
        (name,) = scheme.shared
        assert len(stored[name].unique()) == 1
        assert stored[name].shape == parts[name].shape
