"""Tokens per second of a random mixture of experts with packed weights on an NVIDIA GPU.

    python -m benchmarks.experts_decode [--layers 8] [--new 128]

Three ways: a loop over experts, one call for all experts, and that call in a step that is recorded as a CUDA graph.
Weights are random, so the text means nothing; the last two ways must write the same tokens.
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fewbit.models import experts
from fewbit.models.decoding import decode
from fewbit.models.decoding.fuse import fuse
from fewbit.models.stacking import pack
from fewbit.nn.layers import QLinear
from fewbit.schemes.base import QTensor, parse


def packed_model(config: Any, spec: str) -> Any:
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    experts.separate(model)
    plain: dict[str, nn.Linear] = {}
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and ".layers." in name:
            plain[name] = linear
            layer = QLinear(linear.in_features, linear.out_features, linear.bias, name)
            layer.placeholders = {"weight": "weight"}
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer)

    def weight_of(name: str, layer: QLinear) -> QTensor:
        scheme, weight = parse(spec), plain.pop(name).weight.detach()
        layer.placeholders = {}
        return QTensor(scheme, (weight.shape[0], weight.shape[1]), scheme.pack(*scheme.nearest(weight)))

    pack(model, weight_of, lambda layers: None, torch.bfloat16, None)
    return model


def tokens_per_second(model: Any, ids: torch.Tensor, new: int) -> tuple[float, list[list[int]]]:
    given: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None}
    model.generate(ids, max_new_tokens=8, **given)
    best, text = 0.0, []
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        text = model.generate(ids, max_new_tokens=new, **given).tolist()
        best = max(best, len(ids) * new / (time.perf_counter() - begin))
    return best, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--scheme", default="int4-g128")
    args = parser.parse_args()
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=4096,
        hidden_size=2048,
        num_hidden_layers=args.layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    model = packed_model(config, args.scheme)
    layers = [m for m in model.modules() if isinstance(m, experts.SeparateExperts)]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.layers} layers, {args.scheme}")
    print("| rows | loop | one call | one call in a graph |\n|---|---|---|---|")
    found: dict[int, list[str]] = {1: [], 8: []}
    prompts = {rows: torch.randint(3, 4096, (rows, 16), device="cuda") for rows in found}
    texts: dict[int, list[list[int]]] = {}
    for way in ("loop", "call", "graph"):
        for module in layers:
            module.state.clear()
            if way == "loop":
                module.state.update(groups=None, hooks=[])
        if way == "graph":
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "not fused")
                fuse(model)
            decode.within(model, 16 + args.new)
        for rows, ids in prompts.items():
            speed, text = tokens_per_second(model, ids, args.new)
            before = [token for row in texts.get(rows, text) for token in row]
            same = sum(a == b for a, b in zip(before, (token for row in text for token in row), strict=True))
            note = f" ({same} of {len(before)} tokens as before)" if rows in texts else ""
            found[rows].append(f"{speed:.0f}{note}")
            texts[rows] = text
    for rows, cells in found.items():
        print(f"| {rows} | {' | '.join(cells)} |")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
