"""Time and peak memory of quantizing a mixture of experts with random weights.

    python -m benchmarks.experts qwen3-30b-a3b --layers 1 --plans gptq-4bit [--samples 128 --length 2048]
    python -m benchmarks.experts deepseek-v2-lite --layers 11 --plans nf4 --kill      # larger than memory

Each model has the shapes of a published one, fewer layers and the tokenizer of the embedded model; its weights are
normal with standard deviation 0.02. It is written in shards, a block at a time. A row of the result is one process:
seconds, the growth of anonymous resident memory over that after imports, sampled every 5 ms, and the peak of PyTorch's
allocator on the GPU, beside what `fewbit estimate` says. With `--kill` the process is killed by SIGKILL when half of
the blocks are finished, and started again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.estimate import growth

# Layer shapes as published: Qwen/Qwen3-30B-A3B; deepseek-ai/DeepSeek-V3, -V2 and -V2-Lite; small ones of their kind.
_DEEPSEEK: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 0,
}
_V2 = {
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "topk_group": 3,
}
_LITE = {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
}
_QWEN: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": _QWEN,
    "qwen-small": {**_QWEN, "hidden_size": 256, "moe_intermediate_size": 128, "num_attention_heads": 4},
    "deepseek-v3": _DEEPSEEK,
    "deepseek-v2": {**_DEEPSEEK, **_V2},
    "deepseek-v2-lite": {**_DEEPSEEK, **_LITE},
}


def make(folder: Path, shape: str, layers: int) -> None:
    """Write the random model: a shard for each block and one for the rest."""
    import torch
    from safetensors.torch import save_file

    from fewbit.formats.containers.safetensors import side_files
    from fewbit.models.outline import Outline
    from fewbit.models.source import outlined

    folder.mkdir(parents=True)
    tiny = outlined("tiny")
    for file in side_files(tiny.folder):
        if file.name.startswith("tokenizer"):
            shutil.copy(tiny.folder / file, folder)
    draw = random.Random(0)
    words = ("".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 7))) for _ in range(200_000))
    (folder / "words.txt").write_text(" ".join(words), encoding="utf-8")  # text for calibration
    common = {"num_hidden_layers": layers, "vocab_size": tiny.config["vocab_size"], "max_position_embeddings": 4096}
    config = {**SHAPES[shape], **common, "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    outline = Outline(outlined(folder))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator, where = torch.Generator(device).manual_seed(0), dict[str, str]()
    for number, block in enumerate([*outline.blocks, None]):
        own = {k: s for k, s in outline.checkpoint.specs.items() if k not in where}
        own = {k: s for k, s in own.items() if block is None or k.startswith(f"{block}.")}
        tensors = {}
        for key, spec in own.items():
            values = torch.empty(spec.shape, dtype=torch.bfloat16, device=device)
            one = len(spec.shape) == 1 and "norm" in key
            tensors[key] = (values.fill_(1) if one else values.normal_(0, 0.02, generator=generator)).cpu()
        name = f"shard-{number:03}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(own, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}), encoding="utf-8")


def quantize(model: str, out: str, plan: str, samples: int, length: int, device: str, stages: bool) -> dict[str, Any]:
    """Quantize in this process. Seconds and peaks."""
    import torch

    import fewbit
    import fewbit.api.quantize
    from fewbit.measure import memory
    from fewbit.plans.catalogue import catalogue
    from fewbit.system import heap

    catalogue()
    heap.return_freed(1 << 16)
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
    steps = list[float]()
    start = time.perf_counter()

    def progress(_: Any) -> None:
        steps.append(time.perf_counter() - start)
        print(f"step {len(steps)} {steps[-1]:.1f}", file=sys.stderr, flush=True)

    clock: Any = None
    if stages:
        from benchmarks import quantize_gpu

        clock = quantize_gpu.Clock()
        quantize_gpu.watch(clock)
    calibration = fewbit.Calibration(samples=samples, length=length, text=str(Path(model) / "words.txt"))
    done, host, _ = growth(
        lambda: fewbit.quantize(
            model, out, plan=plan, calibration=calibration, device=device or None, progress=progress
        )
    )
    return {
        "seconds": time.perf_counter() - start,
        "steps": steps,
        "host": host,
        "resident": memory.now().peak,
        "gpu": memory.on_gpus(),
        "stages": {k: round(v, 3) for k, v in sorted(clock.lap().items(), key=lambda i: -i[1])} if clock else {},
        "error": sum(tensor.error for tensor in done.tensors) / len(done.tensors),
    }


def child(*arguments: str, kill_after: int = 0) -> dict[str, Any] | None:
    """Quantize in a process of its own. With `kill_after`, kill it after so many blocks, and return nothing."""
    command = [sys.executable, "-m", "benchmarks.experts", "--child", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8") as process:
        assert process.stderr is not None
        assert process.stdout is not None
        for line in process.stderr:
            print("   ", line, end="", flush=True)
            if kill_after and line.startswith(f"step {kill_after} "):
                os.kill(process.pid, signal.SIGKILL)
        out = process.stdout.read()
    if kill_after:
        return None
    if process.returncode:
        raise SystemExit(process.returncode)
    return dict(json.loads(out.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--plans", nargs="+", default=["gptq-4bit"])
    parser.add_argument("--device", default="")
    parser.add_argument("--stages", action="store_true", help="seconds of each stage; needs a GPU")
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--folder", type=Path, help="keep the model here, and use it if it exists")
    parser.add_argument("--child", nargs="*")
    args = parser.parse_args()
    if args.child:
        model, out, plan, samples, length, device, stages = args.child
        print(json.dumps(quantize(model, out, plan, int(samples), int(length), device, stages == "True")))
        return
    with tempfile.TemporaryDirectory() as scratch:
        model = args.folder or Path(scratch) / "model"
        if not model.exists():
            start = time.perf_counter()
            make(model, args.shape, args.layers)
            print(f"made in {time.perf_counter() - start:.1f} s", flush=True)
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        print(f"{args.shape}: {args.layers} layers, {size:,} bytes", flush=True)
        for plan in args.plans:
            out = str(Path(scratch) / "out")
            own = (str(model), out, plan, str(args.samples), str(args.length), args.device, str(args.stages))
            if args.kill:
                child(*own, kill_after=max(1, args.layers // 2))
            print(plan, json.dumps(child(*own)), flush=True)
            shutil.rmtree(out)


if __name__ == "__main__":
    main()
