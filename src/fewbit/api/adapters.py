"""The verbs that make adapters and merge them, over quantized and unquantized models alike."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fewbit.api import arguments, evaluate, quantize, requested, splitting
from fewbit.api.arguments import Device, DType, Plans, checked
from fewbit.checks import Texts
from fewbit.errors import FormatError, NumericsError, OutputError, PlanError
from fewbit.formats.containers.safetensors import files_in, read_specs
from fewbit.formats.containers.safetensors import writing as safetensors_errors
from fewbit.measure import memory
from fewbit.models import scales
from fewbit.models.adapters.tuning import Tuning
from fewbit.models.describe import describe
from fewbit.models.load import check_adapter, load_model
from fewbit.models.loading import Loading, need_peft
from fewbit.models.outline import Outline
from fewbit.models.provenance import provenance
from fewbit.models.skeleton import load_tokenizer
from fewbit.models.source import Source, locate, outlined
from fewbit.names import ADAPTER, ADAPTER_WEIGHTS, DEMO, EMBEDDED, PEFT
from fewbit.pipeline import progress as pipeline_progress
from fewbit.pipeline.job import evaluated, homeless, left_behind, rehearsed, same_vocabulary
from fewbit.plans.plan import is_file
from fewbit.report import progress as report_progress
from fewbit.report.results import Converted, Finetuned, Merged
from fewbit.system import ambient, heap, kept, locks, machine, publish, ranks, timing
from fewbit.system.cache import cache_folder
from fewbit.system.files import write_json
from fewbit.texts import calibration as texts_calibration
from fewbit.texts import sources, windows
from fewbit.texts.examples import examples, split


@checked
@ambient.defaults()
def finetune(
    model: str | Path,
    out: str | Path,
    *,
    data: Texts,
    tuning: Tuning | None = None,
    overwrite: bool = False,
    device: Device = None,
    dtype: DType = None,
    trust_remote_code: bool = False,
    progress: bool | Callable[[int, int, float], None] | None = None,
) -> Finetuned:
    """Train a LoRA on `model` and write it to the adapter folder `out`, in PEFT's layout. `model` does not change.

    If `model` is quantized, this is QLoRA. data: a .txt file, or a .jsonl file of {"text"}, {"messages"} or
    {"prompt", "completion"} lines; in chats, only the assistant's answers count in the loss. dtype: of activations and
    unquantized weights; by default float32 on a CPU, the checkpoint's own on a GPU. `out` is written atomically.
    Under torchrun, all processes make this call: each trains on its own batches, so a step has `tuning.batch` examples
    of every process, and rank 0 writes the output.
    PlanError, before any work, for an invalid request; FormatError, with file and line, for broken data; NumericsError
    if a loss or gradient is not finite: `out` then holds the adapter of the last good step, if there was one.
    """
    elapsed = timing.timed()
    with ranks.joined(device) as device:
        out = publish.named(out)
        requested.check_finetuned(out)
        if ranks.first():
            publish.check_output(out, overwrite=overwrite)
        loading = Loading(machine.device(device), dtype, trust_remote_code=trust_remote_code).exact()
        tuning = tuning or Tuning()
        need_peft()
        text = sources.load_text(data)
        source = locate(model)
        publish.check_not_lost(out, source.origin, source.folder, *([data] if isinstance(data, str) else []))
        most = source.context
        if tuning.length > most and tuning.length != Tuning.length:
            raise PlanError(f"`length={tuning.length}` is beyond the model's context of {most} tokens")
        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
        every, notes = examples(text, tokenizer, min(tuning.length, most))
        for example in every:
            ids = torch.tensor(example.ids, dtype=torch.int64, device="cpu")
            windows.within(ids, source.rows, tokenizer, text.name)
        training, held_out = split(every, tuning.held_out, tuning.seed)
        # Peak for SmolLM2 with 4 x 128 tokens: 0.6 GB; with the default threshold of 4 MiB it is 1.0 GB.
        heap.return_freed(1 << 18)
        from fewbit.models.adapters.train import check_fits, train  # slow to import, and PEFT is an extra

        with report_progress.steps(progress) as tell:
            loaded = load_model(source, loading, for_text=True)
            check_fits(loaded, tuning)
            if ranks.first():
                publish.check_space({out.resolve(): _most_bytes(loaded, tuning)})
            ranks.agreed(None)  # an error before the training is found here
            pad = _padding(tokenizer, source.rows)
            done = train(loaded, source.address, pad, training, held_out, tuning, tell)
        if done.stopped and not done.steps:
            raise NumericsError(f"{done.stopped}: nothing was learned, and nothing is saved", _LOWER_RATE)

        def save(folder: Path) -> None:
            with safetensors_errors():
                done.model.save_pretrained(folder, save_embedding_layers=False)
                if (known := scales.of_model(loaded)) is not None:
                    scales.write_record(folder, known, source.address)

        def published() -> int:
            try:
                with publish.published(out, overwrite=overwrite) as folder:
                    save(folder)
            except (OutputError, PlanError) as error:
                raise publish.rescued(error, out, save) from error
            return sum(file.stat().st_size for file in out.glob("*.safetensors"))

        nbytes = ranks.run_on_first(published)
        if done.stopped:
            raise NumericsError(f"{done.stopped}: {out} holds the adapter as of step {done.steps}", _LOWER_RATE)
        parameters = list(done.model.parameters())
        return Finetuned(
            out=str(out),
            model=str(model),
            notes=notes,
            examples=len(training),
            held_out_examples=len(held_out),
            tokens=sum(sum(e.learned) for e in training),
            steps=done.steps,
            loss=done.loss,
            held_out_before=done.before,
            held_out_after=done.after,
            trainable=sum(p.numel() for p in parameters if p.requires_grad),
            nbytes=nbytes,
            seconds=elapsed(),
            peak=memory.now().peak,
            gpu_peak=memory.on_gpus(),
        )


def _padding(tokenizer: Any, rows: int | None) -> int:
    """Token id for padding: the tokenizer's own if the embedding has a row for it. Padding is masked."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None and (rows is None or token < rows):
            return int(token)
    return 0


