"""A quantization job: model, plan, importances and calibration tokens, all checked before any work."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.brief import brief
from fewbit.checks import Device, Texts
from fewbit.errors import PlanError
from fewbit.formats.containers import pickle
from fewbit.formats.containers.safetensors import card_of, folders_left_out, other_weights, side_files
from fewbit.models.gguf import header
from fewbit.models.gguf.header import Header
from fewbit.models.outline import Outline
from fewbit.models.skeleton import Skeleton, load_tokenizer
from fewbit.models.source import Source
from fewbit.models.stated import check_rows
from fewbit.pipeline import importances, run, sizes
from fewbit.pipeline.block_tuning import BlockTuning
from fewbit.pipeline.capture import Importance, Inputs, tokens_at_once
from fewbit.pipeline.settled import Settled
from fewbit.plans import plan as plans
from fewbit.plans.budget import Allocation
from fewbit.schemes import base
from fewbit.schemes.base import PartSpec
from fewbit.stats import Need
from fewbit.system import machine
from fewbit.system.files import write_json
from fewbit.texts import sources
from fewbit.texts import windows as texts_windows
from fewbit.texts.calibration import Calibration as Calibration
from fewbit.units import counted

# Files that a GGUF output does not need: it stores their content in its keys.
_IN_GGUF = re.compile(
    r"(config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|merges\.txt|.*\.model|.*\.jinja"
    r"|LICENSE.*|generation_config\.json"
)

HELD_OUT = 4096  # tokens that outputs of a chosen size are measured on


@dataclass
class Job:
    """A model, and a plan that is resolved for it and checked."""

    source: Source
    settled: Settled
    importance: Importance | None
    notes: list[str]

    @classmethod
    def prepare(
        cls,
        source: Source,
        plan: plans.Plan,
        device: Device,
        *,
        trust_remote_code: bool = False,
        imatrix: str | Path | None = None,
    ) -> Job:
        """Resolve `plan` for a source. PlanError if it does not fit."""
        skeleton = skeleton_of(
            source, machine.device(device), trust_remote_code, for_gguf=bool(plans.format_of(plan).suffix)
        )
        return cls.of(skeleton, plan, imatrix)

    @classmethod
    def of(cls, skeleton: Skeleton, plan: plans.Plan, imatrix: str | Path | None = None) -> Job:
        """Resolve `plan` for a model. PlanError if it does not fit."""
        settled = Settled.of(skeleton, plan)
        settled.check()
        importance, notes = _importance(imatrix, settled)
        return cls(skeleton.source, settled, importance, [*settled.on_the_source(), *settled.resolved.notes, *notes])

    @property
    def single_file(self) -> bool:
        return bool(self.settled.resolved.format.suffix)

    def header(self, tokenizer: Any) -> Header | None:
        """The header of the GGUF file, None for a folder. PlanError if GGUF cannot express the config or tokenizer."""
        if not self.single_file:
            return None
        return header.of(self.settled.skeleton.config, tokenizer, self.source.name, self.source.folder)

    def inputs(
        self, wanted: Calibration, tokenizer: Any, tuning: BlockTuning | None = None
    ) -> tuple[Inputs, dict[str, Any] | None]:
        """The calibration inputs, and the record's entry on calibration tokens (None if nothing needs them).

        tuning: how blocks are tuned, if they are.
        """
        if tuning is None and (self.importance is not None or self.settled.need == Need.NOTHING):
            return Inputs(importance=self.importance), None
        tokens, text = windows(wanted, self.source, tokenizer)
        at_once = tokens_at_once(self.settled.skeleton, self.settled.resolved.assignments.values())
        if tuning is not None:
            at_once = min(at_once, tuning.wanted.batch)
        return Inputs(tokens, importance=self.importance, tokens_at_once=at_once), text

    def left_out(self) -> list[str]:
        """Notes on tensors and files of the model's folder that the output copies unchanged or leaves out."""
        skeleton = self.settled.skeleton
        carried = {} if self.single_file else skeleton.carried(self.settled.resolved.assignments)
        specs = skeleton.checkpoint.specs
        lost = {key: specs[key] for key in skeleton.without_place if key not in carried}
        kind = type(skeleton.model).__name__
        return homeless(kind, carried, lost) + left_behind(self.source, single_file=self.single_file)

    def preview(self) -> Preview:
        tensors, output_bytes = sizes.tensors(self.settled)
        return Preview(
            plan=self.settled.resolved.plan.name,
            format=self.settled.resolved.format.name,
            notes=[*self.notes, *self.left_out()],
            tensors=tensors,
            original_bytes=sizes.checkpoint_bytes(self.settled.skeleton),
            output_bytes=output_bytes,
            share=self.settled.share,
            definition=self.settled.resolved.plan.to_json(),
            unquantized=sizes.unquantized(self.settled),
        )


