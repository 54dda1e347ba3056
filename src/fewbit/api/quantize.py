"""Quantize a model, preview it, and measure importances."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from fewbit import units
from fewbit.advise.memory import activation_peak, cache_bytes, use_of
from fewbit.api import arguments, effort, records, requested, splitting
from fewbit.api.arguments import Device, Plans, checked
from fewbit.checks import Texts
from fewbit.errors import FewbitError, FormatError, KernelError, OutputError, PlanError
from fewbit.formats.containers import imatrix as importances
from fewbit.formats.containers.safetensors import Checkpoint
from fewbit.measure import memory
from fewbit.models.calls import first_line
from fewbit.models.decoding.generate import continue_text
from fewbit.models.decoding.sampling import Sampling as Sampling
from fewbit.models.describe import describe
from fewbit.models.gguf.header import Header
from fewbit.models.load import load_model
from fewbit.models.loading import Loading
from fewbit.models.on_text import OnText
from fewbit.models.on_text import inputs as text_inputs
from fewbit.models.outline import geometry
from fewbit.models.provenance import provenance
from fewbit.models.skeleton import load_tokenizer
from fewbit.models.source import Source, locate
from fewbit.pipeline import blocks, budgeted, costs, settled, write_folder, write_gguf
from fewbit.pipeline import importances as pipeline_importances
from fewbit.pipeline import progress as pipeline_progress
from fewbit.pipeline import run as pipeline_run
from fewbit.pipeline.divergence import divergence
from fewbit.pipeline.job import (
    Job,
    Preview,
    fewer,
    held_out,
    rarely_used,
    skeleton_of,
    too_small,
    windows,
)
from fewbit.plans.budget import Allocation, Budget
from fewbit.plans.plan import Plan, is_file
from fewbit.report import progress as report_progress
from fewbit.report import text as report_text
from fewbit.report.results import Measured, Quantized
from fewbit.stats import Need
from fewbit.system import ambient, heap, machine, publish, ranks, timing
from fewbit.system.cache import cache_folder
from fewbit.texts import windows as texts_windows
from fewbit.texts.calibration import Calibration as Calibration

SCHEMA = 1


_KEPT = "The quantized blocks are kept in the cache: the same command resumes from there."


# Fields of `Quantized` that are not in fewbit.json.
_NOT_KEPT = ("out", "plan", "peak", "gpu_peak", "anonymous", "sample", "unquantized")


@checked
@ambient.defaults()
def quantize(
    model: str | Path,
    out: str | Path,
    *,
    plan: Plans = "gptq-4bit",
    budget: Budget | None = None,
    calibration: Calibration | Texts | None = None,
    imatrix: str | Path | None = None,
    effort: str = "fast",
    max_shard: int | str | None = None,
    overwrite: bool = False,
    device: Device = None,
    safetensors_only: bool = False,
    trust_remote_code: bool = False,
    progress: bool | pipeline_progress.Progress | None = None,
) -> Quantized:
    """Quantize `model` by `plan` into `out`, a folder or a GGUF file. `out` is written atomically.

    budget: the size that the output is to have. The weights then have the widths that lose least at this size, and the
    plan gives the format, the method, and everything else of the schemes.
    imatrix: an importance matrix file of llama.cpp, used instead of calibration. effort: "fast"; "high" to train codes
    and scales block by block, and then codes, scales and norms on the whole model's predictions; "best" to take more
    steps for these. max_shard: split a GGUF file into files of at most so many bytes, such as "2GB"; `out` of
    the result is the first of them. After an interruption, the same call resumes at the block where it stopped. Under
    torchrun, all processes make this call and share the work; rank 0 writes the output. PlanError before any work if
    the plan does not fit the model, FormatError for a broken checkpoint, NumericsError (naming the tensor) for NaN or
    Inf in it.
    """
    wanted = Request(
        plan=arguments.plan("plan", plan),
        budget=budget or Budget(),
        calibration=arguments.calibrated(calibration),
        imatrix=imatrix,
        effort=effort,
        max_shard=None if max_shard is None else int(max_shard),
        device=device,
        progress=progress,
        overwrite=overwrite,
        safetensors_only=safetensors_only,
        trust_remote_code=trust_remote_code,
    )
    return made(model, out, wanted)


@dataclass(frozen=True)
class Request:
    """What `quantize` is to do. measured: measures the written output, before it is published, for its record. told:
    what the record says of the model, in place of what its files say."""

    plan: Plan
    calibration: Calibration
    imatrix: str | Path | None
    device: Device
    progress: bool | pipeline_progress.Progress | None
    effort: str = arguments.EFFORTS[0]
    max_shard: int | None = None
    measured: Callable[[Path], dict[str, Any]] | None = None
    told: Mapping[str, Any] = field(default_factory=dict)
    overwrite: bool = False
    safetensors_only: bool = False
    trust_remote_code: bool = False
    budget: Budget = field(default_factory=Budget)

    def needs_no_text(self, job: Job) -> bool:
        """Whether nothing is computed on a text, and the output, a folder, is not to have a tokenizer of its own."""
        computed = self.budget.given or self.effort != arguments.EFFORTS[0] or self.measured is not None
        calibrated = job.settled.need > Need.NOTHING and job.importance is None
        return not (computed or calibrated or job.single_file)


def made(model: str | Path | Source, out: str | Path, wanted: Request) -> Quantized:
    """Quantize `model` into `out`. See `quantize`."""
    elapsed, calibration, progress = timing.timed(), wanted.calibration, wanted.progress
    with ranks.joined(wanted.device) as device, ExitStack() as leaving:
        out, file = publish.named(out), is_file(out, wanted.plan)
        if ranks.first():
            publish.check_output(out, overwrite=wanted.overwrite, file=file)
        parts = splitting.parts(out, wanted.max_shard, overwrite=wanted.overwrite, file=file)
        heap.return_freed()
        job = Job.prepare(
            model if isinstance(model, Source) else locate(model, safetensors_only=wanted.safetensors_only),
            wanted.plan,
            device,
            trust_remote_code=wanted.trust_remote_code,
            imatrix=wanted.imatrix,
        )
        if ranks.first():
            publish.check_not_lost(out, job.source.origin, job.source.folder, *job.source.files)
        job, tokenizer = _with_tokenizer(job, wanted)
        # For a GGUF file, this raises the error if GGUF cannot express the model: before any work.
        with report_progress.phase("checking the tokenizer", progress) if file else nullcontext():
            header = job.header(tokenizer)
        job = replace(job, notes=[*job.notes, *(header.notes if header else ())])
        tuning = effort.block_tuning(wanted.effort, calibration.seed)
        if tuning is not None:
            job.settled.skeleton.check_text(calibrates=True)
        if tokenizer is not None:  # the check after writing generates from these words: check their token ids now
            words = tokenizer(report_text.FIRST_WORDS, return_tensors="pt")["input_ids"]
            texts_windows.within(words, job.source.rows, tokenizer, repr(report_text.FIRST_WORDS))
        sized = _Sized.of(job, wanted.budget, calibration, tokenizer, progress)
        job, calibration = sized.job, sized.calibration
        preview = job.preview()
        splitting.count(job.settled, header, wanted.max_shard)
        if ranks.first():
            # The cache holds the finished blocks, and `out` the output that is made from them.
            # The tuned model is written beside the one it replaces, and parts beside the file that they replace.
            copies = 1 if wanted.effort == "fast" and parts is None else 2
            publish.check_space({cache_folder(): preview.output_bytes, out.resolve(): copies * preview.output_bytes})
        inputs, calibrated = job.inputs(calibration, tokenizer, tuning)
        versions = machine.versions()
        fingerprint = pipeline_run.fingerprint(job.settled, inputs, versions, tuning)
        run = leaving.enter_context(
            pipeline_run.Run(fingerprint, job.source.name, f"blocks quantized by {wanted.plan.name}")
        )
        with report_progress.blocks(progress) as tell:
            tensors = blocks.quantize_blocks(job.settled, inputs, run, tell, tuning)
        allocation = sized.measured(run, progress)

        def published() -> Quantized:
            weights = sum(prod(t.shape) for t in tensors)
            done = Quantized(
                out=str(out),
                plan=job.settled.resolved.plan.name,
                notes=[
                    *job.notes,
                    *job.left_out(),
                    *fewer(calibration, calibrated),
                    *rarely_used(tensors),
                    *too_small(tensors),
                ],
                tensors=tensors,
                original_bytes=preview.original_bytes,
                output_bytes=preview.output_bytes,
                bits_per_weight=8 * sum(t.nbytes for t in tensors) / weights,
                share=preview.share,
                seconds=elapsed(),
                peak=0,
                gpu_peak=0,
                anonymous=0,
                sample="",
                allocation=allocation,
                unquantized=preview.unquantized,
            )
            kept = {k: v for k, v in asdict(done).items() if k not in _NOT_KEPT}
            record = {
                "schema_version": SCHEMA,
                "versions": versions,
                "model": job.source.name,
                "origin": job.source.address,
                "base": provenance(job.source),
                **wanted.told,
                "source": None if (packing := job.settled.skeleton.packing) is None else packing.to_json(),
                "calibration": calibrated,
                "plan": job.settled.resolved.plan.to_json(),
                "effort": wanted.effort,
                **kept,
            }

            def rewrite(place: Path) -> None:
                """Write the record again."""
                if header is None:
                    records.write(place, record)
                else:  # the file holds its record, so it is written again
                    place.unlink()
                    _write(place, job, run, header, record)

            with publish.published(out, overwrite=wanted.overwrite, file=file, kept=_KEPT, parts=parts) as place:
                with report_progress.phase(f"writing {out.name}", progress):
                    written = _write(place, job, run, header, record)
                if written != preview.output_bytes:
                    raise FormatError(f"{written} bytes were written, expected {preview.output_bytes}")
                if tuning is not None:
                    assert inputs.tokens is not None
                    assert calibrated is not None
                    finish = effort.Finish.of(
                        job, wanted.effort, inputs.tokens, calibrated, fingerprint, progress, wanted.trust_remote_code
                    )
                    if why := finish.run(place, record, records.write):
                        record["notes"].append(why)
                        rewrite(place)
                    done = replace(done, notes=list(record["notes"]))
                opened = partial(_reopened, place, tokenizer, job.settled.skeleton.on_text, wanted.trust_remote_code)
                with report_progress.phase(f"checking {out.name}", progress):
                    sample, notes = _checked(place, written, device, opened)
                if wanted.measured is not None:
                    record |= wanted.measured(place)
                    rewrite(place)
            run.forget()
            held = memory.now()
            return replace(
                done,
                out=str(splitting.written(out)),
                seconds=elapsed(),
                peak=held.peak,
                gpu_peak=memory.on_gpus(),
                anonymous=held.anonymous,
                sample=sample,
                notes=[*done.notes, *notes],
            )

        return ranks.run_on_first(published)


def _with_tokenizer(job: Job, wanted: Request) -> tuple[Job, Any]:
    """The job and its tokenizer: None, and a note, if the source has none and nothing needs one. FormatError if it has
    none that can be used."""
    if not (job.source.without_tokenizer and wanted.needs_no_text(job)):
        return job, load_tokenizer(job.source, trust_remote_code=wanted.trust_remote_code)
    why = f"{job.source.name} has no tokenizer, and so the output has none: copy the files of one into it"
    return replace(job, notes=[*job.notes, why]), None


@dataclass(frozen=True)
class _Sized:
    """A job with widths chosen for a budget; what was chosen, None without a budget. calibration: without the windows
    that are held out."""

    job: Job
    calibration: Calibration
    allocation: Allocation | None = None
    held_out: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        job: Job,
        budget: Budget,
        calibration: Calibration,
        tokenizer: Any,
        progress: bool | pipeline_progress.Progress | None,
    ) -> _Sized:
        """Without a budget, the same job. PlanError, before any work, if the smallest output is above the budget."""
        if not budget.given:
            return cls(job, calibration)
        beside = 0
        if budget.fit is not None:
            if budget.context is not None and budget.context > (most := job.source.context):
                raise PlanError(f"`context={budget.context}` is beyond the model's context of {most} tokens")
            use = use_of(job.source.context, budget.context)
            shape = geometry(job.settled.skeleton.config, job.source.context)
            beside = cache_bytes(shape, use) + activation_peak(shape, use, packed=True)
        choice = budgeted.Choice.of(job, budget, job.header(tokenizer), beside)
        calibration, held = held_out(calibration, job.source, tokenizer)
        tokens, _ = windows(calibration, job.source, tokenizer)
        fewer_samples = min(calibration.samples, costs.samples(tokens.shape[1]))
        inputs, _ = job.inputs(replace(calibration, samples=fewer_samples), tokenizer)
        texts = budgeted.Texts(inputs, tokens, held)
        with report_progress.costs(progress) as tell:
            job, allocation = budgeted.chosen(job, choice, texts, tell)
        return cls(job, calibration, allocation, held)

    def measured(self, run: pipeline_run.Run, progress: bool | pipeline_progress.Progress | None) -> Allocation | None:
        """What was chosen, with the KL divergence of the weights of `run`."""
        if self.allocation is None or self.held_out is None:
            return None
        with report_progress.phase("measuring the KL divergence", progress):
            return self.allocation.with_measured(divergence(self.job.settled, run, self.held_out))


@checked
@ambient.defaults()
def preview(
    model: str | Path,
    *,
    plan: Plans = "gptq-4bit",
    budget: Budget | None = None,
    calibration: Calibration | Texts | None = None,
    imatrix: str | Path | None = None,
    effort: str = "fast",
    max_shard: int | str | None = None,
    device: Device = None,
    safetensors_only: bool = False,
    trust_remote_code: bool = False,
    progress: bool | pipeline_progress.Progress | None = None,
) -> Preview:
    """Return what `quantize` would do to each tensor, with exact output bytes. Writes no output (`--dry-run`).

    With a `budget`, it measures on the calibration text which widths lose least, and returns the loss at other sizes
    too. What it measured is kept in the cache, so `quantize` need not measure it again.
    """
    wanted = Request(
        plan=arguments.plan("plan", plan),
        budget=budget or Budget(),
        calibration=arguments.calibrated(calibration),
        imatrix=imatrix,
        effort=effort,
        device=device,
        progress=progress,
        trust_remote_code=trust_remote_code,
    )
    source = locate(model, safetensors_only=safetensors_only)
    where = machine.device(device) if wanted.budget.given else "cpu"
    job = Job.prepare(source, wanted.plan, where, trust_remote_code=trust_remote_code, imatrix=imatrix)
    if max_shard is not None:
        requested.check_split(job.single_file)
    job, tokenizer = _with_tokenizer(job, wanted)
    if (header := job.header(tokenizer)) is not None:
        job = replace(job, notes=[*job.notes, *header.notes])
    sized = _Sized.of(job, wanted.budget, wanted.calibration, tokenizer, progress)
    files = splitting.count(sized.job.settled, header, None if max_shard is None else int(max_shard))
    return replace(sized.job.preview(), allocation=sized.allocation, files=files)


@checked
@ambient.defaults()
def imatrix(
    model: str | Path,
    out: str | Path,
    *,
    calibration: Calibration | Texts | None = None,
    overwrite: bool = False,
    device: Device = None,
    safetensors_only: bool = False,
    trust_remote_code: bool = False,
    progress: bool | pipeline_progress.Progress | None = None,
) -> Measured:
    """Measure the importance matrix of `model` on a calibration text. Writes `out`, llama.cpp's .gguf or .dat file."""
    elapsed, out, calibration = timing.timed(), publish.named(out), arguments.calibrated(calibration)
    importances.check(out)
    with ranks.joined(device) as device:
        if ranks.first():
            publish.check_output(out, overwrite=overwrite, file=True)
        source = locate(model, safetensors_only=safetensors_only)
        skeleton = skeleton_of(source, machine.device(device), trust_remote_code)
        settled.model_of(skeleton)  # PlanError if llama.cpp has no name for one of its weights
        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
        tokens, text = windows(calibration, source, tokenizer)
        with report_progress.blocks(progress) as tell:
            found = pipeline_importances.measure(skeleton, tokens, tell)

        def published() -> Measured:
            matrix = pipeline_importances.matrix_of(skeleton, found)

            def write(path: Path) -> None:
                importances.write(path, matrix, chunks=len(tokens), length=tokens.shape[1], text=text["text"])

            try:
                with publish.published(out, overwrite=overwrite, file=True) as made:
                    write(made)
            except (OutputError, PlanError) as error:
                raise publish.rescued(error, out, write) from error
            notes = [*fewer(calibration, text), *pipeline_importances.unreached(found)]
            return Measured(str(out), len(matrix), tokens.numel(), text["text"], notes, elapsed())

        return ranks.run_on_first(published)


