"""The commands that train and merge adapters: finetune and merge."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from fewbit.cli.flags import Fields, checked
from fewbit.cli.options import Imatrix, Json, MaxShard, Model, Overwrite, Text, Windows, printed
from fewbit.cli.stdin import text_of
from fewbit.models.adapters.tuning import Tuning
from fewbit.models.loading import Loading, need_peft
from fewbit.texts.calibration import Calibration


@checked
def finetune(
    model: Model,
    data: Annotated[
        str,
        typer.Option(
            help="A .txt or .jsonl file, or - for a text on stdin. A line has text, messages, or prompt and completion."
        ),
    ],
    output: Annotated[str, typer.Option("-o", "--output", help="Folder to make for the adapter.")],
    tuning: Tuning = Tuning(),
    overwrite: Overwrite = False,
    loading: Annotated[Loading, Fields("device", "trust_remote_code")] = Loading(),
    as_json: Json = False,
) -> None:
    """Train a LoRA adapter on MODEL, quantized or not. MODEL itself does not change."""
    from fewbit.api import requested

    need_peft()
    requested.check_finetuned(output)
    learned = text_of(data) or data
    from fewbit.api import adapters
    from fewbit.report import text as report

    done = adapters.finetune(
        model,
        output,
        data=learned,
        tuning=tuning,
        overwrite=overwrite,
        device=loading.device,
        trust_remote_code=loading.trust_remote_code,
        progress=True,
    )
    printed(asdict(done)) if as_json else report.finetuned(done)


@checked
def merge(
    model: Model,
    adapter: Annotated[str, typer.Argument(help="Folder or .gguf file of the adapter.")],
    output: Annotated[str, typer.Option("-o", "--output", help="Folder or .gguf file to make.")],
    base: Annotated[
        str | None, typer.Option(help="Original of MODEL. Default: the one that its fewbit.json names.")
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(
            help="Plan for quantizing the result; q4_k_m and others make a .gguf file. Default: not quantized."
        ),
    ] = None,
    calibration: Annotated[Calibration, Fields(text="calibration")] = Calibration(),
    imatrix: Imatrix = None,
    max_shard: MaxShard = None,
    text: Text = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens in a window to measure on. Default: the model's context, at most 2048.")
    ] = None,
    samples: Windows = 8,
    overwrite: Overwrite = False,
    loading: Annotated[Loading, Fields("device", "trust_remote_code")] = Loading(),
    as_json: Json = False,
) -> None:
    """Add ADAPTER to MODEL's weights in 16 bits, quantize the result if --plan is given, and compare."""
    need_peft()
    measured = text_of(text)
    from fewbit.api import requested
    from fewbit.plans.plan import find, is_file

    requested.check_window(length)
    if plan is None:
        requested.check_merged(output, imatrix)
    else:
        is_file(output, find(plan))
    from fewbit.api import adapters
    from fewbit.report import text as report

    done = adapters.merge(
        model,
        adapter,
        output,
        base=base,
        plan=plan,
        calibration=calibration,
        imatrix=imatrix,
        max_shard=max_shard,
        text=measured,
        length=length,
        samples=samples,
        overwrite=overwrite,
        device=loading.device,
        trust_remote_code=loading.trust_remote_code,
        progress=True,
    )
    if not as_json:
        report.merged(done)
        return
    printed({**asdict(done), "evaluation": report.evaluation_json(done.evaluation)})
