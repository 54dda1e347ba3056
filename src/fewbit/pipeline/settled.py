"""A plan settled for a model, and the checks that need no work."""

from __future__ import annotations

from typing import Any

import torch

from fewbit.errors import NumericsError, PlanError
from fewbit.formats.base import Shape
from fewbit.models.gguf import names as gguf_names
from fewbit.models.skeleton import Skeleton
from fewbit.pipeline import settled as pipeline_settled
from fewbit.plans import mixtures
from fewbit.plans import plan as plans
from fewbit.plans.plan import Assignment, Resolved
from fewbit.schemes.base import chunk_rows
from fewbit.stats import Need


def settled(skeleton: Skeleton, plan: plans.Plan) -> plans.Resolved:
    """`plan` resolved over the model's shapes; PlanError where it cannot be."""
    shapes: dict[str, Shape] = {n: s for block in skeleton.blocks for n, s in skeleton.linears(block).items()}
    whole = None
    if plans.format_of(plan).suffix:
        whole = pipeline_settled.model_of(skeleton)
        shapes |= skeleton.outside()
    return plans.resolve(plan, shapes, whole)


def model_of(skeleton: Skeleton) -> mixtures.Model:
    """What a plan must know of the model; PlanError for one that llama.cpp has no name for."""
    config = skeleton.config
    routes = gguf_names.routes(config)
    heads = config.num_attention_heads
    outside = skeleton.outside()
    linears = [name for block in skeleton.blocks for name in skeleton.linears(block)]
    if unknown := [name for name in [*linears, *outside] if f"{name}.weight" not in routes]:
        raise PlanError(
            f"GGUF has no name for {unknown[0]} of a model of type {config.model_type!r}",
            "Use a plan for another format.",
        )
    return mixtures.Model(
        arch=gguf_names.architecture(config.model_type).name,
        layers=config.num_hidden_layers,
        gqa=heads // (getattr(config, "num_key_value_heads", None) or heads),
        tied=len(outside) < 2,
        names={name: routes[f"{name}.weight"].name.removesuffix(".weight") for name in [*linears, *outside]},
    )


_LOWEST_SHARE = 0.5


def share_quantized(skeleton: Skeleton, resolved: Resolved) -> float:
    """Share of the blocks' parameters that the plan quantizes."""
    besides = {a.module for a in outside(skeleton, resolved)}
    quantized = sum(a.shape[0] * a.shape[1] for a in resolved.assignments.values() if a.module not in besides)
    return quantized / skeleton.parameters_in_blocks()


def outside(skeleton: Skeleton, resolved: Resolved) -> list[Assignment]:
    """What is quantized outside the blocks: embeddings and head, in formats that hold a whole model."""
    return [a for a in resolved.assignments.values() if not any(a.module.startswith(f"{b}.") for b in skeleton.blocks)]


def check(skeleton: Skeleton, resolved: Resolved) -> None:
    """Everything that can be known before any work: PlanError or NumericsError, naming the tensor."""
    if reason := skeleton.why_not():
        raise PlanError(reason)
    if (share := share_quantized(skeleton, resolved)) < _LOWEST_SHARE:
        why = [*resolved.notes, f"left as they are: {', '.join(resolved.kept) or 'no linears'}"]
        raise PlanError(
            f"only {share:.0%} of the parameters in the model's blocks would be quantized:\n  " + "\n  ".join(why),
            f"At least {_LOWEST_SHARE:.0%} must be; another --scheme or --format may fit more of them.",
        )
    for key, _, _ in skeleton.passed_through():
        tensor = skeleton.checkpoint.get(key)
        rows = tensor.reshape(len(tensor), -1) if tensor.dim() else tensor.reshape(1, 1)
        # PyTorch has no isfinite of all 8-bit floats.
        if not all(torch.isfinite(rows[part].float()).all() for part in chunk_rows(*rows.shape)):
            raise NumericsError(f"{key} has NaN or Inf", f"The checkpoint {skeleton.source.folder} is damaged.")


def quantization_config(skeleton: Skeleton, resolved: Resolved) -> dict[str, Any]:
    """What config.json will say; every linear that is not quantized, outside the blocks too, is named there."""
    quantized = resolved.assignments
    skipped = [name for name in skeleton.all_linears() if name not in quantized]
    for key, spec in skeleton.carried(quantized).items():
        name = key.removesuffix(".weight")
        # Some readers take a name for the beginning or the end of others too.
        alike = any(module.startswith(name) or module.endswith(name) for module in quantized)
        if len(spec.shape) == 2 and name != key and not alike:
            skipped.append(name)
    return resolved.format.config(list(resolved.assignments.values()), skipped, skeleton.source.dtype)


def calibration_need(resolved: Resolved) -> Need:
    """The most that a method of the plan needs to know of inputs."""
    return max((a.method.needs for a in resolved.assignments.values()), default=Need.NOTHING)
