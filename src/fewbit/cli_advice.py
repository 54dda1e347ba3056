"""The commands that help to choose: estimate and recommend."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from fewbit.errors import PlanError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")]
Context = Annotated[int | None, typer.Option(help="Tokens of a text; the model's context up to 4096 by default.")]
Batch = Annotated[int, typer.Option(help="Texts at once.")]
_MODEL = "A folder, with or without weights, a config.json, a Hub name, tiny"


def estimate(
    model: Annotated[str, typer.Argument(help=f"{_MODEL}, or a size such as 7B.")],
    plan: Annotated[str | None, typer.Option(help="This plan alone, by name or a .json file.")] = None,
    context: Context = None,
    batch: Batch = 1,
    cache: Annotated[str, typer.Option(help="Type of keys and values: float32, bf16, fp8, q8_0, q4_0.")] = "bf16",
    samples: Annotated[int, typer.Option(help="Windows of calibration text.")] = 128,
    length: Annotated[int, typer.Option(help="Tokens in a window of it.")] = 512,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Tell what every plan would make of MODEL, from its config alone: bytes, memory, and which GPU cards hold it."""
    from fewbit import choosing, report_advice

    if (sizes := choosing.estimate_size(model)) is not None:
        _print(asdict(sizes)) if as_json else report_advice.precision(sizes)
        return
    done = choosing.estimate(
        model,
        plan=plan,
        context=context,
        batch=batch,
        cache=cache,
        samples=samples,
        length=length,
        trust_remote_code=trust_remote_code,
    )
    _print(asdict(done)) if as_json else report_advice.estimate(done)


def recommend(
    model: Annotated[str | None, typer.Argument(help=f"{_MODEL}.")] = None,
    purpose: Annotated[
        str | None, typer.Option("--for", help="serving, edge, finetuning, experiment or quality.")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="What may be used, 8GB; this machine's by default.")] = None,
    max_kl: Annotated[float | None, typer.Option(help="The most KL divergence from the original.")] = None,
    speed: Annotated[str | None, typer.Option(help="first: prefer the fastest to the one that loses least.")] = None,
    target: Annotated[str | None, typer.Option(help="What must read it: vllm, llama.cpp or transformers.")] = None,
    report: Annotated[str | None, typer.Option(help="A report.json of fewbit compare, whose numbers decide.")] = None,
    context: Context = None,
    batch: Batch = 1,
    table: Annotated[bool, typer.Option("--table", help="Show which method is for what, and nothing else.")] = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Tell which plan to use on MODEL for a purpose, why, and what to run."""
    from fewbit import choosing, report_advice

    if table:
        rows = choosing.methods(report)
        _print({"order": "kl", "methods": [asdict(row) for row in rows]}) if as_json else report_advice.methods(rows)
        return
    if model is None or purpose is None:
        raise PlanError(
            "recommend needs a model and a purpose",
            "Such as: fewbit recommend tiny --for quality. Purposes: serving, edge, finetuning, experiment, quality.",
        )
    if speed not in (None, "first"):
        raise PlanError(f"--speed {speed}", "Only --speed first is known.")
    done = choosing.recommend(
        model,
        purpose,
        memory=memory,
        max_kl=max_kl,
        speed_first=speed == "first",
        target=target,
        report=report,
        context=context,
        batch=batch,
        trust_remote_code=trust_remote_code,
    )
    _print({"plan": done.best.plan, **asdict(done)}) if as_json else report_advice.recommendation(done)


def _print(data: Any) -> None:
    print(json.dumps(data, indent=1, allow_nan=False))
