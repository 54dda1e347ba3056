"""`compare`: quantize one model by several plans and compare the results. Each plan runs in its own processes.

A plan may also be the path of an already quantized model. That model is measured as it is.

The cache keeps quantized models and measurements under a fingerprint of everything that determines them: the model's
files, the plan, the calibration tokens and versions; for measurements also the text, the machine and the settings. So
an interrupted comparison resumes where it stopped, a repeated one takes seconds, and an additional plan costs only that
plan. If a plan fails, its row gives the reason, and the next run tries it again.
"""

from __future__ import annotations

import hashlib
import json
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from fewbit.advise import doctor, speeds
from fewbit.api import arguments, requested
from fewbit.api.arguments import SAMPLES, Device, checked
from fewbit.checks import Texts
from fewbit.errors import FormatError
from fewbit.measure import speed
from fewbit.measure.comparison import (
    FILE,
    ORIGINAL,
    SCHEMA_VERSION,
    Comparison,
    Event,
    Machine,
    Row,
    TextUsed,
    parsed,
    plain,
)
from fewbit.methods.base import make
from fewbit.models.decoding.generate import prompt_ids
from fewbit.models.describe import describe
from fewbit.models.skeleton import load_tokenizer
from fewbit.models.source import Source, locate
from fewbit.nn import choose
from fewbit.pipeline.job import evaluated, same_vocabulary, windows
from fewbit.plans import plan as plans
from fewbit.plans.plan import Plan, find_all
from fewbit.report import page
from fewbit.report import progress as report_progress
from fewbit.report import text as report
from fewbit.stats import Need
from fewbit.system import locks, publish, timing
from fewbit.system import machine as system_machine
from fewbit.system.cache import cache_folder, writing
from fewbit.system.files import read_json, replace_text
from fewbit.system.kept import label
from fewbit.system.processes import Failed, Server
from fewbit.texts import sources
from fewbit.texts import windows as texts_windows
from fewbit.texts.calibration import COMPARED
from fewbit.texts.calibration import Calibration as Calibration

PLANS = (ORIGINAL, "int8", "nf4", "gptq-4bit", "awq-4bit", "q4_k_m")
LENGTH = 512  # tokens in a window of the text that quality is measured on
PROMPT_TOKENS, NEW_TOKENS = 128, 32  # of what is timed
_STORY = "Once upon a time"  # a beginning as in the texts that tiny was trained on


Told = Callable[[Event], None]
Wanted: TypeAlias = plans.Plan | Source | None  # a plan, an existing model, or (None) the original


@checked
def compare(
    model: str | Path = "tiny",
    *,
    plans: str | Sequence[str | Path] = PLANS,
    out: str | Path | None = None,
    calibration: Calibration | Texts = COMPARED,
    text: Texts | None = None,
    samples: int | None = SAMPLES,
    length: int = LENGTH,
    prompt: str | None = None,
    device: Device = None,
    trust_remote_code: bool = False,
    again: bool = False,
    progress: bool | Told | None = None,
) -> Comparison:
    """Quantize `model` by each plan, measure the results, and write a report into the folder `out` if it is given.

    plans: names or plan files, or folders or .gguf files of models made from `model`; "bf16" is the original. `model`
    itself may be quantized: the plans then quantize its dequantized weights. calibration: for the plans that need it.
    text, samples, length: the text to measure quality on, as in `evaluate`. prompt: the text that every model
    continues, as a sample. Earlier results are reused. again: measure again, and reuse only quantized models.
    PlanError, before any work, for an invalid argument; if one plan fails, its row says why.
    """
    requested.check_window(length)
    elapsed, device = timing.timed(), system_machine.device(device)
    calibration = arguments.calibrated(calibration, COMPARED)
    found = find_all(arguments.plans("plans", plans), but=ORIGINAL)
    wanted: dict[str, Wanted] = {name: locate(each) if isinstance(each, Path) else each for name, each in found.items()}
    folder = None if out is None else requested.report_folder(out)
    source = locate(model)
    asked = _asked(source, wanted, calibration, text, samples, length, prompt, trust_remote_code)
    machine = _machine(device)
    settings = {
        "model": source.address,
        "device": device,
        "trust_remote_code": trust_remote_code,
        "windows": asked.windows.tolist(),
        **asked.continued,
    }
    with report_progress.plans(progress) as told:
        rows = _Bench(source, asked, machine, settings, told, again).rows(wanted)
    speeds.keep(source, device, rows)
    described = describe(source)
    compared = Comparison(
        model=str(model),
        architecture=described.architecture,
        parameters=described.parameters,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine,
        versions=system_machine.versions(),
        text=asked.text,
        calibration=asked.calibrated,
        **asked.continued,
        seconds=elapsed(),
        rows=tuple(rows),
    )
    if folder is not None:
        write(compared, folder)
    return compared


