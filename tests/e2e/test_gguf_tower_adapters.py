"""Adapters of a language model, and of a whole model, beside a vision tower from a GGUF file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("PIL")
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from PIL import Image
from transformers import AutoModelForCausalLM

import fewbit as package
from fewbit.errors import PlanError
from fewbit.models.adapters.attach import quiet
from fewbit.models.adapters.tuning import Tuning
from tests import architectures, mmproj_files, models
from tests.e2e.conftest import Fewbit
from tests.e2e.test_gguf_adapters import drawn
from tests.e2e.test_gguf_towers import Files, made

IDS = torch.randint(3, 200, (1, 12), generator=torch.Generator().manual_seed(0))
EXACT: dict[str, Any] = {"dtype": "float32", "device": "cpu"}
OTHERS = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {r"layers\.0\.self_attn\.k_proj": 20}}


def near(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one - other).norm() / other.norm()) < 1e-5


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_vl", "llama4"])
def test_a_language_models_adapter_beside_a_tower(kind: str, tmp_path: Path) -> None:
    files = made(tmp_path, kind)
    alone = tmp_path / "text-text"  # the language model as a folder
    adapter = drawn(alone, tmp_path / "adapter", target_modules=["q_proj", "k_proj", "v_proj"], **OTHERS)
    package.convert(adapter, tmp_path / "lora.gguf", to="gguf", base=alone)
    wanted = models.logits(package.load(files.text, adapter=adapter, **EXACT), IDS)
    assert not near(models.logits(package.load(files.text, **EXACT), IDS), wanted)
    for each in (adapter, tmp_path / "lora.gguf"):
        loaded = package.load(files.text, mmproj=files.tower, adapter=each, **EXACT)
        named = {name.partition(".lora_A")[0] for name, _ in loaded.named_parameters() if ".lora_A" in name}
        place = f"base_model.model.{mmproj_files.row_of(kind).language}."
        assert named
        assert all(name.startswith(place) for name in named)
        assert near(models.logits(loaded, IDS), wanted)


def test_a_whole_models_adapter_beside_a_tower(tmp_path: Path) -> None:
    files = made(tmp_path, "gemma3")
    original = mmproj_files.original(files.folder)
    with quiet():
        adapted: Any = get_peft_model(original, LoraConfig(target_modules=["q_proj"], r=4))
    numbers = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=numbers)
    adapted.eval().save_pretrained(tmp_path / "adapter")
    given = mmproj_files.inputs("gemma3", original)
    loaded = package.load(files.text, mmproj=files.tower, adapter=tmp_path / "adapter", **EXACT)
    with torch.inference_mode():
        assert near(loaded(**given).logits, adapted(**given).logits)
    alone: dict[str, Any] = {"adapter": tmp_path / "adapter", "device": "cpu"}
    text: dict[str, Any] = {"text": [models.sentences(60)], "length": 32, "progress": False}
    out = tmp_path / "out.gguf"
    for verb in (
        lambda: package.generate(files.text, "Hi", **alone),
        lambda: package.evaluate(files.text, **text, **alone),
        lambda: package.merge(files.text, alone["adapter"], tmp_path / "out", progress=False),
        lambda: package.convert(alone["adapter"], out, to="gguf", base=files.text),
    ):
        with pytest.raises(PlanError, match="for a whole vision model, and this is its language model alone") as told:
            verb()
        assert "`mmproj`" in str(told.value)


_Q: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
_EVERY = {
    "ia3": IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": LoHaConfig(**_Q, r=4, rank_pattern={"v_proj": 2}),
    "lokr": LoKrConfig(**_Q, r=4),
    "vera": VeraConfig(target_modules=["q_proj", "o_proj"], r=4),
    "parameters": LoraConfig(**_Q, r=4, target_parameters=["mlp.down_proj.weight"]),
    "head": LoraConfig(target_modules=["q_proj", "lm_head"], r=4),
    "saved": LoraConfig(**_Q, r=4, modules_to_save=["norm"]),
}


def changed(folder: Path, out: Path, config: Any) -> Any:
    """The model of a folder with an adapter of random numbers, which is written to `out`."""
    with quiet():
        adapted: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config)
    numbers = torch.Generator().manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape, generator=numbers)
    adapted.eval().save_pretrained(out, save_embedding_layers=False)
    return adapted


@pytest.mark.parametrize("name", _EVERY)
def test_every_kind_of_adapter_beside_a_tower(name: str, tmp_path: Path) -> None:
    files = made(tmp_path, "qwen2_vl")
    adapted = changed(tmp_path / "text-text", tmp_path / "adapter", _EVERY[name])
    loaded = package.load(files.text, mmproj=files.tower, adapter=tmp_path / "adapter", **EXACT)
    assert near(models.logits(loaded, IDS), models.logits(adapted, IDS))
    trained = [each for each, _ in loaded.named_parameters() if "default" in each]
    assert trained
    assert not any(".visual." in each for each in trained)


_EXPERTS = [("qwen3_vl_moe", "q8_0"), ("qwen3_5_moe", "q8_0"), ("glm4v_moe", "q8_0"), ("llama4", "f32")]


@pytest.mark.parametrize(("kind", "scheme"), _EXPERTS)
def test_an_adapter_of_experts_beside_a_tower(kind: str, scheme: str, tmp_path: Path) -> None:
    """Trained on the language model alone, and as a file; and one step on an image, of the whole model."""
    files = made(tmp_path, kind, text=scheme)
    how: dict[str, Any] = {"length": 32, "batch": 4, "learning_rate": 0.02, "steps": 1, "rank": 4}
    tuning = Tuning(**how, targets=("gate_proj", "up_proj", "down_proj"))
    text = tmp_path / "text.txt"
    text.write_text(models.sentences(100), encoding="utf-8")
    given: dict[str, Any] = {"data": text, "tuning": tuning, "device": "cpu", "progress": False}
    package.finetune(files.text, tmp_path / "adapter", **given)
    package.convert(tmp_path / "adapter", tmp_path / "lora.gguf", to="gguf", base=files.text)
    before = models.logits(package.load(files.text, **EXACT), IDS)
    wanted = models.logits(package.load(files.text, adapter=tmp_path / "adapter", **EXACT), IDS)
    assert not near(before, wanted)
    for each in (tmp_path / "adapter", tmp_path / "lora.gguf"):
        loaded = package.load(files.text, mmproj=files.tower, adapter=each, **EXACT)
        place = re.escape(mmproj_files.row_of(kind).language)
        names = [name for name, _ in loaded.named_parameters() if ".lora_A" in name]
        assert any(re.match(rf"base_model\.model\.{place}\.layers\.1\..*experts\.3\.down_proj", name) for name in names)
        assert near(models.logits(loaded, IDS), wanted)

    whole = package.load(files.text, mmproj=files.tower, **EXACT)
    inputs = mmproj_files.inputs(kind, whole)
    with quiet():
        config = LoraConfig(target_modules=r".*experts\.\d+\.(gate|up|down)_proj", r=4, init_lora_weights=False)
        adapted: Any = get_peft_model(whole, config)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    adapted(**inputs).logits.square().mean().backward()
    assert sum(bool(parameter.grad.any()) for parameter in trained) > len(trained) / 2  # of experts that got tokens
    torch.optim.SGD(trained, lr=0.1).step()
    adapted.eval().save_pretrained(tmp_path / "whole", save_embedding_layers=False)
    again = package.load(files.text, mmproj=files.tower, adapter=tmp_path / "whole", **EXACT)
    with torch.inference_mode():
        assert near(again(**inputs).logits, adapted(**inputs).logits)


def test_an_adapter_of_fused_experts_is_refused_by_name(tmp_path: Path) -> None:
    files = made(tmp_path, "qwen3_vl_moe")
    config = LoraConfig(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"], r=2)
    changed(tmp_path / "text-text", tmp_path / "adapter", config)
    each: tuple[dict[str, Any], ...] = ({}, {"mmproj": files.tower})
    for more in each:
        with pytest.raises(
            PlanError, match=r"adapts the fused parameters experts\.gate_up_proj, .* linears of its own"
        ):
            package.load(files.text, adapter=tmp_path / "adapter", **more, **EXACT)


def test_an_adapter_of_fused_experts_is_merged_into_the_original(fewbit: Fewbit, tmp_path: Path) -> None:
    """As the error says. The quantized model is refused before any work."""
    model, packed = architectures.save(tmp_path / "model", "qwen3_moe"), tmp_path / "packed"
    config = LoraConfig(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"], r=2)
    changed(model, tmp_path / "adapter", config)
    assert fewbit("quantize", model, "-o", packed, "--plan", "rtn-4bit").code == 0
    refused = fewbit("generate", packed, "a", "--adapter", tmp_path / "adapter")
    assert refused.code == 2
    assert "`fewbit merge ORIGINAL adapter -o OUT --plan PLAN`" in refused.err
    few = ("--plan", "rtn-4bit", "--samples", 1, "--length", 16)
    refused = fewbit("merge", packed, tmp_path / "adapter", "-o", tmp_path / "out", *few)
    assert (refused.code, "adapts the fused parameters" in refused.err, "writing" in refused.err) == (2, True, False)
    assert not (tmp_path / "out").exists()
    done = fewbit("merge", model, tmp_path / "adapter", "-o", tmp_path / "out", *few)
    assert done.code == 0, done.err


def test_prompt_tuning_beside_a_tower_is_refused(tmp_path: Path) -> None:
    files = made(tmp_path, "qwen2_vl")
    changed(
        tmp_path / "text-text", tmp_path / "adapter", PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    )
    with pytest.raises(PlanError, match="an adapter of type PROMPT_TUNING is not attached to a language model inside"):
        package.load(files.text, mmproj=files.tower, adapter=tmp_path / "adapter", **EXACT)


def test_a_lora_in_a_file_is_not_for_the_whole_original(tmp_path: Path) -> None:
    files = made(tmp_path, "gemma3")
    alone, lora = tmp_path / "text-text", tmp_path / "lora.gguf"
    package.convert(drawn(alone, tmp_path / "adapter", target_modules=["q_proj"]), lora, to="gguf", base=alone)
    for verb in (
        lambda: package.load(files.folder, adapter=lora, device="cpu"),
        lambda: package.convert(lora, tmp_path / "out", to="peft", base=files.folder),
    ):
        with pytest.raises(PlanError, match="for a language model alone; this model, of type 'gemma3', is whole"):
            verb()


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    files: Files = made(tmp_path, "gemma3")
    other = models.save(tmp_path / "llama", "llama", hidden_size=32)
    adapter = drawn(other, tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(PlanError, match="is an adapter for another model"):
        package.load(files.text, mmproj=files.tower, adapter=adapter, **EXACT)


def test_images_and_an_adapter_of_the_command_line(tmp_path: Path, fewbit: Fewbit) -> None:
    Image.new("RGB", (50, 40), "teal").save(tmp_path / "picture.png")
    files = made(tmp_path, "gemma3")
    adapter = drawn(tmp_path / "text-text", tmp_path / "adapter", target_modules=["q_proj"])
    shared = (
        "--image",
        tmp_path / "picture.png",
        "--mmproj",
        files.tower,
        "--max-new-tokens",
        4,
        "--device",
        "cpu",
        "--json",
    )
    done = fewbit("generate", files.text, "The weight", "--adapter", adapter, *shared)
    assert done.code == 0, done.err
    assert done.json["tokens"] > 1
