"""GGUF files of models with state spaces (Mamba), in all layers or in some."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GraniteForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fewbit.api import generate, quantize
from fewbit.errors import FormatError, PlanError
from fewbit.formats.containers.gguf import GgufFile, GgufWriter
from fewbit.models.gguf.config import to_config, to_metadata
from fewbit.plans.plan import find
from tests import architectures, gguf_files, models

KINDS = (
    *("mamba", "mamba2", "granitemoehybrid", "granitemoehybrid-dense", "falcon_h1", "falcon_h1-plain"),
    *("nemotron_h", "nemotron_h-experts", "jamba"),
)
Q8 = find("q8_0").changed(method="rtn")


def _heads(*each: int) -> np.ndarray[Any, Any]:
    return np.array(each, np.int32)


@pytest.mark.parametrize("kind", KINDS)
def test_what_sets_the_state_stays_in_32_bits(kind: str, tmp_path: Path) -> None:
    folder = gguf_files.halved(gguf_files.save(tmp_path / "m", kind))
    quantize.quantize(folder, tmp_path / "out.gguf", plan=Q8)
    types = {name: entry.type for name, entry in GgufFile(tmp_path / "out.gguf").entries.items()}
    block = next(name.rpartition(".")[0] for name in types if name.endswith("ssm_a"))
    for name in ("ssm_a", "ssm_d", "ssm_dt.bias", "ssm_conv1d.weight", "ssm_conv1d.bias", "ffn_gate_inp.weight"):
        assert types.get(f"{block}.{name}", "f32") == "f32"
    assert {types[f"{block}.{name}.weight"] for name in ("ssm_in", "ssm_out")} == {"q8_0"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_quantized_again(kind: str, tmp_path: Path) -> None:
    """Its norms and states are the original's, and its text goes on as that of the model with the same weights."""
    folder, whole = gguf_files.save(tmp_path / "m", kind), tmp_path / "whole.gguf"
    gguf_files.written(folder, whole, "f32")
    for source, name in ((folder, "a"), (whole, "b")):
        quantize.quantize(source, tmp_path / f"{name}.gguf", plan=Q8)
    one, two = (GgufFile(tmp_path / f"{name}.gguf") for name in "ab")
    assert {name: entry.shape for name, entry in one.entries.items()} == {
        name: entry.shape for name, entry in two.entries.items()
    }
    for name, entry in one.entries.items():
        if name.endswith("ssm_a"):  # log(exp(x)) is not x for 0.2 % of float32 numbers
            torch.testing.assert_close(one.get(name), two.get(name), rtol=1e-6, atol=0)
        elif entry.type == two.entries[name].type:
            assert torch.equal(one.get(name).float(), two.get(name).float()), name
    loaded = generate.load(tmp_path / "a.gguf", dtype=torch.float32)
    ids = gguf_files.ids(length=12)[:1]
    whole_text = models.logits(loaded, ids)
    with torch.no_grad():
        cache = loaded(ids[:, :8], use_cache=True)
        kept = next(value for key, value in cache.items() if key in ("cache", "cache_params", "past_key_values"))
        name = next(key for key in cache if key in ("cache", "cache_params", "past_key_values"))
        steps = [cache.logits[:, -1]]
        for place in range(8, 11):
            step = loaded(ids[:, place : place + 1], use_cache=True, **{name: kept})
            steps.append(step.logits[:, -1])
    torch.testing.assert_close(torch.stack(steps, 1), whole_text[:, 7:11], rtol=1e-4, atol=1e-4)


