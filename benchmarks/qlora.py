"""QLoRA against LoRA over unquantized weights: loss on held-out text, peak memory and time, same data and steps.

    python benchmarks/qlora.py --text FILE [--model smollm2] [--plans gptq-4bit nf4] [--steps 200] [--batch 2]

Each model is trained on the CPU in a process of its own: the unquantized one in bfloat16 unless --original says
otherwise, the quantized ones with float32 activations (as `fewbit finetune` does there) unless --activations does.
Memory is the growth of what is resident, anonymous and mapped together, over that after imports: unquantized weights
are read in place from their mapped file, packed ones are not. The text must be new to the model.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--plans", nargs="*", default=["gptq-4bit", "nf4"])
    parser.add_argument("--quantized", nargs="*", default=[], help="folders quantized before, instead of plans")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--held-out", type=float, default=0.05)
    parser.add_argument("--original", default="bfloat16", help="dtype of the unquantized model")
    parser.add_argument("--activations", default="float32", help="of the quantized ones")
    parser.add_argument("--child", metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folders = list(args.quantized)
        for plan in [] if folders else args.plans:
            folders.append(str(Path(scratch) / plan))
            command = ["quantize", args.model, "-o", folders[-1], "--plan", plan, "--samples", "64"]
            subprocess.run([sys.executable, "-m", "fewbit", *command], check=True, stdout=subprocess.DEVNULL)
        for model, dtype in [(args.model, args.original), *((folder, args.activations) for folder in folders)]:
            child = [sys.executable, __file__, *sys.argv[1:], "--child", model, "--dtype", dtype]
            done = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True, encoding="utf-8")
            print(done.stdout.strip().splitlines()[-1], flush=True)


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Train once in this process; what it gave and what it took."""
    import torch

    import fewbit
    import fewbit.models.adapters.train  # so that it counts as an import
    from fewbit.measure import memory
    from fewbit.models.adapters.tuning import Tuning

    before, peaks, running = memory.now(), {"anonymous": 0, "resident": 0}, True

    def watch() -> None:
        while running:
            held = memory.now()
            peaks["anonymous"] = max(peaks["anonymous"], held.anonymous)
            peaks["resident"] = max(peaks["resident"], held.anonymous + held.mapped)
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    tuning = Tuning(rank=8, steps=args.steps, batch=args.batch, length=args.length, held_out=args.held_out)
    with tempfile.TemporaryDirectory() as scratch:
        done = fewbit.finetune(
            args.child,
            Path(scratch) / "adapter",
            data=args.text,
            tuning=tuning,
            device="cpu",
            dtype=getattr(torch, args.dtype),
        )
    running = False
    watcher.join()
    return {
        "model": args.child,
        "activations": args.dtype,
        "steps": done.steps,
        "batch": args.batch,
        "length": args.length,
        "held_out_examples": done.held_out_examples,
        "held_out_before": done.held_out_before,
        "held_out_after": done.held_out_after,
        "growth_resident": peaks["resident"] - before.anonymous - before.mapped,
        "growth_anonymous": peaks["anonymous"] - before.anonymous,
        "seconds": done.seconds,
    }


if __name__ == "__main__":
    main()
