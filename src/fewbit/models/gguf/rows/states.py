"""Architectures with state spaces (Mamba), in all layers or in some."""

from __future__ import annotations

from dataclasses import replace

from fewbit.models.gguf.architecture import Architecture, Cut, Factor, Piece
from fewbit.models.gguf.rows.dense import LLAMA_ROW
from fewbit.models.gguf.rows.experts import GRANITE_SHARED_ROW
from fewbit.models.gguf.rows.shared import ATTENTION, EXPERTS, GRANITE, MEAN_EPSILON, NO_BIAS, SQUARE

_NO_LIMIT = (0.0, float("inf"))  # of time steps
MAMBA_ROW = Architecture(
    "mamba",
    "mamba",
    "MambaForCausalLM",
    {"backbone.embeddings": "token_embd", "backbone.norm_f": "output_norm", "lm_head": "output"},
    {
        "norm": "attn_norm",
        "mixer.in_proj": "ssm_in",
        "mixer.conv1d": "ssm_conv1d",
        "mixer.x_proj": "ssm_x",
        "mixer.dt_proj": "ssm_dt",
        "mixer.out_proj": "ssm_out",
    },
    parameters={"mixer.A_log": "ssm_a", "mixer.D": "ssm_d"},
    layers=("backbone.layers",),
    negative_exp=frozenset({"ssm_a"}),
    squeezed=frozenset({"ssm_conv1d"}),
    keys={
        "num_attention_heads": "",
        "max_position_embeddings": "",
        "rms_norm_eps": "layer_norm_epsilon",
    },
    fixed={"expand": 2},
    required={"use_bias": False, "use_conv_bias": True},
    twice="intermediate_size",
    counts={
        "intermediate_size": "ssm.inner_size",
        "conv_kernel": "ssm.conv_kernel",
        "state_size": "ssm.state_size",
        "time_step_rank": "ssm.time_step_rank",
    },
    constants={"ssm.dt_b_c_rms": False},
)
# The same with norms without weights in the mixer
FALCON_MAMBA_ROW = replace(
    MAMBA_ROW,
    model_type="falcon_mamba",
    cls="FalconMambaForCausalLM",
    equal={"mixer_rms_eps": "layer_norm_epsilon"},
    constants={"ssm.dt_b_c_rms": True},
    when=("ssm.dt_b_c_rms",),
)
MAMBA2_ROW = replace(
    MAMBA_ROW,
    name="mamba2",
    model_type="mamba2",
    cls="Mamba2ForCausalLM",
    block={
        "norm": "attn_norm",
        "mixer.in_proj": "ssm_in",
        "mixer.conv1d": "ssm_conv1d",
        "mixer.norm": "ssm_norm",
        "mixer.out_proj": "ssm_out",
    },
    parameters={"mixer.A_log": "ssm_a", "mixer.D": "ssm_d", "mixer.dt_bias": "ssm_dt.bias"},
    matrices={"ssm_a": "num_heads", "ssm_d": "num_heads", "ssm_norm": "n_groups"},
    fixed={},
    required={"use_bias": False, "use_conv_bias": True, "time_step_limit": _NO_LIMIT},
    twice="",
    counts={
        "conv_kernel": "ssm.conv_kernel",
        "state_size": "ssm.state_size",
        "num_heads": "ssm.time_step_rank",
        "n_groups": "ssm.group_count",
    },
    products={"ssm.inner_size": ("expand", "hidden_size")},
    quotients={
        "expand": ("ssm.inner_size", "embedding_length"),
        "head_dim": ("ssm.inner_size", "ssm.time_step_rank"),
    },
    constants={},
)

