"""Scores on tasks such as hellaswag, by lm-evaluation-harness, an extra.

A task is known to the harness by its name, or is described in a YAML file, also over local data. The loaded model is
passed on as it is, so a packed model stays packed. Source: https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fewbit.errors import FormatError, PlanError
from fewbit.system.files import read_text

_SHOTS_SEED = 1234  # the harness's own, so that prompts are the same as those of its command
_FILES = (".yaml", ".yml")
# Of the standard library, of the HTTP libraries, and of datasets and huggingface_hub.
_NETWORK = {
    *("ConnectionError", "ConnectError", "DatasetNotFoundError"),
    *("OfflineModeIsEnabled", "HfHubHTTPError", "LocalEntryNotFoundError"),
}
_OFFLINE = (
    "The harness downloads the data of its tasks from the Hub. Connect once, so that they are in its cache, or give a "
    "task file over local data."
)


@dataclass(frozen=True)
class Score:
    """One metric of one task. name: that of the harness; filter: how answers were extracted, "none" for most tasks.

    stderr: the standard error as the harness gives it, None if it gives none. reference, reference_stderr: those of the
    original, None without one. higher: whether higher is better, None if the task does not say. examples: number of
    examples; shots: number of solved examples in each prompt.
    """

    task: str
    name: str
    filter: str
    value: float
    stderr: float | None
    higher: bool | None
    examples: int
    shots: int
    reference: float | None = None
    reference_stderr: float | None = None


@dataclass(frozen=True)
class Tasks:
    """Tasks that were found. names: as they were given; specs: what the harness calls them.

    limit: the number of examples of each; None: all. bars: whether the harness shows its bars, in a terminal.
    """

    names: Sequence[str]
    specs: Sequence[str]
    limit: int | None
    bars: bool
    manager: Any

    @classmethod
    def found(cls, wanted: Sequence[str], limit: int | None, bars: bool) -> Tasks:
        """The tasks of these names and files. It reads their data. PlanError if one is unknown, or has no data here."""
        check(wanted)
        with _quiet(bars):
            files = [_file(each) for each in wanted]
            manager = _manager(named=not all(each is not None and _is_whole(each) for each in files))
            specs = [
                _known(name, manager) if file is None else str(file) for name, file in zip(wanted, files, strict=True)
            ]
            for name, spec in zip(wanted, specs, strict=True):
                with _as_error(name):
                    manager.load([spec])  # reads the data
        return cls(wanted, specs, limit, bars, manager)

    def scores(self, model: Any, tokenizer: Any, length: int) -> list[Score]:
        """The scores of a loaded model. length: its context in tokens."""
        with _quiet(self.bars), _as_error(", ".join(self.names)):
            from lm_eval import evaluate
            from lm_eval.models.huggingface import HFLM

            held = HFLM(pretrained=model, tokenizer=tokenizer, max_length=length, batch_size=1, backend="causal")
            loaded = self.manager.load(list(self.specs))
            for task in loaded["tasks"].values():  # as `simple_evaluate` sets them, which also seeds the whole process
                if task.get_config("num_fewshot") is None:
                    task.set_config(key="num_fewshot", value=0)
                task.set_fewshot_seed(seed=_SHOTS_SEED)
            found = evaluate(lm=held, task_dict=loaded, limit=self.limit, log_samples=False)
        return list(_scores(found))


def beside(scores: Sequence[Score], reference: Sequence[Score]) -> list[Score]:
    """The scores with those of the original."""
    known = {(each.task, each.name, each.filter): each for each in reference}
    pairs = [(each, known[each.task, each.name, each.filter]) for each in scores]
    return [
        Score(**{**vars(each), "reference": other.value, "reference_stderr": other.stderr}) for each, other in pairs
    ]


def check(wanted: Iterable[str]) -> None:
    """PlanError without the harness, or for the name of a file that does not exist."""
    if importlib.util.find_spec("lm_eval") is None:
        raise PlanError("`tasks` needs lm-evaluation-harness, which is not installed", "pip install 'fewbit[tasks]'")
    for name in wanted:
        _file(name)


def _file(name: str) -> Path | None:
    """The absolute path of the file of a task; None for a name. PlanError if there is no such file."""
    path = Path(name)
    if path.suffix not in _FILES:
        return None
    if not path.is_file():
        wrong = "this is a folder" if path.is_dir() else "no such file"
        raise PlanError(f"task {name}: {wrong}", "Give a YAML file of a task, or the name of a task.")
    return path.absolute()


def _is_whole(file: Path) -> bool:
    """Whether the file describes one task. A group may name tasks of the harness."""
    return re.search(r"^group:", read_text(file), re.MULTILINE) is None


@cache
def _manager(named: bool) -> Any:
    """The tasks of the harness. named: also those that it has by name, of which it reads ten thousand files."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=named)


def _known(name: str, manager: Any) -> str:
    """The name of a task of the harness. PlanError if it has none of this name."""
    known = manager.task_index
    if name not in known:
        near = ", ".join(difflib.get_close_matches(name, list(known), 3)) or "hellaswag, arc_easy, winogrande"
        raise PlanError(
            f"task {name}: lm-evaluation-harness has no such task",
            f"Near it: {near}. lm_eval ls tasks lists all. A task of your own is a .yaml file.",
        )
    return name


def _scores(found: Mapping[str, Any]) -> Iterator[Score]:
    """The scores in what the harness returns: "METRIC,FILTER" -> value, "METRIC_stderr,FILTER" -> standard error."""
    for task, metrics in {**found["results"], **found.get("groups", {})}.items():
        for key, value in metrics.items():
            name, comma, filter = key.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = metrics.get(f"{name}_stderr,{filter}")
            shots, counted = found["n-shot"].get(task), found["n-samples"].get(task) or {}
            yield Score(
                task=task,
                name=name,
                filter=filter,
                value=float(value),
                stderr=float(error) if isinstance(error, (int, float)) else None,
                higher=found["higher_is_better"].get(task, {}).get(name),
                examples=int(counted.get("effective", 0)),
                shots=int(shots) if isinstance(shots, (int, float)) else 0,
            )


@contextmanager
def _quiet(bars: bool) -> Iterator[None]:
    """Log only errors of the harness. Its bars are drawn on stderr, which is not shown unless it is a terminal."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        if bars and sys.stderr.isatty():
            yield
            return
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
            yield
    finally:
        logger.setLevel(before)


@contextmanager
def _as_error(name: str) -> Iterator[None]:
    """A task is a file of somebody, with code, and its data come from a network: anything may be raised."""
    try:
        yield
    except Exception as error:
        line = str(error).strip().split("\n")[0][:300] or type(error).__name__
        if _of_network(error):
            raise PlanError(f"task {name}: its data cannot be loaded: {line}", _OFFLINE) from error
        raise FormatError(f"task {name}: {type(error).__name__}: {line}") from error


def _of_network(error: BaseException | None) -> bool:
    """Whether an error comes from data that are not on this machine."""
    while error is not None:
        if _NETWORK & {each.__name__ for each in type(error).__mro__}:
            return True
        error = error.__cause__ or error.__context__
    return False
