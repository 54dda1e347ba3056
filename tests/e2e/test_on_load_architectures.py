"""Every type of causal LM and of model with towers, quantized on load, then saved and loaded again."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fewbit.errors import FormatError, NumericsError
from fewbit.models import experts
from fewbit.models.plugin import quantizer
from fewbit.nn.fused import packed_linears
from fewbit.nn.layers import QLinear
from tests import architectures, models, multimodal

CONFIGS: dict[str, Any] = {"nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "int8": {"load_in_8bit": True}}
LEFT = "of those in the model's layers, stay in"  # in the warning about parameters that are not packed
# What people run and fewbit quantizes in a way of its own. Always tested.
POPULAR = ("deepseek_v3", "gpt_oss", "llama4_text", "mamba2", "nemotron_h", "qwen3_5_moe_text", "qwen3_moe")
# Others run by NF4 on one day of ten. tests/e2e/test_architectures.py checks why some types are not built.
TYPES = [kind for kind in architectures.TYPES if kind not in architectures.NOT_BUILT]
TODAY = architectures.today(TYPES)
# Models with towers that `fewbit.quantize` serves too.
MULTIMODAL = [kind for kind in multimodal.TYPES if kind not in multimodal.NOT_BUILT | multimodal.REFUSED]


def is_quick(kind: str, plan: str) -> bool:
    return plan == "nf4" and kind in (*POPULAR, *TODAY)


def is_quick_multimodal(kind: str, plan: str) -> bool:
    return plan == "nf4" and kind in ("gemma3", "llava", "qwen3_5", *architectures.today(MULTIMODAL))


def loaded(folder: Path, *, kind: Any = AutoModelForCausalLM, **options: Any) -> Any:
    with quantizer.serving("reference"):
        return kind.from_pretrained(folder, dtype=torch.float32, **options).eval()


@pytest.mark.filterwarnings("default")  # models warn about their own tiny configs
@pytest.mark.parametrize(("kind", "plan"), architectures.cases(TYPES, list(CONFIGS), is_quick))
def test_quantized_on_load_saved_and_loaded_again(kind: str, plan: str, tmp_path: Path) -> None:
    folder = architectures.save(tmp_path / "model", kind)
    config = BitsAndBytesConfig(**CONFIGS[plan])
    if reason := architectures.NOT_ON_LOAD.get(kind):
        with pytest.raises(Exception, match=reason):
            architectures.logits(loaded(folder, quantization_config=config), _ids())
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = loaded(folder, quantization_config=config)
    said = any(LEFT in str(each.message) for each in caught)
    expected = architectures.with_values(models.original(folder), made)
    wanted, found = architectures.logits(expected, _ids()), architectures.logits(made, _ids())
    assert (found - wanted).norm() <= 1e-4 * wanted.norm()
    assert said or _share(expected, packed_linears(made)) > 0.9
    made.save_pretrained(tmp_path / "out")
    assert torch.equal(architectures.logits(loaded(tmp_path / "out"), _ids()), found)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("kind", "plan"), architectures.cases(MULTIMODAL, list(CONFIGS), is_quick_multimodal))
def test_models_with_towers_on_load_saved_and_loaded_again(kind: str, plan: str, tmp_path: Path) -> None:
    folder = multimodal.save(tmp_path / "model", kind)
    original = models.original(folder)
    made = loaded(folder, kind=type(original), quantization_config=BitsAndBytesConfig(**CONFIGS[plan]))
    assert packed_linears(made)
    expected = architectures.with_values(original, made)
    inputs = multimodal.inputs(kind, expected)
    with torch.inference_mode():
        wanted, found = expected(**inputs).logits, made(**inputs).logits
    assert (found - wanted).norm() <= 1e-4 * wanted.norm()
    made.save_pretrained(tmp_path / "out")
    with torch.inference_mode():
        assert torch.equal(loaded(tmp_path / "out", kind=type(original))(**inputs).logits, found)


@pytest.mark.skipif("unlimited_ocr" not in multimodal.TYPES, reason="this transformers does not have it")
@pytest.mark.filterwarnings("ignore:BitsAndBytesConfig.*stay in")  # its convolutions
@pytest.mark.parametrize("plan", ["nf4", "int8"])
def test_tensors_of_a_packed_layer_keep_one_prefix(plan: str, tmp_path: Path) -> None:
    """transformers renames the weight and the bias of this projector, and no scales of it."""
    folder = multimodal.save(tmp_path / "model", "unlimited_ocr")
    kind = type(models.original(folder))
    made = loaded(folder, kind=kind, quantization_config=BitsAndBytesConfig(**CONFIGS[plan]))
    for place in ("out", "again"):
        made.save_pretrained(tmp_path / place)
        names = {name for name in models.tensors_of(tmp_path / place) if "projector" in name}
        assert {f"model.multi_modal_projector.{end}" for end in ("weight", "bias")} <= names
        assert {name.removeprefix("model.multi_modal_projector.").partition(".")[0] for name in names} <= {
            *("weight", "bias", "SCB", "weight_format")
        }
        made = loaded(tmp_path / place, kind=kind)


def _share(model: Any, layers: dict[str, QLinear]) -> float:
    """The share of the parameters in `layers`, without embeddings, norms and biases."""
    outside = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    outside |= {id(m.weight) for m in [model.get_output_embeddings()] if m is not None}
    inside = sum(p.numel() for p in model.parameters() if p.dim() > 1 and id(p) not in outside)
    return sum(layer.in_features * layer.out_features for layer in layers.values()) / float(inside)


def _ids() -> torch.Tensor:
    return torch.randint(3, models.VOCAB, (1, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.filterwarnings("ignore:BitsAndBytesConfig.*stay in")  # routers, a large part of a tiny model
@pytest.mark.parametrize("kind", ["gpt_oss", "llama4_text", "mixtral"])
def test_experts_that_a_config_skips_stay_fused(kind: str, tmp_path: Path) -> None:
    """Llama 4: transformers replaces its fused experts in files of bitsandbytes, even where they are fused."""
    folder = architectures.save(tmp_path / "model", kind)
    made = loaded(folder, quantization_config=_nf4(skip=["lm_head", r".*\.experts"]))
    assert list(experts.fused_in(made))
    assert packed_linears(made)
    made.save_pretrained(tmp_path / "out")
    again = loaded(tmp_path / "out")
    assert torch.equal(models.logits(again, _ids()), models.logits(made, _ids()))


def test_one_expert_that_a_config_skips_is_read(tmp_path: Path) -> None:
    """It is the first, by whose name transformers asks whether a fused tensor is to be quantized."""
    folder = architectures.save(tmp_path / "model", "gpt_oss")
    skipped = "model.layers.0.mlp.experts.0"
    with pytest.warns(UserWarning, match="one expert at a time, which is slow: not all of them are packed"):
        made = loaded(folder, quantization_config=_nf4(skip=["lm_head", skipped]))
    assert skipped + ".up_proj" not in packed_linears(made)
    assert skipped.replace("experts.0", "experts.1") + ".up_proj" in packed_linears(made)
    expected = architectures.with_values(models.original(folder), made)
    wanted = models.logits(expected, _ids())
    assert (models.logits(made, _ids()) - wanted).norm() <= 1e-4 * wanted.norm()


def test_a_checkpoint_of_the_base_model_has_no_prefix(tmp_path: Path) -> None:
    folder = architectures.save(tmp_path / "model", "gpt_oss")
    file = folder / "model.safetensors"
    bare = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
    made = loaded(folder, quantization_config=_nf4())
    save_file(bare, file, metadata={"format": "pt"})
    again = loaded(folder, quantization_config=_nf4())
    assert packed_linears(again).keys() == packed_linears(made).keys()
    assert torch.equal(models.logits(again, _ids()), models.logits(made, _ids()))


def test_fused_experts_of_another_shape_are_named(tmp_path: Path) -> None:
    folder = architectures.save(tmp_path / "model", "gpt_oss")
    file, key = folder / "model.safetensors", "model.layers.1.mlp.experts.gate_up_proj"
    tensors = load_file(file)
    save_file({**tensors, key: tensors[key][:3].contiguous()}, file, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=rf"{key} has shape \[3, 64, 192\], config.json requires \[4, 64, 192\]"):
        loaded(folder, quantization_config=_nf4())


def test_an_expert_that_cannot_be_quantized_is_named(tmp_path: Path) -> None:
    folder = architectures.save(tmp_path / "model", "gpt_oss")
    file, key = folder / "model.safetensors", "model.layers.1.mlp.experts.down_proj"
    tensors = load_file(file)
    tensors[key][2, 5, 7] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=r"model.layers.1.mlp.experts.2.down_proj: .*NaN"):
        loaded(folder, quantization_config=_nf4())


def _nf4(skip: list[str] | None = None) -> Any:
    return BitsAndBytesConfig(**CONFIGS["nf4"], llm_int8_skip_modules=skip)
