"""How fast an 8B-shaped model decodes on a GPU: tokens a second of whole steps in a CUDA graph, bf16 beside.

    python -m benchmarks.decode_gpu [--sequences 1,8,32] [--head SCHEME] [--length 512] [--layers 32] [--compile]
        [SCHEME ...]
    python -m benchmarks.decode_gpu --prompt 2048 [--profile] [SCHEME ...]

The model has Llama 3 8B's widths and random packed weights, so what it writes means nothing and takes as long as any
text. It is fused and generates as `fewbit generate --fuse` does; the time is that of 128 tokens less that of 32, by the
number between, medians of five. The output head is bf16 unless `--head` names a scheme for it. `--compile` compiles the
step before it is recorded, if fewbit's own operations do not serve it.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu import CUDA, random_parts
from benchmarks.quantize_gpu import CONFIG
from fewbit.models.decoding.decode import within
from fewbit.models.decoding.fuse import fuse
from fewbit.nn.layers import QLinear
from fewbit.schemes.base import QTensor, parse

FEW, MANY, ROUNDS = 32, 128, 5


def made(spec: str, head: str, layers: int) -> Any:
    """A random model on the GPU, its blocks' linears in `spec`, its head in `head`."""
    config = LlamaConfig(**{**CONFIG, "num_hidden_layers": layers})
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
        model.to(torch.bfloat16)
    for name, module in list(model.named_modules()):
        scheme = head if name == "lm_head" else spec
        if isinstance(module, nn.Linear) and scheme != "bf16":
            shape, codec = (module.out_features, module.in_features), parse(scheme)
            weight = QTensor(codec, shape, random_parts(codec, shape))
            model.set_submodule(name, QLinear(shape[1], shape[0], None).adopt(weight, torch.bfloat16))
    for module in model.modules():
        for name, tensor in list(module.named_parameters(recurse=False)):
            if tensor.is_meta:
                filled = torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)
                filled = filled.fill_(1) if tensor.dim() == 1 else filled.normal_(0, 0.02)
                setattr(module, name, nn.Parameter(filled, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(CUDA)
    model.generation_config.eos_token_id = None
    return model.eval()


def rate(model: Any, sequences: int) -> float:
    """Tokens of each sequence a second."""
    ids = torch.randint(0, 128000, (sequences, 16), device=CUDA)

    def seconds(tokens: int) -> float:
        start = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    with torch.inference_mode():
        seconds(FEW)
        return statistics.median((MANY - FEW) / (seconds(MANY) - seconds(FEW)) for _ in range(ROUNDS))


def reading(model: Any, tokens: int, *, profile: bool) -> float:
    """Milliseconds until the first token after a prompt of so many tokens."""
    ids = torch.randint(0, 128000, (1, tokens), device=CUDA)

    def once() -> float:
        start = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    with torch.inference_mode():
        once()
        found = statistics.median(once() for _ in range(ROUNDS))
        if profile:
            from torch.profiler import ProfilerActivity
            from torch.profiler import profile as profiler

            with profiler(activities=[ProfilerActivity.CUDA]) as told:
                once()
            print(told.key_averages().table(sort_by="cuda_time_total", row_limit=14, max_name_column_width=70))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schemes", nargs="*", default=("bf16", "int4-g128-sym", "int4-g128", "nf4-b64", "q4_k"))
    parser.add_argument("--sequences", default="1,8,32")
    parser.add_argument("--head", default="bf16")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--prompt", type=int)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    sequences = [int(s) for s in args.sequences.split(",")]
    how = f"head {args.head}, {args.layers} blocks{', compiled' * args.compile}"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {how}\n")
    if args.prompt:
        sequences, args.length = [1], max(args.length, args.prompt + 8)
        print(f"| ms until the first token | {args.prompt} tokens |\n|---|---|")
    else:
        print(f"| tokens/s of all sequences | {' | '.join(map(str, sequences))} |\n|---|{'---|' * len(sequences)}")
    for spec in args.schemes:
        start = time.perf_counter()
        model = made(spec, args.head, args.layers)
        if spec != "bf16":
            fuse(model)
        kernels = {m.kernel.name for m in model.modules() if isinstance(m, QLinear) and m.kernel}
        within(model, args.length, compile=args.compile)
        torch.cuda.synchronize()
        took = time.perf_counter() - start
        if args.prompt:
            cells = f"{reading(model, args.prompt, profile=args.profile):.1f}"
        else:
            cells = " | ".join(f"{rate(model, n) * n:.0f}" for n in sequences)
        print(f"| {spec} ({', '.join(kernels) or 'cuBLAS'}; made in {took:.0f} s) | {cells} |", flush=True)
        del model
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
