"""The verbs for choosing a plan: what each would take, and which one to use."""

from __future__ import annotations

from pathlib import Path

from fewbit.advise import estimate as estimates
from fewbit.advise import memory, precision, speeds
from fewbit.advise import recommend as recommending
from fewbit.advise import table as tables
from fewbit.advise.estimate import Estimate
from fewbit.advise.precision import Precision
from fewbit.advise.recommend import Recommendation
from fewbit.advise.table import MethodRow
from fewbit.api import arguments
from fewbit.api.arguments import Plans, checked
from fewbit.errors import PlanError
from fewbit.measure.comparison import Comparison
from fewbit.models.source import outlined
from fewbit.plans import plan as plans
from fewbit.system import machine
from fewbit.texts.calibration import Calibration


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
    """What each plan, or one, makes of `model`: exact bytes, and stated peaks, from its config alone.

    model: as elsewhere, or a config.json, or a folder without weights; of a Hub name only the config is downloaded.
    context: tokens of each of `batch` texts, the model's own up to 4096 by default. cache: the type of keys and values
    (float32, in which activations then are too, bf16, fp8, q8_0 ...). samples, length: of calibration text.
    PlanError or FormatError if the config does not describe a causal LM.
    """
    source = outlined(model)
    wanted = list(plans.PRESETS.values()) if plan is None else [arguments.plan("plan", plan)]
    use = memory.Use(
        context=min(4096, source.context) if context is None else context,
        batch=batch,
        cache=cache,
        activation=4 if cache == "float32" else 2,
    )
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
    context: int | None = None,
    batch: int = 1,
    trust_remote_code: bool = False,
) -> Recommendation:
    """Which plan to use on `model` for a purpose: serving, edge, finetuning, experiment or quality.

    memory: bytes, or text such as 8GB, that weights, cache and activations may take; by default what this machine has
    (of its first GPU for serving and fine-tuning). target: vllm, llama.cpp or transformers must read it. max_kl: the
    most KL divergence allowed. report: of `fewbit compare`, the file, its folder, or a `Comparison`: then its
    measurements decide. PlanError if no plan meets all demands; it names the nearest one.
    """
    if max_kl is not None and not 0 < max_kl < float("inf"):
        raise PlanError(
            f"`max_kl={max_kl:g}`: must be finite and greater than 0", "0.05 is a small loss, 0.5 a large one."
        )
    if precision.parameters(str(model)) is not None:
        raise PlanError(
            f"{model} is a size, not a model",
            f"recommend needs a config.json. For a size, run: fewbit estimate {model}",
        )
    given = memory if isinstance(memory, int) else recommending.nbytes(memory) if memory is not None else None
    measured = report if isinstance(report, Comparison) or report is None else Comparison.read(report)
    source = outlined(model)
    if source.quantization is not None:
        raise PlanError(f"{model} is quantized already", "Give the original model.")
    gpu = machine.gpu_memory() if purpose in ("serving", "finetuning", "experiment") else 0
    room = given if given is not None else gpu or machine.main_memory()
    return recommending.recommend(
        estimate(model, context=context, batch=batch, trust_remote_code=trust_remote_code),
        purpose,
        recommending.Demands(room, target, max_kl, speed_first),
        measured=measured,
        timed=speeds.known(source, machine.device(None)),
        device=machine.device(None),
    )


def methods(report: str | Path | Comparison | None = None) -> tuple[MethodRow, ...]:
    """The table of all methods: bits, calibration, kernel here, quality (of `report`, else of the priors), best for."""
    measured = report if isinstance(report, Comparison) or report is None else Comparison.read(report)
    return tables.table(measured, machine.device(None))
