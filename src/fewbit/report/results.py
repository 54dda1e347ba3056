"""What the verbs return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fewbit.brief import brief

if TYPE_CHECKING:
    from fewbit.measure.quality import Quality
    from fewbit.models.describe import Inspection
    from fewbit.pipeline.run import TensorReport


@brief
@dataclass(frozen=True)
class Quantized:
    """What `quantize` did. Bytes of tensors; `peak` is the most memory this process ever had resident."""

    out: str
    plan: str
    notes: list[str]
    tensors: list[TensorReport]
    original_bytes: int
    output_bytes: int
    bits_per_weight: float
    share: float
    seconds: float
    peak: int
    gpu_peak: int
    anonymous: int
    sample: str


@brief
@dataclass(frozen=True)
class Measured:
    """What `imatrix` wrote: importances of `entries` tensors, over so many tokens of a text."""

    out: str
    entries: int
    tokens: int
    text: str
    notes: list[str]
    seconds: float


@brief
@dataclass(frozen=True)
class Evaluation:
    """Quality; also size if the model is quantized."""

    model: str
    reference: str | None
    text: str
    quality: Quality
    inspection: Inspection
    peak: int
    gpu_peak: int
    seconds: float
    available: int  # windows of the text, of which quality.windows were measured


@brief
@dataclass(frozen=True)
class Finetuned:
    """What `finetune` did. Losses are nats per learned token: over the whole training, and on what was held out before
    and after it. `tokens` are those learned in one epoch; `peak` is the most memory this process ever had resident."""

    out: str
    model: str
    notes: list[str]
    examples: int
    held_out_examples: int
    tokens: int
    steps: int
    loss: float
    held_out_before: float | None
    held_out_after: float | None
    trainable: int
    nbytes: int
    seconds: float
    peak: int
    gpu_peak: int


@brief
@dataclass(frozen=True)
class Merged:
    """What `merge` made: an ordinary model, or a quantized one. `base`: the weights that the adapter was added to, None
    for the values of the packed ones. `notes`: what was carried over beside the model, and what was left out.
    `evaluation` compares with the adapter on the model it was trained on."""

    out: str
    base: str | None
    notes: list[str]
    quantized: Quantized | None
    evaluation: Evaluation
    nbytes: int
    seconds: float
