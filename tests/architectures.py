"""Every type of model that transformers builds as a causal LM: how to make a tiny one, and which are not served yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fewbit.nn.layers import QLinear
from tests import models

TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))

# A config of any type is called with those of these that it has.
_HALF = ["linear_attention", "full_attention"]
SIZES: dict[str, Any] = {
    "vocab_size": models.VOCAB,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "num_experts_per_tok", "num_experts_per_token"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "linear_key_head_dim", "linear_value_head_dim", "mamba_d_head"), 16),
    **dict.fromkeys(("linear_head_dim", "index_head_dim", "q_lora_rank", "kv_lora_rank", "sliding_window"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "mamba_d_state", "state_size", "time_step_rank"), 8),
    **dict.fromkeys(("mamba_n_heads", "index_topk"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), models.CONTEXT),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "linear_num_value_heads"), 4),
    **dict.fromkeys(("linear_num_heads", "conv_kernel", "ssm_state_size"), 4),
    **dict.fromkeys(("mamba_expand", "expand", "index_n_heads"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
# The width that is turned. Latents are expanded to keys and values of every head.
_MLA = {"head_dim": 8, "num_key_value_heads": 4}
_HYBRID = {"layer_types": _HALF}
# What a type needs besides or in place of these.
MORE: dict[str, dict[str, Any]] = {
    "axk1": _MLA,
    "axk2": _MLA,
    "bailing_hybrid": {**_HYBRID, "mlp_layer_types": ["dense", "sparse"]},
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"layer_types": ["full_attention"] * 2},
    "deepseek_v3": {**_MLA, "first_k_dense_replace": 1},
    "deepseek_v32": {**_MLA, "first_k_dense_replace": 1},
    "dory": {"num_hidden_layers": 6, "n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": models.UNLIKE["gemma3n"] | {"altup_num_inputs": 4},
    "gemma4_unified_assistant": {"backbone_hidden_size": 32},
    "gemma4_text": {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": models.VOCAB},
    "glm4_moe_lite": _MLA,
    "glm_moe_dsa": _MLA,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {**_HYBRID, "mlp_layer_types": ["dense", "sparse"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {**_MLA, "zero_expert_num": 2},
    "mamba2": {
        "num_heads": 16,
        "head_dim": 8,
        "n_groups": 1,
    },
    "nemotron_h": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "moe", "attention", "mlp"],
        "mamba_num_heads": 16,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "moe_shared_expert_intermediate_size": 32,
    },
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_5_text": _HYBRID,
    "qwen3_next": _HYBRID,
    "qwen4_exp_text": _HYBRID,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [32, 32],
        "attn_layers": ["local", "lsh"],
        "attention_head_size": 16,
        "feed_forward_size": 96,
        "num_buckets": 4,
    },
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "youtu": _MLA,
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}

# Types that no tiny model is made of here, and what happens instead.
NOT_BUILT: dict[str, str] = {
    "blt": "too large",
    "cohere_compass_text": "full_attention",
    "dbrx": "rope_theta",
    "dots3_note": "per_layer_config",
    "gemma3n": "PIL|timm",
    "gemma4_assistant": "hidden_size_per_layer_input must be 0",
    "inkling2_loop_text": "negative dimension",
    "inkling2_text": "negative dimension",
    "musicgen": "no attribute 'dropout'",
    "musicgen_melody": "no attribute 'dropout'",
    "qwen4_exp": "NoneType",
    "qwen4_exp_text": "NoneType",
}
# Types that cannot be quantized while they are loaded, and the error. Most of these tiny models cannot be loaded by
# transformers itself, or cannot be run from ids alone.
NOT_ON_LOAD: dict[str, str] = {
    "emu3": "Unrecognized configuration class",
    "mllama": "Unrecognized configuration class",
    "rwkv": "is packed, and cannot be changed",  # it divides weights before the first token
}
_FUSED = "fused experts .* cannot be quantized yet"
_SHARED = "blocks that share weights cannot be quantized yet"
# Types that fewbit refuses, and with what words.
REFUSED: dict[str, str] = {
    "rwkv": "changes rwkv.blocks.0.attention.output.weight in its forward pass",
    "zamba": _SHARED,
    "zamba2": _SHARED,
}
# The same for single plans.
_CALIBRATED: dict[str, str] = {
    "gemma4_unified_assistant": "shared_kv_states cannot be None",  # it drafts for another model
    "dory": r"runs model.layers.\d+ \d+ times",
    "hrm_text": r"runs model.L_module.layers.\d+ \d+ times",
    "reformer": "gives its blocks no hidden states",
}
REFUSED_BY = {(kind, plan): words for kind, words in _CALIBRATED.items() for plan in ("gptq-4bit", "awq-4bit")}
_LARGEST = 20_000_000  # parameters


def cases(types: Sequence[str], plans: Sequence[str], quick: Callable[[str, str], bool]) -> list[object]:
    """Every type by every plan, as parameters of a test. Those that are not `quick` run in `make test-all` alone."""
    return [
        pytest.param(kind, plan, id=f"{kind}-{plan}", marks=() if quick(kind, plan) else pytest.mark.slow)
        for kind in types
        for plan in plans
    ]


def today(types: Sequence[str]) -> Sequence[str]:
    """A tenth of all types: another one each day."""
    return types[datetime.now(UTC).toordinal() % 10 :: 10]


def refusal(kind: str, plan: str) -> str | None:
    """A pattern of the error by which `fewbit.quantize` refuses that type; None if it serves it."""
    return REFUSED_BY.get((kind, plan)) or REFUSED.get(kind)


def logits(model: Any, ids: Tensor) -> Tensor:
    """The logits of `model`; of one that drafts for another model, with random states of that one."""
    if not hasattr(model.config, "backbone_hidden_size"):
        return models.logits(model, ids)
    generator, shared = torch.Generator().manual_seed(2), {}

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    for layer in model.model.layers:
        own = layer.self_attn
        heads = own.config.num_attention_heads // own.num_key_value_groups
        states = [drawn(1, heads, ids.shape[1], own.head_dim) for _ in range(2)]
        shared[own.layer_type] = (states[0], states[1])
    given = drawn(1, ids.shape[1], 2 * model.config.backbone_hidden_size)
    places = torch.arange(ids.shape[1])[None]
    with torch.inference_mode():
        found: Tensor = model(inputs_embeds=given, position_ids=places, shared_kv_states=shared).logits
    return found


def check_small(kind: str) -> None:
    """Build the model without weights. ValueError if it is too large to be made in a test."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(kind))
    if sum(p.numel() for p in model.parameters()) > _LARGEST:
        raise ValueError("too large")


