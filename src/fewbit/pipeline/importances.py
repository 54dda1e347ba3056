"""Importances of inputs: measured on a text, or read from a file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fewbit.errors import FormatError, PlanError
from fewbit.formats.containers import imatrix
from fewbit.methods.base import name_of
from fewbit.models.skeleton import Skeleton
from fewbit.pipeline.capture import Block, Inputs, captured, gather
from fewbit.pipeline.progress import Progress, Step
from fewbit.pipeline.settled import Settled, model_of
from fewbit.stats import Need, Stats


def importance(path: Path, settled: Settled) -> tuple[dict[str, Stats], list[str]]:
    """Read the importance matrix at `path`: statistics of each linear in a block, and notes on missing entries.

    PlanError if a method of the plan needs whole inputs, or no importances at all. FormatError if the file is damaged
    or belongs to another model.
    """
    skeleton = settled.skeleton
    besides = {a.module for a in settled.outside}
    wanted = {module: a for module, a in settled.resolved.assignments.items() if module not in besides}
    for a in wanted.values():
        if a.method.needs != Need.MEAN_SQUARE or a.method.rewrites:
            needs = "whole inputs" if a.method.needs > Need.NOTHING else "no importances"
            raise PlanError(
                f"`imatrix={path}`: method {name_of(a.method)} needs {needs}",
                "Omit `imatrix`, or use the method imatrix.",
            )
    names, matrix = model_of(skeleton).names, imatrix.read(path)
    found, missing = {}, []
    for module, a in wanted.items():
        name = f"{names[module]}.weight"
        if name not in matrix:
            missing.append(name)
            found[module] = Stats.from_mean_square(
                torch.ones(a.shape[1], device=skeleton.device, dtype=torch.float32), 1
            )
            continue
        mean_square, rows = matrix[name]
        if len(mean_square) != a.shape[1]:
            raise FormatError(
                f"{path}: {name} has {len(mean_square)} importances, the weight {a.shape[1]} columns",
                "The file is of another model.",
            )
        found[module] = Stats.from_mean_square(mean_square.to(skeleton.device), rows)
    if len(missing) == len(wanted):
        raise FormatError(
            f"{path} has importances of {len(matrix)} tensors, none of this model ({missing[0]} is not there)",
            "The file is of another model.",
        )
    notes = [f"{path} has no importances of {', '.join(missing)}: equal weights there"] if missing else []
    return found, notes


def measure(skeleton: Skeleton, tokens: Tensor, progress: Progress) -> dict[str, Stats]:
    """Mean squares of the inputs of all linears in blocks. All tokens have equal weight; nothing is quantized."""
    found: dict[str, Stats] = {}
    hidden, calls = captured(skeleton, Inputs(tokens))
    for index, name in enumerate(skeleton.blocks):
        with skeleton.materialized(name) as module:
            block = Block(skeleton, name, module, calls[name], hidden)
            found |= gather(block, dict.fromkeys(skeleton.linears(name), Need.MEAN_SQUARE), alike=True)
            if name != skeleton.blocks[-1]:
                block.replay()
        progress(Step(index + 1, len(skeleton.blocks), 0.0, False))
    return found