def _write(place: Path, job: Job, run: pipeline_run.Run, header: Header | None, record: dict[str, Any]) -> int:
    """Write the output and its record at `place`. Returns the bytes of all tensors."""
    tensors = Checkpoint(run.files())
    if header is not None:
        return write_gguf.write(place, job.settled, tensors, header, record)
    written = write_folder.write(place, job.settled, tensors)
    records.write(place, record)
    return written


def _checked(
    place: Path, nbytes: int, device: Device, opened: Callable[[str], tuple[str | None, list[str]]]
) -> tuple[str | None, list[str]]:
    """Load and run the written model of `nbytes`, on the device or else on the CPU. Returns what `opened` does.

    Quantizing needs memory for one block, so the whole model may fit neither. Then only its tensors are compared with
    its config, the text is None, and a note says so.
    """
    wanted, tried = machine.device(device), list[str]()
    for where in dict.fromkeys([wanted, "cpu"]):
        free = machine.free_memory(torch.device(where))
        if free is not None and nbytes > free:
            tried.append(f"{where} has {units.size(free)} of free memory")
            continue
        try:
            return opened(where)
        except KernelError:  # the memory of a GPU may be too small all the same
            if where == "cpu":
                raise
            tried.append(f"it does not fit {where}")
    describe(locate(place))
    return None, [f"the output was not run: it has {units.size(nbytes)}, and {' and '.join(tried)}"]


