"""Convert a quantized model to another format: exactly, or with `requantize` by quantizing it again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fewbit.api import adapters, arguments, evaluate, quantize, records, requested, splitting
from fewbit.api.arguments import SAMPLES, Device, Plans, checked
from fewbit.checks import Texts
from fewbit.errors import FormatError, PlanError
from fewbit.formats.containers import gguf_split
from fewbit.formats.containers.gguf import PLAIN, GgufFile
from fewbit.measure import memory
from fewbit.models.describe import describe
from fewbit.models.gguf import editing
from fewbit.models.gguf import header as gguf_header
from fewbit.models.provenance import provenance
from fewbit.models.skeleton import load_tokenizer
from fewbit.models.source import Source, locate
from fewbit.names import PEFT
from fewbit.pipeline import conversion, replacing, sizes, write_folder, write_gguf
from fewbit.pipeline.conversion import Conversion
from fewbit.pipeline.job import Preview, evaluated, left_behind
from fewbit.plans import targets
from fewbit.plans.plan import Assignment
from fewbit.plans.targets import Target
from fewbit.report import progress as report_progress
from fewbit.report import text as report_text
from fewbit.report.results import Converted, Evaluation
from fewbit.system import ambient, machine, publish, timing
from fewbit.texts import sources
from fewbit.texts.calibration import Calibration as Calibration

_KEPT = ("plan", "calibration", "tensors", "model", "origin", "original_bytes", "bits_per_weight", "share", "source")


@checked
@ambient.defaults()
def convert(
    model: str | Path,
    out: str | Path,
    *,
    to: str,
    requantize: bool = False,
    plan: Plans | None = None,
    calibration: Calibration | Texts | None = None,
    imatrix: str | Path | None = None,
    text: Texts | None = None,
    length: int | None = None,
    samples: int | None = SAMPLES,
    max_shard: int | str | None = None,
    set: Mapping[str, str] | Sequence[str] | None = None,
    base: str | Path | None = None,
    overwrite: bool = False,
    device: Device = None,
    safetensors_only: bool = False,
    trust_remote_code: bool = False,
    progress: bool | None = None,
) -> Converted:
    """Convert the quantized `model` to the format `to`, a folder or a GGUF file `out`. `out` is written atomically.

    to: a format, a variant of one such as `gptq-v2`, or `dense`, which decodes all weights to the model's dtype.
    No code and no scale changes; PlanError, before any work, names the weights for which that is impossible.
    requantize: quantize the decoded weights by `plan` instead, with `calibration` or `imatrix` as in `quantize`. Then
    the result is compared with `model` on `samples` windows of `length` tokens of `text`, as in `evaluate`.
    max_shard: split a GGUF file into files of at most so many bytes, such as "2GB".
    set: other values for keys of a GGUF file, in a copy of it, as text: a chat template, a special token, a number of
    the config. "@FILE" is the content of a file.
    base: if `model` is a LoRA, the folder or GGUF file of its model. Default: the one that the LoRA names. A LoRA in a
    folder is converted to "gguf", and one in a GGUF file to "peft".
    """
    measured_on = {"text": text, "length": length, "samples": samples}
    anew: dict[str, Any] = {"plan": plan, "calibration": calibration, "imatrix": imatrix, **measured_on}
    requested.check_conversion(model, to, requantize=requantize, **anew, max_shard=max_shard, set=set, base=base)
    if to == PEFT:
        return adapters.as_peft(model, out, base, overwrite=overwrite, trust_remote_code=trust_remote_code)
    if requested.is_adapter(model):
        return adapters.as_gguf(model, out, base, overwrite=overwrite, trust_remote_code=trust_remote_code)
    limit = None if max_shard is None else int(max_shard)
    target, source = targets.find(to), locate(model, safetensors_only=safetensors_only)
    if requantize:
        wanted = quantize.Request(
            plan=requested.requantizing(plan, target, to),
            calibration=arguments.calibrated(calibration),
            imatrix=imatrix,
            max_shard=limit,
            device=device,
            progress=progress,
            overwrite=overwrite,
            safetensors_only=safetensors_only,
            trust_remote_code=trust_remote_code,
        )
        return _requantized(source, out, wanted, measured_on)
    if _copies(source, target, set, limit):
        return _copied(source, Path(out), arguments.keys("set", set or {}), limit, overwrite, progress)
    return _converted(source, Path(out), target, limit, overwrite, trust_remote_code, progress)


@checked
def preview(
    model: str | Path,
    *,
    to: str,
    plan: Plans | None = None,
    calibration: Calibration | Texts | None = None,
    imatrix: str | Path | None = None,
    text: Texts | None = None,
    length: int | None = None,
    samples: int | None = SAMPLES,
    max_shard: int | str | None = None,
    set: Mapping[str, str] | Sequence[str] | None = None,
    base: str | Path | None = None,
    safetensors_only: bool = False,
    trust_remote_code: bool = False,
) -> Preview:
    """What `convert` would do to each tensor, with exact output bytes. Writes nothing (`--dry-run`).

    It has the options of a `convert` without `requantize`, and refuses those that `convert` refuses.
    """
    anew = {"plan": plan, "calibration": calibration, "imatrix": imatrix}
    measured_on = {"text": text, "length": length, "samples": samples}
    requested.check_conversion(model, to, preview=True, **anew, **measured_on, max_shard=max_shard, set=set, base=base)
    target, source = targets.find(to), locate(model, safetensors_only=safetensors_only)
    limit = None if max_shard is None else int(max_shard)
    if _copies(source, target, set, limit):
        return _previewed_copy(source, arguments.keys("set", set or {}), limit)
    made = conversion.prepare(source, target, trust_remote_code=trust_remote_code)
    header = _header(made, source, trust_remote_code)
    files = splitting.count(made.settled, header, limit)
    tensors, output_bytes = sizes.tensors(made.settled, _scheme)
    return Preview(
        plan=made.settled.resolved.plan.name,
        format=target.format.name,
        notes=[*made.notes, *(header.notes if header else ())],
        tensors=tensors,
        original_bytes=sizes.checkpoint_bytes(made.settled.skeleton),
        output_bytes=output_bytes,
        share=made.settled.share,
        files=files,
        unquantized=sizes.unquantized(made.settled),
    )


def _previewed_copy(source: Source, set: Mapping[str, str], max_shard: int | None) -> Preview:
    """What a copy of a GGUF file has, with its parts joined or split anew, and with other values for some keys."""
    file = GgufFile(source.files[0])
    entries, keys = [*file.entries.values()], editing.changed(file, set) if set else {}
    return Preview(
        plan="copy",
        format="gguf",
        notes=left_behind(source, single_file=True),
        tensors=[(entry.name, f"{entry.type}, unchanged", entry.spec.nbytes) for entry in entries],
        original_bytes=file.nbytes,
        output_bytes=file.nbytes,
        share=describe(locate(file.path)).share,
        files=1 if max_shard is None else gguf_split.count(entries, file.metadata | keys, max_shard),
    )


def _copies(source: Source, target: Target, set: Any, max_shard: int | None) -> bool:
    """Whether the output is a copy of a GGUF file with other keys or parts. PlanError if `set` is given in vain."""
    between_files = source.gguf is not None and bool(target.format.suffix)
    requested.check_set(set, between_files=between_files)
    return between_files and bool(set or max_shard is not None or len(source.files) > 1)


def _scheme(assignment: Assignment) -> str:
    return str(assignment.scheme)


def _header(made: Conversion, source: Source, trust_remote_code: bool) -> gguf_header.Header | None:
    """The header of the GGUF file, None for a folder. PlanError if GGUF cannot express the config or tokenizer."""
    if source.without_tokenizer and not made.settled.resolved.format.suffix:
        return None
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    if not made.settled.resolved.format.suffix:
        return None
    return gguf_header.of(made.settled.skeleton.config, tokenizer, source.name, source.folder)


def _converted(
    source: Source,
    out: Path,
    target: Target,
    max_shard: int | None,
    overwrite: bool,
    trust_remote_code: bool,
    progress: bool | None,
) -> Converted:
    elapsed, file = timing.timed(), targets.is_file(publish.named(out), target, target.format.name)
    publish.check_output(out, overwrite=overwrite, file=file)
    parts = splitting.parts(out, max_shard, overwrite=overwrite, file=file)
    publish.check_not_lost(out, source.origin, source.folder, *source.files)
    made = conversion.prepare(source, target, trust_remote_code=trust_remote_code)
    header = _header(made, source, trust_remote_code)
    splitting.count(made.settled, header, max_shard)
    settled, size = made.settled, sizes.tensors(made.settled, _scheme)[1]
    publish.check_space({out.resolve(): size if parts is None else 2 * size})
    schemes = Counter(str(each.scheme) for each in settled.resolved.assignments.values())
    done = Converted(
        out=str(out),
        to=" ".join(filter(None, (target.format.name, target.format.variant(settled.config)))),
        exact=bool(schemes) or (packing := settled.skeleton.packing) is None or not packing.parameters,
        schemes=dict(schemes),
        decoded=list(made.decoded),
        notes=[*made.notes, *(header.notes if header else ())],
        original_bytes=sizes.checkpoint_bytes(settled.skeleton),
        output_bytes=size,
        seconds=0,
        peak=0,
    )
    record = _record(source, made, done)
    with (
        report_progress.phase(f"writing {out.name}", progress),
        publish.published(out, overwrite=overwrite, file=file, parts=parts) as place,
    ):
        if header is not None:
            written = write_gguf.write(place, settled, made.tensors, header, record)
        else:
            written = write_folder.write(place, settled, made.tensors)
            records.write(place, record)
        if written != size:
            raise FormatError(f"{written} bytes were written, expected {size}")
        describe(locate(place))
    whole = {"out": str(splitting.written(out)), "seconds": elapsed(), "peak": memory.now().peak}
    return Converted(**{**vars(done), **whole})


def _copied(
    source: Source, out: Path, set: Mapping[str, str], max_shard: int | None, overwrite: bool, progress: bool | None
) -> Converted:
    """A copy of a GGUF file, with all its parts joined, or split anew, and with other values for some keys."""
    elapsed, file = timing.timed(), GgufFile(source.files[0])
    keys = editing.changed(file, set) if set else {}
    if publish.named(out).suffix != ".gguf":
        raise PlanError(f"{out}: a copy of a GGUF file is one too", "Give an `out` that ends in .gguf.")
    publish.check_output(out, overwrite=overwrite, file=True)
    parts = splitting.parts(out, max_shard, overwrite=overwrite, file=True)
    publish.check_not_lost(out, source.origin, *source.files)
    size = sum(each.stat().st_size for each in source.files)
    publish.check_space({out.resolve(): size if parts is None else 2 * size})
    with (
        report_progress.phase(f"writing {out.name}", progress),
        publish.published(out, overwrite=overwrite, file=True, parts=parts) as place,
    ):
        replacing.with_metadata(file, place, keys)
        describe(locate(place))
    return Converted(
        out=str(splitting.written(out)),
        to="gguf",
        exact=True,
        schemes=dict(Counter(entry.type for entry in file.entries.values() if entry.type not in PLAIN)),
        decoded=[],
        notes=left_behind(source, single_file=True),
        original_bytes=file.nbytes,
        output_bytes=file.nbytes,
        seconds=elapsed(),
        peak=memory.now().peak,
    )


def _record(source: Source, made: Conversion, done: Converted) -> dict[str, Any]:
    """The record of a conversion: that of the source, if it has one, and what the conversion did.

    The quantized weights are those of the source, so what its record says of them still holds.
    """
    before = describe(source).made
    packing = made.settled.skeleton.packing
    return {
        "schema_version": quantize.SCHEMA,
        "model": source.name,
        "origin": None,
        "base": before.get("base") or provenance(source),
        "plan": {"name": "not recorded", "format": done.to},
        "calibration": None,
        "tensors": [],
        "source": None,
        **{key: before[key] for key in _KEPT if key in before},
        "versions": machine.versions(),
        "notes": [*before.get("notes", []), *done.notes],
        "output_bytes": done.output_bytes,
        "converted": {
            "from": source.name,
            "packing": None if packing is None else packing.to_json(),
            # What the target's config may have no place for, such as the variant of the layout and act-order.
            "settings": made.source_settings,
            "to": done.to,
            "exact": done.exact,
            "schemes": done.schemes,
            "decoded": done.decoded,
        },
    }


def _requantized(source: Source, out: str | Path, wanted: quantize.Request, measured_on: dict[str, Any]) -> Converted:
    """Quantize the decoded weights of `source`, and compare the result with it before it is published."""
    if source.quantization is None:
        raise PlanError(f"{source.name} is not quantized", "Use fewbit quantize.")
    tokenizer = load_tokenizer(source, trust_remote_code=wanted.trust_remote_code)
    text = measured_on["text"] or sources.own_source(source.config)
    evaluated([source], tokenizer, text, measured_on["length"], measured_on["samples"])  # its errors, before the work
    found = list[Evaluation]()

    def measured(place: Path) -> dict[str, Any]:
        made = evaluate.evaluate(
            place,
            reference=source.address if source.hosted else source.origin,
            **{**measured_on, "text": text},
            device=wanted.device,
            trust_remote_code=wanted.trust_remote_code,
            progress=wanted.progress if isinstance(wanted.progress, bool) else None,
        )
        found.append(replace(made, model=str(out), reference=source.name))  # not the folder before it is published
        loss = report_text.evaluation_json(found[0])
        return {"converted": {"from": source.name, "to": wanted.plan.format, "exact": False, "loss": loss}}

    request = quantize.Request(**{**vars(wanted), "measured": measured})
    done = quantize.made(source.address if source.hosted else source.origin, out, request)
    schemes = Counter(tensor.scheme for tensor in done.tensors)
    return Converted(
        out=done.out,
        to=wanted.plan.format,
        exact=False,
        schemes=dict(schemes),
        decoded=[],
        notes=done.notes,
        original_bytes=done.original_bytes,
        output_bytes=done.output_bytes,
        seconds=done.seconds,
        peak=done.peak,
        quantized=done,
        evaluation=found[0],
    )
