"""A script: CPU time and memory of loading the second model after the first was used.

`drawn` is the CPU time of making the same model with random weights, for comparison.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import fewbit


def resident() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    rollup = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in rollup if line.startswith("Rss:")) << 10


if __name__ == "__main__":
    first = fewbit.load(sys.argv[1])
    first(torch.arange(8)[None])
    del first
    before, start = resident(), time.process_time()
    model = fewbit.load(sys.argv[2])
    seconds = time.process_time() - start
    for parameter in model.parameters():
        parameter.data.view(-1)[::64].sum()  # every page is touched
    after, start = resident(), time.process_time()
    AutoModelForCausalLM.from_config(model.config)
    drawn = time.process_time() - start
    print(json.dumps({"seconds": seconds, "drawn": drawn, "resident": after - before}))
