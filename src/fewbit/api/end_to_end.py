"""The end-to-end phase of tuning: for `tune`, and for `quantize` with high effort."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.models.describe import describe
from fewbit.models.load import load_model
from fewbit.models.loading import Loading
from fewbit.models.skeleton import Skeleton
from fewbit.models.source import Source, locate
from fewbit.pipeline import tuning
from fewbit.pipeline.descent import Descent
from fewbit.pipeline.optimization import Optimization
from fewbit.pipeline.replacing import Files, files_of
from fewbit.report import progress as report_progress
from fewbit.system import locks, machine
from fewbit.system.cache import cache_folder
from fewbit.system.kept import label

_STATE = "state.safetensors"


class Once:
    """Loads a model when it is first used. The last use hands it over, so that it is freed with that use."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self.first = cache(load)

    def __call__(self) -> Any:
        """The model, for its last use."""
        loaded = self.first()
        self.first.cache_clear()
        return loaded


@dataclass(frozen=True)
class Phase:
    """What is to be done. original: what the model was quantized from. load: loads it; its result is not kept."""

    original: Source
    load: Callable[[], Any]
    split: tuning.Windows
    wanted: Optimization
    loading: Loading
    progress: bool | Callable[[int, int, float], None] | None


@dataclass(frozen=True)
class Trained:
    """A trained model, not yet written. changes: name in the files -> the trained tensor. before: the divergence on the
    held-out windows. weights, gains: how many of each were trained; numbers: how many numbers they have. moved: the
    share of the trained codes that changed; None if codes stay.

    forget: deletes the state that is kept in the cache. measured: the divergence of the model in a folder or file.
    """

    files: Files
    changes: Mapping[str, Tensor]
    before: float
    done: Descent
    notes: list[str]
    weights: int
    gains: int
    numbers: int
    moved: float | None
    forget: Callable[[], None]
    measured: Callable[[Path], float]

    def entry(self, source: str, phase: Phase, text: Mapping[str, Any]) -> dict[str, Any]:
        """The entry `tuned` of the record."""
        split, done = phase.split, self.done
        return {
            "from": source,
            "reference": phase.original.name,
            "text": dict(text),
            "held_out_tokens": split.held_out * split.tokens.shape[1],
            **vars(phase.wanted),
            "steps_taken": done.steps,
            "best_step": done.best,
            "before": self.before,
            "after": done.after,
            "history": [list(each) for each in done.history],
            "weights": self.weights,
            "gains": self.gains,
            "moved": self.moved,
        }

    def write(self, place: Path, record: dict[str, Any], write_record: Callable[[Path, dict[str, Any]], None]) -> float:
        """Write the output, and its record with the divergence that the output has. Returns that.

        write_record: writes the record of a folder. A GGUF file holds its record.
        """
        self.files.write(place, self.changes, record)
        after = self.measured(place)
        record["tuned"]["after"] = after
        if place.is_dir():
            write_record(place, record)
        else:  # the file holds its record, so it is written again
            place.unlink()
            self.files.write(place, self.changes, record)
        return after


@contextmanager
def trained(source: Source, files: Files, phase: Phase, known: Sequence[Any]) -> Iterator[Trained]:
    """The result of training a quantized model. known: what distinguishes this request from others, for the cache.

    The state of an interrupted run is kept in the cache, and the same request continues from it.
    """
    split, loading, progress = phase.split, phase.loading, phase.progress
    with _resumable(known, split) as (folder, forget):
        label(folder, source.name, "state of tuning")
        with report_progress.phase(f"computing predictions of {phase.original.name}", progress):
            truth = tuning.Original(phase.load, split.tokens, folder)
        packed = load_model(source, loading, for_text=True)
        before = tuning.divergence(packed, truth, split.held)
        student = tuning.Student.of(packed, files, codes=phase.wanted.codes)
        with report_progress.tuning(progress) as tell:
            done = student.train(truth, split, phase.wanted, tell, folder / _STATE)
        counts = len(student.weights), len(student.gains), sum(each.numel() for each in student.parameters)
        notes, moved = student.notes, student.moved
        lazily = source.gguf is not None  # a GGUF file takes its blocks from the trained model
        changes = student.changes(files) if lazily else dict(student.changes(files))
        del packed, student
        gc.collect()

        def measured(place: Path) -> float:
            describe(locate(place))
            return tuning.divergence(load_model(locate(place), loading), truth, split.held)

        yield Trained(files, changes, before, done, notes, *counts, moved, forget, measured)


def files(source: Source, *, trust_remote_code: bool) -> Files:
    """The files of a quantized source. PlanError if fewbit does not keep its weights packed."""
    return files_of(Skeleton(source, torch.float32, torch.device("cpu"), trust_remote_code=trust_remote_code))


@contextmanager
def _resumable(known: Sequence[Any], split: tuning.Windows) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A folder of the cache for this request, with the state that an interrupted run left, and a function that deletes
    it. Without a state it is deleted at the end."""
    digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode() + split.tokens.numpy().tobytes())
    held = locks.resumable(cache_folder() / "tuning" / digest.hexdigest()[:32])
    kept = True

    def forget() -> None:
        nonlocal kept
        kept = False

    try:
        yield held.folder, forget
    finally:
        (held.folder / tuning.LOGITS).unlink(missing_ok=True)
        held.release() if kept and (held.folder / _STATE).exists() else held.remove()


def known(source: Source, phase: Phase) -> list[Any]:
    """What distinguishes the training of a source in files that stay."""
    listed = [
        [str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns]
        for each in (source, phase.original)
        for file in each.files
    ]
    wanted, device = vars(phase.wanted), str(phase.loading.device)
    return [listed, source.config, phase.original.config, wanted, phase.split.seed, device, machine.versions()]
