"""Targets of the original model: the shift is its definition, in every stage and for experts, and GPTQ uses it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewbit
from fewbit.methods.base import make
from fewbit.methods.gptq import GPTQ
from fewbit.methods.targets import moved
from fewbit.models.source import locate
from fewbit.pipeline import blocks, capture, original
from fewbit.pipeline.capture import Block, Inputs, gather, original_of
from fewbit.pipeline.job import Job
from fewbit.pipeline.run import Run
from fewbit.pipeline.staged import add_shifts, staged
from fewbit.plans.plan import find
from fewbit.schemes.base import parse
from fewbit.stats import Need, Shift, Stats
from fewbit.texts.calibration import Calibration
from tests import architectures, models
from tests.contract.cases import inputs, ordinary

pytestmark = pytest.mark.filterwarnings("default")  # models warn about their own tiny configs
LAYER = "model.layers.1"
EXPERTS = f"{LAYER}.mlp.experts"
WINDOWS, LENGTH = 9, 8  # window 7 is held out


def shift_of(original: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """By definition, in float64."""
    original, x, weight = original.double(), x.double(), weight.double()
    return ((original - x).T * weight) @ ((original + x) / 2) / weight.sum()


def rows_for(k: int, count: int = 60) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of the original model, of the quantized one, their weights, and which are held out."""
    x = inputs(count, k)
    return x + 0.1 * inputs(count + 1, k)[1:], x, torch.linspace(0.5, 2, count), torch.arange(count) % 8 == 7


@pytest.mark.parametrize("k", [12, 200])
def test_the_shift_is_its_definition(k: int) -> None:
    before, x, weight, held = rows_for(k)
    stats = Stats(k, Need.SHIFT)
    for part in torch.arange(60).split(17):
        stats.add_shift(x[part], before[part], held[part], weight[part])
        assert stats.shift is not None or part[0] == 0
    assert stats.shift is not None
    middle, own = ((before + x) / 2)[~held].double(), weight[~held].double()
    torch.testing.assert_close(stats.shift.middle.double(), (middle.T * own) @ middle / own.sum(), rtol=1e-4, atol=1e-5)
    for found, rows in ((stats.shift.fit, ~held), (stats.shift.held_out, held)):
        wanted = shift_of(before[rows], x[rows], weight[rows])
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-7)
    scales = torch.linspace(0.5, 2, k)
    divided = stats.divided(scales).shift
    assert divided is not None
    wanted = shift_of(before[~held] / scales, x[~held] / scales, weight[~held])
    torch.testing.assert_close(divided.fit.double(), wanted, rtol=1e-4, atol=1e-7)


def test_rows_that_are_not_finite_are_left_out_of_the_shift() -> None:
    before, x, weight, held = rows_for(12)
    before[3] = torch.nan
    stats = Stats(12, Need.SHIFT)
    x[5, 2] = torch.inf
    stats.add_shift(x, before, held, weight)
    rows = ~held & (torch.arange(60) != 3) & (torch.arange(60) != 5)
    assert stats.shift is not None
    wanted = shift_of(before[rows], x[rows], weight[rows])
    torch.testing.assert_close(stats.shift.fit.double(), wanted, rtol=1e-4, atol=1e-7)
    assert Stats(12, Need.SHIFT).shift is None


def test_the_target_is_its_formula() -> None:
    before, x, weight, held = rows_for(12)
    stats = Stats(12, Need.SHIFT)
    stats.add(x, weight)
    stats.add_shift(x, before, held, weight)
    assert stats.shift is not None
    middle = (before[~held] + x[~held]) / 2
    torch.testing.assert_close(stats.shift.middle, (middle.T * weight[~held]) @ middle / weight[~held].sum())
    w = ordinary(5, 12)
    damped = stats.shift.middle + 0.01 * stats.shift.middle.diagonal().mean() * torch.eye(12)
    step = w @ stats.shift.fit @ damped.inverse()
    ((found, strength),) = moved([w], stats.shift, [0.5], 0.01)
    best = float(((w @ stats.shift.held_out) * step).sum() / ((w @ stats.shift.fit) * step).sum())
    assert strength == pytest.approx(0.5 * min(max(best, 0), 1), rel=1e-4)
    torch.testing.assert_close(found, w + strength * step, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("sign", "strength"), [(1.0, 0.5), (0.5, 0.25), (2.0, 0.5), (-1.0, 0.0), (0.0, 0.0)])
