"""GGUF files of Gemma 3n and 4: two kinds of heads, inputs of single layers, gate and up of an expert as one matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from fewbit.api import generate, quantize
from fewbit.errors import FormatError, PlanError
from fewbit.formats.containers import imatrix
from fewbit.formats.containers.gguf import GgufFile, GgufWriter
from fewbit.models.gguf.config import to_metadata
from fewbit.plans.plan import find
from fewbit.texts.calibration import Calibration
from tests import gguf_files, models

DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}
LLAMA3 = {**LINEAR, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
PART = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
FEW = Calibration(samples=4, length=64)
# Of the first layer that uses the keys and values of an earlier one: published files and checkpoints have its own too
UNUSED = {"attn_k.weight": "k_proj.weight", "attn_v.weight": "v_proj.weight", "attn_k_norm.weight": "k_norm.weight"}


def changed(path: Path, out: Path, keys: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """A copy of a file with other keys and more tensors."""
    file = GgufFile(path)
    more = {name: file.entries["blk.0." + name.split(".", 2)[2]]._replace(name=name) for name in tensors or {}}
    with GgufWriter(out, file.metadata | keys, [*file.entries.values(), *more.values()]) as writer:
        for name in file.entries:
            writer.add(name, file.get(name))
        for name, tensor in (tensors or {}).items():
            writer.add(name, tensor)
    return out


def test_unused_keys_of_a_file_are_ignored(tmp_path: Path) -> None:
    folder = gguf_files.save(tmp_path / "m", "gemma4_text")
    path = gguf_files.written(folder, tmp_path / "m.gguf")
    unused = {f"blk.2.{name}": GgufFile(path).get(f"blk.0.{name}") for name in UNUSED}
    loaded = generate.load(changed(path, tmp_path / "more.gguf", {}, unused), dtype=torch.float32)
    ids = gguf_files.ids()
    assert torch.equal(models.logits(loaded, ids), models.logits(models.original(folder), ids))


def test_unused_keys_of_a_checkpoint_are_ignored(tmp_path: Path) -> None:
    folder = gguf_files.save(tmp_path / "m", "gemma4_text")
    plan = find("q8_0").changed(method="rtn")
    quantize.quantize(folder, tmp_path / "one.gguf", plan=plan)
    weights, start = load_file(folder / "model.safetensors"), "model.layers.{}.self_attn."
    weights |= {start.format(2) + name: weights[start.format(0) + name].clone() for name in UNUSED.values()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    quantize.quantize(folder, tmp_path / "two.gguf", plan=plan)
    one, two = (GgufFile(tmp_path / f"{name}.gguf") for name in ("one", "two"))
    assert one.entries == two.entries
    assert gguf_files.digest(one) == gguf_files.digest(two)


@pytest.mark.parametrize("kind", ["gemma4_text-wide", "gemma4_unified_text"])
def test_layers_share_keys_without_inputs_of_their_own(kind: str, tmp_path: Path) -> None:
    """The file of either is read as `gemma4_text`, whose forward pass in transformers 5.24 fails with such a model."""
    folder, ids = gguf_files.save(tmp_path / "m", kind, num_kv_shared_layers=1), gguf_files.ids()
    original = models.original(folder)
    wanted = original(ids, output_hidden_states=True).logits  # then no token is left out before the shared layers
    quantize.quantize(folder, tmp_path / "out.gguf", plan=find("q8_0").changed(method="rtn"))
    loaded = generate.load(gguf_files.written(folder, tmp_path / "m.gguf"), dtype=torch.float32)
    assert loaded.config.model_type == "gemma4_text"
    assert torch.equal(models.logits(loaded, ids), wanted)
    last = loaded(ids, logits_to_keep=1).logits
    torch.testing.assert_close(last, wanted[:, -1:], rtol=1e-5, atol=1e-5)


def test_a_shorter_embedding_of_layers_gets_more_rows(tmp_path: Path) -> None:
    """Published models have tokens of images and sound that no row of it is for."""
    folder = gguf_files.save(tmp_path / "m", "gemma3n_text", vocab_size_per_layer_input=200)
    quantize.quantize(folder, tmp_path / "out.gguf", plan=find("q8_0").changed(method="rtn"))
    file = GgufFile(tmp_path / "out.gguf")
    entry = file.entries["per_layer_token_embd.weight"]
    assert (entry.type, entry.shape) == ("q8_0", (models.VOCAB, 12 * 256))
    assert not file.get(entry.name)[200:].any()
    plain = gguf_files.written(folder, tmp_path / "m.gguf")
    loaded, ids = generate.load(plain, dtype=torch.float32), gguf_files.ids() % 200
    assert torch.equal(models.logits(loaded, ids), models.logits(models.original(folder), ids))


def test_layers_without_keys_get_some_that_are_not_used(tmp_path: Path) -> None:
    """llama.cpp does not load a file of Gemma 3n without them."""
    sparse = [0.95] * 10 + [0.0] * 12
    changes = {"num_hidden_layers": 22, "num_kv_shared_layers": 2, "activation_sparsity_pattern": sparse}
    folder = gguf_files.save(tmp_path / "m", "gemma3n_text", **changes)
    path = gguf_files.written(folder, tmp_path / "m.gguf")
    assert GgufFile(path).entries["blk.21.attn_k.weight"].type == "f16"
    loaded, ids = generate.load(path, dtype=torch.float32), gguf_files.ids()
    assert torch.equal(models.logits(loaded, ids), models.logits(models.original(folder), ids))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_sparsity_pattern": [0.9] * 12}, "activation_sparsity_pattern = "),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers = 0 of 12; this model has 2"),
        ({"laurel_rank": 32}, "laurel_rank = 64"),
        ({"intermediate_size": [96] * 11 + [64]}, "one value for intermediate_size"),
    ],
)
def test_other_sizes_of_gemma_3n_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=message):
        gguf_files.header_of(gguf_files.save(tmp_path / "m", "gemma3n_text", **changes))


def test_both_embeddings_are_quantized(tmp_path: Path) -> None:
    folder = gguf_files.save(tmp_path / "m", "gemma4_text", hidden_size=256, hidden_size_per_layer_input=64)
    quantize.quantize(folder, tmp_path / "out.gguf", plan=find("q4_0").changed(method="rtn"))
    types = {name: entry.type for name, entry in GgufFile(tmp_path / "out.gguf").entries.items()}
    assert types["token_embd.weight"] == types["per_layer_token_embd.weight"] == "q6_k"
    assert types["per_layer_model_proj.weight"] == "f32"
    assert types["blk.0.inp_gate.weight"] == "q4_0"


def test_gate_and_up_of_an_expert_share_importances(tmp_path: Path) -> None:
    folder, path = gguf_files.save(tmp_path / "m", "gemma4_text-experts"), tmp_path / "imatrix.gguf"
    quantize.imatrix(folder, path, calibration=FEW)
    found = imatrix.read(path)["blk.0.ffn_gate_up_exps.weight"]
    assert found.mean_square.numel() == 4 * 64  # experts, columns
    quantize.quantize(folder, tmp_path / "out.gguf", plan="q4_0", imatrix=path)
    entry = GgufFile(tmp_path / "out.gguf").entries["blk.0.ffn_gate_up_exps.weight"]
    assert (entry.type, entry.shape) == ("q4_0", (4, 64, 64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layer_types": ["full_attention"] * 4, "per_layer_config": None, "num_kv_shared_layers": 0},
            "with one width and number of heads for each",
        ),
        (
            {"layer_types": ["full_attention", "sliding_attention"] * 2, "per_layer_config": None},
            "of layer 0 for layers",
        ),
        ({"use_bidirectional_attention": "all"}, "causal attention"),
        ({"vocab_size_per_layer_input": 300}, "vocab_size_per_layer_input = vocab_size"),
        ({"num_kv_shared_layers": 4}, "at least 2 layers with keys and values of their own; this model has 0"),
        ({"attention_bias": True}, "attention_bias = False"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=message):
        gguf_files.header_of(gguf_files.save(tmp_path / "m", "gemma4_text", **changes))


def test_sizes_of_inputs_that_layers_do_not_have_do_not_matter(tmp_path: Path) -> None:
    folder = gguf_files.save(tmp_path / "m", "gemma4_text-wide", vocab_size_per_layer_input=300)
    assert models.original(folder).config.hidden_size_per_layer_input == 0
    loaded = generate.load(gguf_files.written(folder, tmp_path / "m.gguf"), dtype=torch.float32)
    ids = gguf_files.ids()
    assert torch.equal(models.logits(loaded, ids), models.logits(models.original(folder), ids))


@pytest.mark.parametrize(
    ("kind", "full", "local", "message"),
    [
        ("gemma4_text", DEFAULT, DEFAULT, "proportional RoPE with factor 1"),
        ("gemma4_text", LINEAR, DEFAULT, "proportional RoPE with factor 1"),
        ("gemma4_text", LLAMA3, DEFAULT, "proportional RoPE with factor 1"),
        ("gemma4_text", {**PART, "factor": 8.0}, DEFAULT, "proportional RoPE with factor 1"),
        ("gemma4_text", PART, LINEAR, "whole, unscaled RoPE in layers with a sliding window"),
        ("gemma4_text", PART, PART, "whole, unscaled RoPE in layers with a sliding window"),
        ("gemma3n_text", DEFAULT, LINEAR, "whole, unscaled RoPE in layers with a sliding window"),
        ("gemma3", DEFAULT, LINEAR, "whole, unscaled RoPE in layers with a sliding window"),
        ("olmo3", DEFAULT, LINEAR, "whole, unscaled RoPE in layers with a sliding window"),
    ],
)
def test_other_positions_are_refused(
    kind: str, full: dict[str, Any], local: dict[str, Any], message: str, tmp_path: Path
) -> None:
    rope = {"full_attention": full, "sliding_attention": local}
    with pytest.raises(PlanError, match=message):
        gguf_files.header_of(gguf_files.save(tmp_path / "m", kind, rope_parameters=rope))


@pytest.mark.parametrize("kind", ["gemma4_text", "gemma3n_text", "gemma3", "olmo3"])
def test_positions_of_published_models_are_written(kind: str, tmp_path: Path) -> None:
    rope = AutoConfig.for_model(gguf_files.TYPE_OF.get(kind, kind)).rope_parameters
    assert gguf_files.header_of(gguf_files.save(tmp_path / "m", kind, rope_parameters=rope)).metadata


def test_a_file_says_that_logits_have_no_cap(tmp_path: Path) -> None:
    """llama.cpp takes 30 without the key."""
    folder = gguf_files.save(tmp_path / "m", "gemma4_text", final_logit_softcapping=None)
    path = gguf_files.written(folder, tmp_path / "m.gguf")
    assert GgufFile(path).metadata["gemma4.final_logit_softcapping"] == 0
    assert generate.load(path).config.final_logit_softcapping is None


def test_layers_of_other_types_have_one_size() -> None:
    own = AutoConfig.for_model("qwen3", per_layer_config={1: {"intermediate_size": 64}})
    with pytest.raises(PlanError, match="qwen3 with layers of one size; this model has a per_layer_config"):
        to_metadata(own, "m")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attention.sliding_window_pattern": [True] * 3}, "which layers have a sliding window"),
        ({"feed_forward_length": [96, 96, 96, 192]}, "MLPs of width"),
        ({"attention.head_count_kv": [2, 2, 2, 1]}, "key-value heads"),
        ({"attention.head_count_kv": [2, 2]}, "no list of 4 numbers"),
    ],
)
def test_contradicting_keys_are_an_error(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = gguf_files.written(gguf_files.save(tmp_path / "m", "gemma4_text"), tmp_path / "m.gguf")
    arrays = {f"gemma4.{key}": np.array(value, bool if value[0] is True else np.int32) for key, value in keys.items()}
    with pytest.raises(FormatError, match=message):
        generate.load(changed(path, tmp_path / "bad.gguf", arrays))
