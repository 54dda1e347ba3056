"""Throughput of a loaded model: prompt tokens per second (prefill), and generated tokens per second (decode).

Each result is a list with one rate per run, after a short warm-up run. Runs repeat until the 95 % interval of their
median is narrow enough (`intervals.TIGHT`), or until the limit on runs or seconds is reached.
Decoding is greedy and does not stop at an end-of-text token, so that every model does the same work.
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
_SECONDS = 5.0  # after this time no further run starts, once there are FEWEST
_RUN = 1.5  # approximate upper limit for the seconds of one decoding run
RULE = (FEWEST, MOST, _SECONDS, _RUN, intervals.TIGHT)  # all settings that affect the results
clock = time.perf_counter
_FEW = 8  # the fewest tokens that a run generates, unless fewer are requested


Finished = Callable[[int], None]  # called after each run, with the number of finished runs


def prefill(model: Any, ids: Tensor, finished: Finished | None = None) -> list[float]:
    """Prefill rates: tokens of the prompt `ids` [1, n] per second, up to the logits of the last token. One per run."""

    def run() -> float:
        return _timed(model, lambda: _read(model, ids))

    with torch.inference_mode():
        run()
    return _rates(run, ids.shape[1], finished)


def decode(model: Any, ids: Tensor, new_tokens: int, finished: Finished | None = None) -> list[float]:
    """Decoding rates: tokens generated per second after the prompt `ids` [1, n], without its prefill. One per run.

    A run generates `new_tokens` tokens, or fewer if the model is slow.
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
    return _rates(lambda: run(tokens), tokens, finished)


def _read(model: Any, ids: Tensor) -> Any:
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return model(input_ids=ids.to(model.device), use_cache=True, **last)


def _timed(model: Any, work: Callable[[], Any]) -> float:
    start = clock()
    work()
    if model.device.type == "cuda":  # GPU work is asynchronous: wait until it is done
        torch.cuda.synchronize(model.device)
    return clock() - start


def _rates(run: Callable[[], float], tokens: int, finished: Finished | None) -> list[float]:
    with torch.inference_mode():
        start, found = clock(), list[float]()
        while len(found) < FEWEST or not _enough(found, clock() - start):
            found.append(tokens / run())
            if finished is not None:
                finished(len(found))
    return found


def _enough(found: list[float], seconds: float) -> bool:
    return len(found) >= MOST or seconds >= _SECONDS or intervals.spread(found) <= intervals.TIGHT
