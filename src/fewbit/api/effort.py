"""`quantize` with more effort: blocks are tuned one by one, and then the written model end to end.

The end-to-end phase trains codes too, on texts that the original writes as well: millions of codes need more text than
a calibration has. `high` and `best` differ in the number of steps, and on a GPU in the amount of text. A GPU takes more
of both.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.api import end_to_end
from fewbit.errors import FewbitError, PlanError
from fewbit.models.calls import first_line
from fewbit.models.decoding.generate import written
from fewbit.models.load import load_model
from fewbit.models.loading import Loading
from fewbit.models.skeleton import load_tokenizer
from fewbit.models.source import locate
from fewbit.pipeline import tuning
from fewbit.pipeline.block_tuning import BlockTuning
from fewbit.pipeline.capture import held_out_windows
from fewbit.pipeline.job import Job
from fewbit.pipeline.optimization import Optimization
from fewbit.report import progress as report_progress
from fewbit.system import machine, ranks


@dataclass(frozen=True)
class EndToEnd:
    """The end-to-end phase. written: windows that the original writes, for each calibration window."""

    wanted: Optimization
    written: int


def end_to_end_phase(effort: str, device: torch.device) -> EndToEnd:
    """The end-to-end phase of an effort. On a CPU a step of fewer tokens takes less time, and writing takes long."""
    return (_ON_CPU if device.type == "cpu" else _PHASES)[effort]


_PHASES = {
    "high": EndToEnd(Optimization(steps=1000, batch=4096, codes=True, learning_rate=1e-3), written=16),
    "best": EndToEnd(Optimization(steps=3000, batch=4096, codes=True, learning_rate=1e-3), written=32),
}
_ON_CPU = {
    "high": EndToEnd(Optimization(steps=300, batch=1024, codes=True), written=4),
    "best": EndToEnd(Optimization(steps=1000, batch=1024, codes=True, learning_rate=1e-3), written=4),
}


def block_tuning(effort: str, seed: int) -> BlockTuning | None:
    """How blocks are tuned; None with `fast`. PlanError if several processes would have to share the work."""
    if effort == "fast":
        return None
    if ranks.size() > 1:
        raise PlanError(
            f"`effort={effort}` runs in one process, and there are {ranks.size()}",
            "Run it without torchrun, or use `effort=fast`.",
        )
    return BlockTuning(seed=seed)


@dataclass(frozen=True)
class Finish:
    """The end-to-end phase of a job. tokens: its calibration windows; text: what the record says of them. known: the
    fingerprint of the job."""

    job: Job
    how: EndToEnd
    tokens: Tensor
    text: Mapping[str, Any]
    known: str
    loading: Loading
    progress: bool | None

    @classmethod
    def of(
        cls, job: Job, effort: str, tokens: Tensor, text: Mapping[str, Any], known: str, progress: Any, trust: bool
    ) -> Finish:
        loading = Loading(machine.device(str(job.settled.skeleton.device)), trust_remote_code=trust).exact()
        how = end_to_end_phase(effort, job.settled.skeleton.device)
        return cls(job, how, tokens, text, known, loading, False if callable(progress) else progress)

    def run(
        self, place: Path, record: dict[str, Any], write_record: Callable[[Path, dict[str, Any]], None]
    ) -> str | None:
        """Tune the model at `place` and replace it, if its divergence on held-out windows falls; else say why not.

        record: gets the entry `tuned`, and notes. write_record: writes the record of a folder.
        """
        try:
            return self._run(place, record, write_record)
        except FewbitError as error:
            why = error.message
        except RuntimeError as error:  # no memory, or code of the model without a gradient
            why = first_line(error)
        except Exception as error:  # a model's own code can raise anything, and the quantized model must not be lost
            why = f"{type(error).__name__}: {first_line(error)}"
        return f"the model was not tuned end to end: {why}"

    def _run(
        self, place: Path, record: dict[str, Any], write_record: Callable[[Path, dict[str, Any]], None]
    ) -> str | None:
        source, original, trust = locate(place), self.job.source, self.loading.trust_remote_code
        load = end_to_end.Once(partial(load_model, original, self.loading, for_text=True))
        split, text, notes = self._with_written(_split(self.tokens, self.text), dict(self.text), load)
        phase = end_to_end.Phase(original, load, split, self.how.wanted, self.loading, self.progress)
        files = end_to_end.files(source, trust_remote_code=trust)
        with (
            end_to_end.trained(source, files, phase, [self.known, len(split.tokens), vars(self.how.wanted)]) as trained,
            tempfile.TemporaryDirectory(dir=place.parent) as beside,
        ):
            before, after, new = trained.before, trained.done.after, Path(beside) / place.name
            if after < before:
                if place.is_dir():
                    new.mkdir()
                tuned = {
                    **record,
                    "tuned": trained.entry("", phase, text),
                    "notes": [*record["notes"], *notes, *trained.notes],
                }
                after = trained.write(new, tuned, write_record)
            trained.forget()
            if not after < before:
                return (
                    f"tuning end to end did not lower the KL divergence on held-out text, {before:.4g}: it was undone"
                )
            if place.is_dir():
                shutil.rmtree(place)
            new.replace(place)
            record.update(tuned)
        return None

    def _with_written(
        self, split: tuning.Windows, text: dict[str, Any], load: end_to_end.Once
    ) -> tuple[tuning.Windows, dict[str, Any], list[str]]:
        """`split` and its entry in the record, with texts that the original writes to train on; and notes."""
        source, (count, length) = self.job.source, self.tokens.shape
        tokenizer = load_tokenizer(source, trust_remote_code=self.loading.trust_remote_code)
        with report_progress.phase(f"writing texts with {source.name}", self.progress):
            try:
                own = written(load.first(), tokenizer, self.how.written * count, length, split.seed)
            except PlanError as error:
                return split, text, [f"trained on the calibration text alone: {error.message}"]
        both = tuning.Windows(torch.cat([own, split.tokens]), split.held_out, split.seed)
        return both, text | {"written": len(own)}, []


def _split(tokens: Tensor, text: Mapping[str, Any]) -> tuning.Windows:
    """The windows of the end-to-end phase. Those that are held out were not trained on in the blocks either."""
    held = held_out_windows(tokens)
    trained = [window for window in range(len(tokens)) if window not in held]
    if not held:
        return tuning.Windows.of(tokens, text["text"], text["seed"])
    return tuning.Windows(tokens[[*trained, *held]], len(held), text["seed"])
