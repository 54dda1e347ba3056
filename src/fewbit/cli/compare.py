"""The command `fewbit compare`."""

from __future__ import annotations

from typing import Annotated

import typer

from fewbit.cli.flags import Fields, checked
from fewbit.cli.options import Json, Model, Text, Windows, printed
from fewbit.cli.stdin import prompt_of, text_of
from fewbit.models.loading import Loading
from fewbit.texts.calibration import COMPARED, Calibration


@checked
def compare(
    model: Model = "tiny",
    plans: Annotated[
        str, typer.Option(help="Plans (fewbit list), .json files or models, separated by commas; bf16: the original.")
    ] = "bf16,int8,nf4,gptq-4bit,awq-4bit,q4_k_m",
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Folder to make for the report. Default: print only.")
    ] = None,
    calibration: Annotated[
        Calibration,
        Fields(text="calibration", samples="calibration_samples", length="calibration_length", seed="seed"),
    ] = COMPARED,
    text: Text = None,
    samples: Windows = 16,
    length: Annotated[int, typer.Option(help="Tokens in a window to measure on.")] = 512,
    prompt: Annotated[
        str | None, typer.Option(help="Text that every model continues; -: from stdin. Default: one that suits MODEL.")
    ] = None,
    loading: Annotated[Loading, Fields("device", "trust_remote_code")] = Loading(),
    again: Annotated[bool, typer.Option("--again", help="Measure again what is in the cache.")] = False,
    as_json: Json = False,
) -> None:
    """Quantize MODEL by several plans, measure size, memory, speed and loss of each, and show them side by side."""
    from fewbit.api import requested
    from fewbit.measure.comparison import ORIGINAL
    from fewbit.plans.plan import find_all

    wanted = [name.strip() for name in plans.split(",") if name.strip()]
    find_all(wanted, but=ORIGINAL)
    requested.check_window(length)
    if output is not None:
        requested.report_folder(output)
    measured, asked = text_of(text), None if prompt is None else prompt_of(prompt)
    from fewbit.api import compare as comparing
    from fewbit.report import comparison

    done = comparing.compare(
        model,
        plans=wanted,
        out=output,
        calibration=calibration,
        text=measured,
        samples=samples,
        length=length,
        prompt=asked,
        device=loading.device,
        trust_remote_code=loading.trust_remote_code,
        again=again,
        progress=True,
    )
    if as_json:
        printed(done.to_json())
    else:
        comparison.comparison(done, output)
