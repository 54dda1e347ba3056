"""The command `fewbit convert`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from fewbit import names
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
    Text,
    Windows,
    check_output,
    printed,
)
from fewbit.cli.stdin import text_of
from fewbit.errors import PlanError
from fewbit.models.loading import Loading
from fewbit.texts.calibration import Calibration


@checked
def convert(
    model: Model,
    to: Annotated[
        str,
        typer.Option(
            help="dense, a format (fewbit list), gptq-v1 or gptq-v2. For a LoRA: gguf; for one in a .gguf file: peft."
        ),
    ],
    output: Output = None,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Quantize the decoded weights by --plan, and measure the loss.")
    ] = False,
    plan: Annotated[str | None, typer.Option(help="Plan for --requantize (fewbit list).")] = None,
    calibration: Annotated[
        Calibration,
        Fields(text="calibration", samples="calibration_samples", length="calibration_length", seed="seed"),
    ] = Calibration(),
    imatrix: Imatrix = None,
    text: Text = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens in a window to measure on. Default: the model's context, at most 2048.")
    ] = None,
    samples: Windows = 16,
    max_shard: MaxShard = None,
    set: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Set a key in a copy of a GGUF file; KEY=@FILE: to the content of FILE. Repeat it for more.",
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Model of the adapter, if MODEL is one. Default: the one that it names.")
    ] = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    safetensors_only: SafetensorsOnly = False,
    loading: Annotated[Loading, Fields("device", "trust_remote_code")] = Loading(),
    as_json: Json = False,
) -> None:
    """Convert MODEL to another format without changing codes or scales, or a LoRA adapter to or from GGUF.

    A model that is not quantized can become a GGUF file in 16 bits.
    """
    check_output(output, dry_run=dry_run)
    from fewbit.api import requested
    from fewbit.plans import targets

    if (target := to.lower()) != names.PEFT:
        found = targets.find(target)
        if output is not None:
            targets.is_file(output, found, target)
    elif output is not None:
        requested.check_as_peft(output)
    if requantize and dry_run:
        raise PlanError("--dry-run shows exact conversions only", "Use fewbit quantize --dry-run with the plan.")
    options: dict[str, Any] = {
        "plan": plan,
        "calibration": calibration,
        "imatrix": imatrix,
        "text": text,
        "length": length,
        "samples": samples,
        "max_shard": max_shard,
        "set": set,
        "base": base,
    }
    requested.check_conversion(model, target, preview=dry_run, requantize=requantize, **options)
    options |= {
        "to": to,
        "text": text_of(text),
        "safetensors_only": safetensors_only,
        "trust_remote_code": loading.trust_remote_code,
    }
    from fewbit.api import convert as api
    from fewbit.report import text as report

    if dry_run:
        shown = api.preview(model, **options)
        printed(asdict(shown)) if as_json else report.preview(shown)
        return
    assert output is not None
    done = api.convert(
        model,
        output,
        **options,
        requantize=requantize,
        overwrite=overwrite,
        device=loading.device,
        progress=True,
    )
    if not as_json:
        report.converted(done)
        return
    evaluation = None if done.evaluation is None else report.evaluation_json(done.evaluation)
    printed({**asdict(done), "evaluation": evaluation})
