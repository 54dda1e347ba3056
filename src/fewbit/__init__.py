"""fewbit shrinks language models and measures what it cost.

Importing fewbit is cheap: it imports neither torch nor transformers. When transformers is imported (or if it already
was), fewbit registers itself there, so that `AutoModelForCausalLM.from_pretrained` loads quantized checkpoints packed.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from fewbit import hook
from fewbit.errors import (
    ArgumentError,
    FewbitError,
    FormatError,
    KernelError,
    NotBetter,
    NumericsError,
    OutputError,
    PeerError,
    PlanError,
)

if TYPE_CHECKING:
    from fewbit.advise.estimate import Estimate
    from fewbit.advise.recommend import Recommendation
    from fewbit.api.adapters import finetune, merge
    from fewbit.api.advise import estimate, recommend
    from fewbit.api.compare import compare
    from fewbit.api.convert import convert
    from fewbit.api.evaluate import evaluate
    from fewbit.api.generate import generate, load
    from fewbit.api.inspect import inspect
    from fewbit.api.push import push
    from fewbit.api.quantize import imatrix, preview, quantize
    from fewbit.api.tune import tune
    from fewbit.measure.comparison import Comparison
    from fewbit.models.adapters.tuning import Tuning
    from fewbit.models.decoding.generate import Continuation
    from fewbit.models.decoding.sampling import Sampling
    from fewbit.models.describe import Inspection
    from fewbit.pipeline.job import Preview
    from fewbit.pipeline.optimization import Optimization
    from fewbit.plans.budget import Allocation, Budget
    from fewbit.plans.plan import Plan
    from fewbit.report.results import Converted, Evaluation, Finetuned, Measured, Merged, Pushed, Quantized, Tuned
    from fewbit.texts.calibration import Calibration

__version__ = "0.2.0"
__all__ = [
    "Allocation",
    "ArgumentError",
    "Budget",
    "Calibration",
    "Comparison",
    "Continuation",
    "Converted",
    "Estimate",
    "Evaluation",
    "FewbitError",
    "Finetuned",
    "FormatError",
    "Inspection",
    "KernelError",
    "Measured",
    "Merged",
    "NotBetter",
    "NumericsError",
    "Optimization",
    "OutputError",
    "PeerError",
    "Plan",
    "PlanError",
    "Preview",
    "Pushed",
    "Quantized",
    "Recommendation",
    "Sampling",
    "Tuned",
    "Tuning",
    "compare",
    "convert",
    "estimate",
    "evaluate",
    "finetune",
    "generate",
    "imatrix",
    "inspect",
    "load",
    "merge",
    "prefer",
    "preview",
    "push",
    "quantize",
    "recommend",
    "tune",
]

# Public names by the module that defines them. A module is imported when one of its names is used.
_LAZY = {
    "advise.estimate": ("Estimate",),
    "advise.recommend": ("Recommendation",),
    "api.adapters": ("finetune", "merge"),
    "api.advise": ("estimate", "recommend"),
    "api.compare": ("compare",),
    "api.convert": ("convert",),
    "api.evaluate": ("evaluate",),
    "api.generate": ("generate", "load"),
    "api.inspect": ("inspect",),
    "api.push": ("push",),
    "api.quantize": ("imatrix", "preview", "quantize"),
    "api.tune": ("tune",),
    "measure.comparison": ("Comparison",),
    "models.adapters.tuning": ("Tuning",),
    "models.decoding.generate": ("Continuation",),
    "models.decoding.sampling": ("Sampling",),
    "models.describe": ("Inspection",),
    "pipeline.job": ("Preview",),
    "pipeline.optimization": ("Optimization",),
    "plans.budget": ("Allocation", "Budget"),
    "plans.plan": ("Plan",),
    "report.results": ("Converted", "Evaluation", "Finetuned", "Measured", "Merged", "Pushed", "Quantized", "Tuned"),
    "texts.calibration": ("Calibration",),
}

logging.getLogger(__name__).addHandler(logging.NullHandler())
hook.install()


def prefer(*methods: str) -> None:
    """Load models of these quantization methods by fewbit even where their own back end is installed.

    The names are fewbit's names of formats, such as "bnb" or "gptq", or those of a quantization_config's
    `quant_method`, such as "bitsandbytes" or "auto-round"; none at all means every method that fewbit knows. It holds
    for this process, and may be called before or after transformers is imported. PlanError for a name that fewbit does
    not know.
    """
    from fewbit import registry

    known = {name: format.quant_method for name, format in registry.entries("formats").items()}
    known |= {method: method for method in (*known.values(), "auto-round")}
    for method in methods:
        if method not in known:
            raise registry.unknown("quantization method", method, known)
    hook.prefer({known[method] for method in methods or known})


def __getattr__(name: str) -> Any:
    for module, names in _LAZY.items():
        if name in names:
            return getattr(importlib.import_module(f"fewbit.{module}"), name)
    raise AttributeError(f"module 'fewbit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
