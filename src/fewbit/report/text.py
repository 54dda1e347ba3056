"""Prints the results of the verbs as text for people."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fewbit.errors import in_flags
from fewbit.report import card, tables
from fewbit.report.card import calibrated_on
from fewbit.system import ranks
from fewbit.units import age, counted, duration, share, size

if TYPE_CHECKING:
    from fewbit.advise.doctor import Hardware
    from fewbit.kernels.nvidia.tuning import Measured as MeasuredCard
    from fewbit.measure.intervals import Interval
    from fewbit.measure.tasks import Score
    from fewbit.models.decoding.generate import Continuation
    from fewbit.models.describe import Inspection
    from fewbit.pipeline.job import Preview
    from fewbit.plans.budget import Allocation
    from fewbit.plans.catalogue import Entry
    from fewbit.report.results import Converted, Evaluation, Finetuned, Measured, Merged, Pushed, Quantized, Tuned
    from fewbit.system.kept import Entry as Kept

out = tables.Console(quiet=ranks.silent())
# A notebook's kernel reports its output as a terminal but cannot move the cursor, so it gets plain lines.
_TERMINAL = False if "ipykernel" in sys.modules else None
err = tables.Console(stderr=True, force_jupyter=False, force_terminal=_TERMINAL, quiet=ranks.silent())
FIRST_WORDS = "The capital of France is"  # the prompt for the check of a new output


def _say(line: str) -> None:
    tables.say(out, line)


def _say_notes(notes: Sequence[str]) -> None:
    for note in notes:
        _say(f"note: {in_flags(note)}")


def interval(estimate: Interval, digits: int = 3, percent: bool = False) -> tuple[str, str]:
    """The value, and its 95 % interval."""
    style = ".2%" if percent else f".{digits}g"
    return f"{estimate.value:{style}}", f"{estimate.low:{style}} ... {estimate.high:{style}}"


def grid(title: str, *columns: str, numbers: Sequence[int] = ()) -> tables.Table:
    """A table without lines. The columns `numbers` are right-aligned."""
    return tables.Table(title, [tables.Column(heading, i in numbers) for i, heading in enumerate(columns)])


def _smaller(before: int, after: int) -> str:
    """How sizes in bytes compare."""
    factor = before / max(after, 1)
    if 0.99 < factor < 1.01:
        return "about the same size"
    return f"{factor:.2f} x smaller" if factor > 1 else f"{after / max(before, 1):.2f} x larger"


def _unquantized(done: Quantized | Preview) -> tuple[str, str] | None:
    """The size of the weights that stay unquantized, and that of each kind; None if that is below 5 % of the output."""
    rest = sum(done.unquantized.values())
    if rest <= done.output_bytes / 20:
        return None
    return size(rest), ", ".join(f"{kind} {size(nbytes)}" for kind, nbytes in done.unquantized.items())


def quantized(done: Quantized) -> None:
    """What `fewbit quantize` prints when it is finished."""
    _say_notes(done.notes)
    fallbacks = [(t.module, note) for t in done.tensors for note in t.notes]
    for note, count in Counter(note for _, note in fallbacks).items():
        first = next(module for module, n in fallbacks if n == note)
        _say(f"note: {note} ({first}{f' and {count - 1} more' if count > 1 else ''})")
    table = grid(done.out, "", "original", "quantized", "", numbers=(1, 2))
    table.add_row(
        "weights in files",
        size(done.original_bytes),
        size(done.output_bytes),
        _smaller(done.original_bytes, done.output_bytes),
    )
    table.add_row(
        "bits per quantized weight", "", f"{done.bits_per_weight:.3f}", f"{share(done.share)} of the blocks' parameters"
    )
    if rest := _unquantized(done):
        table.add_row("unquantized", "", *rest)
    worst = max(done.tensors, key=lambda t: t.error)
    mean = sum(t.error for t in done.tensors) / len(done.tensors)
    table.add_row("relative output error", "", f"{mean:.2e}", "mean of all linears")
    table.add_row("time", "", duration(done.seconds), "")
    table.add_row("peak memory", "", size(done.peak), "of this process, mapped files included")
    if done.gpu_peak:
        table.add_row("  on the GPU", "", size(done.gpu_peak), "")
    out.print(table)
    if done.allocation is not None:
        allocation(done.allocation)
        _say("`fewbit evaluate` measures on other text, with an interval.")
    _say(f"The largest error is {worst.error:.2e} in {worst.module}.")  # an expert's name is too long for the table
    sample = f' It continues "{FIRST_WORDS}" with "{done.sample.strip()}".' if done.sample else ""
    if done.sample is not None:  # else a note says why it was not run
        _say(f"Reopened and checked.{sample}")


def converted(done: Converted) -> None:
    """What `fewbit convert` prints when it is finished."""
    if done.quantized is not None and done.evaluation is not None:
        quantized(done.quantized)
        _say("Quantized again. The loss below is measured against the input, which was quantized already.")
        evaluation(done.evaluation)
        return
    _say_notes(done.notes)
    count, kinds = sum(done.schemes.values()), " and ".join(done.schemes)
    unchanged = f"{count} weights as {kinds} with their codes and scales unchanged" if count else "unquantized weights"
    _say(
        f"{done.out}: {done.to}, {unchanged}; {size(done.original_bytes)} became {size(done.output_bytes)}; "
        f"{duration(done.seconds)}, peak memory {size(done.peak)}."
    )


def measured(done: Measured) -> None:
    """What `fewbit imatrix` prints when it is finished."""
    _say_notes(done.notes)
    _say(f"{done.out}: importances of {counted(done.entries, 'tensor')} over {done.tokens:,} tokens of {done.text}.")


def finetuned(done: Finetuned) -> None:
    """What `fewbit finetune` prints when it is finished."""
    _say_notes(done.notes)
    table = grid(f"{done.out}, an adapter for {done.model}", "", "", "", numbers=(1,))
    table.add_row("trained on", f"{done.examples:,}", f"examples with {done.tokens:,} trained tokens")
    table.add_row("steps", f"{done.steps:,}", f"{duration(done.seconds)}, loading included")
    table.add_row("loss", f"{done.loss:.4f}", "nats per token, mean of all steps")
    if done.held_out_before is not None and done.held_out_after is not None:
        table.add_row("  held out, before", f"{done.held_out_before:.4f}", counted(done.held_out_examples, "example"))
        table.add_row("  held out, after", f"{done.held_out_after:.4f}", "lower is better")
    table.add_row("trained parameters", f"{done.trainable:,}", f"{size(done.nbytes)} in the file")
    table.add_row("peak memory", size(done.peak), "of this process, mapped files included")
    if done.gpu_peak:
        table.add_row("  on the GPU", size(done.gpu_peak), "")
    out.print(table)


def tuned(done: Tuned) -> None:
    """What `fewbit tune` prints when it is finished."""
    _say_notes(done.notes)
    table = grid(f"{done.out}, tuned from {done.model}", "", "", "", numbers=(1,))
    table.add_row("KL divergence, before", f"{done.before:.4g}", f"from {done.reference}, in nats per token")
    change = f"{done.after / done.before - 1:+.1%}" if done.before else ""
    table.add_row("  after", f"{done.after:.4g}", change)
    table.add_row("  measured on", f"{done.held_out_tokens:,}", f"held-out tokens of {done.text}")
    table.add_row("trained on", f"{done.tokens:,}", "tokens")
    early = done.steps < done.planned
    ended = f"of {done.planned:,}: training stopped, the held-out loss no longer fell; " if early else ""
    table.add_row("steps", f"{done.steps:,}", f"{ended}the state after step {done.best} is kept")
    table.add_row("trained numbers", f"{done.trained:,}", f"{done.weights} weights, {done.gains} norms and biases")
    if done.moved is not None:
        table.add_row("codes that moved", f"{done.moved:.2%}", "")
    table.add_row("time", duration(done.seconds), "")
    table.add_row("peak memory", size(done.peak), "of this process, mapped files included")
    if done.gpu_peak:
        table.add_row("  on the GPU", size(done.gpu_peak), "")
    out.print(table)


def pushed(done: Pushed) -> None:
    """What `fewbit push` prints."""
    _say_notes(done.notes)
    if done.url:
        _say(f"{done.url}: {counted(len(done.files), 'file')}, {size(sum(done.files.values()))}.")
        return
    table = grid(done.repo, "file", "bytes", numbers=(1,))
    for name, nbytes in done.files.items():
        table.add_row(name, f"{nbytes:,}")
    out.print(table)
    _say(f"{counted(len(done.files), 'file')}, {size(sum(done.files.values()))}. Nothing was uploaded.")


def merged(done: Merged) -> None:
    """What `fewbit merge` prints when it is finished."""
    _say_notes(done.notes)
    if done.quantized is not None:
        quantized(done.quantized)
    onto = f"added to {done.base}" if done.base else "added to the dequantized weights (without a base model)"
    _say(f"{done.out}: {size(done.nbytes)} of weights, {onto}; {duration(done.seconds)}.")
    evaluation(done.evaluation)


def generated(done: Continuation) -> None:
    """Print generation speed on stderr; the text itself is on stdout."""
    after = f", {done.rate:.1f} tokens/s after the first" if done.rate else ""
    err.print(f"[dim]{counted(done.tokens, 'token')}: the first after {duration(done.to_first)}{after}[/dim]")


def allocation(done: Allocation) -> None:
    """The widths that were chosen for a size, and the loss at other sizes."""
    kinds = ", ".join(f"{scheme} in {count}" for scheme, count in done.schemes.items())
    asked = in_flags(f"`{done.asked}`")
    measured = "" if done.measured is None else f", measured {done.measured:.3g}"
    _say(f"Widths for {asked}: {kinds} weights. KL divergence: predicted {done.kl:.3g}{measured} nats per token.")
    table = grid(
        "size and loss", "", "bits per weight", "weights in files", "KL predicted", "measured", numbers=(1, 2, 3, 4)
    )
    for point in done.curve:
        what = "chosen" if point.chosen else f"all {point.what}" if point.what else "mixed"
        of_point = "" if point.measured is None else f"{point.measured:.4g}"
        table.add_row(what, f"{point.bits:.3f}", size(point.output_bytes), f"{point.kl:.4g}", of_point)
    out.print(table)
    ratio = done.kl / done.costs if done.costs else 1.0
    _say(
        f"Measured: on {done.held_out:,} held-out tokens of the calibration text. Predicted: at the chosen size "
        f"{ratio:.3g} times the sum of the weights' costs, by the measured points."
    )


def preview(shown: Preview) -> None:
    """What `fewbit quantize --dry-run` prints."""
    if shown.allocation is not None:
        allocation(shown.allocation)
    table = grid(f"plan {shown.plan}, format {shown.format}", "tensor", "becomes", "bytes", numbers=(2,))
    for name, what, nbytes in shown.tensors:
        table.add_row(name, what, f"{nbytes:,}")
    out.print(table)
    _say_notes(shown.notes)
    if rest := _unquantized(shown):
        _say(f"Unquantized: {rest[0]} ({rest[1]}).")
    _say(
        f"{shown.original_bytes:,} bytes become {shown.output_bytes:,} ({size(shown.output_bytes)}"
        f"{f', in {shown.files} files' if shown.files > 1 else ''}); "
        f"{share(shown.share)} of the blocks' parameters are quantized. Nothing was written."
    )


def evaluation(done: Evaluation) -> None:
    """What `fewbit evaluate` prints."""
    _say_notes(done.notes)
    q, i = done.quality, done.inspection
    against = f" against {done.reference}" if done.reference else ""
    title = (
        f"{done.model}{against}, on {q.tokens:,} tokens of {done.text} "
        f"in {q.windows:,} of {done.available:,} windows of {q.length}"
    )
    table = grid(title, "", "value", "95 % interval", "meaning", numbers=(1,))
    table.add_row("perplexity", *interval(q.perplexity, 4), "how well it predicts the text; lower is better")
    if q.reference_perplexity and q.perplexity_ratio and q.kl and q.same_top:
        table.add_row("  of the reference", *interval(q.reference_perplexity, 4), "")
        table.add_row("  ratio", *interval(q.perplexity_ratio, 4), "1 is no loss")
        table.add_row("KL divergence", *interval(q.kl.mean), "distance from the reference's predictions; 0 is no loss")
        table.add_row("  median", *interval(q.kl.median), "")
        table.add_row("  99 % of tokens below", *interval(q.kl.p99), "")
        table.add_row("  99.9 %", *interval(q.kl.p999), "")
        table.add_row("  worst token", f"{q.kl.max:.3g}", "", "")
        table.add_row(
            "same top token", *interval(q.same_top, percent=True), "how often both would choose the same token"
        )
    table.add_row("weights", size(i.weights_bytes), "", f"{i.bits_per_weight:.2f} bits per weight, all tensors counted")
    if i.bits_per_weight_quantized:
        table.add_row("  quantized ones", f"{i.bits_per_weight_quantized:.3f}", "", "bits per weight")
    held = ", both models held" if done.reference else ""
    table.add_row("peak memory", size(done.peak), "", f"of this evaluation{held}")
    if done.gpu_peak:
        table.add_row("  on the GPU", size(done.gpu_peak), "", "")
    table.add_row("time", duration(done.seconds), "", "")
    out.print(table)
    if done.tasks:
        scores(done.tasks)


def scores(found: Sequence[Score]) -> None:
    """The scores on tasks, beside those of the reference."""
    table = grid("tasks", "", "value", "reference", "", numbers=(1, 2))
    for each in found:
        name = f"{each.task}, {each.name}" + (f" ({each.filter})" if each.filter != "none" else "")
        reference = "" if each.reference is None else card.score(each.reference, each.reference_stderr)
        tried = f"{counted(each.examples, 'example')}, {counted(each.shots, 'shot')}"
        what = {True: "higher is better", False: "lower is better", None: ""}[each.higher]
        table.add_row(name, card.score(each.value, each.stderr), reference, "; ".join(filter(None, (tried, what))))
    out.print(table)


def evaluation_json(done: Evaluation) -> dict[str, Any]:
    """The object that `fewbit evaluate --json` prints: plain numbers, with `intervals` beside them."""
    q, i = done.quality, done.inspection
    data: dict[str, Any] = {
        "model": done.model,
        "reference": done.reference,
        "text": done.text,
        "tokens": q.tokens,
        "windows": q.windows,
        "windows_available": done.available,
        "length": q.length,
        "perplexity": q.perplexity.value,
        "weights_bytes": i.weights_bytes,
        "file_bytes": i.file_bytes,
        "bits_per_weight": i.bits_per_weight,
        "bits_per_weight_quantized": i.bits_per_weight_quantized,
        "peak_memory_bytes": done.peak,
        "peak_gpu_memory_bytes": done.gpu_peak,
        "seconds": done.seconds,
        "intervals": {"perplexity": [q.perplexity.low, q.perplexity.high]},
        "reference_perplexity": None,
        "perplexity_ratio": None,
        "kl": None,
        "same_top": None,
        "tasks": [vars(each) for each in done.tasks],
        "notes": done.notes,
    }
    if q.reference_perplexity and q.perplexity_ratio and q.kl and q.same_top:
        kl = {"mean": q.kl.mean, "median": q.kl.median, "p99": q.kl.p99, "p999": q.kl.p999}
        pairs = {
            "reference_perplexity": q.reference_perplexity,
            "perplexity_ratio": q.perplexity_ratio,
            "same_top": q.same_top,
        }
        data |= {name: estimate.value for name, estimate in pairs.items()}
        data["kl"] = {**{name: estimate.value for name, estimate in kl.items()}, "max": q.kl.max}
        data["intervals"] |= {name: [e.low, e.high] for name, e in pairs.items()}
        data["intervals"]["kl"] = {name: [e.low, e.high] for name, e in kl.items()}
    return data


def inspection(i: Inspection) -> None:
    """What `fewbit inspect` prints."""
    table = grid(i.name, "", "")
    table.add_row("architecture", i.architecture)
    table.add_row("format", i.format or "not quantized")
    for scheme, count in i.schemes.items():
        table.add_row("scheme", f"{scheme} in {count} tensor{'s' * (count != 1)}")
    table.add_row("parameters", f"{i.parameters:,}, of which {share(i.share)} are quantized")
    table.add_row("weights", f"{size(i.weights_bytes)} at rest, {size(i.file_bytes)} in files")
    table.add_row("bits per weight", f"{i.bits_per_weight:.3f} over the whole model")
    if i.bits_per_weight_quantized:
        table.add_row("", f"{i.bits_per_weight_quantized:.3f} of the quantized weights")
    for name, what in i.towers.items():
        table.add_row("tower", f"{name}: {what}")
    if i.made:
        table.add_row(
            "made by", f"fewbit {i.made.get('versions', {}).get('fewbit', '?')} from {i.made.get('model', '?')}"
        )
        table.add_row("plan", str(i.made.get("plan", {}).get("name", "?")))
        if calibrated := i.made.get("calibration"):
            table.add_row("calibrated on", calibrated_on(calibrated))
        if done := i.made.get("tuned"):
            table.add_row("tuned", card.tuned_on(done))
        errors = [t["error"] for t in i.made.get("tensors", [])]
        if errors:
            table.add_row(
                "relative output error", f"{sum(errors) / len(errors):.2e} on average, {max(errors):.2e} at worst"
            )
        for note in i.made.get("notes", []):
            table.add_row("note", note)
    out.print(table)
    if i.metadata:
        keys = grid("metadata", "key", "value")
        for key, value in i.metadata.items():
            keys.add_row(key, _one_line(value))
        out.print(keys)


def _one_line(value: Any) -> str:
    """A value of a GGUF file, at most 200 characters of it."""
    if isinstance(value, dict):
        return f"{value['length']:,} values: {', '.join(map(repr, value['first']))[:200]} ..."
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ... ({len(text):,} characters)"


def listing(families: Mapping[str, Sequence[Entry]]) -> None:
    """What `fewbit list` prints."""
    for family, entries in families.items():
        table = grid(family, "name", "what it is", "here")
        for entry in entries:
            table.add_row(entry.name, entry.what, f"no: {entry.unavailable}" if entry.unavailable else "yes")
        out.print(table)
        out.print()


def doctor(found: Hardware) -> None:
    """What `fewbit doctor` prints."""
    table = grid("this machine", "", "")
    for name, version in found.versions.items():
        table.add_row(name, version)
    table.add_row("devices", ", ".join(found.devices) or "CPU only")
    table.add_row("instruction sets", ", ".join(found.instructions) or "unknown")
    table.add_row("threads", str(found.threads))
    table.add_row("memory", size(found.memory))
    for name, reason in found.kernels.items():
        table.add_row(f"kernel {name}", f"no: {reason}" if reason else "ready")
    for name, made in found.tuned.items():
        table.add_row(f"sizes on {name}", "built in" if made is None else f"tuned on {made}")
    for name, why in found.missing.items():
        table.add_row(f"without {name}", why)
    out.print(table)
    if found.model is not None:
        table = grid("the model on this CPU", "", "")
        for name, how in found.model.lines:
            table.add_row(name, how)
        out.print(table)
    for line in found.advice:
        _say(f"- {line}")


def tuned_cards(found: Sequence[MeasuredCard]) -> None:
    """What `fewbit doctor --tune` prints."""
    for each in found:
        table = grid(f"{each.card}: µs of a product", "weight", "", "rows", "built in", "tuned", numbers=(2, 3, 4))
        changed = [
            (row.scheme, f"{row.n} x {row.k}", str(m), f"{before:.1f}", f"{after:.1f}")
            for row in each.times
            for m, before, after in zip(each.rows, row.before, row.after, strict=True)
            if before != after
        ]
        for cells in changed:
            table.add_row(*cells)
        if changed:
            out.print(table)
        _say(
            f"{each.changed} of {each.ranges} ranges of rows now use other sizes. Measured in {duration(each.seconds)}."
        )
        _say(f"Kept in {each.path}")


def cache(folder: str, entries: Sequence[Kept]) -> None:
    """What `fewbit cache` prints."""
    if not entries:
        _say(f"{folder} is empty.")
        return
    table = grid(folder, "kind", "model", "holds", "size", "age", "", numbers=(3, 4))
    for each in entries:
        state = "in use" if each.in_use else "abandoned" if each.abandoned else ""
        name = each.model or f"{each.path.parent.name}/{each.path.name}"
        table.add_row(each.kind, name, each.holds, size(each.nbytes), age(each.age), state)
    out.print(table)
    _say(f"{_counted(entries)}.")


def _counted(entries: Sequence[Kept]) -> str:
    return f"{counted(len(entries), 'entry', 'entries')}, {size(sum(e.nbytes for e in entries))}"


def cleared(deleted: Sequence[Kept], kept: Sequence[Kept]) -> None:
    """What `fewbit cache --clear` prints."""
    _say(f"Deleted {_counted(deleted)}.")
    for each in kept:
        _say(f"note: {each.path} is in use by a running process and stays.")
