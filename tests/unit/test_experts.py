"""Experts with linears of their own compute what transformers' fused experts compute."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import Interleave, WeightConverter

import fewbit
from fewbit.errors import FormatError, NumericsError
from fewbit.models import conversions, experts
from fewbit.models.linears import is_linear
from fewbit.pipeline import capture
from tests import architectures, models

# Gate and up one after the other; transposed, alternating, with biases; no gate; transposed; names of Mixtral.
LAYOUTS = ("qwen3_moe", "gpt_oss", "nemotron_h", "aria_text", "mixtral")


def fused_experts(kind: str) -> Any:
    """A random model of that type, whose experts are fused."""
    model = AutoModelForCausalLM.from_config(architectures.config(kind), dtype=torch.float32).eval()
    if kind == "aria_text" and not list(experts.fused_in(model)):
        pytest.skip("this version of transformers has another class of experts for Aria")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model


def routed(module: Any, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, chosen experts and their weights. No token chooses expert 1, one token chooses expert 2."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, 64, generator=generator)
    chosen = torch.tensor([[0, 3]] * (tokens - 1) + [[2, 3]])
    return hidden, chosen, torch.rand(tokens, 2, generator=generator)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_separate_experts_compute_what_fused_ones_do(kind: str) -> None:
    model = fused_experts(kind)
    apart = copy.deepcopy(model)
    experts.separate(apart)
    found = list(experts.fused_in(model))
    assert found
    assert not list(experts.fused_in(apart))
    for name, module in found:
        given = routed(module, 7)
        module.config._experts_implementation = "eager"
        with torch.no_grad():
            torch.testing.assert_close(apart.get_submodule(name)(*given), module(*given))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_experts_that_are_joined_again_are_as_before(kind: str) -> None:
    model = fused_experts(kind)
    again = copy.deepcopy(model)
    experts.separate(again)
    experts.join(again)
    assert [type(module) for module in again.modules()] == [type(module) for module in model.modules()]
    before, after = model.state_dict(), again.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_each_weight_of_an_expert_is_a_linear_of_its_own(kind: str) -> None:
    model = fused_experts(kind)
    before = sum(p.numel() for p in model.parameters())
    experts.separate(model)
    assert sum(p.numel() for p in model.parameters()) == before
    name = next(name for name, m in model.named_modules() if isinstance(m, experts.SeparateExperts))
    linears = {n.removeprefix(f"{name}.") for n, m in model.named_modules() if n.startswith(name) and is_linear(m)}
    leaves = {"nemotron_h": ("up_proj", "down_proj"), "mixtral": ("w1", "w2", "w3")}
    wanted = leaves.get(kind, ("gate_proj", "up_proj", "down_proj"))
    count = 8 if kind == "aria_text" else 4
    assert linears == {f"{expert}.{leaf}" for expert in range(count) for leaf in wanted}


def test_tokens_that_choose_no_expert_count_nothing() -> None:
    model = fused_experts("qwen3_moe")
    experts.separate(model)
    module = next(m for m in model.modules() if isinstance(m, experts.SeparateExperts))
    hidden, _, weights = routed(module, 3)
    with torch.no_grad():
        assert not module(hidden, torch.full((3, 2), module.count), weights).any()
        both = module(hidden, torch.tensor([[0, 4], [4, 0], [4, 4]]), weights)
        alone = module.run(0, hidden)
    torch.testing.assert_close(both[0], alone[0] * weights[0, 0])
    torch.testing.assert_close(both[1], alone[1] * weights[1, 1])
    assert not both[2].any()


def test_gradients_reach_each_expert_that_was_chosen() -> None:
    model = fused_experts("qwen3_moe")
    experts.separate(model)
    module: Any = next(m for m in model.modules() if isinstance(m, experts.SeparateExperts))
    hidden, chosen, weights = routed(module, 5)
    module(hidden, chosen, weights).sum().backward()
    reached = [expert for expert in range(4) if module.get_submodule(str(expert)).up_proj.weight.grad is not None]
    assert reached == [0, 2, 3]


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.5


class Written(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        bias: Tensor | None = self.bias
        return x @ self.weight.T if bias is None else x @ self.weight.T + bias


class Grouped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.unflatten(-1, (3, -1)), self.weight)


@pytest.mark.parametrize(
    ("module", "linear"),
    [
        (nn.Linear(8, 4), True),
        (Written(8, 4), True),
        (Written(8, 4, bias=False, device="meta"), True),
        (Scaled(8, 4), False),
        (Grouped(8, 4), False),
        (nn.Embedding(8, 4), False),
    ],
)
def test_a_subclass_is_a_linear_if_it_computes_like_one(module: nn.Module, linear: bool) -> None:
    assert is_linear(module) is linear


@pytest.mark.parametrize("count", [3, 5])
def test_a_fused_tensor_with_another_number_of_experts(count: int, tmp_path: Path) -> None:
    folder = architectures.save(tmp_path, "gpt_oss")
    file, key = folder / "model.safetensors", "model.layers.0.mlp.experts.down_proj"
    tensors = load_file(file)
    own = tensors[key]
    save_file({**tensors, key: own.repeat(2, 1, 1)[:count].contiguous()}, file, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=rf"{key} has shape \[{count}, .*must be 4, the number of experts"):
        fewbit.quantize(folder, tmp_path / "out", plan="nf4", device="cpu")


# Experts that get every token, one linear each, and experts that do nothing.
@pytest.mark.parametrize("kind", ["inkling_text", "jetmoe", "llama4_text", "longcat_flash"])
def test_layers_that_call_experts_otherwise_compute_the_same(kind: str) -> None:
    model = fused_experts(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.arange(3, 40)[None]
    wanted = models.logits(model, ids)
    assert list(experts.fused_in(model))
    experts.separate(model)
    assert not list(experts.fused_in(model))
    # Inkling's shared experts make 0.2 % of these logits.
    assert (models.logits(model, ids) - wanted).norm() <= 1e-5 * wanted.norm()
    experts.join(model)
    torch.testing.assert_close(models.logits(model, ids), wanted)
    assert model.state_dict().keys() == before.keys()


def test_fused_experts_that_transformers_converts_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of Inkling's have rows of gate and up in turn."""
    folder = architectures.save(tmp_path / "model", "inkling_text")
    fewbit.quantize(folder, tmp_path / "plain", plan="nf4", device="cpu")
    conversion = WeightConverter(["mlp.experts.w13"], ["mlp.experts.gate_up_proj"], [Interleave(dim=1)])
    file = folder / "model.safetensors"
    stored = {
        name.replace("gate_up_proj", "w13"): Interleave(dim=1, inverse=True).convert({name: own}, [name], [name])[name]
        if name.endswith("mlp.experts.gate_up_proj")
        else own
        for name, own in load_file(file).items()
    }
    save_file(stored, file, metadata={"format": "pt"})
    monkeypatch.setattr(conversions, "get_model_conversion_mapping", lambda model: [conversion])
    fewbit.quantize(folder, tmp_path / "converted", plan="nf4", device="cpu")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "converted"))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


