"""The commands that help to choose: estimate and recommend."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from fewbit.advise import precision, rules
from fewbit.cli.flags import Fields, checked
from fewbit.cli.options import Json, printed
from fewbit.errors import PlanError
from fewbit.measure.comparison import Comparison
from fewbit.models.loading import Loading
from fewbit.texts.calibration import Calibration

Context = Annotated[int | None, typer.Option(help="Tokens in a text. Default: the model's context, at most 4096.")]
Batch = Annotated[int, typer.Option(help="Batch size: texts at once.")]
_MODEL = "A folder, with or without weights, a config.json, a .gguf file, a Hub name, tiny"


@checked
def estimate(
    model: Annotated[str, typer.Argument(help=f"{_MODEL}, or a size such as 7B.")],
    plan: Annotated[str | None, typer.Option(help="One plan, by name or a .json file. Default: all plans.")] = None,
    context: Context = None,
    batch: Batch = 1,
    cache: Annotated[str, typer.Option(help="Type of the KV cache: float32, bf16, fp8, q8_0, q4_0.")] = "bf16",
    calibration: Annotated[Calibration, Fields("samples", "length")] = Calibration(),
    loading: Annotated[Loading, Fields("trust_remote_code")] = Loading(),
    as_json: Json = False,
) -> None:
    """Compute the bytes and memory of every plan for MODEL, and which GPUs hold it, from its config alone."""
    if precision.parameters(model) is not None:
        for name, value in (("plan", plan), ("context", context)):
            if value is not None:
                raise PlanError(f"`{name}={value}` is given with a size", "Give a model, or leave it out.")
    from fewbit.api import advise
    from fewbit.report import advice

    if (sizes := advise.estimate_size(model)) is not None:
        printed(asdict(sizes)) if as_json else advice.precision(sizes)
        return
    done = advise.estimate(
        model,
        plan=plan,
        context=context,
        batch=batch,
        cache=cache,
        samples=calibration.samples,
        length=calibration.length,
        trust_remote_code=loading.trust_remote_code,
    )
    printed(asdict(done)) if as_json else advice.estimate(done)


@checked
def recommend(
    model: Annotated[str | None, typer.Argument(help=f"{_MODEL}. Required unless --table.")] = None,
    purpose: Annotated[
        str | None,
        typer.Option("--for", help="serving, edge, finetuning, experiment or quality. Required unless --table."),
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Memory limit, such as 8GB. Default: this machine's.")] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Largest KL divergence from the original. Default: no limit.")
    ] = None,
    speed: Annotated[str | None, typer.Option(help="first: prefer speed to quality. Default: prefer quality.")] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Program that must read the result: vllm, llama.cpp or transformers. Default: any."),
    ] = None,
    report: Annotated[
        str | None,
        typer.Option(help="report.json of fewbit compare to decide by. Default: numbers that come with fewbit."),
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(help="In place of --memory: memory that weights of chosen widths, KV cache and activations fill."),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="With --fit: measure this model's costs, which takes longer than to quantize it."
        ),
    ] = False,
    calibration: Annotated[Calibration, Fields("samples", "length", "seed", text="calibration")] = Calibration(),
    context: Context = None,
    batch: Batch = 1,
    table: Annotated[bool, typer.Option("--table", help="Show only the table of methods.")] = False,
    loading: Annotated[Loading, Fields("trust_remote_code")] = Loading(),
    as_json: Json = False,
) -> None:
    """Recommend a plan for MODEL and a purpose; say why, and which commands to run."""
    from fewbit.api import requested

    stated = None if calibration == Calibration() and not measure else calibration
    if not table:
        if fit is not None and purpose is None:
            purpose = "quality"
        if model is None or purpose is None:
            raise PlanError(
                "recommend needs a model and a purpose",
                "Such as: fewbit recommend tiny --for quality. "
                "Purposes: serving, edge, finetuning, experiment, quality.",
            )
        if speed not in (None, "first"):
            raise PlanError(f"--speed {speed}", "Only --speed first is valid.")
        rules.check(purpose, target)
        requested.check_recommendation(memory=memory, fit=fit, measure=measure, calibration=stated, batch=batch)
    measured = None if report is None else Comparison.read(report)
    from fewbit.api import advise
    from fewbit.report import advice

    if model is None or purpose is None or table:
        rows = advise.methods(measured)
        printed({"order": "kl", "methods": [asdict(row) for row in rows]}) if as_json else advice.methods(rows)
        return
    done = advise.recommend(
        model,
        purpose,
        memory=memory,
        max_kl=max_kl,
        speed_first=speed == "first",
        target=target,
        report=measured,
        fit=fit,
        measure=measure,
        calibration=stated,
        context=context,
        batch=batch,
        trust_remote_code=loading.trust_remote_code,
    )
    printed({"plan": (done.fitted or done.best).plan, **asdict(done)}) if as_json else advice.recommendation(done)
