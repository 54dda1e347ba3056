"""Columns swept: uniform grids mean what they say, the fused panel is the definition, one that is not refuses itself.

`python -m tests.unit.test_sweep` prints, for six schemes, the share of codes in which the fused panel and the
definition differ. In the interpreter (TRITON_INTERPRET=1, set before Triton is imported) it needs no GPU.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbit.errors import NumericsError
from fewbit.methods import gptq
from fewbit.methods.gptq import GPTQ
from fewbit.methods.sweep import choose
from fewbit.methods.sweep.definition import Sweep
from fewbit.methods.sweep.groups import GroupSweep, Rounded
from fewbit.pipeline import blocks
from fewbit.plans.plan import Assignment
from fewbit.schemes.base import Grids, Plain, Uneven, Uniform, parse
from tests import interpreter
from tests.contract.cases import SPECS, inputs, ordinary, same_bytes, several_groups, stats_of

# 304 columns are two panels and a ragged third; 40 rows are no whole number of programs.
SWEPT = {"int4-g16": 304, "int3-g16-sym": 304, "int2-row": 304, "q4_k": 256, "q3_k": 512, "q5_1": 288, "q8_0": 288}
SWEPT |= {"q2_k": 256, "nf4-b64": 320, "fp4-b64-dq": 320, "mxfp4": 320, "nvfp4": 304, "iq4_nl": 288}
# The others take the same ways. In the interpreter all of them take 20 minutes, and 40 rows of q4_k three.
IN_THE_INTERPRETER = {"int4-g16": 40, "int2-row": 40, "q5_1": 40, "nf4-b64": 40, "nvfp4": 40, "q4_k": 8}
ROWS = 40
DIFFERENT = 0.005  # share of codes: a last bit may turn a tie, and then what follows in that row


def shares(device: str, spec: str, k: int, n: int = ROWS) -> list[float]:
    """The shares of codes in which the fused passes differ from the definition: GPTQ's, and coordinate descent."""
    w, hessian = ordinary(n, k, seed=3).to(device), stats_of(inputs(2 * k, k)).hessian.to(device)
    grids, found = parse(spec).fit(w), []
    order = gptq.in_order(hessian.diagonal(), grids.run)
    inverse, _ = gptq.inverse_factor(hessian, order, 0.01)
    assert inverse is not None
    definition = GroupSweep if grids.run > 1 else Sweep
    assert type(choose.sweep_for(grids, w.T.to(torch.uint8), order, grids.run)) is not definition, (
        "the fused panel did not serve"
    )
    for chosen in (lambda grids, codes, order, run: definition(grids, codes, order), choose.sweep_for):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gptq, "sweep_for", chosen)
            nearest = grids.encode(w)
            swept = (
                gptq.feed_back(w, grids, inverse, order),
                gptq.descend(w, nearest, grids, hessian, order, 0.01, run=grids.run),
            )
            assert (swept[0][0] != nearest).float().mean() > 0.05, "nothing was fed back"
            assert (swept[1][0] != nearest).float().mean() > 0.05, "nothing descended"
            found.append([(codes, chosen.decode(codes)) for codes, chosen in swept])
    return [
        max(float((a != b).float().mean()) for a, b in zip(one, other, strict=True))
        for one, other in zip(*found, strict=True)
    ]


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_fused_panel_is_the_definition_in_the_interpreter() -> None:
    found = interpreter.run("tests.unit.test_sweep")
    assert found.keys() == IN_THE_INTERPRETER.keys()
    assert all(share <= DIFFERENT for both in found.values() for share in both), found


UNEVEN = [spec for spec in SPECS if any(part in spec for part in ("nf4", "fp4", "iq4"))]
OTHERS = [spec for spec in SPECS if any(part in spec for part in ("fp8", "llm.int8", "iq2", "iq3"))] + ["q1_0"]


@pytest.mark.parametrize("spec", OTHERS)
def test_grids_of_many_uneven_values_are_not_plain(spec: str) -> None:
    assert parse(spec).fit(ordinary(*several_groups(spec))).plain() is None