DOWN = "model.layers.1.mlp.experts"


@pytest.mark.parametrize(
    ("kind", "key", "change", "words"),
    [
        (
            "gpt_oss",
            f"{DOWN}.down_proj",
            None,
            rf"4 tensors are missing, the first is {DOWN}.0.down_proj.weight \({DOWN}.down_proj, which could hold it",
        ),
        ("qwen3_moe", f"{DOWN}.2.down_proj.weight", None, rf"the tensor {DOWN}.2.down_proj.weight is missing"),
        (
            "gpt_oss",
            f"{DOWN}.down_proj",
            lambda fused: fused[:, :5],
            rf"{DOWN}.0.down_proj.weight \(a part of {DOWN}.down_proj\) has shape \[64, 5\], config.json requires",
        ),
        (
            "qwen3_moe",
            f"{DOWN}.2.down_proj.weight",
            lambda own: own[:3],
            rf"{DOWN}.2.down_proj.weight has shape \[3, 32\], config.json requires \[64, 32\]",
        ),
        # transformers converts other tensors of these types, which does not make this one's shape right.
        ("sarvam_moe", f"{DOWN}.2.down_proj.weight", lambda own: own[:3], r"has shape \[3, 32\], config.json requires"),
        ("sarvam_moe", "model.layers.0.attention.query_key_value.weight", lambda own: own[:3], "cannot be split"),
    ],
)
def test_a_missing_or_misshapen_expert_is_named(kind: str, key: str, change: Any, words: str, tmp_path: Path) -> None:
    folder = architectures.save(tmp_path, kind)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    own = tensors.pop(key)
    tensors |= {key: change(own).contiguous()} if change else {}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=words):
        fewbit.preview(folder, plan="nf4")


@pytest.mark.parametrize(
    ("kind", "key"), [("gpt_oss", f"{DOWN}.down_proj"), ("qwen3_moe", "model.layers.1.mlp.gate.weight")]
)
def test_nan_in_an_expert_or_a_router_is_named(kind: str, key: str, tmp_path: Path) -> None:
    folder = architectures.save(tmp_path, kind)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[key][2, 3] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    named = rf"{DOWN}.2.down_proj.weight \(a part of {key}\)" if kind == "gpt_oss" else key
    with pytest.raises(NumericsError, match=rf"^{named} has NaN or Inf"):
        fewbit.preview(folder, plan="nf4")


def test_awq_scales_an_expert_that_some_windows_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "_TOKENS_AT_ONCE", 1)  # one window in a batch
    folder = architectures.save(tmp_path / "model", "qwen3_moe")
    calibration = fewbit.Calibration([models.sentences(60)], samples=16, length=1)
    fewbit.quantize(folder, tmp_path / "out", plan="awq-4bit", calibration=calibration, device="cpu")
    record = json.loads((tmp_path / "out" / "fewbit.json").read_text("utf-8"))
    assert not any("calibration input reached" in note for tensor in record["tensors"] for note in tensor["notes"])


def test_awq_does_not_scale_an_expert_without_tokens(tmp_path: Path) -> None:
    folder = architectures.save(tmp_path / "model", "qwen3_moe")
    calibration = fewbit.Calibration([models.sentences(60)], samples=1, length=1)
    fewbit.quantize(folder, tmp_path / "out", plan="awq-4bit", calibration=calibration, device="cpu")
    record = json.loads((tmp_path / "out" / "fewbit.json").read_text("utf-8"))
    unreached = [t["module"] for t in record["tensors"] if any("no finite calibration" in n for n in t["notes"])]
    assert unreached
    assert all(experts.is_of_expert(name) and name.endswith("down_proj") for name in unreached)