def _most_bytes(model: Any, tuning: Tuning) -> int:
    """Bytes of the adapter in float32, and a little for its configs."""
    sizes = [
        linear.in_features + linear.out_features
        for name, linear in model.named_modules()
        if hasattr(linear, "in_features") and (not tuning.targets or name.endswith(tuning.targets))
    ]
    return 4 * tuning.rank * int(sum(sizes)) + (1 << 16)


_LOWER_RATE = "Try a lower `learning_rate`."


@checked
@ambient.defaults()
def merge(
    model: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    plan: Plans | None = None,
    calibration: texts_calibration.Calibration | Texts | None = None,
    imatrix: str | Path | None = None,
    max_shard: int | str | None = None,
    text: Texts | None = None,
    length: int | None = None,
    samples: int | None = 8,
    overwrite: bool = False,
    device: Device = None,
    trust_remote_code: bool = False,
    progress: bool | pipeline_progress.Progress | None = None,
) -> Merged:
    """Merge an adapter into the weights that `model` was quantized from. Writes `out`, a model folder or a GGUF file.

    base: the original model. Default: the one that `model` records, if it is on this machine; otherwise the dequantized
    weights. plan: quantize the result by this plan, with `calibration`, `imatrix` and `max_shard` as in `quantize`; one
    for GGUF makes a file. The result is compared with `model` and its adapter on `samples` windows of `length` tokens
    of a text. The merged model is held in memory unquantized.
    """
    requested.check_window(length)
    elapsed, out = timing.timed(), publish.named(out)
    plan = None if plan is None else arguments.plan("plan", plan)
    if plan is None:
        requested.check_merged(out, imatrix)
    shard = None if max_shard is None else int(max_shard)
    publish.check_output(out, overwrite=overwrite, file=(file := plan is not None and is_file(out, plan)))
    splitting.parts(out, shard, overwrite=overwrite, file=file)  # PlanError if it cannot be split
    check_adapter(adapter)
    from fewbit.models.adapters.attach import check_experts, folded, read_config, trained_on
    from fewbit.models.merge import write_merged

    source = locate(model)
    if source.quantization is not None and (place := Path(adapter)).is_dir():
        outline = Outline(source, trust_remote_code=trust_remote_code)
        check_experts(outline.model, place, read_config(place))  # the output is compared with these two at the end
    origin = locate(base) if base is not None else _recorded_base(source)
    told = trained_on(adapter)
    trained = folded(source) if told is None else told
    if trained is None and base is not None:
        raise PlanError(
            f"{model} does not record which scales AWQ folded into it, so its adapters do not fit {base}",
            "Omit `base`: the adapter is then added to the dequantized weights.",
        )
    if trained is None:
        origin = None
    onto = origin or source  # whose weights the adapter is added to
    base_folders = [origin.origin, origin.folder] if origin else []
    publish.check_not_lost(out, source.origin, source.folder, adapter, *base_folders)
    if origin is not None and origin.quantization is not None and origin.origin == source.origin:
        raise PlanError(
            f"`base={origin.name}` is the quantized model itself", "Give the model that it was quantized from."
        )
    # Quantizing and measuring come last. Find their errors now, before the work.
    machine.device(device)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    if origin is not None:
        same_vocabulary(origin, source, tokenizer, trust_remote_code)
    evaluated([source, onto], tokenizer, text or sources.own_source(source.config), length, samples)
    needed = {out.resolve() if plan is None else cache_folder(): 2 * describe(onto).parameters}
    if plan is not None:
        with rehearsed(onto, plan, device, trust_remote_code=trust_remote_code, imatrix=imatrix) as job:
            job.inputs(arguments.calibrated(calibration), tokenizer)
            header = job.header(tokenizer)  # PlanError if GGUF cannot express the config or tokenizer
            splitting.count(job.settled, header, shard)
            needed[out.resolve()] = size = job.preview().output_bytes
            needed[cache_folder()] += size  # its blocks are kept there until the file is made
    publish.check_space(needed)
    adding = f"adding {Path(adapter).resolve().name} to {Path(onto.name).resolve().name}"
    if plan is None:
        with report_progress.phase(adding, progress), publish.published(out, overwrite=overwrite) as folder:
            carried = write_merged(onto, adapter, folder, trained=trained, trust_remote_code=trust_remote_code)
        quantized = None
        kind = describe(onto).architecture
        notes = [*homeless(kind, carried, {}), *left_behind(onto, single_file=False)]
    else:
        held = locks.scratch(cache_folder() / "merged")
        kept.label(held.folder, onto.name, f"weights merged with {adapter}")
        plain = held.folder / "model"
        plain.mkdir()
        try:
            with report_progress.phase(adding, progress):
                write_merged(onto, adapter, plain, trained=trained, trust_remote_code=trust_remote_code)
            request = quantize.Request(
                plan=plan,
                calibration=arguments.calibrated(calibration),
                imatrix=imatrix,
                max_shard=shard,
                device=device,
                progress=progress,
                # The folder of the merged weights is temporary, so the record names what they were made from.
                told={
                    "model": f"{onto.name} with {adapter}",
                    "origin": None,
                    "base": {**provenance(onto), "model": None},
                },
                overwrite=overwrite,
                trust_remote_code=trust_remote_code,
            )
            named = f"{Path(onto.name).name.removesuffix('.gguf')} with {Path(adapter).resolve().name}"
            quantized = quantize.made(replace(locate(plain), name=named), out, request)
        finally:
            held.remove()
        notes = left_behind(onto, single_file=False)  # `quantize` returns the other notes
    out = splitting.written(out)
    return Merged(
        out=str(out),
        base=origin.name if origin is not None else None,
        notes=notes,
        quantized=quantized,
        evaluation=evaluate.evaluate(
            out,
            reference=model,
            reference_adapter=adapter,
            text=text,
            length=length,
            samples=samples,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=False if callable(progress) else progress,
        ),
        nbytes=sum(spec.nbytes for file in files_in(out) for spec in read_specs(file).values())
        if quantized is None
        else quantized.output_bytes,
        seconds=elapsed(),
    )


