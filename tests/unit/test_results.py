"""Results are short in Python, and tables in a notebook."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from fewbit.api.arguments import checked
from fewbit.measure.comparison import Comparison
from fewbit.models.decoding.generate import Continuation
from fewbit.models.describe import Inspection
from fewbit.pipeline.run import TensorReport
from fewbit.report.results import Evaluation, Quantized
from tests.unit.test_report import EVALUATION, INSPECTION, QUANTIZED

COMPARISON = Comparison.read(Path(__file__).parents[1] / "data" / "report.json")
TENSOR = TensorReport("model.layers.0.q", (64, 64), "int4-g32-sym", "GPTQ", 2304, 0.001)
LARGE = [
    replace(QUANTIZED, tensors=[TENSOR] * 5000, notes=["a long note"] * 1000),
    EVALUATION,
    replace(INSPECTION, made={str(i): i for i in range(5000)}),
    Continuation("word " * 5000, 5000, 0.5, 3.0),
    replace(COMPARISON, rows=COMPARISON.rows * 500),
]


@pytest.mark.parametrize("result", LARGE, ids=lambda result: type(result).__name__)
def test_a_result_is_one_short_line(
    result: Quantized | Evaluation | Inspection | Continuation | Comparison,
) -> None:
    assert len(repr(result)) < 700
    assert "\n" not in repr(result)
    assert repr(result).startswith(f"{type(result).__name__}(")


@pytest.mark.parametrize("result", LARGE, ids=lambda result: type(result).__name__)
def test_a_notebook_shows_a_small_table(result: object) -> None:
    formatters = pytest.importorskip("IPython.core.formatters")
    table = formatters.HTMLFormatter()(result)
    assert table.startswith("<table>")
    assert len(table) < 4000


def test_a_table_escapes_what_a_model_wrote() -> None:
    formatters = pytest.importorskip("IPython.core.formatters")
    table = formatters.HTMLFormatter()(Continuation("<script>", 1, 0.5, 0.0))
    assert "<script>" not in table
    assert "&lt;script&gt;" in table


def test_an_interval_is_its_value_and_bounds() -> None:
    assert "perplexity=33.46 [32.1, 34.8]" in repr(EVALUATION)


def test_notes_of_a_verb_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    def inspect(model: str) -> SimpleNamespace:
        return SimpleNamespace(notes=[f"{model} is small"])

    inspect.__module__ = "fewbit.api.inspect"
    with caplog.at_level(logging.WARNING, logger="fewbit"):
        checked(inspect)("tiny")
    assert [(record.name, record.getMessage()) for record in caplog.records] == [
        ("fewbit.api.inspect", "tiny is small")
    ]


def test_the_logger_is_silent_unless_set_up() -> None:
    assert any(isinstance(handler, logging.NullHandler) for handler in logging.getLogger("fewbit").handlers)
