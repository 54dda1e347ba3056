"""Importance matrices (mean squares of linears' inputs): measured on a text, or read from a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fewbit.errors import FormatError, PlanError
from fewbit.formats.containers import imatrix
from fewbit.methods.base import name_of
from fewbit.models.experts import is_of_expert
from fewbit.models.gguf import names as gguf_names
from fewbit.models.skeleton import Skeleton
from fewbit.names import in_short
from fewbit.pipeline.capture import Block, Inputs, captured, gather, tokens_at_once
from fewbit.pipeline.progress import Progress, Step
from fewbit.pipeline.settled import Settled, model_of
from fewbit.stats import Need, Stats


def importance(path: Path, settled: Settled) -> tuple[dict[str, Stats], list[str]]:
    """Read the importance matrix at `path`: statistics of each linear in a block, and notes on missing entries.

    PlanError if a method of the plan needs whole inputs, or no importances at all. FormatError if the file is damaged
    or belongs to another model.
    """
    skeleton = settled.skeleton
    outside = {a.module for a in settled.outside}
    assignments = {module: a for module, a in settled.resolved.assignments.items() if module not in outside}
    for a in assignments.values():
        if a.method.needs != Need.MEAN_SQUARE or a.method.rewrites:
            needs = "whole inputs" if a.method.needs > Need.NOTHING else "no importances"
            raise PlanError(
                f"`imatrix={path}`: method {name_of(a.method)} needs {needs}",
                "Omit `imatrix`, or use the method imatrix.",
            )
        if settled.resolved.format.measures_inputs(a.scheme):
            raise PlanError(
                f"`imatrix={path}`: {a.module} needs its largest input, so that servers can round activations, and an "
                "importance matrix does not have it",
                "Omit `imatrix`, or use a plan without activations.",
            )
    model_of(skeleton)  # PlanError if llama.cpp has no name for one of its weights
    matrix, routes = imatrix.read(path), gguf_names.routes(skeleton.config)
    modules = gguf_names.names_of(routes)
    stats: dict[str, Stats] = {}
    missing: dict[str, None] = {}
    for module, a in assignments.items():
        route = routes[f"{module}.weight"]
        names, expert = route.names, route.expert
        name = next((name for name in names if name in matrix), names[0])  # pieces read the same inputs
        if name not in matrix:
            missing[name] = None
            stats[module] = Stats.from_mean_square(
                torch.ones(a.shape[1], device=skeleton.device, dtype=torch.float32), 1
            )
            continue
        mean_square, several = matrix[name].mean_square, len(modules[route.name]) // route.together
        if len(mean_square) != a.shape[1] * several:
            of = "" if expert is None else f" for each of {several} experts"
            raise FormatError(
                f"{path}: {name} has {len(mean_square)} importances, but the weight has {a.shape[1]} columns{of}",
                "The file belongs to another model.",
            )
        own = mean_square.view(several, -1)[(expert or 0) // route.together]
        if (order := route.column_order) is not None:
            own = own[order.argsort()]
        stats[module] = Stats.from_mean_square(own.to(skeleton.device), matrix[name].most)
    if len(missing) == len({routes[f"{module}.weight"].names[0] for module in assignments}):
        raise FormatError(
            f"{path} has importances of {len(matrix)} tensors, but none of this model "
            f"({next(iter(missing))} is missing)",
            "The file belongs to another model.",
        )
    notes = [f"{path} has no importances of {', '.join(missing)}: weighted equally"] if missing else []
    return stats, notes


def matrix_of(skeleton: Skeleton, found: Mapping[str, Stats]) -> dict[str, imatrix.Importance]:
    """The matrix of what `measure` found: name in a GGUF file -> importance, that of all experts of a layer as one."""
    routes = gguf_names.routes(skeleton.config)
    measured: dict[str, list[Stats]] = {}
    for module in sorted(found, key=lambda module: routes[f"{module}.weight"].expert or 0):
        route = routes[f"{module}.weight"]
        if (route.expert or 0) % route.together:
            continue  # gate and up of an expert, and all that a file has as one matrix, read the same inputs
        for name in route.names if route.split is None or route.split.by_rows else ():
            measured.setdefault(name, []).append(found[module])
    orders = {route.name: order for route in routes.values() if (order := route.column_order) is not None}
    matrix = {}
    for name, each in measured.items():
        squares, rows = [_squares(s) for s in each], tuple(s.rows for s in each)
        squares = [square[orders[name]] for square in squares] if name in orders else squares
        one = len(each) == 1
        matrix[name] = imatrix.Importance(squares[0] if one else torch.stack(squares), rows[0] if one else rows)
    return matrix


def _squares(stats: Stats) -> Tensor:
    """mean x_j² [K]. 1 for an expert that no token reached: its count of 0 says so in the file, as llama.cpp's does."""
    if stats.rows or stats.dropped:
        return stats.mean_square.cpu()
    return torch.ones(stats.columns, dtype=torch.float32, device="cpu")


def unreached(found: Mapping[str, Stats]) -> list[str]:
    """A note on the experts in what `measure` found that no token reached, if there are any."""
    every = {module.rpartition(".")[0]: stats.rows for module, stats in found.items() if is_of_expert(module)}
    if not (without := [expert for expert, rows in every.items() if not rows]):
        return []
    return [
        f"no calibration token reached {len(without)} of {len(every)} experts, and their columns have equal "
        f"importances: {in_short(without)}. More samples help"
    ]


def measure(skeleton: Skeleton, tokens: Tensor, progress: Progress) -> dict[str, Stats]:
    """Mean squares of the inputs of all linears in blocks. All tokens have equal weight; nothing is quantized."""
    stats: dict[str, Stats] = {}
    hidden, calls = captured(skeleton, Inputs(tokens, tokens_at_once=tokens_at_once(skeleton)))
    for index, name in enumerate(skeleton.blocks):
        with skeleton.materialized(name) as module:
            block = Block(skeleton, name, module, calls[name], hidden)
            stats |= gather(block, dict.fromkeys(skeleton.linears(name), Need.MEAN_SQUARE), alike=True)
            if name != skeleton.blocks[-1]:
                block.replay()
        progress(Step(index + 1, len(skeleton.blocks), None, False))
    return stats
