"""Answers in JSON: which tokens may come next, by the library llguidance.

llguidance compiles a JSON schema to a grammar, and follows the tokens of an answer with Earley's algorithm. Before each
token it says which tokens of the vocabulary continue a text of the grammar. The model's choice is limited to these.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import llguidance

from fewbit.errors import PlanError

# Between the tokens of JSON, at most one space, as outlines has it. Small models otherwise write line breaks and spaces
# until the answer may have no more tokens.
_SPACE = "[ ]?"


class Grammar:
    """The grammar of one answer, and the answer so far. Only one thread may use it."""

    def __init__(self, matcher: llguidance.LLMatcher, ends: Sequence[int]) -> None:
        """ends: the tokens that end an answer; the matcher knows the first."""
        self._matcher, self._ends = matcher, tuple(ends)

    def copy(self) -> Grammar:
        """The same grammar for another answer."""
        return Grammar(self._matcher.deep_copy(), self._ends)

    @property
    def complete(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> bytes:
        """A byte for each token that the tokenizer has: 0 if it may not come next. PlanError if a limit is exceeded."""
        mask = bytearray(self._matcher.compute_logit_bias())
        self._check()
        for end in self._ends[1:]:
            mask[end] = mask[self._ends[0]]
        return bytes(mask)

    def accept(self, token: int) -> None:
        """Tell which token came. PlanError if it was not allowed."""
        self._matcher.consume_token(self._ends[0] if token in self._ends else token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise PlanError(f"no answer can follow the schema any more: {_first(self._matcher.get_error())}")


class Grammars:
    """Makes grammars for one tokenizer."""

    def __init__(self, tokenizer: Any, ends: Sequence[int], rows: int | None) -> None:
        """ends: the tokens that end an answer, if there are any. rows: of the embedding."""
        self._tokenizer = tokenizer
        self._known: llguidance.LLTokenizer | None = None
        self._ends = tuple(ends) or (() if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),))
        self._rows = rows

    def of(self, schema: dict[str, Any]) -> Grammar:
        """A grammar for the JSON that the schema (JSON Schema, draft 2020-12) describes.

        PlanError if the schema is invalid, has a keyword that llguidance cannot enforce, or is too large, or if the
        tokenizer is of a kind that llguidance cannot read. Takes up to a second the first time.
        """
        vocabulary = self._vocabulary()
        try:
            made = llguidance.LLMatcher.grammar_from_json_schema(
                json.dumps(schema),
                overrides={"lenient": False, "whitespace_flexible": True, "whitespace_pattern": _SPACE},
            )
        except ValueError as error:  # not JSON, such as NaN
            raise PlanError(str(error)) from error
        matcher = llguidance.LLMatcher(vocabulary, made, log_level=0)
        if matcher.is_error():
            raise PlanError(_first(matcher.get_error()))
        grammar = Grammar(matcher, self._ends)
        grammar.allowed()  # fails if no text follows the schema
        return grammar

    def _vocabulary(self) -> llguidance.LLTokenizer:
        if self._known is None:
            try:
                text = self._tokenizer.backend_tokenizer.to_str()
                rows = max(self._rows or 0, len(self._tokenizer))
                self._known = llguidance.LLTokenizer(text, n_vocab=rows, eos_token=self._ends[0])
            except (AttributeError, IndexError, ValueError) as error:
                raise PlanError(f"this model's tokenizer cannot be limited to JSON: {error}") from error
        return self._known


def _first(error: str) -> str:
    """The message, without the state of the parser that llguidance appends."""
    return " ".join(error.partition("<state>")[0].split())
