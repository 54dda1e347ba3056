"""The sweep gives the Fisher information that autograd gives on the whole model with the same sampled labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fewbit.methods.base import Method
from fewbit.methods.rtn import RoundToNearest
from fewbit.models import experts, on_text
from fewbit.models.skeleton import Skeleton
from fewbit.models.source import locate
from fewbit.pipeline import costs
from fewbit.pipeline.divergence import nats_between
from fewbit.pipeline.fisher import Scores, Sweep, fishers, sampled
from fewbit.pipeline.settled import Settled
from fewbit.plans.plan import Plan, Rule
from fewbit.schemes.base import chunk_rows, parse
from fewbit.system import files
from tests import architectures
from tests import models as tiny_models

WINDOWS, LENGTH = 5, 24


def tokens(vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(1))


def swept(skeleton: Skeleton, ids: Tensor, clip: float) -> tuple[dict[str, Any], list[Tensor], list[Tensor]]:
    """Linear -> its Fisher information; the gradients at the first block's input; the labels' uniform draws."""
    sweep, found = Sweep(skeleton, ids), dict[str, Any]()
    with on_text.ending(skeleton) as end:
        sweep.start(end)
    for name in reversed(skeleton.blocks):
        with sweep.block(name) as block:
            scores = sweep.backward(block, list(skeleton.linears(name)))
            found |= fishers(block, {n: s for n, s in scores.items() if s.of_rows}, clip)
    return found, sweep.gradient, sweep.batches


def by_autograd(folder: Path, ids: list[Tensor], clip: float) -> tuple[dict[str, tuple[Tensor, Tensor]], list[Tensor]]:
    """The definition, on the whole model in float64: linear -> (H, r); and the gradients at the first block's input."""
    model = tiny_models.original(folder, torch.float64)
    experts.separate(model)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    entered: list[Tensor] = []

    def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        entered.append(args[0].detach().requires_grad_())
        return (entered[-1].clone(), *args[1:])

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            output.register_hook(lambda g: seen.setdefault(name, []).append((args[0].detach(), g.detach())))

        return hook

    blocks[0].register_forward_pre_hook(enter)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            module.register_forward_hook(watch(name))
    generator = torch.Generator().manual_seed(0)
    for batch in ids:
        logits = model(input_ids=batch, use_cache=False).logits
        chosen = sampled(logits.detach(), generator)
        (-logits.log_softmax(-1).gather(-1, chosen.unsqueeze(-1)).sum()).backward()
    found = {}
    for name, pairs in seen.items():
        x = torch.cat([x.reshape(-1, x.shape[-1]) for x, _ in pairs])
        g = torch.cat([g.reshape(-1, g.shape[-1]) for _, g in pairs]).square()
        s = g.mean(1)
        s = s.clamp(max=float(s.sort().values[-(-int(clip * 1000) * len(s) // 1000) - 1]))
        found[name] = torch.einsum("t,ti,tj->ij", s, x, x), g.sum(0) / g.sum(0).mean()
    return found, [each.grad for each in entered if each.grad is not None]


def check(folder: Path, clip: float) -> dict[str, Any]:
    skeleton = Skeleton(locate(folder), torch.float64, torch.device("cpu"))
    ids = tokens(skeleton.config.vocab_size)
    found, gradients, batches = swept(skeleton, ids, clip)
    expected, entered = by_autograd(folder, batches, clip)
    assert found.keys() == expected.keys()
    for name, (hessian, rows) in expected.items():
        torch.testing.assert_close(found[name].hessian, hessian, rtol=1e-5, atol=1e-7 * float(hessian.abs().max()))
        torch.testing.assert_close(found[name].rows, rows, rtol=1e-5, atol=1e-7)
    for ours, theirs in zip(gradients, entered, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-9)
    return found


def test_a_cost_is_the_divergence_to_second_order(tmp_path: Path) -> None:
    folder = tiny_models.save(tmp_path / "m", "qwen3", dtype="float32")
    skeleton = Skeleton(locate(folder), torch.float64, torch.device("cpu"))
    settled = Settled.of(skeleton, Plan("p", "gptq", (Rule("*", "int4-g32-sym", "rtn"),)))
    ids = tokens(skeleton.config.vocab_size)
    options = costs.widths(settled)
    assert {str(each) for each in options["model.layers.0.mlp.up_proj"]} == {f"int{b}-g32-sym" for b in (2, 3, 4, 8)}
    found = costs.measured(settled, options, ids, None, lambda done, total: None)
    expected, _ = by_autograd(folder, list(Sweep(skeleton, ids).batches), 0.999)
    for name, (hessian, rows) in expected.items():
        weight = tiny_models.linear_weight(tiny_models.original(folder).get_submodule(name))
        for scheme in options[name]:
            error = (Method.quantize(RoundToNearest(), weight, scheme, None).weight.dequantize() - weight).double()
            cost = 0.5 * float((rows * ((error @ hessian) * error).sum(1)).sum()) / ids.numel()
            assert found.of[name][str(scheme)] == pytest.approx(cost, rel=1e-5)
    layer = "model.layers.1."
    together = {name: unit for name, unit in found.units.items() if name.startswith(layer)}
    assert together == {
        **{f"{layer}self_attn.{leaf}_proj": f"{layer}self_attn.q_proj" for leaf in "qkv"},
        **{f"{layer}mlp.{leaf}_proj": f"{layer}mlp.gate_proj" for leaf in ("gate", "up")},
        **{f"{layer}{name}": f"{layer}{name}" for name in ("self_attn.o_proj", "mlp.down_proj")},
    }


def test_a_heads_cost_is_the_divergence_of_the_logits(tmp_path: Path) -> None:
    folder = tiny_models.save(tmp_path / "m", "qwen2", dtype="float32")
    skeleton = Skeleton(locate(folder), torch.float32, torch.device("cpu"))
    settled = Settled.of(skeleton, Plan("p", "gguf", (Rule("*", "q4_0", "rtn"),)))
    ids = tokens(skeleton.config.vocab_size)
    found = costs.measured(settled, costs.widths(settled), ids, None, lambda done, total: None)
    model = tiny_models.original(folder)
    exact = tiny_models.logits(model, ids).double().log_softmax(-1)
    weight = model.lm_head.weight.clone()
    for spec in ("q4_0", "q8_0"):
        values = Method.quantize(RoundToNearest(), weight, parse(spec), None).weight.dequantize()
        other = tiny_models.logits(tiny_models.with_weights(model, {"lm_head": values}), ids).double().log_softmax(-1)
        cost = float((exact.exp() * (exact - other)).sum()) / ids.numel()
        assert found.of["lm_head"][spec] == pytest.approx(cost, rel=1e-3)
    embedded = found.of["model.embed_tokens"]
    assert 0 < embedded["q8_0"] < embedded["q5_0"] < embedded["q4_0"]
    assert all(name == unit for name, unit in found.units.items())  # llama.cpp computes each tensor by itself


def test_a_large_heads_cost_is_that_of_some_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_models.save(tmp_path / "m", "qwen2", dtype="float32")
    skeleton = Skeleton(locate(folder), torch.float32, torch.device("cpu"))
    settled = Settled.of(skeleton, Plan("p", "gguf", (Rule("lm_head", "q4_0", "rtn"),)))
    ids, options = tokens(skeleton.config.vocab_size), costs.widths(settled)
    monkeypatch.setattr("fewbit.pipeline.fisher.LOGITS", LENGTH * skeleton.config.vocab_size)  # one window at a time
    monkeypatch.setattr(costs, "_TOKENS_OF_HEAD", LENGTH + 1)
    some = costs.measured(settled, options, ids, None, lambda done, total: None).of["lm_head"]
    alone = costs.measured(settled, options, ids[:2], None, lambda done, total: None).of["lm_head"]
    assert some == pytest.approx(alone, rel=1e-6)


class Whole(TorchDispatchMode):
    """Counts the tensors of one shape in float32 that operations make."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += isinstance(out, Tensor) and out.dtype == torch.float32 and tuple(out.shape) == self.shape
        return out


def test_no_embedding_or_head_is_decoded_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of rows are decoded into one tensor of the model's dtype. The costs are those of whole weights."""
    folder = tiny_models.save(tmp_path / "m", "qwen2", dtype="bfloat16")
    skeleton = Skeleton(locate(folder), torch.bfloat16, torch.device("cpu"))
    settled = Settled.of(skeleton, Plan("p", "gguf", (Rule("*", "q4_0", "rtn"),)))
    rows, columns = skeleton.config.vocab_size, skeleton.config.hidden_size
    ids = torch.arange(rows // LENGTH * LENGTH).view(-1, LENGTH)
    options = {name: each for name, each in costs.widths(settled).items() if name in ("lm_head", "model.embed_tokens")}
    expected = costs.measured(settled, options, ids, None, lambda done, total: None)
    monkeypatch.setattr(costs, "chunk_rows", lambda n, k, budget, multiple: chunk_rows(n, k, 32 * k, multiple))
    with Whole((rows, columns)) as head, Whole((ids.numel(), columns)) as embedding:
        found = costs.measured(settled, options, ids, None, lambda done, total: None)
    assert found == expected
    assert (head.count, embedding.count) == (0, 0)


@pytest.mark.parametrize("spread", [1e-4, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nats_between_logits_are_their_divergence(spread: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(3, 100, 5000, generator=generator) * 3
    one, other = one.to(dtype), (one + spread * torch.randn(one.shape, generator=generator)).to(dtype)
    p, q = (each.double().log_softmax(-1) for each in (one, other))
    assert nats_between(one, other) == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4)


def test_the_experts_of_a_layer_are_one_unit(tmp_path: Path) -> None:
    folder = architectures.save(tmp_path / "m", "qwen3_moe")
    skeleton = Skeleton(locate(folder), torch.float32, torch.device("cpu"))
    settled = Settled.of(skeleton, Plan("p", "gptq", (Rule("*", "int4-g32-sym", "rtn"),)))
    ids = tokens(skeleton.config.vocab_size)
    found = costs.measured(settled, costs.widths(settled), ids, None, lambda done, total: None)
    names = [name for name in found.units if ".experts." in name]
    assert names
    assert {found.units[name] for name in names} == {f"{name.partition('.experts.')[0]}.experts" for name in names}


@pytest.mark.parametrize("clip", [1.0, 0.9])
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt-neox"])
def test_a_dense_model_has_the_fisher_of_autograd(tmp_path: Path, family: str, clip: float) -> None:
    check(tiny_models.save(tmp_path / "m", family, dtype="float32"), clip)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_experts_have_the_fisher_of_autograd(tmp_path: Path, kind: str) -> None:
    found = check(architectures.save(tmp_path / "m", kind), 1.0)
    assert any(".experts." in name for name in found)


def test_a_label_is_drawn_as_often_as_it_is_likely() -> None:
    p = torch.tensor([0.0, 0.5, 0.2, 0.3, 0.0], dtype=torch.float64)
    drawn = sampled(p.log().expand(20000, 5), torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=5) / 20000
    torch.testing.assert_close(share, p.float(), rtol=0, atol=0.012)
    assert share[0] == share[4] == 0


def test_the_limit_is_a_quantile_of_all_calls() -> None:
    scores = Scores([torch.arange(1.0, 501.0), torch.arange(501.0, 1001.0)])
    assert scores.limit(0.999) == 999.0
    assert scores.limit(1.0) == float("inf")


def test_two_processes_may_keep_the_same_number(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one writes and renames its file between the two steps of this one."""
    others, write = [0.25], files.write_text

    def interrupted(place: Path, text: str) -> None:
        write(place, text)
        if others:
            other = others.pop()
            assert costs.kept("key", "llama", lambda: other) == other

    monkeypatch.setattr(files, "write_text", interrupted)
    assert costs.kept("key", "llama", lambda: 0.5) == 0.5
    assert costs.kept("key", "llama", lambda: 0.75) == 0.5
    kept = [each.suffix for each in (own_cache / "costs").iterdir() if not each.name.startswith(".")]
    assert kept == [".json"]
