"""How fast round-to-nearest streams: `nf4` beside a copy of the same tensors through the same reader and writer.

    python benchmarks/streaming.py                  # a random Llama of 0.3 billion parameters in bf16
    python benchmarks/streaming.py --billions 1.1 --plan int8

The copy reads every tensor of the checkpoint, block by block, and writes it, in the files that quantizing makes; both
end on the disk. Quantizing is told in parts, because a user waits for all of them: the blocks, the output folder put
together from them, and the rest of the command (imports left out), which loads the result and generates from it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WORKER = """
import json, sys, time
from pathlib import Path
from fewbit.api import quantize
from fewbit.pipeline import blocks, write_folder
from fewbit.system import heap
from fewbit.formats.containers.safetensors import Checkpoint, ShardWriter, files_in
from fewbit.measure import memory

what, model, out, plan = sys.argv[1:]
heap.return_freed()
base, started, found = memory.now().anonymous, time.perf_counter(), {}
if what == "copy":
    checkpoint = Checkpoint(files_in(Path(model)))
    writer = ShardWriter(Path(out), checkpoint.specs, write_folder.SHARD_BYTES)
    for name in checkpoint.specs:
        writer.add(name, checkpoint.get(name))
    writer.close()
else:
    for module, name in ((blocks, "quantize_blocks"), (write_folder, "write")):
        def timed(*args, run=getattr(module, name), name=name):
            before = time.perf_counter()
            result = run(*args)
            found[name] = time.perf_counter() - before
            found["anonymous"] = memory.now().anonymous - base
            return result
        setattr(module, name, timed)
    quantize.quantize(model, out, plan=plan, device="cpu", overwrite=True)
print(json.dumps(found | {"seconds": time.perf_counter() - started}))
"""


def main() -> None:
    """Print one line for each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--billions", type=float, default=0.3)
    parser.add_argument("--plan", default="nf4")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        model = made(Path(place) / "model", options.billions)
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        print(f"{size / 1e9:.2f} GB in bf16")
        copied = worker("copy", model, Path(place), options.plan)["seconds"]
        done = worker("quantize", model, Path(place), options.plan)
        streamed = done["quantize_blocks"] + done["write"]
        for what, seconds in (
            ("copied", copied),
            ("blocks quantized", done["quantize_blocks"]),
            ("output put together", done["write"]),
            ("all of fewbit quantize", done["seconds"]),
        ):
            print(f"{what:24} {seconds:7.1f} s  {size / 1e9 / seconds:6.2f} GB/s of bf16")
        print(f"streams at {copied / streamed:.0%} of the speed of a copy; {done['anonymous'] / 1e6:.0f} MB at the end")


def made(folder: Path, billions: float) -> Path:
    """A random Llama of about so many parameters, in shards."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from tests import models

    hidden = 2048 if billions > 0.5 else 1024
    per_layer = 4 * hidden**2 + 3 * hidden * 4 * hidden
    layers = max(1, round((billions * 1e9 - 2 * 8192 * hidden) / per_layer))
    config: Any = LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        dtype="bfloat16",
    )
    import torch

    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    models.tokenizer().save_pretrained(folder)
    return folder


def worker(what: str, model: Path, place: Path, plan: str) -> dict[str, float]:
    """In a process of its own, after a pause for what was written before to reach the disk."""
    time.sleep(2)
    out = place / what
    if what == "copy":
        out.mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WORKER, what, str(model), str(out), plan],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