def config(kind: str) -> Any:
    """A config of that type with small sizes."""
    return small(CONFIG_MAPPING[kind], SIZES, MORE)


def small(make: Any, sizes: dict[str, Any], special: dict[str, dict[str, Any]]) -> Any:
    """A config of the class `make` with those of `sizes` that it has, and what `special` holds for its type."""
    plain = make()
    known = set(plain.to_dict()) | set(getattr(make, "attribute_map", {}))
    more = {name: value for name, value in special.get(make.model_type or make.__name__, {}).items() if name != "kind"}
    inner = {
        name: small(type(own), sizes, special)
        for name in getattr(make, "sub_configs", {})
        if (own := getattr(plain, name, None)) is not None
    }
    return make(**{name: value for name, value in sizes.items() if name in known} | inner | more)


def save(folder: Path, kind: str) -> Path:
    """A random model of that type and a tokenizer, in the Hugging Face layout."""
    check_small(kind)
    with seeded():
        model = AutoModelForCausalLM.from_config(config(kind), dtype=torch.float32)
    draw(model, len(kind))
    model.eval().save_pretrained(folder)
    models.tokenizer().save_pretrained(folder)
    return folder


@contextmanager
def seeded() -> Iterator[None]:
    """Inside this context, PyTorch's own generator is at a fixed state: `draw` leaves decay rates as they are made."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def draw(model: nn.Module, seed: int) -> None:
    """Draw all matrices anew, and move norms and biases a little, so that no part of the model does nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            fresh = torch.randn(weight.shape, generator=generator)
            if weight.dim() > 1:
                weight.copy_(fresh * weight.shape[-1] ** -0.5)
            elif "norm" in name or "bias" in name:
                weight.add_(0.05 * fresh)


def with_values(model: Any, quantized: nn.Module) -> Any:
    """transformers' own `model` with the dequantized weights of the packed linears of `quantized`."""
    for name, module in quantized.named_modules():
        if isinstance(module, QLinear):
            put(model, name, module.qtensor().dequantize())
    return model


def put(model: nn.Module, name: str, weight: Tensor) -> None:
    """Give the linear `name` of transformers' own model this weight [N, K]; experts are fused there."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        if name in modules:
            models.linear_weight(modules[name]).copy_(weight)
            return
        parent, expert, leaf = name.rsplit(".", 2)
        experts: Any = modules[parent]
        transposed = getattr(experts, "is_transposed", type(experts).__name__ == "Llama4TextExperts")
        if leaf == "linear" or hasattr(experts, "gate_proj"):  # JetMoe; Inkling's shared experts
            place = getattr(experts, "weight" if leaf == "linear" else leaf)[int(expert)]
        elif leaf in ("down_proj", "w2"):
            place = experts.down_proj[int(expert)]
        elif not hasattr(experts, "gate_up_proj"):
            place = experts.up_proj[int(expert)]
        else:
            both = experts.gate_up_proj[int(expert)]
            both = both.T if transposed else both
            up, half = leaf in ("up_proj", "w3"), len(both) // 2
            concatenated = getattr(experts, "is_concatenated", True)
            place = both[up * half : (up + 1) * half] if concatenated else both[int(up) :: 2]
            place = place.T if transposed else place
        place.copy_(weight.T if transposed else weight)
