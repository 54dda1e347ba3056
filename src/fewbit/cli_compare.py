"""The command `fewbit compare`."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def compare(
    model: Annotated[
        str, typer.Argument(help="A folder, a Hub name (org/model), or tiny, the embedded model.")
    ] = "tiny",
    plans: Annotated[
        str, typer.Option(help="Names (fewbit list) or .json files, with commas; bf16 is the original.")
    ] = "bf16,int8,nf4,gptq-4bit,awq-4bit,q4_k_m",
    output: Annotated[str | None, typer.Option("-o", "--output", help="The folder of the report.")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text to calibrate on, as of quantize; by default what suits MODEL.")
    ] = None,
    calibration_samples: Annotated[int, typer.Option(help="Windows of it.")] = 32,
    calibration_length: Annotated[int, typer.Option(help="Tokens in each of them.")] = 256,
    text: Annotated[str | None, typer.Option(help="Text to measure on, as of evaluate.")] = None,
    samples: Annotated[int, typer.Option(help="Windows of it.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens in each of them.")] = 512,
    prompt: Annotated[str | None, typer.Option(help="What every model continues, as a sample.")] = None,
    seed: Annotated[int, typer.Option(help="Chooses the windows to calibrate on.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 ...; by default a GPU where there is one.")
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Measure anew what was measured before.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object: report.json.")] = False,
) -> None:
    """Quantize MODEL by several plans, measure size, memory, speed and loss of each, and show them side by side."""
    from fewbit import arguments, comparing, report_compare

    # Under their own names: `samples` and `length` are others here.
    arguments.whole(1)("calibration_samples", calibration_samples)
    arguments.whole(1)("calibration_length", calibration_length)

    with report_compare.progress() as tell:
        done = comparing.compare(
            model,
            plans=[name.strip() for name in plans.split(",") if name.strip()],
            out=output,
            calibration=comparing.Calibration(calibration, calibration_samples, calibration_length, seed),
            text=text,
            samples=samples,
            length=length,
            prompt=prompt,
            device=device,
            trust_remote_code=trust_remote_code,
            again=again,
            progress=tell,
        )
    if as_json:
        print(json.dumps(done.to_json(), indent=1, allow_nan=False))
    else:
        report_compare.comparison(done, output)
