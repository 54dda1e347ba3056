"""How fast a loaded model reads and writes: tokens a second of a prompt, and of what comes after it one at a time.

Each number is a list, one rate a run: after one run to warm up, at least three, and more as long as they are quick.
Decoding takes the likeliest token and does not stop at the end of a text, so that every model does the same work.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FEWEST, MOST = 3, 9  # runs
_SECONDS = 1.5  # after which no run more than the fewest is begun


def prefill(model: Any, ids: Tensor) -> list[float]:
    """Tokens of the prompt `ids` [1, n] read a second, up to the logits of the last."""
    return _rates(lambda: _timed(model, lambda: _read(model, ids)), ids.shape[1])


def decode(model: Any, ids: Tensor, new_tokens: int) -> list[float]:
    """Tokens written a second after the prompt `ids` [1, n], the reading of which is not counted."""

    def run() -> float:
        read = _read(model, ids)

        def write() -> None:
            step = read
            for _ in range(new_tokens):
                token = step.logits[:, -1:].argmax(-1)
                step = model(input_ids=token, past_key_values=step.past_key_values, use_cache=True)

        return _timed(model, write)

    return _rates(run, new_tokens)


def _read(model: Any, ids: Tensor) -> Any:
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return model(input_ids=ids.to(model.device), use_cache=True, **last)


def _timed(model: Any, work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    if model.device.type == "cuda":  # a GPU is asked, and has not done it yet
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - start


def _rates(run: Callable[[], float], tokens: int) -> list[float]:
    with torch.inference_mode():
        run()
        start, found = time.perf_counter(), list[float]()
        while len(found) < FEWEST or (len(found) < MOST and time.perf_counter() - start < _SECONDS):
            found.append(tokens / run())
    return found
