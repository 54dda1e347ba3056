"""What `fewbit estimate` foresees, beside what a process takes: weights, peak of reading a context, peak of quantizing.

    python benchmarks/estimate.py [--models tiny,random] [--plans bf16,nf4,gptq-4bit,q4_k_m]

`random` is a Llama of 98 million random parameters. Each measurement is a process of its own. Peaks are the growth of
anonymous resident memory, sampled every 5 ms: pages of mapped files can be given back. Weights are all parameters and
buffers of the loaded model, each storage once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SAMPLES, LENGTH = 32, 512


def make(folder: Path) -> None:
    """A random Llama of 98 million parameters with tiny's tokenizer."""
    import shutil

    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from fewbit.formats.containers.safetensors import side_files
    from fewbit.models.source import locate

    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=16384,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for file in side_files(locate("tiny").folder):
        if file.name.startswith("tokenizer"):
            shutil.copy(file, folder)


def growth(work: Callable[[], Any]) -> tuple[Any, int, int]:
    """What `work` returns, how far anonymous memory rose above that before, and how far it stays above it."""
    from fewbit.measure import memory

    before, peak, running = memory.now().anonymous, 0, True

    def watch() -> None:
        nonlocal peak
        while running:
            peak = max(peak, memory.now().anonymous)
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        made = work()
    finally:
        running = False
        watcher.join()
    after = memory.now().anonymous
    return made, max(peak, after) - before, after - before


def quantizing(model: str, plan: str, out: str) -> dict[str, int]:
    import fewbit.api.inspect
    from fewbit.plans.catalogue import catalogue
    from fewbit.system import heap

    catalogue()
    heap.return_freed(1 << 16)
    calibration = fewbit.Calibration(samples=SAMPLES, length=LENGTH)
    _, peak, _ = growth(lambda: fewbit.quantize(model, out, plan=plan, calibration=calibration))
    return {"quantization_peak": peak}


def running(model: str, context: int) -> dict[str, int]:
    import torch

    import fewbit.api.inspect
    from fewbit.plans.catalogue import catalogue
    from fewbit.system import heap

    catalogue()
    heap.return_freed(1 << 16)
    loaded = fewbit.load(model)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in loaded.state_dict().values()}
    weights = sum(
        {t.data_ptr(): t.nbytes for t in [*loaded.parameters(), *loaded.buffers()] if t.data_ptr() in storages}.values()
    )

    def read(tokens: int) -> Any:
        with torch.inference_mode():
            return loaded(input_ids=torch.ones(1, tokens, dtype=torch.long), use_cache=True, logits_to_keep=1)

    read(16)
    _, peak, _ = growth(lambda: read(context))
    return {"weights": weights, "reading_peak": peak, "activation": loaded.dtype.itemsize}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="tiny,random")
    parser.add_argument("--plans", default="bf16,nf4,gptq-4bit,q4_k_m")
    parser.add_argument("--child", nargs="*")
    args = parser.parse_args()
    if args.child:
        kind, *rest = args.child
        print(json.dumps(quantizing(*rest) if kind == "quantizing" else running(rest[0], int(rest[1]))))
        return
    from fewbit.api.advise import estimate

    def child(*arguments: str) -> dict[str, int]:
        done = subprocess.run([sys.executable, __file__, "--child", *arguments], stdout=subprocess.PIPE, check=True)
        return dict(json.loads(done.stdout))

    print("| model | plan | weights: foreseen, measured | reading | quantizing |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for model in args.models.split(","):
            path = model if model != "random" else str(Path(scratch) / "random")
            if model == "random":
                make(Path(path))
            context = 512 if model == "tiny" else 2048
            for plan in args.plans.split(","):
                out, made = path, {"quantization_peak": 0}
                if plan != "bf16":
                    out = str(Path(scratch) / f"{model}-{plan}") + (".gguf" if "_k" in plan or "q" in plan[:2] else "")
                    made = child("quantizing", path, plan, out)
                ran = child("running", out, str(context))
                for cache in ("bf16", "float32"):
                    if {"bf16": 2, "float32": 4}[cache] == ran["activation"]:
                        foreseen = estimate(path, context=context, cache=cache, samples=SAMPLES, length=LENGTH)
                row = next(row for row in foreseen.plans if row.plan == plan)
                pairs = (
                    (row.weights_bytes, ran["weights"]),
                    (foreseen.cache_bytes + row.activation_peak, ran["reading_peak"]),
                    (row.quantization_peak, made["quantization_peak"]),
                )
                cells = [f"{a:,} {b:,} ({a / max(b, 1) - 1:+.1%})" for a, b in pairs]
                print(f"| {model} | {plan} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
