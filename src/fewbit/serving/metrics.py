"""Counts what the server does, in the text format of Prometheus (version 0.0.4)."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)


class Histogram:
    """How many durations were at most so many seconds."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_SECONDS) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(_SECONDS, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str) -> Iterator[str]:
        total = 0
        for limit, count in zip((*map(str, _SECONDS), "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{limit}"}} {total}'
        yield f"{name}_sum {self._sum:.6f}"
        yield f"{name}_count {total}"


class Metrics:
    """What /metrics shows. All of it is written by the thread of the event loop."""

    def __init__(self, unfinished: Callable[[], int]) -> None:
        """unfinished: the number of requests that run or wait."""
        self._unfinished = unfinished
        self.requests: Counter[tuple[str, int]] = Counter()  # by endpoint and status
        self.prompt_tokens = self.generated_tokens = self.cancelled = 0
        self.first_token, self.whole = Histogram(), Histogram()

    def text(self) -> str:
        """The page."""
        lines = [
            *_head("fewbit_requests_unfinished", "gauge", "Answers that run or wait; a request with n=2 has two."),
            f"fewbit_requests_unfinished {self._unfinished()}",
            *_head("fewbit_requests_total", "counter", "Answered requests."),
        ]
        for (endpoint, status), count in sorted(self.requests.items()):
            lines.append(f'fewbit_requests_total{{endpoint="{endpoint}",status="{status}"}} {count}')
        for name, value, said in (
            ("fewbit_prompt_tokens_total", self.prompt_tokens, "Tokens of prompts."),
            ("fewbit_generated_tokens_total", self.generated_tokens, "Tokens of answers."),
            ("fewbit_requests_cancelled_total", self.cancelled, "Requests whose client went away."),
        ):
            lines += [*_head(name, "counter", said), f"{name} {value}"]
        for name, histogram, said in (
            ("fewbit_first_token_seconds", self.first_token, "Time from a request to its first token."),
            ("fewbit_request_seconds", self.whole, "Time from a request to the end of its answer."),
        ):
            lines += [*_head(name, "histogram", said), *histogram.lines(name)]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, said: str) -> list[str]:
    return [f"# HELP {name} {said}", f"# TYPE {name} {kind}"]
