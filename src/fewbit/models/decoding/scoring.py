"""The log probabilities of a prompt's tokens, from the steps in which continuous batching reads the prompt.

transformers lets the model compute only the logits that choose a new token. Hooks of the model add those of the prompts
that are to be scored, and take them out of the model's output again. Such a prompt is read whole: it shares no pages
with other prompts, because nothing is computed for shared ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fewbit.models.decoding.choosing import Choosing, Likely, likely

_ROWS = 64  # whose log probabilities are computed at a time: each row is a float32 for each token of the vocabulary


class Scored(Protocol):
    """A request. scores: of the prompt's first tokens; None: it is not scored."""

    choosing: Choosing
    ids: Sequence[int]
    scores: list[Likely] | None
    error: str | None


@dataclass
class _Span:
    """Rows of a step that read a part of a prompt."""

    request: Scored
    position: int  # of the first row's token
    rows: range


class Scoring:
    """Fills `scores` of the requests that have them."""

    def __init__(self, requests: Mapping[str, Scored]) -> None:
        """requests: by their names."""
        self._requests, self._spans, self._new, self._kept = requests, list[_Span](), 0, False
        self._cache: Any = None
        self._hooks: tuple[Any, ...] = ()

    def attach(self, model: Any) -> None:
        """Add hooks to the model that the engine computes."""
        self._hooks = (
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
        )

    def release(self) -> None:
        """Let go of the model and its cache: there are no more steps."""
        for hook in self._hooks:
            hook.remove()
        self._cache = None

    def begin(self, states: list[Any]) -> None:
        """Note the requests of the next step."""
        self._spans, row = [], 0
        for each in states:
            state, request = each.state, self._requests.get(each.state.request_id)
            if request is not None and request.scores is not None:
                position = state.position_offset - each.query_length
                rows = min(
                    each.query_length, len(request.ids) - 1 - position
                )  # the last token's logits are the answer's
                if rows > 0:
                    self._spans.append(_Span(request, position, range(row, row + rows)))
            row += each.query_length

    def _before(self, model: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if (cache := given.get("cache")) is None or "logits_indices" not in given:
            self._spans = []
            return None
        if cache is not self._cache:  # the first step of an engine's thread: no prompt could share its pages before
            self._cache, search = cache, cache.search_prefix_match
            cache.search_prefix_match = lambda name, ids: 0 if self._is_scored(name) else search(name, ids)
        if not self._spans:
            return None
        own = given["logits_indices"]
        self._new, self._kept = len(own), "logits_to_keep" in given
        if not self._kept:
            return None
        rows = torch.tensor([row for span in self._spans for row in span.rows], dtype=own.dtype, device=own.device)
        return args, given | {"logits_to_keep": torch.cat([own, rows])}

    def _is_scored(self, name: str) -> bool:
        request = self._requests.get(name)
        return request is not None and request.scores is not None

    def _after(self, model: Any, args: Any, output: Any) -> Any:
        if not self._spans:
            return None
        at, logits = self._new, output.logits
        for span in self._spans:
            if self._kept:
                found = logits[0, at : at + len(span.rows)]
            else:
                found = logits[0, span.rows.start : span.rows.stop]
            at += len(span.rows)
            _score(span, found)
        self._spans = []
        if self._kept:
            output.logits = logits[:, : self._new]
        return output


def _score(span: _Span, logits: Tensor) -> None:
    """Add the scores of the tokens after those of the span. logits: [rows, vocabulary]."""
    request = span.request
    assert request.scores is not None
    if not bool(logits.amax(-1).isfinite().all()):
        request.error = "the model computed logits that are infinite or not a number"
    for first in range(0, len(logits), _ROWS):
        position = span.position + first
        rows = logits[first : first + _ROWS]
        tokens = list(request.ids[position + 1 : position + 1 + len(rows)])
        # A prompt is read again if the engine made room for others meanwhile.
        request.scores[position + 1 :] = likely(rows, tokens, request.choosing.logprobs or 0)