def as_gguf(
    adapter: str | Path, out: str | Path, base: str | Path | None, *, overwrite: bool, trust_remote_code: bool
) -> Converted:
    """Write the LoRA in a folder as the GGUF file `out`, which llama.cpp adds to the file of its model.

    base: the model. Default: the one that the adapter names. PlanError, before any work, if llama.cpp has no such LoRA.
    """
    elapsed, out, folder = timing.timed(), publish.named(out), Path(adapter).absolute()
    if out.suffix != ".gguf":
        raise PlanError(f"{out}: `to=gguf` makes one .gguf file", "Give an `out` that ends in .gguf.")
    publish.check_output(out, overwrite=overwrite, file=True)
    check_adapter(folder)
    from fewbit.models.adapters import as_gguf as files
    from fewbit.models.adapters.attach import check_fits, read_config

    config = read_config(folder)
    if not (named := base or config.get("base_model_name_or_path")):
        raise PlanError(f"{folder} does not name its model", "Give it as `base`.")
    try:
        source = outlined(named)
    except PlanError as error:
        raise PlanError(f"the model of the adapter: {error.message}", error.hint if base else "Give `base`.") from None
    publish.check_not_lost(out, folder, source.origin, source.folder)
    skeleton = Outline(source, trust_remote_code=trust_remote_code)
    check_fits(skeleton.model, folder, folder, config)
    file = files.made(folder, config, skeleton.config, source)
    with publish.published(out, overwrite=overwrite, file=True) as place:
        file.write(place)
    return Converted(
        out=str(out),
        to="gguf",
        exact=True,
        schemes={},
        decoded=[],
        notes=list(file.notes),
        original_bytes=sum(spec.nbytes for spec in read_specs(folder / ADAPTER_WEIGHTS).values()),
        output_bytes=file.nbytes,
        seconds=elapsed(),
        peak=memory.now().peak,
    )