def test_held_out_windows_decide_the_strength(sign: float, strength: float) -> None:
    fit, w = inputs(8, 8), ordinary(5, 8)
    ((_, found),) = moved([w], Shift(fit, sign * fit, torch.eye(8)), [0.5], 0.0)
    assert found == pytest.approx(strength)
    assert torch.equal(moved([w], Shift(0 * fit, fit, torch.eye(8)), [0.5], 0.01)[0][0], w)
    assert moved([w], Shift(fit, fit, torch.full((8, 8), torch.nan)), [0.5], 0.01)[0][1] == 0


def test_a_shift_that_the_hessian_does_not_show_is_bounded() -> None:
    """The quantized model reads other directions in a stage than in the pass that measured the Hessian."""
    x, weight, held = inputs(800, 12), torch.ones(800), torch.arange(800) % 8 == 7
    stats = Stats(12, Need.SHIFT)
    stats.add(x * torch.tensor([1.0] * 11 + [1e-4]), weight)
    stats.add_shift(x, x @ (torch.eye(12) * 1.1), held, weight)
    assert stats.shift is not None
    w = ordinary(5, 12)
    ((found, _),) = moved([w], stats.shift, [1.0], 0.01)
    assert (found - w).norm() < 0.2 * w.norm()


@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_corrects_the_error_of_its_input(act_order: bool) -> None:
    """The outputs are closer to those of the original model, and the codes are those of the target."""
    _, x, weight, held = rows_for(32, 4000)
    before = x @ (torch.eye(32) + 0.1 * inputs(32, 32) / 32**0.5)
    stats = Stats(32, Need.SHIFT)
    stats.add(x, weight)
    stats.add_shift(x, before, held, weight)
    w, scheme = ordinary(8, 32), parse("int4-g16-sym")
    errors = []
    for target in (0.0, 0.5, 1.0):
        choice = GPTQ(target=target, act_order=act_order).quantize(w, scheme, stats)
        assert choice.target == (None if target == 0 else pytest.approx(target, rel=0.2))
        errors.append(float((before @ w.T - x @ choice.weight.dequantize().T).square().mean()))
    assert errors[0] > 1.2 * errors[1] > 1.2 * errors[2]
    assert stats.shift is not None
    ((wanted, _),) = moved([w], stats.shift, [0.5], 0.01)
    codes = GPTQ(target=0, act_order=act_order).quantize(wanted, scheme, stats).weight
    found = GPTQ(target=0.5, act_order=act_order).quantize(w, scheme, stats).weight
    assert (codes.dequantize() - found.dequantize()).norm() < 1e-3 * codes.dequantize().norm()


@pytest.mark.parametrize("method", ["gptq", "awq+gptq"])
@pytest.mark.parametrize(
    ("scheme", "options", "need"),
    [
        ("int4-g128", {"target": "0"}, Need.HESSIAN),
        ("int8-row-sym", {"target": "0.5"}, Need.SHIFT),
        ("int2-g64-sym", {"target": "0.5"}, Need.SHIFT),
        ("int2-g64-sym", {}, Need.HESSIAN),  # by default, a target only where it measured better
        ("q2_k", {}, Need.HESSIAN),
        ("int3-row-sym", {}, Need.SHIFT),
        ("q3_k", {}, Need.SHIFT),
        ("nvfp4", {}, Need.SHIFT),
        ("q6_k", {}, Need.SHIFT),
        ("int8-g64-sym", {}, Need.HESSIAN),
    ],
)
def test_only_a_target_needs_the_shift(method: str, scheme: str, options: dict[str, str], need: Need) -> None:
    assert make(method, options).needs == Need.HESSIAN
    assert make(method, options).need(parse(scheme)) == need


def test_weights_of_one_input_have_targets_of_their_own() -> None:
    w = ordinary(8, 64)
    fit = 0.1 * torch.eye(64)
    shift = Shift(fit, fit, torch.eye(64))
    (whole, alpha), (same, zero) = moved([w, w], shift, [1.0, 0.0], 0.0)
    assert alpha == pytest.approx(1.0)
    assert torch.allclose(whole, 1.1 * w)
    assert torch.equal(same, w)
    assert zero == 0


def test_a_target_is_a_share() -> None:
    with pytest.raises(fewbit.PlanError, match=r"`target`: '1.5' is not a share"):
        make("gptq", {"target": "1.5"})


