"""Peak memory of quantizing a random Llama of 1.1 billion parameters, against the size of its checkpoint.

    python benchmarks/memory.py [--blocks 22] [--samples 32] [--plan gptq-4bit]

Prints the growth of anonymous resident memory over that after imports, and the mapped pages apart: those belong to
files and are given back when anyone else needs them. The model is made in a process of its own, so that making it
counts nowhere.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

MAKE = """
import sys, torch
from transformers import AutoModelForCausalLM, LlamaConfig
from fewbit.models import smollm2
from fewbit.formats.containers.safetensors import side_files
import shutil
config = LlamaConfig(
    hidden_size=2048, intermediate_size=5632, num_hidden_layers=int(sys.argv[2]), num_attention_heads=32,
    num_key_value_heads=4, vocab_size=49152, max_position_embeddings=2048, tie_word_embeddings=False,
)
torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
AutoModelForCausalLM.from_config(config).save_pretrained(sys.argv[1])
for file in side_files(smollm2.folder()):
    if file.name.startswith("tokenizer"):
        shutil.copy(file, sys.argv[1])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=22)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--plan", default="gptq-4bit")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        subprocess.run([sys.executable, "-c", MAKE, str(model), str(args.blocks)], check=True, capture_output=True)
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))

        import fewbit.api.inspect
        from fewbit.measure import memory
        from fewbit.plans.catalogue import catalogue

        catalogue()  # with fewbit.api.inspect, imports every part, transformers among them
        before, peak, running = memory.now(), {"anonymous": 0, "mapped": 0}, True

        def watch() -> None:
            while running:
                held = memory.now()
                peak["anonymous"] = max(peak["anonymous"], held.anonymous)
                peak["mapped"] = max(peak["mapped"], held.mapped)
                time.sleep(0.02)

        watcher = threading.Thread(target=watch)
        watcher.start()
        start = time.perf_counter()
        phases = []
        fewbit.quantize(
            model,
            Path(scratch) / "out",
            plan=args.plan,
            calibration=fewbit.texts.calibration.Calibration(samples=args.samples, length=512),
            progress=lambda step: phases.append(peak["anonymous"]),
        )
        seconds = time.perf_counter() - start
        running = False
        watcher.join()
    growth = peak["anonymous"] - before.anonymous
    print(
        json.dumps(
            {
                "checkpoint_bytes": size,
                "anonymous_after_imports": before.anonymous,
                "anonymous_growth": growth,
                "anonymous_growth_in_blocks": phases[-1] - before.anonymous,
                "share_of_checkpoint": growth / size,
                "mapped_peak": peak["mapped"],
                "seconds": seconds,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
