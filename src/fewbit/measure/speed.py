"""How fast a loaded model reads and writes: tokens a second of a prompt, and of what comes after it one at a time.

Each number is a list, one rate a run, after a short run to warm up. Runs repeat until the 95 % interval of their median
is tight (`intervals.TIGHT`), or a bound is reached: of runs, or of seconds.
Decoding takes the likeliest token and does not stop at the end of a text, so that every model does the same work.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewbit.measure import intervals

FEWEST, MOST = intervals.FEWEST, 30  # runs
_SECONDS = 5.0  # after which no run more than the fewest is begun
_RUN = 1.5  # seconds that writing takes in one run, about, at most
RULE = (FEWEST, MOST, _SECONDS, _RUN, intervals.TIGHT)  # what decides the numbers
clock = time.perf_counter
_FEW = 8  # tokens, which a run writes at least


def prefill(model: Any, ids: Tensor) -> list[float]:
    """Tokens of the prompt `ids` [1, n] read a second, up to the logits of the last."""

    def run() -> float:
        return _timed(model, lambda: _read(model, ids))

    with torch.inference_mode():
        run()
    return _rates(run, ids.shape[1])


def decode(model: Any, ids: Tensor, new_tokens: int) -> list[float]:
    """Tokens written a second after the prompt `ids` [1, n], the reading of which is not counted.

    A run writes `new_tokens`; of a model that would take long for them, fewer.
    """

    def run(tokens: int) -> float:
        read = _read(model, ids)
        name = "cache" if hasattr(read, "cache") else "past_key_values"  # transformers renamed it in 5.24

        def write() -> None:
            step = read
            for _ in range(tokens):
                token = step.logits[:, -1:].argmax(-1)
                step = model(input_ids=token, use_cache=True, **{name: getattr(step, name)})

        return _timed(model, write)

    few = min(_FEW, new_tokens)
    with torch.inference_mode():
        run(1)
        tokens = max(few, min(new_tokens, int(_RUN * few / run(few))))
    return _rates(lambda: run(tokens), tokens)


def _read(model: Any, ids: Tensor) -> Any:
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return model(input_ids=ids.to(model.device), use_cache=True, **last)


def _timed(model: Any, work: Callable[[], Any]) -> float:
    start = clock()
    work()
    if model.device.type == "cuda":  # a GPU is asked, and has not done it yet
        torch.cuda.synchronize(model.device)
    return clock() - start


def _rates(run: Callable[[], float], tokens: int) -> list[float]:
    with torch.inference_mode():
        start, found = clock(), list[float]()
        while len(found) < FEWEST or not _enough(found, clock() - start):
            found.append(tokens / run())
    return found


def _enough(found: list[float], seconds: float) -> bool:
    return len(found) >= MOST or seconds >= _SECONDS or intervals.spread(found) <= intervals.TIGHT
