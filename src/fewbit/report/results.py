"""The results of the verbs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fewbit.brief import brief

if TYPE_CHECKING:
    from fewbit.measure.quality import Quality
    from fewbit.measure.tasks import Score
    from fewbit.models.describe import Inspection
    from fewbit.pipeline.run import TensorReport
    from fewbit.plans.budget import Allocation


@brief
@dataclass(frozen=True)
class Quantized:
    """The result of `quantize`. Bytes are those of tensors. `peak`: peak resident memory of this process.

    `sample`: what the output generated; "" if it cannot generate; None if it was not run, which a note explains.
    `allocation`: the widths that were chosen for a size; None if no size was given.
    `unquantized`: what a folder has unquantized (embeddings and head, towers for images or sound, others) -> bytes.
    """

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
    sample: str | None
    allocation: Allocation | None = None
    unquantized: dict[str, int] = field(default_factory=dict)


@brief
@dataclass(frozen=True)
class Converted:
    """The result of `convert`. Bytes are those of tensors.

    schemes: scheme in the output -> number of weights. decoded: quantized weights that became ordinary tensors.
    quantized, evaluation: with `requantize`, how the model was quantized, and its comparison with the input.
    """

    out: str
    to: str
    exact: bool
    schemes: dict[str, int]
    decoded: list[str]
    notes: list[str]
    original_bytes: int
    output_bytes: int
    seconds: float
    peak: int
    quantized: Quantized | None = None
    evaluation: Evaluation | None = None


@brief
@dataclass(frozen=True)
class Measured:
    """The result of `imatrix`: importances of `entries` tensors, measured over `tokens` tokens of `text`."""

    out: str
    entries: int
    tokens: int
    text: str
    notes: list[str]
    seconds: float


@brief
@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`: quality, and size if the model is quantized."""

    model: str
    reference: str | None
    text: str
    quality: Quality
    inspection: Inspection
    peak: int
    gpu_peak: int
    seconds: float
    available: int  # number of windows in the text; quality.windows of them were measured
    notes: list[str] = field(default_factory=list)
    tasks: list[Score] = field(default_factory=list)


@brief
@dataclass(frozen=True)
class Finetuned:
    """The result of `finetune`.

    Losses are in nats per trained token. `loss`: mean over the whole training. `held_out_before`, `held_out_after`: on
    the held-out examples. `tokens`: trained tokens in one epoch. `peak`: peak resident memory of this process.
    """

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
class Tuned:
    """The result of `tune`. before, after: KL divergence from the reference on the held-out tokens, in nats per token.

    tokens: number of different tokens that were trained on. steps: taken of the `planned` ones; fewer if the held-out
    loss no longer fell. best: the step whose state was kept. weights: packed weights whose scales were trained. gains:
    norms and biases. trained: trained numbers. moved: the share of the trained codes that changed; None if codes stay.
    """

    out: str
    model: str
    reference: str
    notes: list[str]
    text: str
    tokens: int
    held_out_tokens: int
    steps: int
    planned: int
    best: int
    before: float
    after: float
    weights: int
    gains: int
    trained: int
    moved: float | None
    seconds: float
    peak: int
    gpu_peak: int


@brief
@dataclass(frozen=True)
class Pushed:
    """The result of `push`. url: of the commit; "" if nothing was uploaded. files: name in the repository -> bytes."""

    repo: str
    url: str
    files: dict[str, int]
    notes: list[str]


@brief
@dataclass(frozen=True)
class Merged:
    """The result of `merge`: an ordinary model, or a quantized one.

    `base`: the model whose weights the adapter was added to; None: the dequantized weights. `notes`: files that were
    copied or left out. `evaluation`: comparison with the adapter on the model that it was trained on.
    """

    out: str
    base: str | None
    notes: list[str]
    quantized: Quantized | None
    evaluation: Evaluation
    nbytes: int
    seconds: float
