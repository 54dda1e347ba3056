"""GGUF files of the tests' own models, by fewbit's writer, with all matrices of one type."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as token_models
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fewbit.formats.containers.gguf import PLAIN, Entry, GgufFile, GgufWriter
from fewbit.methods.base import Method
from fewbit.models import experts
from fewbit.models.gguf import header, names
from fewbit.models.gguf.pieces import Joined
from fewbit.models.plugin.gguf import persistent
from fewbit.models.skeleton import load_tokenizer
from fewbit.models.source import locate
from fewbit.schemes.base import parse
from tests import architectures, models

GOLDEN = Path(__file__).parent / "data" / "gguf_architectures.json"
# What a family's config needs for llama.cpp to compute the same: queries scaled by the width of a head.
CHANGES: dict[str, dict[str, Any]] = {
    "qwen2": {"vocab_size": 292},  # transformers adds a token to such tokenizers
    "gemma2": {"query_pre_attn_scalar": 16, "tie_word_embeddings": True},
    "gemma3": {"query_pre_attn_scalar": 16},
}

_QWEN35 = {
    "num_hidden_layers": 4,
    "vocab_size": 292,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [1, 1, 0],  # llama.cpp takes no more than the width of a head
        "mrope_interleaved": True,
    },
}
# The width that is turned. Latents are expanded to keys and values of every head, whose widths differ.
_LATENT: dict[str, Any] = {"head_dim": 8, "num_key_value_heads": 4, "qk_nope_head_dim": 24, "num_hidden_layers": 3}
_LATENT |= {"first_k_dense_replace": 1, "kv_lora_rank": 32, "q_lora_rank": 32, "n_shared_experts": 2}
_LATENT |= {"routed_scaling_factor": 2.5, "tie_word_embeddings": False}
_YARN: dict[str, Any] = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
_YARN |= {"original_max_position_embeddings": 32, "mscale": 0.707, "mscale_all_dim": 0.707}
_YARN |= {"beta_fast": 32, "beta_slow": 1}
# Queries of position 8 and later are scaled by it
_MINISTRAL3 = {**_YARN, "original_max_position_embeddings": 8, "mscale": 1.0, "mscale_all_dim": 0.5}
_MINISTRAL3 |= {"llama_4_scaling_beta": 0.3, "beta_fast": 24.0, "beta_slow": 2.0}
_INDEXED: dict[str, Any] = {"n_group": 2, "n_routed_experts": 8, "index_topk": 6, "index_n_heads": 8}
# llama.cpp turns keys of 64 columns. With fewer heads, several tokens may have the score 0, and each chooses others
_INDEXED |= {"index_head_dim": 64, "mlp_layer_types": ["dense", "sparse", "sparse"], "first_k_dense_replace": 1}
_WINDOW_FIRST = ["sliding_attention", "full_attention"]
_GRANITE: dict[str, Any] = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
}
_GRANITE_HYBRID: dict[str, Any] = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
    "mamba_n_groups": 2,
    "shared_intermediate_size": 48,
}
_NEMOTRON_H: dict[str, Any] = {
    "sliding_window": None,
    "num_hidden_layers": 4,
    "mamba_num_heads": 16,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
    "time_step_floor": 0.5,
}
_GEMMA4: dict[str, Any] = {
    "vocab_size_per_layer_input": models.VOCAB,
    "final_logit_softcapping": 3.0,
    "tie_word_embeddings": True,
    "num_experts": None,
    "moe_intermediate_size": None,
}
# Keys are values in layers with full attention, and these have fewer
_SAME_KV: dict[str, Any] = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "per_layer_config": {layer: {"head_dim": 32, "num_key_value_heads": 1} for layer in (1, 2)},
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
}
# Falcon-H1's, of which none is 1
FACTORS: dict[str, Any] = {
    "attention_in_multiplier": 1.5,
    "attention_out_multiplier": 0.7,
    "embedding_multiplier": 3.0,
    "key_multiplier": 0.6,
    "lm_head_multiplier": 0.4,
    "ssm_in_multiplier": 1.2,
    "ssm_out_multiplier": 0.8,
    "mlp_multipliers": [0.9, 0.5],
    "ssm_multipliers": [0.3, 0.25, 0.35, 0.5, 0.6],
}
# Types of transformers besides those families, and what their tiny configs have besides the usual sizes. What follows a
# hyphen names another model of the type.
TYPES: dict[str, dict[str, Any]] = {
    "granite": {
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
        "attention_bias": True,
    },
    "ministral3": {"rope_parameters": _MINISTRAL3, "sliding_window": None},
    "olmo": {"clip_qkv": 1.5},
    "olmo2": {},
    "olmo3": {"num_hidden_layers": 4},
    "smollm3": {"num_hidden_layers": 4, "tie_word_embeddings": False, "sliding_window": None},
    "stablelm": {"use_qkv_bias": True},
    "glm4": {},
    "glm4-sections": {"mrope_section": [2, 1, 1], "attention_bias": True},
    # 2048 positions, as the converter gives all of them
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "max_position_embeddings": 2048},
    "falcon-1": {
        "new_decoder_architecture": True,
        "num_ln_in_parallel_attn": 1,
        "num_kv_heads": 2,
        "max_position_embeddings": 2048,
    },
    "exaone": {"head_dim": None},
    "internlm3": {"attention_bias": True, "mlp_bias": True},
    "iquestcoder": {},
    "glm": {},
    "gpt_bigcode": {"n_inner": 256},
    "jais2": {"num_key_value_heads": 4},
    "glm4_moe_lite": {**_LATENT, "rms_norm_eps": 1e-6, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "afmoe": {"num_hidden_layers": 5, "mup_enabled": True, "num_shared_experts": 2, "route_scale": 2.5},
    "hy_v3": {"num_hidden_layers": 3, "num_shared_experts": 2, "tie_word_embeddings": True},
    "exaone_moe": {
        "num_hidden_layers": 5,
        "n_group": 2,
        "num_shared_experts": 2,
        "mlp_layer_types": ["dense"] + ["sparse"] * 4,
    },
    "mellum": {
        "num_hidden_layers": 5,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {**_YARN, "mscale": None, "mscale_all_dim": None},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "gemma4_text": {
        **_GEMMA4,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "per_layer_config": {layer: {"head_dim": 32} for layer in (1, 3)},
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 16,
    },
    "gemma4_text-wide": {**_GEMMA4, **_SAME_KV, "final_logit_softcapping": None},
    "gemma4_text-experts": {
        **_GEMMA4,
        **_SAME_KV,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    "gemma4_unified_text": {
        **{key: value for key, value in _SAME_KV.items() if key != "hidden_size_per_layer_input"},
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": True,
        "moe_intermediate_size": None,  # as in published models
    },
    "gemma3n_text": {
        "num_hidden_layers": 12,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": models.VOCAB,
        "tie_word_embeddings": True,
        "hidden_size_per_layer_input": 256,
        "intermediate_size": 96,
        "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 2,
    },
    "granite_swa": {
        **_GRANITE,
        "num_hidden_layers": 4,
        "layer_types": ["full_attention"] + ["sliding_attention"] * 3,
        "layer_rope_theta": [10000.0, 0, 10000.0, 0],
        "attention_bias": True,
    },
    "granitemoe_swa": {**_GRANITE, "layer_types": _WINDOW_FIRST, "shared_intermediate_size": 48},
    "granitemoe_swa-plain": {**_GRANITE, "layer_types": _WINDOW_FIRST},
    "minicpm3": {**_LATENT, "rms_norm_eps": 1e-6, "v_head_dim": 16, "tie_word_embeddings": True},
    "sarvam_mla": {**_LATENT, "n_group": 1},
    "youtu": {
        **{key: _LATENT[key] for key in ("head_dim", "num_key_value_heads", "qk_nope_head_dim", "kv_lora_rank")},
        "q_lora_rank": 32,
        "num_hidden_layers": 3,
        "pad_token_id": None,  # transformers sets its row to 0 when it loads the model
    },
    "deepseek_v32": {**_LATENT, **_INDEXED, "rms_norm_eps": 1e-6},
    "glm_moe_dsa": {**_LATENT, **_INDEXED, "rms_norm_eps": 1e-6, "indexer_types": ["full", "shared", "full"]},
    "cohere2_moe": {
        "num_hidden_layers": 5,
        "layer_types": ["full_attention"] + ["sliding_attention"] * 3 + ["full_attention"],
        "mlp_layer_types": ["dense"] + ["sparse"] * 4,
        "prefix_dense_intermediate_size": 80,
        "expert_selection_fn": "sigmoid",
        "num_shared_experts": 2,
    },
    "cohere2_moe-softmax": {"num_hidden_layers": 4, "tie_word_embeddings": False},
    "apertus": {"attention_bias": True},
    "mimo_v2_flash": {
        "num_hidden_layers": 5,
        "num_key_value_heads": 1,
        "v_head_dim": 8,
        "layer_types": ["full_attention"] + ["sliding_attention"] * 3 + ["full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0, "partial_rotary_factor": 0.5},
        },
        "n_group": 2,
        "attention_value_scale": 0.7,
    },
    "laguna": {
        "num_hidden_layers": 5,
        "num_attention_heads_per_layer": [4, 6, 6, 2, 4],
        "layer_types": ["full_attention"] + ["sliding_attention"] * 3 + ["full_attention"],
        "rope_parameters": {
            "full_attention": {**_YARN, "partial_rotary_factor": 0.5, "mscale": None, "mscale_all_dim": None},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.75},
        },
        "moe_routed_scaling_factor": 2.5,
    },
    "laguna-element": {"gating": "per-element", "sliding_window": 4096, "mlp_layer_types": ["sparse"] * 2},
    "kimi_linear": {
        **{key: _LATENT[key] for key in ("head_dim", "num_key_value_heads", "qk_nope_head_dim", "kv_lora_rank")},
        "n_shared_experts": 2,
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "q_lora_rank": None,
        "linear_head_dim": 32,
        "rms_norm_eps": 1e-6,
        "routed_scaling_factor": 2.5,
    },
    "sarvam_moe": {
        "num_hidden_layers": 3,
        "n_group": 2,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
    },
    "solar_open": {"n_shared_experts": 1, "routed_scaling_factor": 1.5},
    # Two lists of 2 blocks, of which the first runs 6 times, the second twice
    "hrm_text": {"embedding_scale": 4.0},
    "falcon-first": {"max_position_embeddings": 2048},
    "bloom": {},
    "mpt": {"attn_config": {"clip_qkv": 1.5}, "max_seq_len": 96},
    "gpt_neox": {"num_key_value_heads": None},
    "starcoder2": {"sliding_window": None},
    "cohere2": {"num_hidden_layers": 4},
    "cohere": {},
    "phi": {"intermediate_size": 256, "num_key_value_heads": 4},
    "seed_oss": {},
    "ernie4_5": {},
    "mixtral": {"sliding_window": None},
    "qwen2_moe": {"sliding_window": None, "mlp_only_layers": None},
    "qwen3_moe": {"norm_topk_prob": True, "sliding_window": None},
    "olmoe": {"num_key_value_heads": 4},
    "granitemoehybrid": {**_GRANITE_HYBRID, "layer_types": ["linear_attention", "full_attention"]},
    "granitemoehybrid-dense": {
        **_GRANITE_HYBRID,
        "layer_types": ["full_attention", "linear_attention", "linear_attention"],
        "num_hidden_layers": 3,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "intermediate_size": 80,
        "shared_intermediate_size": 80,
    },
    "granitemoehybrid-attention": {
        **_GRANITE_HYBRID,
        "layer_types": ["full_attention"] * 2,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "intermediate_size": 80,
        "shared_intermediate_size": 80,
        "position_embedding_type": "rope",
    },
    "falcon_h1": {
        "mamba_d_ssm": 128,
        "mamba_n_groups": 2,
        "mamba_rms_norm": True,
        "mamba_norm_before_gate": False,
    },
    "falcon_h1-plain": {"mamba_d_ssm": 96, "mamba_d_head": 12, "mamba_norm_before_gate": False},
    # With larger time steps at the start, none is below the least one, which llama.cpp does not have
    "nemotron_h": {**_NEMOTRON_H, "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"]},
    "nemotron_h-experts": {
        **_NEMOTRON_H,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "moe_shared_expert_intermediate_size": 48,
        "moe_latent_size": 32,
        "routed_scaling_factor": 2.5,
    },
    "jamba": {
        "num_hidden_layers": 5,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_dt_rank": 8,
    },
    "granitemoeshared": {"shared_intermediate_size": 48, "logits_scaling": 2.0},
    "gemma": {"tie_word_embeddings": True},
    "minimax_m2": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "falcon_mamba": {"intermediate_size": 128, "mixer_rms_eps": 1e-5},
    "mamba": {"intermediate_size": 128},
    "mamba2": {"num_heads": 16, "head_dim": 8, "n_groups": 2},
    "granitemoe": {
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "llama4_text": {"num_hidden_layers": 4, "intermediate_size_mlp": 80, "interleave_moe_layer_step": 2},
    "nemotron": {},
    "arcee": {},
    "dots1": {
        "num_key_value_heads": 4,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "n_shared_experts": 2,
        "sliding_window": None,
    },
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {"num_experts_per_tok": [2, 2]},
    "lfm2": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "glm4_moe": {"n_group": 2, "num_hidden_layers": 3, "routed_scaling_factor": 1.5, "use_qk_norm": True},
    # the width of the shared experts that the converter assumes: that of the MLP divided by the key-value heads
    "ernie4_5_moe": {"intermediate_size": 128, "num_hidden_layers": 3},
    "deepseek_v2": {**_LATENT, "rope_parameters": _YARN},
    "deepseek_v3": {**_LATENT, "n_group": 2, "n_routed_experts": 8},
    "qwen3_next": {"num_hidden_layers": 4, "vocab_size": 292, "mlp_only_layers": None},
    "qwen3_5_text": _QWEN35,
    "qwen3_5_moe_text": _QWEN35,
}


_NOT_QUANTIZED = re.compile(r"ffn_gate_inp|ssm_conv1d|ssm_a$|ssm_d$|ssm_norm|shortconv\.conv|exp_probs_b")
# Parameters that are all the same number when a model is made, so that some are without effect -> how far they are
# moved. Gemma 3n's scale is 0 and hides the inputs of layers. Moved by 0.2, a relative change of 1e-7 in its weights is
# one of 1.9e-3 in its logits, if GELU is a table of 16-bit numbers as in llama.cpp; with GELU itself, of 3.4e-5
_CONSTANT = {
    "router.scale": 0.2,
    "router.per_expert_scale": 0.2,
    "self_attn.sinks": 0.2,
    "altup.correct_output_scale": 0.1,
    "z_L_init": 0.2,
}


def save(folder: Path, family: str, **changes: Any) -> Path:
    """The model of a family or type in the Hugging Face layout, such as a GGUF file can hold."""
    if family not in TYPES:
        return models.save(folder, family, **{**CHANGES.get(family, {}), **changes})
    kind = CONFIG_MAPPING[family.partition("-")[0]]
    config = architectures.small(kind, architectures.SIZES, {kind.model_type: TYPES[family] | changes})
    with torch.random.fork_rng():
        torch.manual_seed(len(family))  # the parameters that are not drawn anew, such as A_log, come from this
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    architectures.draw(model, len(family))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            for ending, far in _CONSTANT.items():
                if name.endswith(ending):
                    weight.add_(torch.linspace(-far, far, weight.numel(), device="cpu").view_as(weight))
    for name, buffer in persistent(model):
        if name.endswith("layer_scalar"):
            buffer.fill_(0.75)
        elif "bias" in name:  # what corrects the scores of experts
            buffer.copy_(torch.linspace(-0.2, 0.2, buffer.numel()).view_as(buffer))
    model.eval().save_pretrained(folder)
    models.tokenizer().save_pretrained(folder)
    return folder


def numbered(folder: Path) -> Path:
    """The folder, after each of its weights was replaced by whole numbers that tell rows, columns and tensors apart."""
    path = folder / "model.safetensors"
    tensors = {}
    for i, (name, tensor) in enumerate(sorted(load_file(path).items())):
        numbers = (torch.arange(tensor.numel()) + 17 * i) % 251 - 125
        tensors[name] = numbers.view(tensor.shape).to(tensor.dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def halved(folder: Path) -> Path:
    """The folder, after each of its weights was rounded to float16."""
    path = folder / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}), encoding="utf-8")
    return folder


def digest(file: GgufFile) -> str:
    """A hash of the names, shapes and values of all tensors of a file. Dimensions of 1 before others are as none."""
    found = hashlib.sha256()
    for name, entry in sorted(Joined(file, {}, {}).entries.items()):
        found.update(f"{name} {entry.shape} ".encode())
        found.update(file.get(name).float().numpy().tobytes())
    return found.hexdigest()


def keys_of(file: GgufFile) -> dict[str, Any]:
    """The keys of the file's architecture, as JSON has them."""
    name = file.metadata["general.architecture"]
    return {
        key: value.tolist() if isinstance(value, np.ndarray) else value
        for key, value in sorted(file.metadata.items())
        if key.startswith((f"{name}.", "xielu."))
    }