@pytest.mark.parametrize("spec", UNEVEN)
def test_uneven_grids_are_what_they_say(spec: str) -> None:
    """Also at the edges and beside them."""
    shape = several_groups(spec)
    grids = parse(spec).fit(ordinary(*shape))
    plain = grids.plain()
    assert isinstance(plain, Uneven)
    edges = torch.tensor(plain.edges)
    near = torch.cat([edges, edges.nextafter(torch.tensor(-9.0)), edges.nextafter(torch.tensor(9.0)), edges * 1.4])
    near = near[near.abs() > 1e-30]  # a negative 0 has a sign, which no edge can tell
    scale = plain.scale[:, torch.arange(shape[1]) // plain.group]
    w = near.repeat(shape[0] * shape[1] // len(near) + 1)[: shape[0] * shape[1]].view(shape) * scale
    x = torch.where(scale == 0, 0, w / scale)
    rank = (x[..., None] > edges).sum(-1)
    assert torch.equal(torch.tensor(plain.codes, dtype=torch.uint8)[rank], grids.encode(w))
    assert torch.equal(torch.tensor(plain.levels)[rank] * scale, grids.decode(grids.encode(w)))


def test_blocks_that_cross_rows_are_not_plain() -> None:
    assert parse("nf4-b64").fit(ordinary(6, 96)).plain() is None


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec not in (*UNEVEN, *OTHERS)])
def test_uniform_grids_are_what_they_say(spec: str) -> None:
    shape = several_groups(spec)
    w = ordinary(*shape)
    grids = parse(spec).fit(w)
    uniform = grids.plain()
    assert isinstance(uniform, Uniform)
    group = torch.arange(shape[1]) // uniform.group
    scale = uniform.scale[:, group]
    offset = 0 if uniform.offset is None else uniform.offset[:, group]
    zero = uniform.zero[:, group] if isinstance(uniform.zero, Tensor) else uniform.zero
    level = torch.where(scale == 0, 0, (w + offset) / scale).round()
    codes = (level + zero).clamp(0, uniform.top)
    assert torch.equal(codes.to(torch.uint8), grids.encode(w))
    assert torch.equal((codes - zero) * scale - offset, grids.decode(grids.encode(w)))


class Shifted(Sweep):
    """A fused panel that is wrong."""

    def __init__(self, grids: Grids, plain: Plain, codes: Tensor, order: Tensor) -> None:
        super().__init__(grids, codes, order)

    def feed_back(self, start: int, stop: int, panel: Tensor, factor: Tensor) -> Tensor:
        return super().feed_back(start, stop, panel, factor.tril())


class Faithful(Shifted):
    def feed_back(self, start: int, stop: int, panel: Tensor, factor: Tensor) -> Tensor:
        return Sweep.feed_back(self, start, stop, panel, factor)