def test_factors_are_part_of_quantized_weights(tmp_path: Path) -> None:
    """As if the model had been saved with its factors in its weights, in 32 bits."""
    folder = gguf_files.halved(
        gguf_files.save(tmp_path / "m", "falcon_h1", **gguf_files.FACTORS, tie_word_embeddings=False)
    )
    plain = gguf_files.save(tmp_path / "p", "falcon_h1", tie_word_embeddings=False)
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    single = {key: torch.tensor(value) for key, value in gguf_files.FACTORS.items() if isinstance(value, float)}
    heads, groups, inner = 8, 2 * 8, 128
    counts = torch.tensor([inner, inner, groups, groups, heads])
    gate, down = torch.tensor(gguf_files.FACTORS["mlp_multipliers"])
    by_name = {
        "q_proj": single["attention_in_multiplier"],
        "k_proj": single["attention_in_multiplier"] * single["key_multiplier"],
        "v_proj": single["attention_in_multiplier"],
        "o_proj": single["attention_out_multiplier"],
        "embed_tokens": single["embedding_multiplier"],
        "lm_head": single["lm_head_multiplier"],
        "mamba.in_proj": single["ssm_in_multiplier"]
        * torch.tensor(gguf_files.FACTORS["ssm_multipliers"]).repeat_interleave(counts)[:, None],
        "mamba.out_proj": single["ssm_out_multiplier"],
        "gate_proj": gate,
        "down_proj": down,
    }
    for name in tensors:
        for own, factor in by_name.items():
            tensors[name] = tensors[name] * factor if name.endswith(f"{own}.weight") else tensors[name]
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    for source, name in ((folder, "a"), (plain, "b")):
        quantize.quantize(source, tmp_path / f"{name}.gguf", plan=Q8)
    one, two = (GgufFile(tmp_path / f"{name}.gguf") for name in "ab")
    assert {name: entry.type for name, entry in one.entries.items()} == {
        name: entry.type for name, entry in two.entries.items()
    }
    assert all(torch.equal(one.get(name), two.get(name)) for name in one.entries)
    ids = gguf_files.ids()
    wanted = models.logits(models.original(folder), ids)
    found = models.logits(generate.load(tmp_path / "a.gguf", dtype=torch.float32), ids)
    assert float((found - wanted).norm() / wanted.norm()) < 0.05


def test_tied_weights_with_two_factors_are_refused(tmp_path: Path) -> None:
    folder = gguf_files.save(tmp_path / "m", "falcon_h1", **gguf_files.FACTORS, tie_word_embeddings=True)
    with pytest.raises(PlanError, match=r"the tied embedding and head need 3\.0 and 0\.4"):
        quantize.preview(folder, plan=Q8)


