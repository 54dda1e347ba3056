"""The sweep gives the Fisher information that autograd gives on the whole model with the same sampled labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbit.models import experts, on_text
from fewbit.models.skeleton import Skeleton
from fewbit.models.source import locate
from fewbit.pipeline.fisher import Scores, Sweep, fishers, sampled
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
    for module in model.modules():  # `separate` makes its linears on the meta device
        assert not any(p.is_meta for p in module.parameters(recurse=False))
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
