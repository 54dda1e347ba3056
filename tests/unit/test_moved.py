"""Codes that are trained: they start as the method's, gradients pass through the rounding, and they stay in range."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewbit.nn.moved import UNIT, MovedStack, MovedWeight, alike, decoded
from fewbit.schemes.base import QTensor, Scheme, Uniform, parse

MOVING = ("int4-g32-sym", "int3-g32", "int2-g64-sym-bf16", "q2_k", "q3_k", "q4_k", "q6_k", "q4_1")
STAYING = ("nf4-b32", "iq4_xs", "fp8-row", "llm.int8", "nvfp4")
EVERY = pytest.mark.parametrize("spec", MOVING + STAYING)


def made(spec: str, permuted: bool = False) -> tuple[QTensor, Tensor]:
    """A quantized weight, and another one that it is to approximate."""
    generator = torch.Generator().manual_seed(0)
    scheme, w = parse(spec), torch.randn(24, 256, generator=generator)
    order = torch.randperm(256, generator=generator) if permuted else None
    towards = w + 0.3 * torch.randn(w.shape, generator=generator)
    return QTensor(scheme, (24, 256), scheme.pack(*scheme.nearest(w)), order), towards


def scrambled(weight: MovedWeight) -> MovedWeight:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in weight.parameters_of:
            size = 0.3 if parameter.shape == weight.weight.shape else 0.02  # a position, or a scale
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return weight


def codes_of(weight: QTensor) -> Tensor:
    assert isinstance(weight.codec, Scheme)
    return weight.codec.unpack(weight.parts, weight.shape)[0]


@pytest.mark.parametrize("permuted", [False, True])
@EVERY
def test_the_first_values_are_those_of_the_method(spec: str, permuted: bool) -> None:
    weight, towards = made(spec, permuted)
    moved = MovedWeight(weight, towards)
    assert torch.equal(moved.values().detach(), weight.dequantize())
    same = moved.tuned()
    assert same.parts.keys() == weight.parts.keys()
    assert all(torch.equal(same.parts[name], part) for name, part in weight.parts.items())
    assert moved.share_moved == (0 if spec in MOVING else None)


@pytest.mark.parametrize("spec", MOVING)
def test_codes_start_in_the_middle_without_a_weight(spec: str) -> None:
    weight, _ = made(spec)
    moved = MovedWeight(weight, None, unit=10.0)
    assert torch.equal(moved.values().detach(), weight.dequantize())
    assert torch.allclose(moved.latent * 10.0, codes_of(weight).float())
    with torch.no_grad():
        moved.latent.add_(0.06).clamp_(0, float(moved.latent.max()))  # 0.6 codes, where there is a next one
    assert moved.share_moved
    assert int((codes_of(moved.tuned()).int() - codes_of(weight).int()).max()) == 1


@EVERY
def test_a_product_is_that_of_the_values(spec: str) -> None:
    weight, towards = made(spec, permuted=True)
    moved, x = scrambled(MovedWeight(weight, towards)), torch.randn(5, 256, requires_grad=True)
    moved.product(x).square().sum().backward()
    found = [x.grad, *(each.grad for each in moved.parameters_of)]
    x.grad = None
    moved.zero_grad()
    (x @ moved.values().T).square().sum().backward()
    for one, other in zip(found, [x.grad, *(each.grad for each in moved.parameters_of)], strict=True):
        assert one is not None
        assert other is not None
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("spec", MOVING)
def test_a_position_is_on_the_side_of_its_weight(spec: str) -> None:
    weight, towards = made(spec)
    moved = MovedWeight(weight, towards)
    with torch.no_grad():
        lean = moved.latent * UNIT - codes_of(weight)
        above = MovedWeight(weight, towards)
        above.latent.copy_((codes_of(weight) + 1) / UNIT)
        up = above.values() - weight.dequantize()  # one code further, unless that is beyond the last
    error = towards - weight.dequantize()
    known = up != 0
    assert float(lean.abs().max()) < 0.5
    assert bool((lean * up * error >= 0)[known].all())


@EVERY
def test_what_is_stored_is_what_was_computed(spec: str) -> None:
    moved = scrambled(MovedWeight(*made(spec)))
    stored = moved.tuned()
    stored.codec.check(stored.parts, stored.shape)
    assert torch.allclose(stored.dequantize(), moved.values().detach(), rtol=1e-6, atol=0)
    changed = float((codes_of(stored) != codes_of(moved.weight)).double().mean())
    assert changed == (moved.share_moved or 0)
    assert (changed > 0) == (spec in MOVING)


@pytest.mark.parametrize("offset", [False, True])
def test_gradients_are_those_of_the_definition(offset: bool) -> None:
    """W = s (c - z) - o with c = u + (round(u) - u), the bracket a constant, in float64."""
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    n, groups, group, top = 3, 4, 8, 7
    place = torch.rand((n, groups * group), generator=generator, dtype=torch.float64) * top
    scale, shift, zero = random(n, groups), random(n, groups) if offset else None, torch.full((n, groups), 3.0).double()
    upstream, x = random(5, n), random(5, groups * group)
    leaves = [t.clone().requires_grad_() for t in (place / UNIT, scale, *([shift] if shift is not None else []))]
    own = Uniform(leaves[1], zero, leaves[2] if offset else None, top, group)
    found = torch.autograd.grad((x @ decoded(leaves[0], own).T * upstream).sum(), leaves)

    free = [t.detach().clone().requires_grad_() for t in leaves]
    u = free[0] * UNIT
    code = (u + (u.round() - u).detach()).unflatten(1, (groups, group))
    values = (code - zero.unsqueeze(-1)) * free[1].unsqueeze(-1) - (free[2].unsqueeze(-1) if offset else 0)
    expected = torch.autograd.grad((x @ values.flatten(1).T * upstream).sum(), free)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def test_beyond_the_last_code_only_the_way_back_counts() -> None:
    ends = torch.tensor([[-0.4, -0.4, 3.4, 3.4]]) / UNIT
    latent = ends.clone().requires_grad_()
    uniform = Uniform(torch.ones(1, 1), 0, None, 3, 4)
    values = decoded(latent, uniform)
    assert values.tolist() == [[0, 0, 3, 3]]
    values.backward(torch.tensor([[1.0, -1.0, -1.0, 1.0]]))  # a step is against the gradient
    assert latent.grad is not None
    assert latent.grad.tolist() == [[0, -UNIT, 0, UNIT]]


@EVERY
def test_stacked_weights_are_those_of_each_alone(spec: str) -> None:
    weight, towards = made(spec)
    names = alike({"a": weight, "b": weight})
    assert len(names) == (2 if spec == "nvfp4" else 1)
    if len(names) > 1:
        return
    stack = scrambled(MovedStack([weight, weight], [towards, towards.flip(0)]))
    assert isinstance(stack, MovedStack)
    aim = torch.randn(2, *weight.shape, generator=torch.Generator().manual_seed(2))
    values = stack.each()
    (torch.stack(list(values)) * aim).sum().backward()
    for index, own in enumerate([stack.part(0), stack.part(1)]):
        assert torch.equal(own.values().detach(), values[index].detach())
        assert own.tuned().parts.keys() == weight.parts.keys()
        (own.values() * aim[index]).sum().backward()
        for name, alone in [("latent", own), *((f"delta.{name}", own) for name in own.delta)]:
            if name == "latent" and own.grids is None:
                continue
            one, whole = alone.get_parameter(name).grad, stack.get_parameter(name).grad
            assert one is not None
            assert whole is not None
            assert torch.equal(one, whole[index * len(one) : (index + 1) * len(one)])
    assert not torch.equal(*values)


def test_other_weights_are_not_stacked() -> None:
    weight, _ = made("int4-g32-sym")
    others = {"b": made("int3-g32")[0], "c": made("int4-g32-sym", True)[0], "d": made("nvfp4")[0], "e": weight}
    assert alike({"a": weight, **others}) == [["a", "e"], ["b"], ["c"], ["d"]]
