"""The verbs for choosing a plan: what each plan costs, and which one to use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fewbit import checks
from fewbit.advise import estimate as estimates
from fewbit.advise import filling, fitting, precision, speeds
from fewbit.advise import memory as memories
from fewbit.advise import recommend as recommending
from fewbit.advise import table as tables
from fewbit.advise.estimate import Estimate
from fewbit.advise.fitting import Fitted
from fewbit.advise.precision import Precision
from fewbit.advise.recommend import Recommendation
from fewbit.advise.table import MethodRow
from fewbit.api import arguments, quantize, requested
from fewbit.api.arguments import Plans, checked
from fewbit.checks import Texts
from fewbit.errors import PlanError
from fewbit.measure.comparison import Comparison
from fewbit.models.outline import Outline
from fewbit.models.source import outlined
from fewbit.plans import plan as plans
from fewbit.plans.budget import Budget
from fewbit.system import machine
from fewbit.texts.calibration import Calibration

_ON_GPUS = ("serving", "finetuning", "experiment")  # purposes whose plans are for a GPU


@checked
def estimate(
    model: str | Path,
    *,
    plan: Plans | None = None,
    context: int | None = None,
    batch: int = 1,
    cache: str = "bf16",
    samples: int = Calibration.samples,
    length: int = Calibration.length,
    trust_remote_code: bool = False,
) -> Estimate:
    """Compute the exact bytes and the estimated peak memory of every plan (or of `plan`) from the model's config.

    model: as in other verbs; also a config.json, or a folder without weights. For a Hub name, only the config is
    downloaded. context: tokens of each of `batch` texts; by default the model's context, at most 4096. cache: dtype of
    the KV cache (bf16, fp8, q8_0 ...; float32: activations are float32 too). samples, length: calibration windows, and
    tokens in each. A quantized model is estimated as it is, without a plan. For a size such as 7B, there is
    `estimate_size`. PlanError or FormatError if the config does not describe a causal LM.
    """
    if precision.parameters(str(model)) is not None and not Path(model).exists():
        raise PlanError(
            f"{model} is a size, not a model", f"Call fewbit.api.advise.estimate_size({str(model)!r}), which takes one."
        )
    try:
        source = outlined(model)
    except PlanError as error:
        if not precision.like_a_size(str(model)):
            raise
        raise PlanError(error.message, f"If it is a size, write it as 7B, 1.1B or 125M. {error.hint}") from None
    if plan is not None and source.quantization is not None:
        raise PlanError(
            f"{source.name} is quantized already, and its estimate is for the model as it is", "Leave out `plan`."
        )
    wanted = list(plans.PRESETS.values()) if plan is None else [arguments.plan("plan", plan)]
    use = memories.use_of(source.context, context, batch, cache)
    return estimates.estimate(source, wanted, use, samples=samples, length=length, trust_remote_code=trust_remote_code)


def estimate_size(size: str) -> Precision | None:
    """Weight size in each format for a parameter count (7B, 1.1B, 125M). None if `size` is not a number."""
    count = precision.parameters(size)
    return None if count is None else precision.table(size, count)


@checked
def recommend(
    model: str | Path,
    purpose: str,
    *,
    memory: str | int | None = None,
    max_kl: float | None = None,
    speed_first: bool = False,
    target: str | None = None,
    report: str | Path | Comparison | None = None,
    fit: str | int | None = None,
    measure: bool = False,
    calibration: Calibration | Texts | None = None,
    context: int | None = None,
    batch: int = 1,
    trust_remote_code: bool = False,
) -> Recommendation:
    """Recommend a plan for `model` and a purpose: serving, edge, finetuning, experiment or quality.

    memory: limit for weights, cache and activations, in bytes or as text such as 8GB; by default this machine's memory
    (for serving, fine-tuning and experiments that of its first GPU, if there is one). target: the program that must
    read the result: vllm, llama.cpp or transformers; with vllm, serving prefers what it computes fastest on the first
    GPU of this machine. max_kl: largest KL divergence allowed. report: a report of
    `fewbit compare` to rank by: its file, its folder, or a `Comparison`. PlanError if no plan meets all demands; it
    names the nearest one.

    fit: in place of `memory`, the memory that `quantize --fit` is to fill with the widths that it chooses. `fitted` of
    the result then says which plan, size and loss to expect; `max_kl` limits that loss. measure: measure the costs of
    this model's weights for that on `calibration`, as `preview` does, which takes longer than to quantize the model.
    """
    requested.check_recommendation(memory=memory, fit=fit, measure=measure, calibration=calibration, batch=batch)
    memory, named = (memory, "memory") if fit is None else (fit, "fit")
    if precision.parameters(str(model)) is not None:
        raise PlanError(
            f"{model} is a size, not a model",
            f"recommend needs a config.json. For a size, run: fewbit estimate {model}",
        )
    given = None if memory is None else checks.size(named, memory)
    measured = report if isinstance(report, Comparison) or report is None else Comparison.read(report)
    source = outlined(model)
    if source.quantization is not None:
        raise PlanError(f"{model} is quantized already", "Give the original model.")
    gpu = machine.gpu_memory() if purpose in _ON_GPUS else 0
    room = given if given is not None else gpu or machine.main_memory()
    estimated = estimate(model, context=context, batch=batch, trust_remote_code=trust_remote_code)

    def ranked(found: Fitted | None) -> Recommendation:
        device = machine.device(None)
        done = recommending.recommend(
            estimated,
            purpose,
            recommending.Demands(room, target, max_kl, speed_first, machine.gpu_capability(), named, found),
            measured=measured,
            timed=speeds.known(source, device),
            device=device,
        )
        if purpose in _ON_GPUS and not gpu:
            limit = "" if given is not None else " The memory limit is its main memory."
            note = f"This machine has no GPU, and plans for {purpose} are for GPUs.{limit}"
            done = replace(done, notes=(note, *done.notes))
        return done

    if fit is None:
        return ranked(None)
    names = recommending.fitting_plans(estimated, purpose, target)
    try:
        found = fitting.fitted(
            Outline(source, trust_remote_code=trust_remote_code),
            [plans.PRESETS[name] for name in names],
            room,
            memories.use_of(source.context, context),
            recommending.losses(estimated, measured),
        )
    except PlanError:
        ranked(None)  # where nothing fits, its error names the smallest plan
        raise
    if measure:
        previewed = quantize.preview(
            model,
            plan=found.plan,
            budget=Budget(fit=fit, context=context),
            calibration=calibration,
            trust_remote_code=trust_remote_code,
        )
        assert previewed.allocation is not None
        found = found.chosen(previewed.allocation)
    if max_kl is not None:
        found.check(max_kl)
    return filling.with_fitted(ranked(found), found, str(fit), context, arguments.calibrated(calibration))


def methods(report: str | Path | Comparison | None = None) -> tuple[MethodRow, ...]:
    """The table of all methods: bits, calibration, kernel on this machine, quality, best use.

    Quality comes from `report`, or else from the priors in the package.
    """
    measured = report if isinstance(report, Comparison) or report is None else Comparison.read(report)
    return tables.table(measured, machine.device(None))
