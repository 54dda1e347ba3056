"""The recommendation of `recommend --fit`, with the commands that make what it tells of."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace

from fewbit.advise.fitting import Fitted
from fewbit.advise.recommend import Recommendation, base_name
from fewbit.texts.calibration import Calibration


def with_fitted(
    done: Recommendation, found: Fitted, fit: str, context: int | None, calibration: Calibration
) -> Recommendation:
    """`done` with its answer to `fit`, and the commands that make it. calibration: what costs were measured on."""
    out = f"{base_name(done.model) or 'model'}-fit" + (".gguf" if found.format == "gguf" else "")
    asked = f"--fit {fit}" + (f" --context {context}" if context is not None else "")
    make = f"fewbit quantize {done.model} -o {out} --plan {found.plan} {asked}{_options(calibration)}"
    first = [command for command in done.commands if command.startswith("fewbit compare")]
    if found.basis != "costs":
        first.append(f"{make} --dry-run")
    commands = (*first, make, f"fewbit evaluate {out} --reference {done.model}")
    return replace(done, fitted=found, sized=None, commands=commands)


def _options(calibration: Calibration) -> str:
    """The options of a command for what is not the default; texts that are in no file get a name to fill in."""
    text = calibration.text if calibration.text is None or isinstance(calibration.text, str) else "TEXTS.jsonl"
    given = {"calibration": text, **{name: getattr(calibration, name) for name in ("samples", "length", "seed")}}
    usual = {"calibration": None, **asdict(Calibration())}
    return "".join(f" --{name} {shlex.quote(str(each))}" for name, each in given.items() if each != usual[name])
