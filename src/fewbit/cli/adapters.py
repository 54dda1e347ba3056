"""The commands that train and merge adapters: finetune and merge."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from fewbit.cli.options import (
    Calibrated,
    Device,
    Json,
    Model,
    Overwrite,
    Seed,
    Text,
    Trust,
    Windows,
    early,
    printed,
    text_of,
)


@early
def finetune(
    model: Model,
    data: Annotated[
        str,
        typer.Option(
            help="A .txt or .jsonl file, or - for a text on stdin. A line has text, messages, or prompt and completion."
        ),
    ],
    output: Annotated[str, typer.Option("-o", "--output", help="Folder to make for the adapter.")],
    rank: Annotated[int, typer.Option(help="LoRA rank.")] = 8,
    alpha: Annotated[
        float | None, typer.Option(help="LoRA alpha; the scale is alpha / rank. Default: twice the rank.")
    ] = None,
    dropout: Annotated[float, typer.Option(help="LoRA dropout: share of inputs set to 0 in training.")] = 0.0,
    targets: Annotated[
        str,
        typer.Option(help="Linears to adapt, by the ends of their names: q_proj,v_proj. Default: all but the head."),
    ] = "",
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-4,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps. Default: as --epochs says.")] = None,
    batch: Annotated[int, typer.Option(help="Batch size.")] = 4,
    accumulate: Annotated[int, typer.Option(help="Gradient accumulation: batches in a step.")] = 1,
    length: Annotated[int, typer.Option(help="Maximum tokens of an example.")] = 512,
    held_out: Annotated[float, typer.Option(help="Share of the examples kept for evaluation.")] = 0.05,
    checkpointing: Annotated[bool, typer.Option(help="Gradient checkpointing: less memory, slower.")] = True,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    device: Device = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Train an adapter (LoRA) on MODEL, quantized or not, which itself stays as it is."""
    from fewbit.models.adapters.tuning import Tuning

    tuning = Tuning(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        targets=tuple(name.strip() for name in targets.split(",") if name.strip()),
        learning_rate=learning_rate,
        epochs=epochs,
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        length=length,
        held_out=held_out,
        seed=seed,
        checkpointing=checkpointing,
    )
    learned = text_of(data) or data
    from fewbit.api import adapters
    from fewbit.report import text as report

    done = adapters.finetune(
        model,
        output,
        data=learned,
        tuning=tuning,
        overwrite=overwrite,
        device=device,
        trust_remote_code=trust_remote_code,
        progress=True,
    )
    printed(asdict(done)) if as_json else report.finetuned(done)


@early
def merge(
    model: Model,
    adapter: Annotated[str, typer.Argument(help="Folder of the adapter.")],
    output: Annotated[str, typer.Option("-o", "--output", help="Folder to make.")],
    base: Annotated[str | None, typer.Option(help="Original of MODEL. Default: as its fewbit.json says.")] = None,
    plan: Annotated[str | None, typer.Option(help="Plan to quantize the result by. Default: not quantized.")] = None,
    calibration: Calibrated = None,
    text: Text = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens in a window to measure on. Default: the model's context, at most 2048.")
    ] = None,
    samples: Windows = 8,
    overwrite: Overwrite = False,
    device: Device = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Add ADAPTER to the weights of MODEL in 16 bits, quantize them again if asked, and compare."""
    from fewbit.texts.calibration import Calibration

    calibrated, measured = Calibration(text_of(calibration)), text_of(text)
    from fewbit.api import adapters
    from fewbit.report import text as report

    done = adapters.merge(
        model,
        adapter,
        output,
        base=base,
        plan=plan,
        calibration=calibrated,
        text=measured,
        length=length,
        samples=samples,
        overwrite=overwrite,
        device=device,
        trust_remote_code=trust_remote_code,
        progress=True,
    )
    if not as_json:
        report.merged(done)
        return
    printed({**asdict(done), "evaluation": report.evaluation_json(done.evaluation)})
