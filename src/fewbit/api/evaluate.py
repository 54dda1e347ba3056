"""Measure a model's quality and size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fewbit.api import records, requested
from fewbit.api.arguments import SAMPLES, Device, DType, checked
from fewbit.checks import Texts
from fewbit.errors import PlanError
from fewbit.measure import memory, quality
from fewbit.measure.tasks import Score, Tasks, beside
from fewbit.models import blocks
from fewbit.models.decoding.cpu_path import would_round
from fewbit.models.decoding.sampling import Sampling as Sampling
from fewbit.models.describe import describe
from fewbit.models.load import check_adapter, load_model
from fewbit.models.loading import Loading
from fewbit.models.skeleton import load_tokenizer
from fewbit.models.source import Source, locate
from fewbit.pipeline.job import (
    evaluated,
    same_vocabulary,
)
from fewbit.report import progress as report_progress
from fewbit.report import text as report_text
from fewbit.report.results import Evaluation
from fewbit.system import ambient, machine, ranks, timing
from fewbit.texts import sources
from fewbit.texts.calibration import Calibration as Calibration

_ROUNDED = "measured with exact activations; on a CPU, generate rounds them to 8 bits (kernel cpu measures that)"


@checked
@ambient.defaults()
def evaluate(
    model: str | Path,
    *,
    reference: str | Path | None = None,
    adapter: str | Path | None = None,
    reference_adapter: str | Path | None = None,
    text: Texts | None = None,
    length: int | None = None,
    samples: int | None = SAMPLES,
    tasks: str | Path | Sequence[str | Path] | None = None,
    limit: int | None = None,
    device: Device = None,
    dtype: DType = None,
    kernel: str | None = None,
    record: bool = False,
    trust_remote_code: bool = False,
    progress: bool | Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure perplexity of `model` and its distance from `reference`, on disjoint windows of a held-out text.

    adapter, reference_adapter: adapters (folders or GGUF files) for `model` and `reference`.
    text: a name or a file; default: tiny's own text for models made from tiny, pydoc for all others.
    length: tokens in a window; default: the model's context, at most 2048. samples: number of windows from the start of
    the text; None: all.
    dtype: of activations; default: float32 on a CPU, the checkpoint's own on a GPU. kernel: for `model`, as in `load`.
    tasks: names of tasks of lm-evaluation-harness, or YAML files that describe one, to score both models on; they need
    the extra `fewbit[tasks]`. limit: number of examples of each task; None: all.
    record: also write the result into the record and the model card of `model`, an output of fewbit.
    """
    requested.check_evaluation(
        length=length,
        reference=reference,
        reference_adapter=reference_adapter,
        adapter=adapter,
        tasks=tasks,
        limit=limit,
        record=record,
    )
    elapsed = timing.timed()
    with ranks.joined(device) as device, report_progress.windows(progress) as tell:
        loading = Loading(machine.device(device), dtype, kernel, adapter, trust_remote_code=trust_remote_code).exact()
        if reference_adapter is not None:
            check_adapter(reference_adapter)
        source, original = locate(model), locate(reference) if reference is not None else None
        if record:
            records.check_recorded(source)
        scored = _tasks(tasks, limit, _shown(progress))  # type: ignore[arg-type]  # checked
        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
        if original is not None:
            same_vocabulary(original, source, tokenizer, trust_remote_code)
        # Use the original's default text: the metadata of a GGUF file made from it may not name that text.
        wanted = text or sources.own_source((original or source).config)
        models = [source] if original is None else [source, original]
        name, chosen, available = evaluated(models, tokenizer, wanted, length, samples)
        packed = load_model(source, loading, for_text=True)
        plain = None
        if original is not None:
            plain = load_model(original, replace(loading, adapter=reference_adapter, kernel=None), for_text=True)
        measured = quality.measure(packed, plain, chosen, lambda done: tell(done, len(chosen)))
        scores = list[Score]()
        if scored is not None:
            context = min(each.context for each in models)
            with report_progress.phase(f"tasks {', '.join(scored.names)}", _shown(progress)):
                scores = scored.scores(packed, tokenizer, context)
            if plain is not None:
                with report_progress.phase("the same tasks with the reference", _shown(progress)):
                    scores = beside(scores, scored.scores(plain, tokenizer, context))
        done = Evaluation(
            model=_named(model, adapter),
            reference=None if reference is None else _named(reference, reference_adapter),
            text=name,
            quality=measured,
            inspection=describe(source),
            peak=memory.now().peak,
            gpu_peak=memory.on_gpus(),
            seconds=elapsed(),
            available=available,
            notes=[
                *_unused(source, packed),
                *([] if original is None else _unused(original, plain)),
                *([_ROUNDED] if would_round(packed) else []),
            ],
            tasks=scores,
        )
        if record and ranks.first():
            done.notes.extend(records.complete(source, {"evaluation": report_text.evaluation_json(done)}))
        return done


def _unused(source: Source, model: Any) -> list[str]:
    """A note on the towers of a model, which a text does not use; none for a model without."""
    inside = [name.removesuffix(".").removeprefix("base_model.model.") for name in blocks.towers(model)]
    outer = [name for name in inside if not any(name.startswith(f"{other}.") for other in inside)]
    names = [file.name for file in source.towers] or outer
    return [f"measured on text, which does not use {' and '.join(names)} of {source.name}"] if names else []


def _tasks(tasks: Sequence[str] | None, limit: int | None, shown: bool | None) -> Tasks | None:
    """The tasks, found before any model is loaded."""
    if tasks is None:
        return None
    if ranks.size() > 1:
        raise PlanError("`tasks` run in one process", "Run it without torchrun.")
    return Tasks.found(tasks, limit, shown is not False)


def _shown(progress: bool | Callable[[int, int], None] | None) -> bool | None:
    return False if callable(progress) else progress


def _named(model: str | Path, adapter: str | Path | None) -> str:
    return str(model) if adapter is None else f"{model} with {adapter}"
