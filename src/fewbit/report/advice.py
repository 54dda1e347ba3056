"""Prints estimates, recommendations and the table of methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fewbit.advise.estimate import Estimate
from fewbit.advise.fitting import Fitted
from fewbit.advise.precision import Precision
from fewbit.advise.recommend import Candidate, Recommendation
from fewbit.advise.table import MethodRow
from fewbit.names import EMBEDDED
from fewbit.report import tables, text
from fewbit.units import size

COLUMNS = ("method", "plans", "bits", "calibration", "kernel", "quality", "fine-tuning", "best for")


def estimate(done: Estimate) -> None:
    """What `fewbit estimate MODEL` prints."""
    title = f"{done.model}: {done.architecture}, {done.parameters:,} parameters, {done.batch} x {done.context:,} tokens"
    table = text.grid(
        title,
        "plan",
        "bits",
        "weights",
        "in files",
        "in use",
        "making it",
        "on a GPU",
        "smallest card",
        numbers=(1, 2, 3, 4, 5, 6),
    )
    refused = []
    for row in done.plans:
        if row.why_not is not None:
            refused.append(row)
            continue
        making = size(row.quantization_peak) if row.quantization_peak else ""
        on_gpu = size(row.quantization_gpu) if row.quantization_gpu else ""
        card = row.card or "none of the table"
        table.add_row(
            row.plan,
            f"{row.bits:.2f}",
            size(row.weights_bytes),
            size(row.file_bytes),
            size(row.total),
            making,
            on_gpu,
            card,
        )
    text.out.print(table)
    _say(
        f"Bits: per quantized weight. In use: weights, KV cache ({size(done.cache_bytes)} in {done.cache}) and "
        f"activations in {done.activation}. Making it: peak memory of quantizing, in main memory on a CPU, "
        "or in the memory of a GPU. Weights and files are exact. Peaks "
        "are estimates, within 25 % of measurements if freed memory returns to the system; an allocator that keeps it "
        "needed half as much again. Add 0.4 GB for Python and its imports, or a CUDA context."
    )
    for row in refused:
        _say(f"{row.plan}: {row.why_not}")
    if done.imagined:
        _say("The weights are not here: all numbers follow from config.json.")


def precision(done: Precision) -> None:
    """What `fewbit estimate 7B` prints."""
    table = text.grid(
        f"{done.name}: {done.parameters:,} parameters, weights alone",
        *("by the rule", "bits", "weights", "smallest card"),
        numbers=(1, 2),
    )
    for row in done.guide:
        table.add_row(row.name, f"{row.bits:g}", size(row.nbytes), row.card or "none of the table")
    text.out.print(table)
    text.out.print()
    table = text.grid("size in real formats", "format", "bits", "weights", "smallest card", numbers=(1, 2))
    for row in done.formats:
        table.add_row(row.name, f"{row.bits:.4g}", size(row.nbytes), row.card or "none of the table")
    text.out.print(table)
    _say(
        "The difference from the rule is the scales. This table counts all parameters as quantized. Folders keep "
        "embeddings in 16 bits, and mixtures such as q4_k_m give some tensors more bits: fewbit estimate MODEL counts "
        "them."
    )


def recommendation(done: Recommendation) -> None:
    """What `fewbit recommend` prints."""
    target = f", for {done.target}" if done.target else ""
    _say(f"{done.model}, for {done.purpose}{target}: {(done.fitted or done.best).plan}.")
    _say(f"  The rule: {done.rule}. {done.why} ({done.source})")
    for line in done.contradictions:
        _say(f"  Against the rule: {line}")
    if done.ranked:
        _ranked(done)
    else:
        _say("No plan fits with its own types.")
    for c in done.excluded:
        _say(f"not {c.plan}: {c.excluded}")
    for note in done.notes:
        _say(f"note: {note}")
    if (sized := done.sized) is not None:
        _say(
            f"Types chosen for each tensor lose less at the same size, {sized.bits:g} bits: KL divergence "
            f"{sized.kl.value:.3g} against {sized.kl_of_plan.value:.3g}, a prior: measured on {_of_priors(done)}. "
            "This command takes longer, and says what it measured on this model:"
        )
        tables.verbatim(text.out, f"  {sized.command}")
        _say("With --fit in place of --bits, it uses all of a memory.")
    if (fitted := done.fitted) is not None:
        _fitted(fitted, done)
    _say("Run:")
    for command in done.commands:
        tables.verbatim(text.out, f"  {command}")


def _ranked(done: Recommendation) -> None:
    """The table of the plans that meet all demands, and where its numbers come from."""
    _say(f"  Ranked by {done.ranked_by}.")
    table = text.grid(
        f"plans that fit {size(done.memory)}, in that order",
        *("plan", "bits", "weights", "in use", "KL divergence", "tokens/s", "kernel here"),
        numbers=(1, 2, 3, 4, 5),
    )
    for c in done.ranked:
        table.add_row(
            c.plan,
            f"{c.bits:.2f}",
            size(c.weights_bytes),
            size(c.total),
            _loss(c),
            f"{c.decode:.3g}" if c.decode else "",
            c.kernel,
        )
    text.out.print(table)
    if any(c.kl is not None and c.basis == "prior" for c in done.ranked):
        others = "" if done.model == EMBEDDED else ", not on this one"
        _say(f"* a prior: measured on {_of_priors(done)}{others}. In use: weights, KV cache, activations.")
    _say(f"{done.speeds}.")


def _fitted(fitted: Fitted, done: Recommendation) -> None:
    """What `--fit` adds to a recommendation."""
    loss = "was not measured for a plan of this kind"
    if fitted.kl is not None:
        where = {
            "costs": "predicted from the costs of this model's weights",
            "report": "at most about that by the report",
            "prior": f"at most about that by priors, measured on {_of_priors(done)}",
        }
        loss = f"{fitted.kl:.3g}, {where[fitted.basis]}"
    widths = "" if fitted.schemes is None else ": " + ", ".join(f"{s} in {n}" for s, n in fitted.schemes.items())
    _say(
        f"With widths chosen to fill {size(done.memory)}, with {fitted.context:,} tokens of context: {fitted.plan}, "
        f"{fitted.bits:.3g} bits a weight{widths}. Weights {size(fitted.weights_bytes)}, in use {size(fitted.total)}. "
        f"KL divergence {loss}."
    )


def _of_priors(done: Recommendation) -> str:
    """The model that the priors were measured on."""
    return "this model" if done.model == EMBEDDED else "the embedded model"


def methods(rows: Sequence[MethodRow]) -> None:
    """What `fewbit recommend --table` prints."""
    timed = any(row.decode is not None for row in rows)
    table = text.grid("methods by purpose, lowest loss first", *COLUMNS, *(["tokens/s"] if timed else []))
    for row in rows:
        table.add_row(*cells(row), *([f"{row.decode:.3g}" if row.decode else ""] if timed else []))
    text.out.print(table)
    _say("Quality: KL divergence in nats per token, of the plan in brackets; 0 is no loss.")


def cells(row: MethodRow) -> tuple[str, ...]:
    """The cells of a row of that table, in the order of COLUMNS."""
    low, high = row.bits
    bits = f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"
    quality = "" if row.kl is None else f"{row.kl:.2g} ({row.kl_plan})"
    calibration = "text" if row.calibrates else "none"
    plans = " ... ".join(dict.fromkeys((row.plans[0], row.plans[-1])))
    return row.method, plans, bits, calibration, row.kernel, quality, row.finetuning, ", ".join(row.best_for)


def markdown(rows: Sequence[MethodRow]) -> str:
    """The same table for docs/reference.md."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for row in rows:
        texts: list[Any] = list(cells(row))
        texts[1] = " ... ".join(f"`{plan}`" for plan in dict.fromkeys((row.plans[0], row.plans[-1])))
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def _loss(c: Candidate) -> str:
    if c.kl is None:
        return ""
    return f"{c.kl.value:.2g}" if c.basis == "measured" else f"{c.kl.value:.2g} *"


def _say(line: str) -> None:
    tables.say(text.out, line)