def _importance(imatrix: str | Path | None, settled: Settled) -> tuple[Importance | None, list[str]]:
    """What an importance matrix file says of the weights, and notes on it; nothing without one."""
    return (None, []) if imatrix is None else importances.importance(Path(imatrix), settled)


@contextmanager
def rehearsed(
    source: Source,
    plan: plans.Plan,
    device: Device,
    *,
    trust_remote_code: bool = False,
    imatrix: str | Path | None = None,
) -> Iterator[Job]:
    """A job for checks of a plan, before `source` is unpacked: if its weights are packed, as if they were unpacked.

    PlanError if the plan does not fit.
    """
    if source.quantization is None:
        yield Job.prepare(source, plan, device, trust_remote_code=trust_remote_code, imatrix=imatrix)
        return
    with tempfile.TemporaryDirectory() as place:
        config = {key: value for key, value in source.config.items() if key != "quantization_config"}
        write_json(Path(place) / "config.json", config)
        for own in (*source.folder.glob("*.py"), *source.folder.glob("tokenizer.json")):
            shutil.copy(own, place)
        plain = replace(source, folder=Path(place), files=(), gguf=None)
        for_gguf = bool(plans.format_of(plan).suffix)
        settled = Settled.of(Outline(plain, trust_remote_code=trust_remote_code, for_gguf=for_gguf), plan)
        settled.check_plan()
        importance, notes = _importance(imatrix, settled)
        yield Job(plain, settled, importance, [*settled.resolved.notes, *notes])


def same_vocabulary(one: Source, other: Source, tokenizer: Any, trust_remote_code: bool) -> None:
    """PlanError unless `one` has the vocabulary of the `other` model, to which `tokenizer` belongs."""
    check_rows(one.name, one.rows, other.name, other.rows)
    if load_tokenizer(one, trust_remote_code=trust_remote_code).get_vocab() != tokenizer.get_vocab():
        raise PlanError(
            f"{other.name} and {one.name} have different tokenizers", "Compare models with the same vocabulary."
        )


def skeleton_of(source: Source, device: str, trust_remote_code: bool, *, for_gguf: bool = False) -> Skeleton:
    """The model of `source`. PlanError if it cannot be quantized. for_gguf: as a GGUF file can have it."""
    dtype = torch.float32 if device == "cpu" else source.dtype
    options = {"trust_remote_code": trust_remote_code, "for_gguf": for_gguf}
    skeleton = Skeleton(source, dtype, torch.device(device), **options)
    if reason := skeleton.why_not():
        raise PlanError(f"{source.name}: {reason}")
    return skeleton


def windows(wanted: Calibration, source: Source, tokenizer: Any) -> tuple[Tensor, dict[str, Any]]:
    """Calibration tokens [samples, length] and their entry in the record."""
    most = source.context
    if wanted.length > most and wanted.length != Calibration.length:
        raise PlanError(f"`length={wanted.length}` is beyond the model's context of {most} tokens")
    text = sources.load_text(wanted.text or sources.own_source(source.config), "calibration")
    length = min(wanted.length, most)
    stream = texts_windows.within(texts_windows.encode(text, tokenizer), source.rows, tokenizer, text.name)
    tokens = texts_windows.sample(stream, wanted.samples, length, wanted.seed)
    return tokens, {
        "text": text.name,
        "digest": texts_windows.digest(tokens),
        "samples": tokens.shape[0],
        "length": length,
        "seed": wanted.seed,
    }


