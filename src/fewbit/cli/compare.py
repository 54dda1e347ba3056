"""The command `fewbit compare`."""

from __future__ import annotations

from typing import Annotated

import typer

from fewbit.cli.options import (
    Calibrated,
    Device,
    Json,
    Model,
    Seed,
    Text,
    Trust,
    Windows,
    early,
    printed,
    prompt_of,
    text_of,
)


@early
def compare(
    model: Model = "tiny",
    plans: Annotated[
        str, typer.Option(help="Plans (fewbit list), .json files or made models, with commas; bf16 is the original.")
    ] = "bf16,int8,nf4,gptq-4bit,awq-4bit,q4_k_m",
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Folder to make for the report. Default: none, print only.")
    ] = None,
    calibration: Calibrated = None,
    calibration_samples: Annotated[int, typer.Option(help="Number of calibration windows.")] = 32,
    calibration_length: Annotated[int, typer.Option(help="Tokens in a calibration window.")] = 256,
    text: Text = None,
    samples: Windows = 16,
    length: Annotated[int, typer.Option(help="Tokens in a window to measure on.")] = 512,
    prompt: Annotated[
        str | None, typer.Option(help="Text that every model continues; -: from stdin. Default: one that suits MODEL.")
    ] = None,
    seed: Seed = 0,
    device: Device = None,
    trust_remote_code: Trust = False,
    again: Annotated[bool, typer.Option("--again", help="Measure again what is in the cache.")] = False,
    as_json: Json = False,
) -> None:
    """Quantize MODEL by several plans, measure size, memory, speed and loss of each, and show them side by side."""
    from fewbit import checks
    from fewbit.measure.comparison import ORIGINAL
    from fewbit.plans.plan import find_all
    from fewbit.texts import calibration as texts_calibration

    # Checked here by their own names: in this command `samples` and `length` are those of the measurement.
    checks.integer(1)("calibration_samples", calibration_samples)
    checks.integer(1)("calibration_length", calibration_length)
    wanted = [name.strip() for name in plans.split(",") if name.strip()]
    find_all(wanted, but=ORIGINAL)
    calibrated = texts_calibration.Calibration(text_of(calibration), calibration_samples, calibration_length, seed)
    measured, asked = text_of(text), None if prompt is None else prompt_of(prompt)
    from fewbit.api import compare as comparing
    from fewbit.report import comparison

    done = comparing.compare(
        model,
        plans=wanted,
        out=output,
        calibration=calibrated,
        text=measured,
        samples=samples,
        length=length,
        prompt=asked,
        device=device,
        trust_remote_code=trust_remote_code,
        again=again,
        progress=True,
    )
    if as_json:
        printed(done.to_json())
    else:
        comparison.comparison(done, output)