def write(compared: Comparison, folder: Path) -> None:
    """Write the report's files, each atomically. A warning names each chart that cannot be made, and why.

    OutputError if the report cannot be written.
    """
    with publish.as_output_error(folder, "The same command with another `out` reuses all measurements."):
        folder.mkdir(parents=True, exist_ok=True)
        _put(folder / FILE, compared.to_json())
    for note in page.write(compared, folder):
        warnings.warn(note, stacklevel=2)


@dataclass(frozen=True)
class _Asked:
    """Tokenized texts, and their descriptions for the report."""

    calibration: Calibration
    calibrated: TextUsed | None
    windows: Tensor
    text: TextUsed
    continued: Mapping[str, Any]  # the prompt, and how many tokens are timed


class _Bench:
    """Produces the rows of a comparison: from the cache, or by running worker processes."""

    def __init__(
        self, source: Source, asked: _Asked, machine: Machine, settings: Mapping[str, Any], told: Told, again: bool
    ) -> None:
        self.source, self.asked, self.settings, self.told, self.again = source, asked, settings, told, again
        self.base = cache_folder() / "compare"
        self.model = [
            _stats(source),
            source.config,
            system_machine.versions(),
            settings["device"],
            settings["trust_remote_code"],
        ]
        of = {name: value for name, value in settings.items() if name not in ("windows", "model")}
        self.how = [SCHEMA_VERSION, speed.RULE, asdict(machine), asked.text.digest, asked.text.length, of]
        self.recorded = self.base / f"reference-{_digest([self.model, self.how])}"

    def rows(self, wanted: Mapping[str, Wanted]) -> list[Row]:
        """One row for each plan, in order. The original's logits are kept until all plans are compared with them."""
        found, held = [], locks.resumable(self.recorded)
        label(held.folder, self.source.name, "predictions of the original")
        self.reference = held.folder / "logits"
        try:
            with Server("fewbit.api.compare_worker") as server:
                for number, (name, plan) in enumerate(wanted.items(), 1):
                    event = Event(name, number, len(wanted), "")
                    elapsed = timing.timed()
                    try:
                        row = self._row(server, name, plan, event)
                        state = "reused" if row.reused else "done"
                        self.told(replace(event, state=state, seconds=elapsed()))
                    except Failed as error:
                        row = Row(name, "failed", reason=str(error))
                        self.told(replace(event, state="failed", reason=str(error), seconds=elapsed()))
                    found.append(row)
        finally:
            held.remove() if len(found) == len(wanted) else held.release()
        return found

    def _row(self, server: Server, name: str, plan: Wanted, event: Event) -> Row:
        text = self.asked.calibrated if _calibrated(plan) else None
        by: Any = [_stats(plan), plan.config] if isinstance(plan, Source) else plan and plan.to_json()
        place = self.base / _digest([self.model, by, text and asdict(text)])
        note = f"{name}: another process makes this row; waiting for it"
        with locks.alone(place, lambda: warnings.warn(note, stacklevel=2)):
            label(place, self.source.name, f"output and measurements of {name}")
            return self._found_or_made(place, server, name, plan, event)

    def _found_or_made(self, place: Path, server: Server, name: str, plan: Wanted, event: Event) -> Row:
        kept = place / f"row-{_digest(self.how)}.json"
        if not self.again and (before := _read(kept)) is not None:
            try:
                return replace(parsed(Row, before, str(kept)), plan=name, reused=True)
            except FormatError:  # damaged: measure again
                kept.unlink()
        told: dict[str, Any] = {}
        output: Path | str | None = None
        if isinstance(plan, Source):
            output = plan.address
            told["what"] = f"as it is: {', '.join(describe(plan).schemes) or 'not quantized'}"
        elif plan is not None:
            output = place / ("model" + (plans.format_of(plan).suffix or ""))
            told = self._quantized(server, plan, output, event)
        task = {
            **self.settings,
            "do": "measure",
            "made": None if output is None else str(output),
            "reference": str(self.reference),
        }

        def on_message(said: Mapping[str, Any]) -> None:
            for message in said.get("told", ()):  # nobody sees the worker's warnings
                choose.tell_once(message)
            self.told(_step(event, "measuring", said))

        found = server.run(task, on_message)
        row = parsed(Row, {"plan": name, "status": "done", **told, **found}, name)
        with writing(place):
            place.mkdir(parents=True, exist_ok=True)
            _put(kept, {k: v for k, v in plain(row).items() if k != "reused"})
        return row

    def _quantized(self, server: Server, plan: plans.Plan, output: Path, event: Event) -> dict[str, Any]:
        """Quantize into `output`, or reuse it from the cache. Returns the row's entries on quantizing."""
        record = output.parent / "quantizing.json"
        if (before := _read(record)) is not None and output.exists():
            return before

        def on_message(said: Mapping[str, Any]) -> None:
            self.told(_step(event, "quantizing", said))

        task = {
            **{name: self.settings[name] for name in ("model", "device", "trust_remote_code")},
            "do": "quantize",
            "plan": plan.to_json(),
            "calibration": asdict(self.asked.calibration),
            "out": str(output),
        }
        found = server.run(task, on_message)
        with writing(output.parent):
            _put(record, found)
        return found


