"""Tokens a second of the server's engine on a GPU, with steps that are recorded and with transformers' own.

    python -m benchmarks.engine_gpu [--requests 1,8,32,64] [--new 128] [--layers 32] [--scheme int4-g128-sym]

It also prints how long a request with a prompt of 512 tokens waits for its first token while 8 others run, and how
long each of these waits for its next token meanwhile.

The model has Llama 3 8B's widths and random packed weights, and is fused as `fewbit serve` does it. All requests come
at once, with 16 tokens each; the time is from the first request to the last answer. There is no HTTP.
"""

from __future__ import annotations

import argparse
import queue
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from benchmarks.decode_gpu import made
from fewbit.models.decoding.choosing import Choosing
from fewbit.models.decoding.continuous import Engine, News
from fewbit.models.decoding.fuse import fuse
from fewbit.models.decoding.together import Together

PROMPT, CONTEXT = 16, 2048
LONG, OTHERS = 512, 8  # tokens of the prompt whose first token is timed, and requests that run meanwhile
GREEDY = Choosing(ignore_eos=True)
SAMPLED = Choosing(temperature=1.0, top_p=0.9, seed=1, ignore_eos=True)


def rate(engine: Engine, requests: int, new: int, choosing: Choosing) -> float:
    """Tokens a second of all requests."""
    seeded = torch.Generator().manual_seed(requests)
    prompts = torch.randint(5, 4000, (requests, PROMPT), generator=seeded).tolist()
    told = [queue.SimpleQueue[News]() for _ in prompts]
    start = time.perf_counter()
    for prompt, own in zip(prompts, told, strict=True):
        engine.submit(prompt, new, choosing, own.put)
    for own in told:
        while not (news := own.get()).finished:
            pass
        if news.error is not None:
            raise SystemExit(news.error)
    return requests * new / (time.perf_counter() - start)


def arrival(engine: Engine, others: int) -> str:
    """Milliseconds to the first token of a long prompt, and the longest that a running request waits meanwhile."""
    came = list[float]()
    tells: list[Callable[[News], None]] = [lambda _: came.append(time.perf_counter())]
    tells += [lambda _: None] * (others - 1)
    names = [engine.submit([5] * PROMPT, CONTEXT - PROMPT, GREEDY, tell) for tell in tells]
    firsts, waits = list[float](), list[float]()
    for n in range(6):
        time.sleep(0.3)
        own = queue.SimpleQueue[News]()
        start, before = time.perf_counter(), len(came)
        engine.submit([5 + n] * LONG, 1, GREEDY, own.put)
        own.get()
        firsts.append((time.perf_counter() - start) * 1000)
        time.sleep(0.3)
        waits.append(max(b - a for a, b in pairwise(came[before - 1 :])) * 1000)
    for name in names:
        engine.cancel(name)
    return f"{median(firsts[1:]):.1f} ms to the first token, {median(waits[1:]):.1f} ms between two tokens of another"


def measured(model: Any, args: argparse.Namespace, devices: tuple[str, ...]) -> None:
    Together.devices = devices
    counts = [int(n) for n in args.requests.split(",")]
    engine = Engine(model, CONTEXT, max(counts), torch.cuda.mem_get_info()[0] // 4)
    try:
        for name, choosing in (("greedy", GREEDY), ("sampled", SAMPLED)):
            cells = []
            for count in counts:
                rate(engine, count, 8, choosing)  # the second step of a number of requests is the recording
                cells.append(f"{rate(engine, count, args.new if devices else args.new // 4, choosing):.0f}")
            print(f"| {name}, {'recorded' if devices else 'by transformers'} | {' | '.join(cells)} |", flush=True)
        print(f"\nA prompt of {LONG} tokens beside {OTHERS} requests: {arrival(engine, OTHERS)}\n", flush=True)
    finally:
        engine.stop(finish=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", default="1,8,32,64")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--scheme", default="int4-g128-sym")
    args = parser.parse_args()
    import transformers

    model = made(args.scheme, "bf16", args.layers)
    fuse(model)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}\n")
    names = args.requests.split(",")
    print(f"| tokens/s of all requests | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for devices in (("cuda",), ()):
        measured(model, args, devices)


if __name__ == "__main__":
    main()