@pytest.mark.parametrize("fused", [Shifted, Faithful])
def test_a_fused_panel_that_differs_refuses_itself(fused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("fewbit.methods.sweep.in_triton")
    monkeypatch.setattr(module, "FusedSweep", fused, raising=False)
    monkeypatch.setitem(sys.modules, "fewbit.methods.sweep.in_triton", module)
    monkeypatch.setattr(choose, "_has_triton", lambda device: True)
    monkeypatch.setattr(choose, "_agreed", {})
    w, order = ordinary(24, 160), torch.arange(160)
    grids, codes = parse("int4-g16").fit(w), torch.zeros(160, 24, dtype=torch.uint8)
    if fused is Shifted:
        with pytest.warns(UserWarning, match=r"the fused kernel failed: \d+\.\d% of the values differ"):
            assert type(choose.sweep_for(grids, codes, order, 1)) is Sweep
    assert type(choose.sweep_for(grids, codes, order, 1)) is (Sweep if fused is Shifted else Faithful)
    assert type(choose.sweep_for(parse("fp8-row").fit(w), codes, order, 1)) is Sweep
    assert type(choose.sweep_for(parse("int4-g16").fit(w.double()), codes, order, 1)) is Sweep


class Misplaced(GroupSweep):
    """A fused sweep with right codes under wrong scales."""

    def rounded(self, w: Tensor, factor: Tensor, nearby: Uniform) -> Rounded:
        found = super().rounded(w, factor, nearby)
        return found._replace(choice=(found.choice + 1) % len(nearby.scale))


@pytest.mark.parametrize("fused", [GroupSweep, Misplaced])
def test_a_fused_sweep_with_other_scales_refuses_itself(fused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("fewbit.methods.sweep.in_triton")
    monkeypatch.setattr(module, "FusedGroups", lambda *given: fused(*given), raising=False)
    monkeypatch.setitem(sys.modules, "fewbit.methods.sweep.in_triton", module)
    monkeypatch.setattr(choose, "_has_triton", lambda device: True)
    monkeypatch.setattr(choose, "_agreed", {})
    w = ordinary(24, 256)
    grids, codes = parse("q4_k").fit(w), torch.zeros(256, 24, dtype=torch.uint8)
    given = (grids, codes, torch.arange(256), grids.run)
    if fused is Misplaced:
        with pytest.warns(UserWarning, match=r"the fused kernel failed: \d+\.\d% of the values differ"):
            choose.sweep_for(*given)
    assert type(choose.sweep_for(*given)) is GroupSweep
    assert list(choose._agreed.values()) == [fused is GroupSweep]


def test_weights_that_read_the_same_input_share_one_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    made, factor = [], gptq.inverse_factor

    def counted(hessian: Tensor, order: Tensor, damp: float) -> tuple[Tensor | None, float]:
        made.append(hessian)
        return factor(hessian, order, damp)

    monkeypatch.setattr(gptq, "inverse_factor", counted)
    weights, schemes = [ordinary(n, 96, seed=n) for n in (8, 24, 16)], [parse("int4-g32"), parse("q4_0"), parse("nf4")]
    stats = stats_of(inputs(200, 96))
    together = GPTQ().quantize_alike(weights, schemes, stats)
    assert len(made) == 1
    for w, scheme, choice in zip(weights, schemes, together, strict=True):
        assert choice.weight.shape == tuple(w.shape)
        alone = GPTQ().quantize(w, scheme, stats).weight
        assert all(torch.equal(choice.weight.parts[name], part) for name, part in alone.parts.items())


def test_small_weights_are_quantized_as_one_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "_STACKING", ("cpu",))
    monkeypatch.setattr(gptq, "_STACK", 24 * 96)
    swept, once = [], gptq.feed_back

    def counted(w: Tensor, grids: Grids, inverse: Tensor, order: Tensor) -> tuple[Tensor, Grids]:
        swept.append(len(w))
        return once(w, grids, inverse, order)

    monkeypatch.setattr(gptq, "feed_back", counted)
    rows, specs = (8, 16, 8, 4, 4, 4), ("int4-g32", "int4-g32", "int4-g32", "q4_0", "nf4-b64-dq", "nf4-b64-dq")
    weights, schemes = [ordinary(n, 96, seed=i) for i, n in enumerate(rows)], [parse(spec) for spec in specs]
    stats = stats_of(inputs(200, 96))
    together = GPTQ().quantize_alike(weights, schemes, stats)
    assert swept == [24, 8, 4, 4, 4]
    for w, scheme, choice in zip(weights, schemes, together, strict=True):
        alone = GPTQ().quantize(w, scheme, stats).weight
        assert choice.weight.shape == tuple(w.shape)
        assert (choice.weight.dequantize() - alone.dequantize()).norm() <= 1e-3 * w.norm()


def test_weights_with_scales_of_their_own_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as q and fc1 of a parallel block: they read one input, but servers do not compute them as one matrix."""
    monkeypatch.setattr(gptq, "_STACKING", ("cpu",))
    weights = [ordinary(8, 64, seed=1) * 100, ordinary(8, 64, seed=2)]
    schemes = [parse("nvfp4").for_all([w]) for w in weights]
    stats = stats_of(inputs(200, 64))
    together = GPTQ().quantize_alike(weights, schemes, stats)
    for w, scheme, choice in zip(weights, schemes, together, strict=True):
        assert same_bytes(choice.weight.parts, GPTQ().quantize(w, scheme, stats).weight.parts)


def test_the_one_that_cannot_be_quantized_is_named() -> None:
    weights = [ordinary(8, 64), ordinary(8, 64), ordinary(8, 64)]
    weights[1][3, 5] = torch.nan
    assigned = [Assignment(module, (8, 64), parse("int4-g32"), GPTQ()) for module in ("q", "k", "v")]
    with pytest.raises(NumericsError, match=r"^k: a weight has NaN"):
        blocks.choose(assigned, weights, stats_of(inputs(128, 64)))


if __name__ == "__main__":
    print(json.dumps({spec: shares("cpu", spec, SWEPT[spec], n) for spec, n in IN_THE_INTERPRETER.items()}))
