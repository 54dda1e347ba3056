"""Estimate the size and memory of each plan, and the cards that hold it, before any download or computation."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from fewbit.advise import cards, memory
from fewbit.brief import brief
from fewbit.errors import PlanError
from fewbit.formats.base import by_quant_method
from fewbit.measure.comparison import ORIGINAL
from fewbit.models.describe import describe
from fewbit.models.outline import Outline, geometry
from fewbit.models.source import Source
from fewbit.pipeline import sizes
from fewbit.plans import plan as plans
from fewbit.stats import Need
from fewbit.system import machine


@dataclass(frozen=True)
class PlanEstimate:
    """One plan. All in bytes: `file_bytes` and `weights_bytes`, on disk and in memory, are exact; `total` is weights,
    cache and activations; peaks follow the stated model (advise/memory.py). `card`: the smallest that holds `total`.

    `quantization_peak`: peak memory of quantizing on a CPU. `quantization_gpu`, `quantization_host`: on a GPU, the peak
    of its memory, and of main memory. None counts Python and its imports. `why_not`: why the plan is impossible for
    this model.
    """

    plan: str
    format: str
    method: str
    bits: float
    file_bytes: int
    weights_bytes: int
    activation_peak: int
    total: int
    quantization_peak: int
    quantization_gpu: int
    quantization_host: int
    calibrates: bool
    schemes: tuple[str, ...]
    card: str | None
    notes: tuple[str, ...]
    why_not: str | None


@brief
@dataclass(frozen=True)
class Estimate:
    """The estimates of all plans for a model, the unquantized model first. `imagined`: the weights were not on this
    machine, so their shapes come from the config alone."""

    model: str
    architecture: str
    parameters: int
    imagined: bool
    context: int
    batch: int
    cache: str
    cache_bytes: int
    activation: str
    plans: tuple[PlanEstimate, ...]


def estimate(
    source: Source,
    wanted: list[plans.Plan],
    use: memory.Use,
    *,
    samples: int,
    length: int,
    trust_remote_code: bool = False,
) -> Estimate:
    """The estimate for a located model, whose files may be missing; of one that is quantized, for what it is."""
    _check(source, use)
    if source.quantization is not None:
        return _quantized(source, use)
    outline = Outline(source, trust_remote_code=trust_remote_code)
    g = geometry(outline.config, source.context)
    cache = memory.cache_bytes(g, use)
    original = sizes.original_bytes(outline)
    parameters = sum(prod(spec.shape) for _, _, spec in outline.passed_through())
    files = sizes.checkpoint_bytes(outline)
    rows = [_row(sizes.Sized(ORIGINAL, "as it is", files, original, bits=8 * original / parameters), g, use, cache)]
    block = memory.Block(**outline.largest_block())
    for plan in wanted:
        sized = sizes.sized(outline, plan)
        peaks = (0, 0, 0)
        if sized.why_not is None:
            work = memory.Work(sized.need, samples, min(length, source.context), sized.bits, sized.packed_bytes)
            cpu, gpu = memory.Device(4, machine.main_memory()), memory.Device(2, machine.gpu_memory(), gpu=True)
            on_cpu, on_gpu = (memory.quantization_peak(g, block, work, device) for device in (cpu, gpu))
            peaks = on_cpu, on_gpu, memory.host_peak(block, work)
        rows.append(_row(sized, g, use, cache, "+".join(sorted({r.method for r in plan.rules if r.scheme})), peaks))
    return Estimate(
        model=source.name,
        architecture=type(outline.model).__name__,
        parameters=parameters,
        imagined=not source.files,
        context=use.context,
        batch=use.batch,
        cache=use.cache,
        cache_bytes=cache,
        activation="float32" if use.activation == 4 else "bf16",
        plans=tuple(rows),
    )


def _quantized(source: Source, use: memory.Use) -> Estimate:
    """The estimate for an already quantized model: one row."""
    if not source.files:
        quantization: Any = source.quantization
        raise PlanError(
            f"{source.name} is quantized ({quantization['quant_method']}) and its weights are not here",
            "Give the folder that holds them, or the unquantized model.",
        )
    found, config = describe(source), source.config
    g = geometry(_Plain(config), source.context)
    cache = memory.cache_bytes(g, use)
    format = by_quant_method((source.quantization or {})["quant_method"])
    sized = sizes.Sized(
        "as it is",
        found.format or (format.name if format else "?"),
        found.file_bytes,
        found.weights_bytes,
        bits=found.bits_per_weight_quantized or 0.0,
        share=found.share,
        schemes=tuple(found.schemes),
    )
    return Estimate(
        model=source.name,
        architecture=found.architecture,
        parameters=found.parameters,
        imagined=False,
        context=use.context,
        batch=use.batch,
        cache=use.cache,
        cache_bytes=cache,
        activation="float32" if use.activation == 4 else "bf16",
        plans=(_row(sized, g, use, cache),),
    )


class _Plain:
    """A config.json as transformers' config objects look to `geometry`."""

    def __init__(self, data: dict[str, Any]) -> None:
        vars(self).update(data)
        for ours, theirs in (
            ("num_hidden_layers", "n_layer"),
            ("hidden_size", "n_embd"),
            ("num_attention_heads", "n_head"),
        ):
            if not hasattr(self, ours):
                setattr(self, ours, data.get(theirs))

    def get_text_config(self) -> _Plain:
        return self


def _check(source: Source, use: memory.Use) -> None:
    if use.context < 1 or use.batch < 1:
        raise PlanError(f"`context={use.context}`, `batch={use.batch}`: both must be at least 1")
    if use.context > source.context:
        raise PlanError(f"`context={use.context}` is beyond the model's context of {source.context} tokens")


def _row(
    sized: sizes.Sized, g: Any, use: memory.Use, cache: int, method: str = "", peaks: tuple[int, int, int] = (0, 0, 0)
) -> PlanEstimate:
    packed = sized.plan != ORIGINAL
    activations = memory.activation_peak(g, use, packed=packed) if sized.why_not is None else 0
    total = sized.weights_bytes + cache + activations if sized.why_not is None else 0
    return PlanEstimate(
        plan=sized.plan,
        format=sized.format,
        method=method,
        bits=sized.bits,
        file_bytes=sized.file_bytes,
        weights_bytes=sized.weights_bytes,
        activation_peak=activations,
        total=total,
        quantization_peak=peaks[0],
        quantization_gpu=peaks[1],
        quantization_host=peaks[2],
        calibrates=sized.need > Need.NOTHING,
        schemes=sized.schemes,
        card=cards.smallest(total) if sized.why_not is None else None,
        notes=sized.notes,
        why_not=sized.why_not,
    )
