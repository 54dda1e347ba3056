"""Where the time of quantizing the demo model goes: wall seconds of each step, summed over all blocks.

python benchmarks/where_time_goes.py [--samples 64] [--plan gptq-4bit]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fewbit
from fewbit.methods import gptq
from fewbit.models.skeleton import BlockCall, Skeleton
from fewbit.pipeline import blocks
from fewbit.plans import plan as plans
from fewbit.schemes.affine import Affine
from fewbit.schemes.ggml.scheme import GGML
from fewbit.schemes.nf4 import FourBit
from fewbit.stats import Stats
from fewbit.texts.calibration import Calibration

spent: dict[str, float] = defaultdict(float)


def timed(owner: Any, name: str, label: str) -> None:
    inner: Callable[..., Any] = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            spent[label] += time.perf_counter() - start

    setattr(owner, name, wrapper)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--plan", default="gptq-4bit")
    args = parser.parse_args()
    timed(Stats, "add", "Hessians")
    timed(BlockCall, "run", "forward, Hessians included")
    timed(gptq, "feed_back", "GPTQ column loop")
    timed(gptq, "descend", "coordinate descent")
    timed(gptq, "inverse_factor", "Cholesky")
    timed(Affine, "refit", "scale refit")
    timed(Affine, "fit", "scale search")
    timed(blocks, "_lost", "error measurement")
    timed(Skeleton, "_load", "reading weights")
    suffix = plans.format_of(plans.find(args.plan)).suffix
    for scheme in (FourBit, GGML):
        timed(scheme, "fit", "encoding")
        timed(scheme, "nearest", "encoding")
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        out, calibration = Path(scratch) / f"out{suffix}", Calibration(samples=args.samples, length=512)
        fewbit.quantize(args.model, out, plan=args.plan, calibration=calibration)
        total = time.perf_counter() - start
    spent["forward alone"] = spent.pop("forward, Hessians included") - spent["Hessians"]
    spent["all else"] = total - sum(spent.values())
    for label, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"{label:24} {seconds:7.1f} s  {seconds / total:6.1%}")
    print(f"{'total':24} {total:7.1f} s")


if __name__ == "__main__":
    main()
