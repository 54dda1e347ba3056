"""A script: the CPU time of loading the second model, and how much memory all of it takes, after one was used."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from pathlib import Path

import torch

import fewbit


def resident() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()
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
    print(json.dumps({"seconds": seconds, "resident": resident() - before}))