def _step(event: Event, state: str, said: Mapping[str, Any]) -> Event:
    """The event for a progress message of a worker process."""
    counted = {name: said[name] for name in ("pid", "unit", "done", "of") if name in said}
    return replace(event, state=state, **counted)


def _stats(source: Source) -> list[tuple[str, int, int]]:
    """Path, size and modification time of each model file, to detect changes."""
    return [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in source.files]


def _asked(
    source: Source,
    wanted: Mapping[str, Wanted],
    calibration: Calibration,
    text: Texts | None,
    samples: int | None,
    length: int,
    prompt: str | None,
    trust_remote_code: bool,
) -> _Asked:
    """Everything that all rows share. PlanError or FormatError if it does not fit one of the models."""
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    models = [source, *(made for made in wanted.values() if isinstance(made, Source))]
    for made in models[1:]:
        same_vocabulary(made, source, tokenizer, trust_remote_code)
    most = min(each.context for each in models)
    own, length = sources.own_source(source.config), min(length, most) if length == LENGTH else length
    name, chosen, _ = evaluated(models, tokenizer, text or own, length, samples)
    used = TextUsed(name, len(chosen), chosen.shape[1], texts_windows.digest(chosen))
    if prompt is None:
        prompt = _STORY if own == "tiny" else report.FIRST_WORDS
    ids, new = prompt_ids(tokenizer, prompt), min(NEW_TOKENS, most // 4)
    texts_windows.continued(texts_windows.within(ids, source.rows, tokenizer, "the prompt"), new, most)
    calibrated = None
    if any(_calibrated(plan) for plan in wanted.values()):
        calibrated = parsed(TextUsed, windows(calibration, source, tokenizer)[1], "calibration")
    continued = {"prompt": prompt, "prompt_tokens": min(PROMPT_TOKENS, most // 2), "new_tokens": new}
    return _Asked(calibration, calibrated, chosen, used, continued)


def _calibrated(plan: Wanted) -> bool:
    """Whether a method of the plan needs calibration."""
    if not isinstance(plan, Plan):
        return False
    rules = [rule for rule in plan.rules if rule.scheme is not None]
    return any(make(rule.method, dict(rule.options)).needs > Need.NOTHING for rule in rules)


def _machine(device: str) -> Machine:
    found = doctor.look()
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=system_machine.processor(),
        instructions=tuple(found.instructions),
        threads=found.threads,
        memory=found.memory,
        devices=tuple(found.devices),
        device=device,
    )


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:32]


def _read(file: Path) -> dict[str, Any] | None:
    """Read a JSON object that fewbit wrote. None if the file is missing or damaged."""
    try:
        found = read_json(file)
    except (OSError, FormatError):
        return None
    return found if isinstance(found, dict) else None


def _put(file: Path, data: Mapping[str, Any]) -> None:
    replace_text(file, json.dumps(data, indent=1, allow_nan=False) + "\n")