def as_peft(
    adapter: str | Path, out: str | Path, base: str | Path | None, *, overwrite: bool, trust_remote_code: bool
) -> Converted:
    """Write the LoRA in a GGUF file as the folder `out`, in PEFT's layout.

    base: its model, which a file does not name. PlanError, before any work, if the LoRA is for another model.
    """
    elapsed, out, file = timing.timed(), publish.named(out), Path(adapter).absolute()
    requested.check_as_peft(out)
    publish.check_output(out, overwrite=overwrite, file=False)
    check_adapter(file)
    if base is None:
        raise PlanError(f"{file} does not name its model", "Give it as `base`.")
    from fewbit.models.adapters import as_gguf as files
    from fewbit.models.adapters.attach import check_fits, read_config

    source = outlined(base)
    publish.check_not_lost(out, file, source.origin, source.folder)
    skeleton = Outline(source, trust_remote_code=trust_remote_code)
    with files.as_folder(file, skeleton.config) as folder:
        config = read_config(folder)
        check_fits(skeleton.model, folder, file, config)
        with publish.published(out, overwrite=overwrite) as made:
            shutil.copytree(folder, made, dirs_exist_ok=True)
            write_json(made / ADAPTER, {**config, "base_model_name_or_path": source.address})
    return Converted(
        out=str(out),
        to=PEFT,
        exact=True,
        schemes={},
        decoded=[],
        notes=[],
        original_bytes=files.opened(file).nbytes,
        output_bytes=sum(spec.nbytes for spec in read_specs(out / ADAPTER_WEIGHTS).values()),
        seconds=elapsed(),
        peak=memory.now().peak,
    )


def _recorded_base(source: Source) -> Source | None:
    """The original that a quantized model records, if it is on this machine (a folder) or embedded, else None.

    A model that is not quantized is its own base.
    """
    if source.quantization is None and source.gguf is None:
        return source
    name = describe(source).made.get("origin")
    # A relative name is ignored: in another working directory it could be another model.
    if not isinstance(name, str) or not (
        name in (DEMO, EMBEDDED) or (Path(name).is_absolute() and Path(name).is_dir())
    ):
        return None
    try:
        return locate(name)
    except (FormatError, PlanError):
        return None
