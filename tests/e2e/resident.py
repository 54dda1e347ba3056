"""A script: CPU time and memory of using and loading the second model after the first was used.

`peak`: bytes that generating text adds at most to what is resident. 0 where peaks count from the start of a process on.
`drawn` is the CPU time of making the same model with random weights, for comparison.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from pathlib import Path

from transformers import AutoModelForCausalLM

import fewbit
from fewbit.measure import memory


def resident() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    rollup = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in rollup if line.startswith("Rss:")) << 10


if __name__ == "__main__":
    fewbit.generate(sys.argv[1], "Once", max_new_tokens=16)
    before = resident()
    memory.forget_peak()
    forgotten = memory.now().peak < before + (8 << 20)
    fewbit.generate(sys.argv[2], "Once", max_new_tokens=16)
    peak = memory.now().peak - before if forgotten else 0
    before, start = resident(), time.process_time()
    model = fewbit.load(sys.argv[2])
    seconds = time.process_time() - start
    for parameter in model.parameters():
        parameter.data.view(-1)[::64].sum()  # every page is touched
    after, start = resident(), time.process_time()
    AutoModelForCausalLM.from_config(model.config)
    drawn = time.process_time() - start
    print(json.dumps({"peak": peak, "seconds": seconds, "drawn": drawn, "resident": after - before}))