def golden() -> dict[str, Any]:
    """Family or type -> digest and keys of the file that llama.cpp's converter made of its numbered model."""
    found: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return found


def written(folder: Path, path: Path, kind: str = "f32", *, norms: str = "f32") -> Path:
    """The model of a folder as a GGUF file: matrices in type `kind`, vectors in `norms`."""
    head = header_of(folder)
    model = models.original(folder)
    experts.separate(model)
    weights: dict[str, tuple[Entry, Tensor]] = {}
    own = dict([*model.named_parameters(), *persistent(model)])  # ties once
    listed = names.lists_of(head.routes, {name: each for name, each in own.items() if head.routes[name].listed})
    for name, parameter in own.items():
        route = head.routes[name]
        if route.listed is not None:
            continue
        tensor = route.to_file(parameter.data).contiguous()
        matrix = tensor.dim() == 2 and not _NOT_QUANTIZED.search(route.name)
        plain = kind if matrix else norms
        if plain in PLAIN:
            weights[name] = Entry(route.name, plain, tuple(tensor.shape)), tensor.to(getattr(torch, PLAIN[plain][1]))
        else:
            packed = Method().quantize(tensor.float(), parse(plain), None).weight
            weights[name] = Entry(route.name, plain, tuple(tensor.shape)), packed.parts["blocks"]
    entries = head.extra_entries
    whole: dict[str, tuple[Entry, Tensor]] = {}
    for name in weights:
        entry, tensor = weights[name]
        if head.routes[name].expert is not None:  # they come in order
            each = [tensor for other, tensor in weights.values() if other.name == entry.name]
            shape = head.routes[name].shape_of_all(entry.shape, len(each))
            entry, tensor = entry._replace(shape=shape), head.routes[name].joined(each)
        if (split := head.routes[name].split) is not None:
            pieces = zip(split.entries(entry), split.cut(tensor), strict=True)
            whole |= {piece.name: (piece, cut) for piece, cut in pieces}
            continue
        whole[entry.name] = entry, tensor
    entries += [entry for entry, _ in whole.values()]
    with GgufWriter(path, head.metadata | listed, entries) as writer:
        for name, tensor in head.extra.items():
            writer.add(name, tensor)
        for entry, tensor in whole.values():
            writer.add(entry.name, tensor)
    return path


