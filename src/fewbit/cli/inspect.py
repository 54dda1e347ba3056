"""Look at a model, at what there is, and at this machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from fewbit.checks import without_gpu
from fewbit.cli.flags import checked
from fewbit.cli.options import Json, Model, printed
from fewbit.errors import PlanError


@checked
def inspect(
    model: Model,
    metadata: Annotated[bool, typer.Option("--metadata", help="Show all keys of a GGUF file.")] = False,
    as_json: Json = False,
) -> None:
    """Show what is in MODEL: schemes, share of parameters, bits per weight, how it was made."""
    from fewbit.api import inspect as api
    from fewbit.report import text as report

    found = api.inspect(model, metadata=metadata)
    printed({**asdict(found), "share": found.share}) if as_json else report.inspection(found)


def list_(as_json: Json = False) -> None:
    """List schemes, methods, formats, kernels and plans, and what is unavailable here."""
    from fewbit.plans.catalogue import catalogue
    from fewbit.report import text as report

    found = catalogue()
    if as_json:
        printed({family: [entry.to_json() for entry in entries] for family, entries in found.items()})
    else:
        report.listing(found)


@checked
def doctor(
    model: Annotated[
        str | None,
        typer.Argument(help="Load this model, and show how the CPU computes it and why not faster."),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="Measure which sizes of kernels are fastest on this machine's GPUs, and use them."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what this machine has, which kernels work on it, and what would make it faster."""
    if tune and model is not None:
        raise PlanError("`tune` measures GPUs, and takes no MODEL", "Leave out one of them.")
    if tune and without_gpu():
        raise PlanError("`tune` needs an NVIDIA GPU", "Leave out `tune`.")
    from fewbit.advise import doctor as hardware
    from fewbit.report import progress
    from fewbit.report import text as report

    if tune:
        with progress.ranges(True) as tell:
            measured = hardware.tune(tell)
        printed({"cards": [asdict(each) for each in measured]}) if as_json else report.tuned_cards(measured)
        return
    found = hardware.look(model)
    printed(asdict(found)) if as_json else report.doctor(found)
