"""Architectures with attention in every layer and a mixture of experts."""

from __future__ import annotations

from dataclasses import replace

from fewbit.models.gguf.architecture import Architecture
from fewbit.models.gguf.rows.dense import LLAMA_ROW
from fewbit.models.gguf.rows.shared import (
    ALL_SPARSE,
    BIAS,
    EXPERTS,
    GRANITE,
    HEAD_NORMS,
    LOCAL_EXPERTS,
    MODEL,
    NO_BIAS,
    NO_MLP,
    QWEN_EXPERTS,
    SHARED_COUNTS,
    SHARED_EXPERT,
    SQUARE,
)

ROWS = (
    replace(
        LLAMA_ROW,
        model_type="mixtral",
        cls="MixtralForCausalLM",
        block={
            **NO_MLP,
            "mlp.gate": "ffn_gate_inp",
            "mlp.experts.*.w1": "ffn_gate_exps",
            "mlp.experts.*.w3": "ffn_up_exps",
            "mlp.experts.*.w2": "ffn_down_exps",
        },
        biases={},
        counts=LOCAL_EXPERTS,
        experts="num_local_experts",
        window=True,
        when="expert_count",
    ),
    replace(
        LLAMA_ROW,
        name="granitemoe",
        model_type="granitemoe",
        cls="GraniteMoeForCausalLM",
        block={
            **NO_MLP,
            "block_sparse_moe.router": "ffn_gate_inp",
            "block_sparse_moe.experts.*.gate_proj": "ffn_gate_exps",
            "block_sparse_moe.experts.*.up_proj": "ffn_up_exps",
            "block_sparse_moe.experts.*.down_proj": "ffn_down_exps",
        },
        biases=BIAS,
        numbers=GRANITE,
        counts=LOCAL_EXPERTS,
        experts="num_local_experts",
    ),
    Architecture(
        "qwen2moe",
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        MODEL,
        {
            **NO_MLP,
            **QWEN_EXPERTS,
            **SHARED_EXPERT,
        },
        keys=SQUARE,
        required={**ALL_SPARSE, "norm_topk_prob": False},
        counts=SHARED_COUNTS,
        experts="num_experts",
        biases={"qkv_bias": "blk.0.attn_q.bias"},
        untied=True,
    ),
    Architecture(
        "qwen3moe",
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        MODEL,
        NO_MLP | HEAD_NORMS | QWEN_EXPERTS,
        required={**ALL_SPARSE, "norm_topk_prob": True},
        counts={**EXPERTS, "moe_intermediate_size": "expert_feed_forward_length"},
        experts="num_experts",
        biases=BIAS,
    ),
    Architecture(
        "olmoe",
        "olmoe",
        "OlmoeForCausalLM",
        MODEL,
        NO_MLP | HEAD_NORMS | QWEN_EXPERTS,
        keys=SQUARE,
        required={**NO_BIAS, "norm_topk_prob": False, "clip_qkv": None},
        counts=EXPERTS,
        experts="num_experts",
        untied=True,
        grouped=False,
    ),
)