def renamed(path: Path, out: Path, name: str) -> Path:
    """A copy of a file as one of another architecture."""
    file = GgufFile(path)
    old = f"{file.metadata['general.architecture']}."
    keys = {key.replace(old, f"{name}.", 1) if key.startswith(old) else key: v for key, v in file.metadata.items()}
    with GgufWriter(out, keys | {"general.architecture": name}, list(file.entries.values())) as writer:
        for each in file.entries:
            writer.add(each, file.get(each))
    return out


def header_of(folder: Path | str) -> header.Header:
    """The header of the model in a folder."""
    source = locate(folder)
    config = AutoConfig.from_pretrained(source.folder)
    return header.of(config, load_tokenizer(source), source.name, source.folder)


def ids(seed: int = 0, length: int = 40) -> Tensor:
    return torch.randint(3, models.VOCAB, (2, length), generator=torch.Generator().manual_seed(seed))


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2")
KINDS = (*FAMILIES, *TYPES)
# Whose files are read as another type that computes the same
_OTHER = (
    *(
        "granitemoehybrid-attention",
        "exaone",
        "internlm3",
        "iquestcoder",
        "glm4_moe_lite",
        "solar_open",
        "sarvam_mla",
        "gemma4_unified_text",
    ),
)
SAME = tuple(kind for kind in TYPES if kind not in _OTHER)
TYPE_OF = {"gemma3": "gemma3_text"}  # transformers' types of families with other names

