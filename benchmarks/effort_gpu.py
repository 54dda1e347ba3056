"""Where the time of `--effort high` of a Llama-3-8B-shaped random model on a GPU goes, by the parts of a smaller one.

    python -m benchmarks.effort_gpu --calibration TEXT [--layers 2] [--steps 10] [--samples 128]
    python -m benchmarks.effort_gpu --calibration TEXT --layers 32 --whole

The model has 8B's widths and vocabulary and so many of its 32 blocks, and the tokenizer of `tiny`. The end-to-end phase
takes so many steps in place of 1000, and does not train codes: they would take 168 GB for all 32 blocks. With two and
four blocks, the seconds of a block and of what does not depend on the blocks follow. With --whole, `high` is as it is.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch

import fewbit
from benchmarks.quantize_gpu import make
from fewbit.api import effort
from fewbit.pipeline import blocks, training_step, tuning
from fewbit.pipeline.optimization import Optimization
from fewbit.texts.calibration import Calibration

WINDOWS = 2  # written for each calibration window, an eighth of what `high` takes


def timed(owner: Any, name: str) -> list[float]:
    """Seconds of the calls of a function, which are added to the list."""
    inner: Callable[..., Any] = getattr(owner, name)
    seen = list[float]()

    @wraps(inner)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.synchronize()
        start = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            torch.cuda.synchronize()
            seen.append(time.perf_counter() - start)

    setattr(owner, name, wrapper)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--whole", action="store_true", help="all steps and windows of `high`")
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp())
    make(scratch / "model", args.layers)
    for path in (Path(fewbit.__file__).parent / "data/tiny").iterdir():
        if "token" in path.name or path.suffix == ".jinja":
            shutil.copy(path, scratch / "model")
    if not args.whole:
        wanted = Optimization(steps=args.steps, batch=4096, codes=False, learning_rate=1e-3)
        effort._PHASES["high"] = effort.EndToEnd(wanted, WINDOWS)
    parts = {
        "a block, quantized and tuned": timed(blocks, "_quantize_block"),
        "a block, its tuning": timed(blocks, "_tune"),
        "the windows that the original writes": timed(effort, "written"),
        "a step of 4096 tokens": timed(training_step.TrainingStep, "__call__"),
        "the divergence of a pass of held-out windows": timed(tuning, "divergence"),
    }
    start = time.perf_counter()
    fewbit.quantize(
        scratch / "model",
        scratch / "out",
        plan="gptq-4bit",
        device="cuda",
        effort="high",
        progress=args.whole,
        calibration=Calibration(args.calibration, samples=args.samples, length=512),
    )
    memory = torch.cuda.max_memory_allocated() / 2**30
    print(f"{args.layers} blocks: {time.perf_counter() - start:.1f} s in all, {memory:.1f} GiB at most")
    print("| seconds | calls | mean | last |\n|---|---|---|---|")
    for name, seen in parts.items():
        print(f"| {name} | {len(seen)} | {sum(seen) / len(seen):.3f} | {seen[-1]:.3f} |")
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
