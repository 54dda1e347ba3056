"""Quantize and measure on several GPUs: torchrun --nproc-per-node 4 several_gpus.py MODEL OUT [SAMPLES].

`accelerate launch --multi_gpu --num_processes 4` starts it as well. All processes make the same calls and get the same
results; the first one writes the files. Without GPUs, each process uses a part of the CPU.
"""

import os
import sys

import fewbit

model, out, *samples = sys.argv[1:]
calibration = fewbit.Calibration(samples=int(samples[0]) if samples else 128)
fewbit.quantize(model, out, plan="gptq-4bit", calibration=calibration)
quality = fewbit.evaluate(out, reference=model, samples=4).quality
assert quality.kl is not None
if os.environ.get("RANK", "0") == "0":
    processes = os.environ.get("WORLD_SIZE", "1")
    print(f"{processes} processes: KL divergence {quality.kl.mean.value:.4f}")