AWKWARD = (
    "Hello world",
    "  two  spaces \n\n\ttabs   ",
    "👍🏽 emoji 🏳️‍🌈 👩‍👩‍👧 joined",
    "def f(x):\n    return x**2  # ünïcödé\n\n\n\tif x != None: pass\r\n",
    "日本語のテキスト 中文 한국어 العربية हिन्दी ไทย עברית Ελληνικά",
    "1234567890 12,345.678 ½ ² Ⅷ",
    "don't I'LL we've 'tis 'S",
    "\u00a0no-break\u200bzero\u3000wide",
    "a\r\nb\r\n\r\nc   \n   d",
    "e\u0301 é ﬁ",
    "\x01\x7f\ufffd",
    "<s>in text</s> <|im_start|>user\nhi<|im_end|>",
    " ",
)

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_SPLITS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "tekken": rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt-4o": rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDS}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDS}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def with_tokenizer(folder: Path, kind: str, **changes: Any) -> Path:
    """A small Llama in a folder, with a tokenizer of that kind trained on the awkward text and some sentences."""
    spm = kind in ("sentencepiece", "gemma")
    made = Tokenizer(
        token_models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>") if spm else token_models.BPE()
    )
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    text = [models.sentences(100), *AWKWARD, *AWKWARD]
    if spm:
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        first = [normalizers.Prepend("▁")] if kind == "sentencepiece" else []
        made.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
        undone = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        made.decoder = decoders.Sequence([*undone, decoders.Strip(" ", 1, 0)] if first else undone)
        text = [models.sentences(100)] * 3  # other scripts fall back to bytes
    else:
        if kind == "gpt2":
            made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        else:
            split = pre_tokenizers.Split(Regex(_SPLITS[kind]), behavior="isolated")
            made.pre_tokenizer = pre_tokenizers.Sequence(
                [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
            )
        made.decoder = decoders.ByteLevel()
        if kind == "qwen2":
            made.normalizer = normalizers.NFC()
    alphabet = [] if spm else pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        text,
        trainers.BpeTrainer(vocab_size=900, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    settings = json.loads(made.to_str())
    settings["added_tokens"] = [each for each in settings["added_tokens"] if not each["content"].startswith("<0x")]
    settings["model"]["ignore_merges"] = kind in ("llama-bpe", "tekken")
    if spm:
        settings["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        }
    models.save(folder, "llama", vocab_size=made.get_vocab_size() + 3)
    make: Any = PreTrainedTokenizerFast  # whose constructor is not typed
    backend = Tokenizer.from_str(json.dumps(settings))
    make(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **changes).save_pretrained(
        folder
    )
    return folder