def _reopened(
    folder: Path, tokenizer: Any, on_text: OnText, trust_remote_code: bool, device: str
) -> tuple[str | None, list[str]]:
    """Load the written model as a user would and generate a few tokens. FormatError if that fails.

    Also returns a note if only a part of the model runs on text, or if transformers cannot generate with it.
    """
    try:
        source = locate(folder)
        describe(source)
        model = load_model(source, Loading(device, trust_remote_code=trust_remote_code))
        ids = torch.zeros(1, 1, dtype=torch.long, device="cpu")
        if (
            tokenizer is not None
            and (words := tokenizer(report_text.FIRST_WORDS, return_tensors="pt")["input_ids"]).numel()
        ):
            ids = words
        why = f"as {type(model).__name__} {on_text.why_not_whole}"
        if on_text.part is None:
            return None, [f"checked by loading it only, {why}"]
        with torch.inference_mode():
            part = model.get_submodule(on_text.part)
            computed = part(**text_inputs(part, ids.to(model.device)))
            if not torch.isfinite(computed["logits"] if "logits" in computed else computed[0]).all():
                raise FormatError("the quantized model's logits are not finite")
        if on_text.part:
            return "", [f"checked by a forward pass of {on_text.part} only, {why}"]
        if tokenizer is None:
            return "", ["checked by a forward pass only, as there is no tokenizer"]
        if getattr(model.config, "is_encoder_decoder", False):
            return "", ["checked by a forward pass only, as the model has an encoder, and does not continue a text"]
        try:
            return continue_text(model, tokenizer, ids, max_new_tokens=8).text, []
        except (FewbitError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            return "", [f"checked by a forward pass only, as transformers' generate fails on it: {first_line(error)}"]
    except KernelError:
        raise
    except FewbitError as error:
        raise FormatError(f"the output failed its own check: {error.message}", error.hint) from error
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model's code can raise anything
        raise FormatError(f"the output failed its own check: running it raises {first_line(error)}") from error
