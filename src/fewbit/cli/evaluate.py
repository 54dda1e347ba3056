"""Measure a model's quality and size."""

from __future__ import annotations

from typing import Annotated

import typer

from fewbit.cli.flags import Fields, checked
from fewbit.cli.options import Json, Model, Text, Windows, printed
from fewbit.cli.stdin import text_of
from fewbit.models import stated
from fewbit.models.loading import Loading


@checked
def evaluate(
    model: Model,
    reference: Annotated[str | None, typer.Option(help="Original to compare with.")] = None,
    reference_adapter: Annotated[str | None, typer.Option(help="LoRA adapter for the reference.")] = None,
    text: Text = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens in a window. Default: the model's context, at most 2048.")
    ] = None,
    samples: Windows = 16,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-evaluation-harness, by name or .yaml file, separated by commas."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Number of examples of each task. Default: all.")] = None,
    loading: Annotated[Loading, Fields("adapter", "device", "kernel", "trust_remote_code")] = Loading(),
    record: Annotated[
        bool,
        typer.Option("--record", help="Also write the result into fewbit.json and the model card of MODEL."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure MODEL: perplexity, KL divergence from the reference, same top token, bytes."""
    from fewbit.api import requested

    requested.check_evaluation(
        length=length,
        reference=reference,
        reference_adapter=reference_adapter,
        adapter=loading.adapter,
        tasks=tasks,
        limit=limit,
        record=record,
    )
    if reference is not None:
        stated.check_vocabularies(reference, model)
    measured = text_of(text)
    from fewbit.api import evaluate as api
    from fewbit.report import text as report

    done = api.evaluate(
        model,
        reference=reference,
        adapter=loading.adapter,
        reference_adapter=reference_adapter,
        text=measured,
        length=length,
        samples=samples,
        tasks=tasks,
        limit=limit,
        device=loading.device,
        kernel=loading.kernel,
        record=record,
        trust_remote_code=loading.trust_remote_code,
        progress=True,
    )
    printed(report.evaluation_json(done)) if as_json else report.evaluation(done)
