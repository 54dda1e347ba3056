"""The verbs. Each is short and does its work by asking the parts below it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from fewbit import ambient, arguments, folder_output, gguf_output, heap, outputs, pipeline, ranks, report
from fewbit import calibration as texts
from fewbit.advise import hardware
from fewbit.arguments import SAMPLES, Device, DType, Plans, Texts, checked
from fewbit.arguments import Sampling as Sampling
from fewbit.cache import cache_folder
from fewbit.errors import FewbitError, FormatError, KernelError, OutputError, PlanError
from fewbit.formats import imatrix as importances
from fewbit.job import Calibration as Calibration
from fewbit.job import Job, evaluated, fewer, is_file, same_vocabulary, skeleton_of, too_small, unquantized, windows
from fewbit.measure import memory, quality
from fewbit.models import gguf_header
from fewbit.models.describe import Inspection, describe
from fewbit.models.generate import Continuation, continue_text, prompt_ids
from fewbit.models.load import load_model
from fewbit.models.skeleton import load_tokenizer
from fewbit.models.source import locate
from fewbit.report import Evaluation, Measured, Preview, Quantized
from fewbit.scales import read as folded_scales

SCHEMA = 1
_KEPT = "The quantized blocks are kept in the cache: the same command goes on from there."
_NOT_KEPT = ("out", "plan", "peak", "gpu_peak", "anonymous", "sample")  # of a result, in the record beside it


@checked
@ambient.defaults()
def quantize(
    model: str | Path,
    out: str | Path,
    *,
    plan: Plans = "gptq-4bit",
    calibration: Calibration | Texts | None = None,
    imatrix: str | Path | None = None,
    overwrite: bool = False,
    device: Device = None,
    safetensors_only: bool = False,
    trust_remote_code: bool = False,
    progress: pipeline.Progress | None = None,
) -> Quantized:
    """Quantize `model` by `plan` into the folder, or the GGUF file, `out`, which appears whole or not at all.

    imatrix: a file of importances as llama.cpp writes them, in place of calibration. The same call after an
    interruption goes on at the block where it stopped. Where torchrun started several processes, all of them make this
    call and share the work; the first writes. PlanError before any work if the plan does not fit the model,
    FormatError for a broken checkpoint, NumericsError (naming the tensor) for NaN or Inf in it.
    """
    elapsed = pipeline.timed()
    wanted, calibration = arguments.plan("plan", plan), arguments.calibrated(calibration)
    with ranks.joined(arguments.device("device", device)) as device, ExitStack() as leaving:
        out, file = outputs.named(out), is_file(out, wanted)
        if ranks.first():
            outputs.claimed(out, overwrite=overwrite, file=file)
        heap.return_freed()
        job = Job.prepare(model, wanted, device, safetensors_only, trust_remote_code, imatrix)
        preview = job.preview()
        if ranks.first():
            outputs.spare(out, job.source.origin, job.source.folder, *job.source.files)
            # Block results, then what is put together from them.
            outputs.check_space({cache_folder(): preview.output_bytes, out.resolve(): preview.output_bytes})
        tokenizer = load_tokenizer(job.source, trust_remote_code=trust_remote_code)
        # What no file can say of the model is found before any work.
        header = gguf_header.of(job.source, trust_remote_code=trust_remote_code) if job.single_file else None
        tokens, calibrated = job.tokens(calibration, tokenizer)
        # What the check after writing asks of the model.
        words = tokenizer(report.FIRST_WORDS, return_tensors="pt")["input_ids"]
        texts.within(words, job.source.rows, tokenizer, repr(report.FIRST_WORDS))
        versions = hardware.versions()
        fingerprint = pipeline.fingerprint(job.skeleton, job.resolved, tokens, versions, job.importance)
        run = leaving.enter_context(pipeline.Run(fingerprint))
        told = progress or pipeline.silent
        tensors = pipeline.quantize_blocks(job.skeleton, job.resolved, tokens, run, told, job.importance)

        def published() -> Quantized:
            weights = sum(prod(t.shape) for t in tensors)
            done = Quantized(
                out=str(out),
                plan=job.resolved.plan.name,
                notes=[*job.notes, *job.left_out(), *fewer(calibration, calibrated), *too_small(tensors)],
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
            )
            kept = {k: v for k, v in asdict(done).items() if k not in _NOT_KEPT}
            record = {
                "schema_version": SCHEMA,
                "versions": versions,
                "model": job.source.name,
                "origin": job.source.address,
                "calibration": calibrated,
                "plan": job.resolved.plan.to_json(),
                **kept,
            }
            with outputs.published(out, overwrite=overwrite, file=file, kept=_KEPT) as made:
                if header is not None:
                    written = gguf_output.write(made, job.skeleton, job.resolved, run, header, record)
                else:
                    written = folder_output.write(made, job.skeleton, job.resolved, run)
                    record["scales"] = folded_scales(made).to_json()
                    record["files"] = sorted({*_files(made), "README.md", outputs.RECORD})
                    (made / outputs.RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
                    (made / "README.md").write_text(report.model_card(record), encoding="utf-8")
                if written != preview.output_bytes:
                    raise FormatError(f"{written} bytes were written where {preview.output_bytes} were foreseen")
                try:
                    sample = _reopened(made, tokenizer, hardware.device(device), trust_remote_code)
                except KernelError:  # quantizing took a block at a time, the whole model may not fit the device
                    sample = _reopened(made, tokenizer, "cpu", trust_remote_code)
            run.forget()
            held = memory.now()
            return replace(
                done,
                seconds=elapsed(),
                peak=held.peak,
                gpu_peak=memory.on_gpus(),
                anonymous=held.anonymous,
                sample=sample,
            )

        return ranks.from_first(published)


@checked
def preview(
    model: str | Path,
    *,
    plan: Plans = "gptq-4bit",
    imatrix: str | Path | None = None,
    safetensors_only: bool = False,
    trust_remote_code: bool = False,
) -> Preview:
    """What `quantize` would do to each tensor, with exact output bytes, without doing it (`--dry-run`)."""
    wanted = arguments.plan("plan", plan)
    return Job.prepare(model, wanted, "cpu", safetensors_only, trust_remote_code, imatrix).preview()


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
    progress: pipeline.Progress | None = None,
) -> Measured:
    """Write the importance matrix of `model` on a calibration text to `out`, a .gguf or .dat file as of llama.cpp."""
    elapsed, out, calibration = pipeline.timed(), outputs.named(out), arguments.calibrated(calibration)
    if reason := importances.why_not(out):
        raise PlanError(reason, "Give another -o.")
    with ranks.joined(arguments.device("device", device)) as device:
        if ranks.first():
            outputs.claimed(out, overwrite=overwrite, file=True)
        source = unquantized(model, safetensors_only)
        skeleton = skeleton_of(source, hardware.device(device), trust_remote_code)
        names = gguf_output.model_of(skeleton).names
        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
        tokens, text = windows(calibration, source, tokenizer)
        found = pipeline.measure(skeleton, tokens, progress or pipeline.silent)

        def published() -> Measured:
            matrix = {
                f"{names[m]}.weight": importances.Importance(s.mean_square.cpu(), s.rows) for m, s in found.items()
            }

            def write(path: Path) -> None:
                importances.write(path, matrix, chunks=len(tokens), length=tokens.shape[1], text=text["text"])

            try:
                with outputs.published(out, overwrite=overwrite, file=True) as made:
                    write(made)
            except (OutputError, PlanError) as error:
                raise outputs.rescued(error, out, write) from error
            return Measured(str(out), len(matrix), tokens.numel(), text["text"], fewer(calibration, text), elapsed())

        return ranks.from_first(published)


def _files(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


@checked
@ambient.defaults()
def load(
    model: str | Path,
    *,
    dtype: DType = "auto",
    device: Device = None,
    kernel: str | None = None,
    adapter: str | Path | None = None,
    fuse: int | None = None,
    compile: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """The model, its quantized weights packed: what `AutoModelForCausalLM.from_pretrained` gives after `import fewbit`.

    `kernel` names the one to use throughout (`fewbit list`); KernelError if it cannot serve a weight. `adapter` is the
    folder of one to put on it, as `peft.PeftModel.from_pretrained` does; PlanError if it was made for another model.
    `fuse`: multiply once by all weights that read the same tensor, and generate texts of up to so many tokens, prompt
    included, in a static cache (on a GPU, a CUDA graph for each token); PlanError beyond the model's context.
    `compile`: on a GPU, let PyTorch compile what is run for a token, at the first token of a size of batch: many
    seconds, for a step that is shorter; PlanError without `fuse`, and without a GPU.
    """
    where = arguments.device("device", device)
    return load_model(
        locate(model),
        dtype=arguments.dtype("dtype", dtype),
        device=where if where in (None, "auto") else hardware.device(where),
        kernel=kernel,
        adapter=adapter,
        fuse=fuse,
        compile=compile,
        trust_remote_code=trust_remote_code,
    )


@checked
@ambient.defaults()
def evaluate(
    model: str | Path,
    *,
    reference: str | Path | None = None,
    adapter: str | Path | None = None,
    reference_adapter: str | Path | None = None,
    text: Texts | None = None,
    length: int | None = None,
    samples: int | None = SAMPLES,
    device: Device = None,
    dtype: DType = None,
    kernel: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Perplexity of `model` and its distance from `reference`, on disjoint windows of a text not calibrated on.

    adapter, reference_adapter: folders of adapters to put on the one and the other.
    text: a name or a file; by default tiny's own for what was made from it, pydoc for all others.
    length: tokens of a window, the model's context up to 2048 by default. samples: how many windows, from the start of
    the text; None: all of them.
    dtype of activations: float32 on a CPU, the checkpoint's own on a GPU by default. kernel: for `model`, as in `load`.
    """
    elapsed = pipeline.timed()
    with ranks.joined(arguments.device("device", device)) as device:
        device = hardware.device(device)
        source, original = locate(model), locate(reference) if reference is not None else None
        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
        if original is not None:
            same_vocabulary(original, source, tokenizer, trust_remote_code)
        # The original may know a text that a GGUF file made from it has no word for.
        wanted = text or texts.own_source((original or source).config)
        name, chosen, available = evaluated(source, original, tokenizer, wanted, length, samples)
        options: dict[str, Any] = {
            "dtype": dtype or ("auto" if device != "cpu" else torch.float32),
            "device": device,
            "trust_remote_code": trust_remote_code,
        }
        measured = quality.measure(
            load_model(source, adapter=adapter, kernel=kernel, **options),
            load_model(original, adapter=reference_adapter, **options) if original is not None else None,
            chosen,
            (lambda done: progress(done, len(chosen))) if progress else None,
        )
        return Evaluation(
            model=_named(model, adapter),
            reference=None if reference is None else _named(reference, reference_adapter),
            text=name,
            quality=measured,
            inspection=describe(source),
            peak=memory.now().peak,
            gpu_peak=memory.on_gpus(),
            seconds=elapsed(),
            available=available,
        )


