"""Quantize a model, and measure importances."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from fewbit.cli.flags import Fields, checked
from fewbit.cli.options import (
    DryRun,
    Imatrix,
    Json,
    MaxShard,
    Model,
    Output,
    Overwrite,
    SafetensorsOnly,
    check_output,
    printed,
)
from fewbit.models.loading import Loading
from fewbit.plans.budget import Budget
from fewbit.texts.calibration import Calibration

Calibrated = Annotated[Calibration, Fields("samples", "length", "seed", text="calibration")]
_ANY_SIZE = Budget()


@checked
def quantize(
    ctx: typer.Context,
    model: Model,
    output: Output = None,
    plan: Annotated[str, typer.Option(help="A plan by name (fewbit list), or a .json file.")] = "gptq-4bit",
    method: Annotated[
        str | None, typer.Option(help="Method that chooses the codes (fewbit list), or awq+gptq. Default: the plan's.")
    ] = None,
    scheme: Annotated[str | None, typer.Option(help="Scheme, such as int4-g64-sym. Default: the plan's.")] = None,
    format: Annotated[str | None, typer.Option(help="File format (fewbit list). Default: the plan's.")] = None,
    budget: Annotated[Budget, Fields("bits", "size", "fit", "context")] = _ANY_SIZE,
    calibration: Calibrated = Calibration(),
    imatrix: Imatrix = None,
    effort: Annotated[
        str,
        typer.Option(
            help="fast; high: also train codes and scales of each block, then of the whole model; best: in more steps."
        ),
    ] = "fast",
    max_shard: MaxShard = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    safetensors_only: SafetensorsOnly = False,
    loading: Annotated[Loading, Fields("device", "trust_remote_code")] = Loading(),
    as_json: Json = False,
) -> None:
    """Quantize MODEL into a new folder or .gguf file."""
    from fewbit.api import requested
    from fewbit.plans.plan import find, format_of, is_file

    chosen = find(plan)
    options: dict[str, str] = ctx.obj or {}
    if method or scheme or format or options:
        chosen = chosen.changed(scheme=scheme, method=method, format=format, options=options)
    check_output(output, dry_run=dry_run)
    if output is not None:
        is_file(output, chosen)
    if max_shard is not None:
        requested.check_split(bool(format_of(chosen).suffix))
    from fewbit.api import quantize as api
    from fewbit.report import text as report

    if dry_run:
        if budget.given:
            said = "note: to choose widths, the model is quantized at each of them, which takes longer than one run. "
            print(f"{said}The cache keeps what is measured.", file=sys.stderr, flush=True)
        shown = api.preview(
            model,
            plan=chosen,
            budget=budget,
            calibration=calibration,
            imatrix=imatrix,
            effort=effort,
            max_shard=max_shard,
            device=loading.device,
            safetensors_only=safetensors_only,
            trust_remote_code=loading.trust_remote_code,
            progress=True,
        )
        printed(asdict(shown)) if as_json else report.preview(shown)
        return
    assert output is not None
    done = api.quantize(
        model,
        output,
        plan=chosen,
        budget=budget,
        calibration=calibration,
        imatrix=imatrix,
        effort=effort,
        max_shard=max_shard,
        overwrite=overwrite,
        device=loading.device,
        safetensors_only=safetensors_only,
        trust_remote_code=loading.trust_remote_code,
        progress=True,
    )
    printed(asdict(done)) if as_json else report.quantized(done)


@checked
def imatrix(
    model: Model,
    output: Annotated[str, typer.Option("-o", "--output", help="The .gguf or .dat file to make.")],
    calibration: Calibrated = Calibration(),
    overwrite: Overwrite = False,
    safetensors_only: SafetensorsOnly = False,
    loading: Annotated[Loading, Fields("device", "trust_remote_code")] = Loading(),
    as_json: Json = False,
) -> None:
    """Measure which columns of MODEL's weights matter, in a file for --imatrix and for llama.cpp."""
    check_output(output, dry_run=False)
    from fewbit.formats.containers import imatrix as importances  # it imports numpy

    importances.check(output)
    from fewbit.api import quantize as api
    from fewbit.report import text as report

    done = api.imatrix(
        model,
        output,
        calibration=calibration,
        overwrite=overwrite,
        device=loading.device,
        safetensors_only=safetensors_only,
        trust_remote_code=loading.trust_remote_code,
        progress=True,
    )
    printed(asdict(done)) if as_json else report.measured(done)