# Layers with a state space, and others with attention but no positions
_MIXER = {
    "mamba.in_proj": "ssm_in",
    "mamba.conv1d": "ssm_conv1d",
    "mamba.norm": "ssm_norm",
    "mamba.out_proj": "ssm_out",
}
_HALF = (("shared_intermediate_size",),)
GRANITE_HYBRID_ROW = replace(
    GRANITE_SHARED_ROW,
    name="granitehybrid",
    model_type="granitemoehybrid",
    cls="GraniteMoeHybridForCausalLM",
    block={
        **GRANITE_SHARED_ROW.block,
        **_MIXER,
    },
    parameters={"mamba.A_log": "ssm_a", "mamba.D": "ssm_d", "mamba.dt_bias": "ssm_dt.bias"},
    when=("expert_count",),
    negative_exp=frozenset({"ssm_a"}),
    squeezed=frozenset({"ssm_conv1d"}),
    matrices={"ssm_a": "mamba_n_heads", "ssm_d": "mamba_n_heads", "ssm_norm": "mamba_n_groups"},
    required={
        **NO_BIAS,
        "mamba_expand": 2,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "time_step_limit": _NO_LIMIT,
    },
    counts={
        **GRANITE_SHARED_ROW.counts,
        "mamba_d_conv": "ssm.conv_kernel",
        "mamba_d_state": "ssm.state_size",
        "mamba_n_heads": "ssm.time_step_rank",
        "mamba_n_groups": "ssm.group_count",
    },
    products={"ssm.inner_size": ("mamba_expand", "hidden_size")},
    quotients={
        "mamba_expand": ("ssm.inner_size", "embedding_length"),
        "mamba_d_head": ("ssm.inner_size", "ssm.time_step_rank"),
    },
    constants={"rope.scaling.finetuned": False},
    biases={},
    without_attention="linear_attention",
    unturned=True,
)
_DENSE = {
    "shared_mlp.input_linear": "ffn_gate_up",
    "shared_mlp.output_linear": "ffn_down",
}
_DENSE_CUT = {"ffn_gate_up": Cut("", (Piece("ffn_gate", _HALF), Piece("ffn_up", _HALF)))}
# llama.cpp's converter writes the width of shared experts for a model without experts too
_DENSE_WIDTH = {"expert_shared_feed_forward_length": ("shared_intermediate_size",)}
_NO_EXPERTS = {"expert_count": 0, "expert_used_count": 0}
# Attention and a state space side by side
_STATES = ("mamba_n_groups", "mamba_d_state")
_FACTORS = {
    "attention_in_multiplier": Factor(("attn_q", "attn_k", "attn_v")),
    "attention_out_multiplier": Factor(("attn_output",)),
    "embedding_multiplier": Factor(("token_embd",)),
    "key_multiplier": Factor(("attn_k",)),
    "lm_head_multiplier": Factor(("output",)),
    "ssm_in_multiplier": Factor(("ssm_in",)),
    "ssm_out_multiplier": Factor(("ssm_out",)),
    "mlp_multipliers": Factor(("ffn_gate", "ffn_down"), each=True),
    "ssm_multipliers": Factor(
        ("ssm_in",), rows=(("mamba_d_ssm",), ("mamba_d_ssm",), _STATES, _STATES, ("mamba_n_heads",))
    ),
}
FALCON_H1_ROW = Architecture(
    "falcon-h1",
    "falcon_h1",
    "FalconH1ForCausalLM",
    {"model.embed_tokens": "token_embd", "model.final_layernorm": "output_norm", "lm_head": "output"},
    {
        **ATTENTION,
        **_MIXER,
        "feed_forward.gate_proj": "ffn_gate",
        "feed_forward.up_proj": "ffn_up",
        "feed_forward.down_proj": "ffn_down",
    },
    parameters={**GRANITE_HYBRID_ROW.parameters, "pre_ff_layernorm.weight": "ffn_norm"},
    negative_exp=GRANITE_HYBRID_ROW.negative_exp,
    squeezed=GRANITE_HYBRID_ROW.squeezed,
    matrices=GRANITE_HYBRID_ROW.matrices,
    factors=_FACTORS,
    required={
        **NO_BIAS,
        "mlp_bias": False,
        "projectors_bias": False,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "mamba_norm_before_gate": False,
        "time_step_limit": _NO_LIMIT,
    },
    counts={
        "mamba_d_ssm": "ssm.inner_size",
        "mamba_d_conv": "ssm.conv_kernel",
        "mamba_d_state": "ssm.state_size",
        "mamba_n_heads": "ssm.time_step_rank",
        "mamba_n_groups": "ssm.group_count",
    },
    quotients={"mamba_d_head": ("ssm.inner_size", "ssm.time_step_rank")},
    biases={"mamba_rms_norm": "blk.0.ssm_norm.weight"},
)
# Layers that are a state space, attention or an MLP
_NEMOTRON = {
    "norm": "attn_norm",
    "mixer.in_proj": "ssm_in",
    "mixer.conv1d": "ssm_conv1d",
    "mixer.norm": "ssm_norm",
    "mixer.out_proj": "ssm_out",
    "mixer.q_proj": "attn_q",
    "mixer.k_proj": "attn_k",
    "mixer.v_proj": "attn_v",
    "mixer.o_proj": "attn_output",
}
NEMOTRON_H_ROW = Architecture(
    "nemotron_h",
    "nemotron_h",
    "NemotronHForCausalLM",
    {"model.embeddings": "token_embd", "model.norm_f": "output_norm", "lm_head": "output"},
    {**_NEMOTRON, "mixer.up_proj": "ffn_up", "mixer.down_proj": "ffn_down"},
    parameters={"mixer.A_log": "ssm_a", "mixer.D": "ssm_d", "mixer.dt_bias": "ssm_dt.bias"},
    permuted=True,
    negative_exp=GRANITE_HYBRID_ROW.negative_exp,
    squeezed=GRANITE_HYBRID_ROW.squeezed,
    matrices={"ssm_a": "mamba_num_heads", "ssm_d": "mamba_num_heads", "ssm_norm": "n_groups"},
    chosen={"layer_types": frozenset({"linear_attention", "full_attention", "mlp"})},
    activation="",
    keys={
        "layer_types": "layers_block_type",
        "rms_norm_eps": "layer_norm_epsilon",
    },
    required={
        **NO_BIAS,
        "use_bias": False,
        "mlp_bias": False,
        "use_conv_bias": True,
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
    },
    counts={
        "conv_kernel": "ssm.conv_kernel",
        "ssm_state_size": "ssm.state_size",
        "mamba_num_heads": "ssm.time_step_rank",
        "n_groups": "ssm.group_count",
    },
    products={"ssm.inner_size": ("mamba_num_heads", "mamba_head_dim"), "rope.dimension_count": ("head_dim",)},
    quotients={"mamba_head_dim": ("ssm.inner_size", "ssm.time_step_rank")},
    constants={"rope.scaling.finetuned": False},
    epsilon=MEAN_EPSILON,
    without_attention="linear_attention",
    mlp_alone="mlp",
    no_positions=True,
    any_length=True,
    differs="llama.cpp does not raise time steps to `time_step_min`, so its logits may differ",
)
NEMOTRON_H_MOE_ROW = replace(
    NEMOTRON_H_ROW,
    name="nemotron_h_moe",
    block={
        **_NEMOTRON,
        "mixer.gate": "ffn_gate_inp",
        "mixer.experts.*.up_proj": "ffn_up_exps",
        "mixer.experts.*.down_proj": "ffn_down_exps",
        "mixer.shared_experts.up_proj": "ffn_up_shexp",
        "mixer.shared_experts.down_proj": "ffn_down_shexp",
        "mixer.fc1_latent_proj": "ffn_latent_down",
        "mixer.fc2_latent_proj": "ffn_latent_up",
    },
    parameters={**NEMOTRON_H_ROW.parameters, "mixer.gate.e_score_correction_bias": "exp_probs_b.bias"},
    chosen={"layer_types": frozenset({"linear_attention", "full_attention", "moe"})},
    keys={**NEMOTRON_H_ROW.keys, "intermediate_size": "moe_intermediate_size"},
    numbers={"routed_scaling_factor": ("expert_weights_scale", 1.0)},
    counts={
        **NEMOTRON_H_ROW.counts,
        "n_routed_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "moe_shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    },
    without_lora=frozenset(("ffn_latent_down", "ffn_latent_up")),
    optional_counts={"moe_latent_size": "moe_latent_size"},
    products={**NEMOTRON_H_ROW.products, "expert_feed_forward_length": ("moe_intermediate_size",)},
    integers={
        "n_shared_experts": ("expert_shared_count", 1),
        "n_group": ("expert_group_count", 1),
        "topk_group": ("expert_group_used_count", 1),
    },
    flags={"norm_topk_prob": "expert_weights_norm"},
    experts="n_routed_experts",
    mlp_alone="moe",
)
JAMBA_ROW = Architecture(
    "jamba",
    "jamba",
    "JambaForCausalLM",
    {"model.embed_tokens": "token_embd", "model.final_layernorm": "output_norm", "lm_head": "output"},
    {
        **ATTENTION,
        "mamba.in_proj": "ssm_in",
        "mamba.conv1d": "ssm_conv1d",
        "mamba.x_proj": "ssm_x",
        "mamba.dt_layernorm": "ssm_dt_norm",
        "mamba.dt_proj": "ssm_dt",
        "mamba.b_layernorm": "ssm_b_norm",
        "mamba.c_layernorm": "ssm_c_norm",
        "mamba.out_proj": "ssm_out",
        "pre_ff_layernorm": "ffn_norm",
        "feed_forward.gate_proj": "ffn_gate",
        "feed_forward.up_proj": "ffn_up",
        "feed_forward.down_proj": "ffn_down",
        "feed_forward.router": "ffn_gate_inp",
        "feed_forward.experts.*.gate_proj": "ffn_gate_exps",
        "feed_forward.experts.*.up_proj": "ffn_up_exps",
        "feed_forward.experts.*.down_proj": "ffn_down_exps",
    },
    parameters={"mamba.A_log": "ssm_a", "mamba.D": "ssm_d"},
    negative_exp=MAMBA_ROW.negative_exp,
    squeezed=MAMBA_ROW.squeezed,
    keys=SQUARE,
    required={"mamba_expand": 2, "mamba_conv_bias": True, "mamba_proj_bias": False},
    counts={
        **EXPERTS,
        "mamba_d_conv": "ssm.conv_kernel",
        "mamba_d_state": "ssm.state_size",
        "mamba_dt_rank": "ssm.time_step_rank",
    },
    products={"ssm.inner_size": ("mamba_expand", "hidden_size")},
    experts="num_experts",
    without_attention="linear_attention",
    attention_every=("attn_layer_period", "attn_layer_offset"),
    experts_every=("expert_layer_period", "expert_layer_offset"),
    no_positions=True,
)
_ATTENTION_ONLY = frozenset({"full_attention"})