def held_out(wanted: Calibration, source: Source, tokenizer: Any) -> tuple[Calibration, Tensor]:
    """Calibration without some windows of its text, and these windows [n, length], of about `HELD_OUT` tokens.

    They are windows that `wanted` would not use, if the text has enough of them. Else an eighth of all is held out. A
    text of one window has no other, and that one is returned.
    """
    length = min(wanted.length, source.context)
    more = -(-HELD_OUT // length)
    tokens, _ = windows(replace(wanted, samples=wanted.samples + more), source, tokenizer)
    held = min(more, max(len(tokens) - wanted.samples, len(tokens) // 8, min(1, len(tokens) - 1)))
    fitted = min(wanted.samples, len(tokens) - held)
    return replace(wanted, samples=fitted), tokens[len(tokens) - held :] if held else tokens


def evaluated(
    models: Sequence[Source], tokenizer: Any, text: Texts, length: int | None, samples: int | None
) -> tuple[str, Tensor, int]:
    """The name of a text, its first `samples` windows [windows, length] (None: all of them), and its number of windows.

    FormatError if a token has no row in the embedding of one of the models.
    """
    most = min(model.context for model in models)
    if length is not None and length > most:
        raise PlanError(f"`length={length}` is beyond the model's context of {most} tokens")
    loaded = sources.load_text(text, "evaluation")
    stream = texts_windows.encode(loaded, tokenizer)
    for model in models:
        texts_windows.within(stream, model.rows, tokenizer, loaded.name)
    every = texts_windows.windows(stream, length or min(2048, most))
    return loaded.name, every if samples is None else every[:samples], len(every)


def homeless(kind: str, carried: Mapping[str, PartSpec], lost: Mapping[str, PartSpec]) -> list[str]:
    """Notes on the checkpoint tensors that the model class `kind` has no place for."""
    notes = []
    if carried:
        notes.append(f"carried over as is: {_some(carried)} that {kind} has no place for; other readers may use them")
    if lost:
        notes.append(f"left out: {_some(lost)} that {kind} has no place for")
    return notes


def _some(specs: Mapping[str, PartSpec]) -> str:
    """How many tensors, their bytes, and the names of the first."""
    named = ", ".join([*specs][:3]) + (" ..." if len(specs) > 3 else "")
    nbytes = sum(spec.nbytes for spec in specs.values())
    return f"{counted(len(specs), 'tensor')} of {nbytes:,} bytes ({named})"


def left_behind(source: Source, *, single_file: bool) -> list[str]:
    """Notes on the files of the model's folder that the output will not contain."""
    if source.gguf is not None:
        return [f"left out: {file.name} of {source.name}, which is a vision or audio tower" for file in source.towers]
    folder = source.beside
    used = {file.name for file in (*source.files, *pickle.files_in(folder))}
    names = [path.name + "/" for path in folders_left_out(folder)]
    if single_file:
        names += [str(file) for file in side_files(folder) if not _IN_GGUF.fullmatch(str(file))]
        if not source.hosted and (card := card_of(folder)) is not None:  # the Hub, or fewbit, still has the card
            names.append(card.name)
    names += [file.name for file in other_weights(folder) if file.name not in used]
    if not names:
        return []
    return [
        f"left out: {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''} of {source.name}"
    ]


def fewer(wanted: Calibration, used: dict[str, Any] | None) -> list[str]:
    """Notes on calibration settings that the text or the model's context could not satisfy."""
    notes = []
    if used is not None and (count := used["samples"]) < wanted.samples:
        notes.append(
            f"{used['text']} has {counted(count, 'window')} of {counted(used['length'], 'token')}, not {wanted.samples}"
        )
    if used is not None and used["length"] < wanted.length:
        notes.append(f"windows of {used['length']} tokens, not {wanted.length}: that is the model's context")
    return notes


def rarely_used(tensors: Sequence[run.TensorReport]) -> list[str]:
    """One note on the experts that served fewer calibration tokens than their inputs have columns.

    So few rows leave a Hessian singular, and `Pools` takes most of it from the layer.
    """
    every = {t.module.rpartition(".")[0] for t in tensors if t.rows is not None}
    rows = {t.module.rpartition(".")[0]: t.rows for t in tensors if t.rows is not None and t.rows < t.shape[1]}
    if not rows:
        return []
    shown = sorted(rows.items(), key=lambda item: item[1])[:4]
    named = ", ".join(f"{name} ({count})" for name, count in shown)
    more = f" and {len(rows) - len(shown)} more" if len(rows) > len(shown) else ""
    return [
        f"{len(rows)} of {len(every)} experts served fewer calibration tokens than their inputs have columns: {named}"
        f"{more}. Their statistics are mostly those of all experts of their layer; more samples help"
    ]


def too_small(tensors: Sequence[run.TensorReport]) -> list[str]:
    """One note on the groups of weights that became 0. It names the linear that has the most."""
    hit = [(tensor.module, tensor.scheme, tensor.vanished) for tensor in tensors if tensor.vanished]
    return base.too_small(hit, len(tensors))


@brief
@dataclass(frozen=True)
class Preview:
    """What `quantize` would do. Bytes are exact; `tensors` lists every tensor of the output as (name, what, bytes).

    definition: the plan's JSON. allocation: the widths that were chosen for a size; None if no size was given. files:
    the number of files of a GGUF model; the record, which only the work makes, may add one. unquantized: as
    in `Quantized`.
    """

    plan: str
    format: str
    notes: list[str]
    tensors: list[tuple[str, str, int]]
    original_bytes: int
    output_bytes: int
    share: float
    definition: dict[str, Any] = field(default_factory=dict)
    allocation: Allocation | None = None
    files: int = 1
    unquantized: dict[str, int] = field(default_factory=dict)
