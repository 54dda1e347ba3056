"""Scores on tasks: what is said without lm-evaluation-harness, and how its results are read."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest

import fewbit
from fewbit.errors import FormatError, PlanError
from fewbit.measure import tasks
from fewbit.measure.tasks import Score

SCORE = Score("words", "acc", "none", 0.75, 0.1, True, 4, 0)


def test_without_the_harness_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(PlanError, match=r"pip install 'fewbit\[tasks\]'"):
        fewbit.evaluate("tiny", tasks="hellaswag")


def test_a_limit_without_tasks_is_refused() -> None:
    with pytest.raises(PlanError, match=r"^`limit` without `tasks`"):
        fewbit.evaluate("tiny", limit=3)
    wrong: Any
    for wrong in ("", [], 7):
        with pytest.raises(PlanError, match=r"^tasks="):
            fewbit.evaluate("tiny", tasks=wrong)


def test_results_of_the_harness_become_scores() -> None:
    found = {
        "results": {
            "words": {"alias": "words", "acc,none": 0.75, "acc_stderr,none": 0.1, "sample_len": 4},
            "maths": {"match,strict": 0.5, "match_stderr,strict": "N/A", "match,loose": 1, "match_stderr,loose": 0.0},
        },
        "n-shot": {"words": 0, "maths": 5},
        "n-samples": {"words": {"original": 10, "effective": 4}, "maths": {"original": 2, "effective": 2}},
        "higher_is_better": {"words": {"acc": True}, "maths": {}},
    }
    assert list(tasks._scores(found)) == [
        SCORE,
        Score("maths", "match", "strict", 0.5, None, None, 2, 5),
        Score("maths", "match", "loose", 1.0, 0.0, None, 2, 5),
    ]


def test_each_score_gets_that_of_the_reference() -> None:
    (both,) = tasks.beside([SCORE], [replace(SCORE, value=0.8, stderr=None)])
    assert both == replace(SCORE, reference=0.8, reference_stderr=None)


@pytest.mark.parametrize("name", sorted(tasks._NETWORK))
def test_data_that_are_not_here_are_no_fault_of_the_task(name: str) -> None:
    """Also if the error of the network is the cause of another one."""
    missing = type(name, (Exception,), {})("no route")
    with pytest.raises(PlanError, match="its data cannot be loaded"), tasks._as_error("mine"):
        raise ValueError("a task") from missing
    with pytest.raises(FormatError, match="ValueError"), tasks._as_error("mine"):
        raise ValueError("a task")