ROWS = (
    NEMOTRON_H_ROW,
    NEMOTRON_H_MOE_ROW,
    JAMBA_ROW,
    FALCON_H1_ROW,
    FALCON_MAMBA_ROW,
    MAMBA_ROW,
    MAMBA2_ROW,
    # Models of this type without state spaces become files of Granite, and are read as such
    replace(
        LLAMA_ROW,
        name="granite",
        model_type="granitemoehybrid",
        cls="GraniteMoeHybridForCausalLM",
        block={
            **{name: ours for name, ours in LLAMA_ROW.block.items() if not name.startswith("mlp.")},
            **_DENSE,
        },
        cut=_DENSE_CUT,
        chosen={"num_local_experts": 0, "layer_types": _ATTENTION_ONLY},
        keys={"intermediate_size": "shared_intermediate_size"},
        required={"position_embedding_type": "rope"},
        numbers=GRANITE,
        products=_DENSE_WIDTH,
        constants={**_NO_EXPERTS, "rope.scaling.finetuned": True},
    ),
    replace(
        GRANITE_HYBRID_ROW,
        block={
            **{
                name: ours for name, ours in GRANITE_HYBRID_ROW.block.items() if "ffn" not in ours or ours == "ffn_norm"
            },
            **_DENSE,
        },
        cut=_DENSE_CUT,
        chosen={"num_local_experts": 0},
        when=(),
        keys={"intermediate_size": "shared_intermediate_size"},
        fixed={"num_local_experts": 0, "num_experts_per_tok": 0},
        counts={key: ours for key, ours in GRANITE_HYBRID_ROW.counts.items() if key.startswith("mamba")},
        products={**GRANITE_HYBRID_ROW.products, **_DENSE_WIDTH},
        constants={**GRANITE_HYBRID_ROW.constants, **_NO_EXPERTS},
        experts="",
    ),
    GRANITE_HYBRID_ROW,
)
