"""Models as the rules of llama.cpp's mixtures see them: names and widths of tensors, layers, heads, ties.

Rows do not matter to the rules, so all tensors have two; what is made of these for llama.cpp is small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from fewbit.plans.mixtures import Model, Shape

ROWS = 2


@dataclass(frozen=True)
class Example:
    arch: str
    layers: int
    heads: int
    kv_heads: int
    width: int
    hidden: int  # of the MLP
    tied: bool
    roles: Sequence[str] = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    widths: Mapping[str, int] = field(default_factory=dict)
    experts: int = 0

    def tensors(self) -> dict[str, Shape]:
        """Name without `.weight` -> shape of all that may be quantized."""
        found = {"token_embd": (ROWS, self.width)}
        if not self.tied:
            found["output"] = (ROWS, self.width)
        for i in range(self.layers):
            for role in self.roles:
                columns = self.hidden if role.startswith("ffn_down") else self.widths.get(role, self.width)
                found[f"blk.{i}.{role}"] = (ROWS, columns)
        return found

    def model(self) -> Model:
        return Model(self.arch, self.layers, self.heads // self.kv_heads, self.tied, experts=self.experts)


_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
_SPARSE = (*_ATTENTION, "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
_SHARED = (*_SPARSE, "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")
_FUSED = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")

EXAMPLES = {
    "tiny": Example("llama", 8, 4, 2, 256, 768, tied=True),
    "smollm2-135m": Example("llama", 30, 9, 3, 576, 1536, tied=True),
    "llama, 32 layers": Example("llama", 32, 32, 8, 256, 512, tied=False),
    "llama, no shared heads": Example("llama", 26, 8, 8, 256, 512, tied=False),
    "llama, 80 layers": Example("llama", 80, 64, 8, 256, 512, tied=False),
    "llama, 80 layers, no shared heads": Example("llama", 80, 64, 64, 256, 512, tied=False),
    "qwen2, 24 layers": Example("qwen2", 24, 14, 2, 896, 4864, tied=True),
    "qwen2, 80 layers": Example("qwen2", 80, 64, 8, 256, 512, tied=False),
    "qwen3, 28 layers": Example("qwen3", 28, 16, 8, 1024, 3072, tied=True, widths={"attn_output": 2048}),
    "gemma2, 26 layers": Example("gemma2", 26, 8, 4, 2304, 9216, tied=True, widths={"attn_output": 2048}),
    "gemma3, 18 layers": Example("gemma3", 18, 4, 1, 640, 2048, tied=True, widths={"attn_output": 1024}),
    "phi3, 32 layers": Example("phi3", 32, 32, 32, 3072, 8192, tied=False, roles=_FUSED),
    "falcon, 32 layers": Example("falcon", 32, 16, 2, 512, 2048, tied=False, roles=_FUSED),
    "gpt2": Example("gpt2", 12, 12, 12, 768, 3072, tied=True, roles=_FUSED),
    "mixtral, 32 layers": Example("llama", 32, 32, 8, 256, 512, tied=False, roles=_SPARSE, experts=8),
    "qwen3moe, 48 layers": Example("qwen3moe", 48, 32, 4, 256, 256, tied=False, roles=_SPARSE, experts=128),
    "qwen2moe, 24 layers": Example("qwen2moe", 24, 16, 16, 256, 512, tied=False, roles=_SHARED, experts=60),
    "olmoe, 16 layers": Example("olmoe", 16, 16, 16, 256, 256, tied=False, roles=_SPARSE, experts=3),
    "not by 32": Example("llama", 4, 4, 2, 48, 80, tied=False),
}


def summed_up(types: Mapping[str, str]) -> dict[str, str]:
    """Role -> its types over the layers: `4 q6_k, 2 q4_k`."""
    roles: dict[str, list[str]] = {}
    for name, kind in types.items():
        roles.setdefault(name.rpartition(".")[2], []).append(kind)
    return {
        role: ", ".join(f"{len(list(run))} {kind}" for kind, run in groupby(kinds)) for role, kinds in roles.items()
    }