def spoil(weight: Tensor) -> None:
    """Change a weight, as quantization would."""
    generator = torch.Generator().manual_seed(weight.numel())
    weight.add_(0.1 * weight.std() * torch.randn(weight.shape, generator=generator))


@contextmanager
def second_block(folder: Path, kind: str) -> Iterator[tuple[Block, list[Tensor]]]:
    """The second block after a first one that lost something, and the original model's states at its input."""
    skeleton = Job.prepare(locate(architectures.save(folder, kind)), find("gptq-4bit"), "cpu").settled.skeleton
    tokens = torch.randint(0, 200, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))
    taken = Inputs(tokens, tokens_at_once=2 * LENGTH)
    hidden, calls = capture.captured(skeleton, taken)
    states = original_of(taken, hidden)
    first, second = skeleton.blocks[:2]
    with skeleton.materialized(first) as module:
        block = Block(skeleton, first, module, calls[first], hidden, states)
        states.advance(skeleton, block.run)
        for name in skeleton.linears(first):
            spoil(skeleton.weight(name))
        block.replay()
    with skeleton.materialized(second) as module:
        yield Block(skeleton, second, module, calls[second], hidden, states), list(states.states)


def read_by(block: Block, states: list[Tensor], names: list[str]) -> dict[str, Tensor]:
    """Linear or module -> what it reads when the block runs on the states, rows of all batches."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    modules = {name: block.skeleton.model.get_submodule(name) for name in names}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].flatten(0, -2)))
        for name, module in modules.items()
    ]
    with torch.no_grad():
        for batch, each in enumerate(states):
            block.run(batch, each)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in seen.items() if rows}


def check_shift(stats: Stats, before: Tensor, x: Tensor, weight: Tensor, held: Tensor) -> None:
    assert stats.shift is not None
    for found, rows in ((stats.shift.fit, ~held), (stats.shift.held_out, held)):
        wanted = shift_of(before[rows], x[rows], weight[rows])
        assert (found.double() - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("room", [1 << 30, 40_000, 0])
@pytest.mark.parametrize(("stages", "count"), [(None, 3), ((), 4)])
def test_stages_compare_with_the_original_model(
    stages: tuple[tuple[str, ...], ...] | None, count: int, room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether there is room for what the original model's linears read and for all statistics, for one, or for none."""
    with second_block(tmp_path, "llama") as (block, states):
        monkeypatch.setattr(capture, "room_for_statistics", lambda _: room)
        names = list(block.skeleton.linears(LAYER))
        before, unquantized = read_by(block, states, names), read_by(block, block.hidden, names)
        with torch.no_grad():
            after = [block.run(batch, each) for batch, each in enumerate(states)]
        assert block.original is not None
        weight = torch.cat([each.norm(dim=-1).flatten() for each in block.hidden])
        held = torch.arange(WINDOWS).repeat_interleave(LENGTH) == 7
        found, number = list[str](), 0
        for stage in staged(block, dict.fromkeys(names, Need.SHIFT), stages):
            number += 1
            own = list[str]()
            for stats in stage:
                own += stats
                x = read_by(block, block.hidden, list(stats))
                for name in stats:
                    check_shift(stats[name], before[name], x[name], weight, held)
                    rows = unquantized[name] if stages is None else x[name]
                    torch.testing.assert_close(stats[name].hessian, (rows.T * weight) @ rows / weight.sum())
            block.original.keep_weights(block.skeleton, own)
            for name in own:
                spoil(block.skeleton.weight(name))
            found += own
        assert (number, sorted(found)) == (count, sorted(names))
        quantized = {name: block.skeleton.weight(name).clone() for name in names}
        block.replay()
        assert all(torch.equal(one, other) for one, other in zip(block.original.states, after, strict=True))
        assert all(torch.equal(block.skeleton.weight(name), w) for name, w in quantized.items())


