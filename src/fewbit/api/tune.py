"""Tune a quantized model end to end: scales, norms and biases are trained, and codes if wanted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fewbit.api import arguments, end_to_end, quantize, records, requested
from fewbit.api.arguments import Device, checked
from fewbit.checks import Texts
from fewbit.errors import NotBetter, PlanError
from fewbit.measure import memory
from fewbit.models.decoding.generate import written
from fewbit.models.describe import describe
from fewbit.models.load import load_model
from fewbit.models.loading import Loading
from fewbit.models.provenance import provenance
from fewbit.models.skeleton import load_tokenizer
from fewbit.models.source import Source, locate
from fewbit.pipeline import tuning
from fewbit.pipeline.job import fewer, same_vocabulary, windows
from fewbit.pipeline.optimization import Optimization
from fewbit.report import progress as report_progress
from fewbit.report.results import Tuned
from fewbit.system import ambient, heap, machine, publish, timing
from fewbit.texts import sources
from fewbit.texts import windows as texts_windows
from fewbit.texts.calibration import Calibration as Calibration

_STATE = "state.safetensors"
_KEPT = "The trained state is kept in the cache: the same call writes it."


@checked
@ambient.defaults()
def tune(
    model: str | Path,
    out: str | Path,
    *,
    reference: str | Path,
    calibration: Calibration | Texts | None = None,
    optimization: Optimization | None = None,
    overwrite: bool = False,
    device: Device = None,
    trust_remote_code: bool = False,
    progress: bool | Callable[[int, int, float], None] | None = None,
) -> Tuned:
    """Train the scales, norms and biases of the quantized `model` on its divergence from `reference`, the original.

    Codes are trained too with `optimization.codes`. `out` has the format, tensor names and size of `model`, whichever
    tool made it. A tenth of the calibration windows is held out: it decides which state is kept. `out` is written
    atomically, and only if the KL divergence on these windows is lower than that of `model`; else this raises
    NotBetter. After an interruption, the same call resumes. calibration: the text "self" stands for texts that the
    original writes by itself. PlanError for a model that is not quantized, or whose weights fewbit does not keep
    packed.
    """
    elapsed, wanted = timing.timed(), optimization or Optimization()
    source, original = locate(model), locate(reference)
    out, file = _checked_output(Path(out), source, original, overwrite)
    loading = Loading(machine.device(device), trust_remote_code=trust_remote_code).exact()
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    same_vocabulary(original, source, tokenizer, trust_remote_code)
    files = end_to_end.files(source, trust_remote_code=trust_remote_code)
    asked = arguments.calibrated(calibration, written=True)
    given = replace(asked, text=asked.text or sources.own_source(original.config))
    load = end_to_end.Once(partial(load_model, original, loading, for_text=True))
    tokens, text = (
        _own_windows(given, original, tokenizer, load.first)
        if given.text == sources.SELF
        else windows(given, source, tokenizer)
    )
    split = tuning.Windows.of(tokens, text["text"], given.seed)
    heap.return_freed()
    publish.check_space({out.resolve(): sum(each.stat().st_size for each in source.files)})

    phase = end_to_end.Phase(original, load, split, wanted, loading, progress)
    with end_to_end.trained(source, files, phase, end_to_end.known(source, phase)) as trained:
        done = trained.done
        result = Tuned(
            out=str(out),
            model=str(model),
            reference=str(reference),
            notes=[*trained.notes, *fewer(asked, text)],
            text=text["text"],
            tokens=split.trained * tokens.shape[1],
            held_out_tokens=split.held_out * tokens.shape[1],
            steps=done.steps,
            planned=wanted.steps,
            best=done.best,
            before=trained.before,
            after=done.after,
            weights=trained.weights,
            gains=trained.gains,
            trained=trained.numbers,
            moved=trained.moved,
            seconds=0,
            peak=0,
            gpu_peak=0,
        )
        if not done.after < done.before:
            trained.forget()
            raise NotBetter(_no_better(done.before, done.after), _MORE)
        record = _record(source, original, result.notes) | {"tuned": trained.entry(source.name, phase, text)}
        with (
            report_progress.phase(f"writing {out.name}", progress),
            publish.published(out, overwrite=overwrite, file=file, kept=_KEPT) as place,
        ):
            after = trained.write(place, record, records.write)
            if not after < trained.before:
                trained.forget()
                raise NotBetter(_no_better(trained.before, after), _MORE)
        trained.forget()
        return replace(result, after=after, seconds=elapsed(), peak=memory.now().peak, gpu_peak=memory.on_gpus())


def _own_windows(
    wanted: Calibration, original: Source, tokenizer: Any, load: Callable[[], Any]
) -> tuple[Tensor, dict[str, Any]]:
    """Windows that the original writes itself, and their entry in the record."""
    length = min(wanted.length, original.context)
    tokens = written(load(), tokenizer, wanted.samples, length, wanted.seed)
    return tokens, {
        "text": f"texts written by {original.name}",
        "digest": texts_windows.digest(tokens),
        "samples": len(tokens),
        "length": length,
        "seed": wanted.seed,
    }


_MORE = "Nothing was written. More text (`samples`, `length`), more `steps` or a lower `learning_rate` may help."


def _no_better(before: float, after: float) -> str:
    return f"tuning did not lower the KL divergence on the held-out text: {before:.4g} before, {after:.4g} after"


def _checked_output(out: Path, source: Source, original: Source, overwrite: bool) -> tuple[Path, bool]:
    """`out`, and whether it is a GGUF file. PlanError if it does not fit the model, or cannot be written."""
    out, file = publish.named(out), source.gguf is not None
    requested.check_copy(out, source.name, file=file)
    if original.origin == source.origin:
        raise PlanError(
            f"`reference={original.name}` is the quantized model itself", "Give the model that it was quantized from."
        )
    publish.check_output(out, overwrite=overwrite, file=file)
    publish.check_not_lost(out, *(p for each in (source, original) for p in (each.origin, each.folder, *each.files)))
    return out, file


def _record(source: Source, original: Source, notes: list[str]) -> dict[str, Any]:
    """The record of the source, if it has one, as that of the output."""
    inspected = describe(source)
    before = inspected.made
    return {
        "schema_version": quantize.SCHEMA,
        "model": original.name,
        "origin": original.address,
        "base": provenance(original),
        "plan": {"name": "not recorded", "format": inspected.format},
        "calibration": None,
        "tensors": [],
        "source": None,
        **before,
        "versions": machine.versions(),
        "notes": [*before.get("notes", []), *notes],
    }
