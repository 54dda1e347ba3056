"""Measure a model's quality and size."""

from __future__ import annotations

from typing import Annotated

import typer

from fewbit.cli.options import (
    Adapter,
    Device,
    Json,
    Kernel,
    Model,
    Text,
    Trust,
    Windows,
    early,
    printed,
    text_of,
)


@early
def evaluate(
    model: Model,
    reference: Annotated[str | None, typer.Option(help="Original to compare with. Default: none.")] = None,
    adapter: Adapter = None,
    reference_adapter: Annotated[
        str | None, typer.Option(help="LoRA adapter for the reference. Default: none.")
    ] = None,
    text: Text = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens in a window. Default: the model's context, at most 2048.")
    ] = None,
    samples: Windows = 16,
    device: Device = None,
    kernel: Kernel = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Measure MODEL: perplexity, KL divergence from the reference, same top token, bytes."""
    measured = text_of(text)
    from fewbit.api import evaluate as api
    from fewbit.report import text as report

    done = api.evaluate(
        model,
        reference=reference,
        adapter=adapter,
        reference_adapter=reference_adapter,
        text=measured,
        length=length,
        samples=samples,
        device=device,
        kernel=kernel,
        trust_remote_code=trust_remote_code,
        progress=True,
    )
    printed(report.evaluation_json(done)) if as_json else report.evaluation(done)