@checked
def inspect(model: str | Path) -> Inspection:
    """What is in a model's files, from their headers alone."""
    return describe(locate(model))


@checked
@ambient.defaults()
def generate(
    model: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    chat: bool = False,
    adapter: str | Path | None = None,
    device: Device = None,
    kernel: str | None = None,
    fuse: int | None = None,
    compile: bool = False,
    trust_remote_code: bool = False,
    stream: bool = False,
) -> Continuation:
    """What `model` continues `prompt` with, and how fast: greedy unless `sampling` says otherwise.

    chat: the prompt is a user's message in the model's chat template. adapter: the folder of one to put on it. fuse,
    compile: as in `load`. stream: print the text as it comes, too.
    """
    if max_new_tokens < 1:
        raise PlanError(f"--max-new-tokens {max_new_tokens}: at least one token must come")
    device, source = hardware.device(arguments.device("device", device)), locate(model)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    ids = texts.within(prompt_ids(tokenizer, prompt, chat=chat), source.rows, tokenizer, "the prompt")
    if fuse is not None and ids.shape[1] + max_new_tokens > fuse:
        raise PlanError(
            f"--max-length {fuse} holds the prompt and the answer, {ids.shape[1]} and {max_new_tokens} tokens here",
            "Give a greater one, or fewer --max-new-tokens.",
        )
    loaded = load_model(
        source,
        device=device,
        kernel=kernel,
        adapter=adapter,
        fuse=fuse,
        compile=compile,
        trust_remote_code=trust_remote_code,
    )
    return continue_text(
        loaded, tokenizer, ids, max_new_tokens=max_new_tokens, sampling=sampling or Sampling(), stream=stream
    )


def _reopened(folder: Path, tokenizer: Any, device: str, trust_remote_code: bool) -> str:
    """Open what was written as any user would, and generate a few tokens from it; FormatError if that fails."""
    try:
        source = locate(folder)
        describe(source)
        model = load_model(source, device=device, trust_remote_code=trust_remote_code)
        ids = tokenizer(report.FIRST_WORDS, return_tensors="pt")["input_ids"]
        ids = ids if ids.numel() else torch.zeros(1, 1, dtype=torch.long, device="cpu")
        with torch.inference_mode():
            if not torch.isfinite(model(input_ids=ids.to(model.device)).logits).all():
                raise FormatError("the quantized model's logits are not finite")
        return continue_text(model, tokenizer, ids, max_new_tokens=8).text
    except KernelError:
        raise
    except FewbitError as error:
        raise FormatError(f"the output failed its own check: {error.message}", error.hint) from error


def _named(model: str | Path, adapter: str | Path | None) -> str:
    return str(model) if adapter is None else f"{model} with {adapter}"