def test_experts_compare_on_the_tokens_of_the_quantized_model(tmp_path: Path) -> None:
    with second_block(tmp_path, "qwen3_moe") as (block, states):
        experts: Any = block.skeleton.model.get_submodule(EXPERTS)
        seen: list[tuple[Tensor, ...]] = []
        handle = experts.register_forward_pre_hook(lambda _, args: seen.append(args))
        read_by(block, states, [])
        before = torch.cat([args[0] for args in seen])
        seen.clear()
        read_by(block, block.hidden, [])
        handle.remove()
        x, chosen = torch.cat([args[0] for args in seen]), torch.cat([args[1] for args in seen])
        weights = torch.cat([each.norm(dim=-1).flatten() for each in block.hidden])
        held = torch.arange(WINDOWS).repeat_interleave(LENGTH) == 7
        stats = gather(block, dict.fromkeys(block.skeleton.linears(LAYER), Need.HESSIAN))
        add_shifts(block, stats)
        checked = 0
        for expert in range(experts.count):
            rows = (chosen == expert).any(1)
            up, down = (stats[f"{EXPERTS}.{expert}.{leaf}"] for leaf in ("up_proj", "down_proj"))
            if up.shift is None:  # no token, or none that is held out
                assert not (rows & held).any()
                continue
            checked += 1
            check_shift(up, before[rows], x[rows], weights[rows], held[rows])
            assert down.shift is None
        assert checked


def test_the_kept_stream_is_the_original_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a whole run, block by block; and a plan without a target keeps none."""
    seen: list[list[Tensor] | None] = []
    quantize = blocks._quantize_block

    def watched(settled: Any, block: Block, inputs: Inputs, tuning: Any) -> Any:
        seen.append(None if block.original is None else list(block.original.states))
        return quantize(settled, block, inputs, tuning)

    monkeypatch.setattr(blocks, "_quantize_block", watched)
    folder = models.save(tmp_path / "model", "llama", num_hidden_layers=3)
    tokens = torch.randint(0, 200, (6, 16), generator=torch.Generator().manual_seed(0))
    for target, kind in (("0.5", "gptq"), ("0.5", "awq+gptq"), ("0", "gptq")):
        plan = find("gptq-4bit").changed(method=kind, options={"target": target})
        job = Job.prepare(locate(folder), plan, "cpu")
        seen.clear()
        with Run(f"target-{target}-{kind}", "llama", "blocks") as run:
            blocks.quantize_blocks(job.settled, Inputs(tokens), run, lambda step: None)
        if target == "0":
            assert seen == [None] * 3
            continue
        model = fewbit.load(folder, device="cpu").float()
        with torch.no_grad():
            states = model(tokens, output_hidden_states=True).hidden_states[:3]
        for own, wanted in zip(seen, states, strict=True):
            assert own is not None
            torch.testing.assert_close(torch.cat(own), wanted, rtol=1e-4, atol=1e-5)


def test_every_eighth_window_is_held_out_whatever_the_batches() -> None:
    for cut in ([16], [3, 13], [8, 8]):
        starts = [sum(cut[:i]) for i in range(len(cut))]
        windows = [range(start, start + size) for start, size in zip(starts, cut, strict=True)]
        states = original.Original([torch.zeros(size, 4, 2) for size in cut], windows, 16)
        found = [states.held_out(i, torch.arange(4 * size), 4 * size) for i, size in enumerate(cut)]
        assert torch.cat([each for each in found if each is not None]).view(16, 4).all(
            1
        ).nonzero().flatten().tolist() == [7, 15]
    few = original.Original([torch.zeros(2, 4, 2)], [range(2)], 2)
    held = few.held_out(0, torch.arange(8), 8)
    assert held is not None
    assert held.tolist() == [False] * 4 + [True] * 4
    assert few.held_out(0, torch.arange(7), 7) is None


def test_a_resumed_run_writes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a rewrite (AWQ) too, whose blocks compute the same up to rounding."""
    folder = models.save(tmp_path / "model", "llama", num_hidden_layers=4)
    text = tmp_path / "text.txt"
    text.write_text(models.sentences(300), encoding="utf-8")
    wanted = Calibration(str(text), samples=6, length=32, seed=1)
    plan = find("gptq-4bit").changed(method="awq+gptq", options={"target": "0.5"})

    def stop(step: Any) -> None:
        if step.done == 2:
            raise KeyboardInterrupt

    monkeypatch.setenv("FEWBIT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(KeyboardInterrupt):
        fewbit.quantize(folder, tmp_path / "out", plan=plan, calibration=wanted, progress=stop)
    resumed: list[bool] = []
    fewbit.quantize(
        folder, tmp_path / "out", plan=plan, calibration=wanted, progress=lambda step: resumed.append(step.resumed)
    )
    assert any(resumed)
    monkeypatch.setenv("FEWBIT_CACHE", str(tmp_path / "another"))
    fewbit.quantize(folder, tmp_path / "straight", plan=plan, calibration=wanted)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "straight"))
    assert one == other