def test_granite_with_attention_alone_becomes_a_file_of_granite(tmp_path: Path) -> None:
    folder = gguf_files.save(tmp_path / "m", "granitemoehybrid-attention")
    path = gguf_files.written(folder, tmp_path / "m.gguf")
    loaded, ids = generate.load(path, dtype=torch.float32), gguf_files.ids()
    assert isinstance(loaded, GraniteForCausalLM)
    wanted = models.logits(models.original(folder), ids)
    found = models.logits(loaded, ids)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-6
    quantize.quantize(folder, tmp_path / "out.gguf", plan=Q8)
    assert {GgufFile(tmp_path / "out.gguf").entries[f"blk.1.ffn_{name}.weight"].type for name in ("gate", "up")} == {
        "q8_0"
    }


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("mamba", {"intermediate_size": 192}, "intermediate_size = 2 x hidden_size; this model has 192"),
        ("falcon_mamba", {"mixer_rms_eps": 1e-6}, "mixer_rms_eps = layer_norm_epsilon; this model has 1e-06 and 1e-05"),
        ("mamba", {"use_conv_bias": False}, "use_conv_bias = True"),
        ("mamba2", {"time_step_limit": [0.0, 0.1]}, r"time_step_limit = \(0.0, inf\)"),
        ("mamba2", {"hidden_act": "gelu"}, "silu in its MLP"),
        ("granitemoehybrid", {"position_embedding_type": "rope"}, "without positions"),
        ("falcon_h1", {"key_multiplier": 0.5}, "key_multiplier = 1.0; this model has 0.5"),
        ("falcon_h1", {"mamba_norm_before_gate": True}, "mamba_norm_before_gate = False"),
        ("jamba", {"mamba_expand": 4}, "mamba_expand = 2"),
        ("nemotron_h", {"mlp_hidden_act": "silu"}, "mlp_hidden_act = relu2"),
        (
            "nemotron_h",
            {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
            "no GGUF file can be made of this model of type 'nemotron_h'",
        ),
        ("granitemoehybrid", {"mamba_conv_bias": False}, "mamba_conv_bias = True"),
        (
            "granitemoehybrid",
            {"layer_types": ["full_attention"] * 2},
            "layers of type linear_attention",
        ),
        ("granitemoehybrid", {"attention_bias": True}, "attention_bias = False"),
        ("granitemoehybrid-attention", {"position_embedding_type": "nope"}, "position_embedding_type = rope"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused(kind: str, changes: dict[str, Any], reason: str) -> None:
    make = CONFIG_MAPPING[kind.partition("-")[0]]
    special = {make.model_type: gguf_files.TYPES[kind] | changes}
    with pytest.raises(PlanError, match=reason):
        to_metadata(architectures.small(make, architectures.SIZES, special), "m")


def test_layers_of_a_jamba_are_found_in_its_tensors(tmp_path: Path) -> None:
    folder = gguf_files.save(tmp_path / "m", "jamba")
    found = to_config(GgufFile(gguf_files.written(folder, tmp_path / "m.gguf")))
    assert [found[f"{kind}_layer_{key}"] for kind in ("attn", "expert") for key in ("period", "offset")] == [3, 1, 2, 1]
    assert "layer_types" not in found


def test_limits_of_time_steps_may_be_a_list() -> None:
    special = {"mamba2": gguf_files.TYPES["mamba2"] | {"time_step_limit": [0.0, float("inf")]}}
    assert to_metadata(architectures.small(CONFIG_MAPPING["mamba2"], architectures.SIZES, special), "m")


@pytest.mark.parametrize(
    ("kind", "key", "value", "reason"),
    [
        ("jamba", "jamba.attention.head_count_kv", _heads(2, 0, 2, 2, 0), "do not have the same number of others"),
        ("jamba", "jamba.attention.head_count_kv", _heads(0, 2), "key-value heads of 2 layers are given, not of 5"),
        ("nemotron_h", "nemotron_h.feed_forward_length", _heads(0, 96), "MLP widths of 2 layers are given, not of 4"),
        ("nemotron_h", "nemotron_h.feed_forward_length", 96, "no list of the MLP widths of each layer"),
        ("nemotron_h", "nemotron_h.feed_forward_length", _heads(0, 96, 0, 80), r"\[80, 96\] MLP widths"),
        ("mamba2", "mamba2.ssm.time_step_rank", 15, "which is no multiple of ssm.time_step_rank, 15"),
        ("mamba2", "mamba2.ssm.inner_size", 0, "not an integer above 0"),
        ("granitemoehybrid", "granitehybrid.rope.scaling.finetuned", True, "its layers have RoPE"),
        ("granitemoehybrid", "granitehybrid.rope.scaling.finetuned", None, "its layers have RoPE"),
    ],
)
def test_other_files_are_refused(kind: str, key: str, value: Any, reason: str, tmp_path: Path) -> None:
    good = GgufFile(gguf_files.written(gguf_files.save(tmp_path / "m", kind), tmp_path / "m.gguf"))
    keys = {**good.metadata, key: value}
    with GgufWriter(
        tmp_path / "bad.gguf", {k: v for k, v in keys.items() if v is not None}, list(good.entries.values())
    ) as w:
        for name in good.entries:
            w.add(name, good.get(name))
    with pytest.raises(FormatError, match=reason):
        to_config(GgufFile(tmp_path / "bad.gguf"))
