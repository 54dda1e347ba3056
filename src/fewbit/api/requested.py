"""Checks of arguments that belong together, before any work.

Nothing here imports PyTorch: the command line calls these checks first, and the verbs call them for Python.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fewbit.api import arguments
from fewbit.api.arguments import SAMPLES, Plans
from fewbit.errors import FormatError, PlanError
from fewbit.formats.containers.gguf import GgufFile, is_gguf
from fewbit.measure.comparison import FILE, Comparison
from fewbit.names import ADAPTER, ADAPTER_WEIGHTS, PEFT, hub_file, path_of
from fewbit.plans import targets
from fewbit.plans.plan import Plan
from fewbit.plans.targets import Target
from fewbit.system import publish
from fewbit.system.cache import cache_folder
from fewbit.texts.calibration import Calibration

CHARTS = ("quality-size.png", "quality-size.svg")  # of a report of `compare`; the Hub shows both
_ANEW = ("plan", "calibration", "imatrix", "text", "length", "samples")  # used by `requantize` only
# The values with which an option is not given. Default: None
_UNSET: dict[str, tuple[Any, ...]] = {
    "requantize": (False,),
    "calibration": (None, Calibration()),
    "samples": (SAMPLES,),
    "set": (None, {}),
}


def check_finetuned(out: str | Path) -> None:
    """PlanError if `out` of finetune cannot be a folder."""
    publish.check_folder(out, "finetune makes a folder", "`fewbit convert --to gguf` makes a file of an adapter.")


def check_merged(out: str | Path, imatrix: str | Path | None) -> None:
    """PlanError if `out` of a merge without a plan cannot be a folder, or for an importance matrix."""
    if imatrix is not None:
        raise PlanError(
            f"`imatrix={imatrix}`: without a plan merge quantizes nothing", "Give a plan, or omit `imatrix`."
        )
    publish.check_folder(out, "without a plan merge makes a folder", "Or give a plan for GGUF, such as `plan=q4_k_m`.")


def check_as_peft(out: str | Path) -> None:
    """PlanError if `out` of a conversion to PEFT's layout cannot be a folder."""
    publish.check_folder(out, "`to=peft` makes a folder")


def check_split(file: bool) -> None:
    """PlanError if the output, which is to be split, is not a file."""
    if not file:
        raise PlanError(
            "`max_shard` splits GGUF files, and this output is a folder",
            "A folder has its weights in shards already. Leave `max_shard` out.",
        )


def check_tuned(model: str | Path, out: str | Path) -> None:
    """PlanError if `out` of tune is not of the kind of `model`, a GGUF file or a folder, as far as names tell."""
    place = path_of(model)
    file = place is not None and place.suffix == ".gguf" and (place.is_file() or hub_file(str(model)) is not None)
    folder = place is None or (place / "config.json").is_file()
    if file or folder:
        check_copy(out, str(model), file=file)


def check_copy(out: str | Path, name: str, *, file: bool) -> None:
    """PlanError if `out` does not have the ending of a copy of the model `name`. file: it is a GGUF file."""
    if file and Path(out).suffix != ".gguf":
        raise PlanError(f"{out}: {name} is a GGUF file, and so is its copy", "Give an `out` that ends in .gguf.")
    if not file and Path(out).suffix == ".gguf":
        raise PlanError(f"{out} would be a GGUF file, but {name} is a folder", "Give another `out`.")


def check_window(length: int | None) -> None:
    """PlanError if a window of a text to measure on has so few tokens that nothing is predicted."""
    if length is not None and length < 2:
        raise PlanError(f"`length={length}`: a window needs at least 2 tokens")


def check_evaluation(**given: Any) -> None:
    """PlanError for options of `evaluate` that cannot be, alone or together. given: its arguments."""
    check_window(given["length"])
    for option, other in (("reference_adapter", "reference"), ("limit", "tasks")):
        if given[option] is not None and given[other] is None:
            raise PlanError(f"`{option}` without `{other}`", f"Give `{other}` too.")
    if given["record"] and given["adapter"] is not None:
        raise PlanError("`record` with `adapter`: the record is that of the model alone", "Omit one of them.")


def check_recommendation(**given: Any) -> None:
    """PlanError for options of `recommend` that do not go together. given: its arguments."""
    fit, measure, calibration, batch = (given[name] for name in ("fit", "measure", "calibration", "batch"))
    if given["memory"] is not None and fit is not None:
        raise PlanError("`memory` and `fit` are given", "Give one of them.")
    if fit is None and (measure or calibration is not None):
        raise PlanError(
            f"`{'measure' if measure else 'calibration'}` is given without `fit`", "Add `fit`, such as 8GB."
        )
    if not measure and calibration is not None:
        raise PlanError(
            "`calibration` is given without `measure`",
            "Omit `calibration`, or add `measure`: only `measure` reads a text.",
        )
    if fit is not None and batch != 1:
        raise PlanError(f"`batch={batch}` is given with `fit`", "Omit `batch`: `fit` counts the KV cache of one text.")


def is_adapter(place: str | Path) -> bool:
    """Whether this is the folder of an adapter."""
    folder = Path(place)
    return (folder / ADAPTER).is_file() and not (folder / "config.json").exists()


def check_kind(place: str | Path, to: str) -> None:
    """PlanError unless `to=peft` is given for a GGUF file with a LoRA, and only for one."""
    file = Path(place).absolute()
    found = file.is_file() and is_gguf(file) and GgufFile(file).metadata.get("general.type") == "adapter"
    if to != PEFT:
        if found:
            raise PlanError(f"a LoRA in a GGUF file is converted with `to={PEFT}`: {file}", f"Give `to={PEFT}`.")
        return
    if not file.exists():
        raise PlanError(f"{file}: no such file", "Give a GGUF file with a LoRA.")
    if not found:
        raise PlanError(f"{file} is no GGUF file with a LoRA, which `to={PEFT}` makes a folder of", "Give such a file.")


def requantizing(plan: Plans | None, target: Target, to: str) -> Plan:
    """The plan of a conversion with `requantize`. PlanError if there is none, or if it makes another format."""
    if plan is None:
        raise PlanError("`requantize=True` without a plan", "Give `plan`; fewbit list shows all plans.")
    found = arguments.plan("plan", plan)
    if found.format != to:
        hint = "Give a plan for this format." if not target.variant else f"Give `to={target.format.name}`."
        raise PlanError(f"`to={to}`, but plan {found.name} makes {found.format}", hint)
    return found


def _refuse_unused(model: str | Path, to: str, **options: Any) -> None:
    """PlanError for an option that is given, but has no effect on `model`."""
    given = [name for name, value in options.items() if value not in _UNSET.get(name, (None,))]
    if to == PEFT or is_adapter(model):
        if unused := [name for name in given if name != "base"]:
            raise PlanError(f"`{unused[0]}` has no effect on an adapter", f"Leave out `{unused[0]}`.")
    elif "base" in given:
        raise PlanError(f"`base` without an adapter: {model} is not the folder of one", "Leave out `base`.")
    elif "requantize" not in given and (unused := [name for name in given if name in _ANEW]):
        raise PlanError(
            f"`{unused[0]}` has no effect without `requantize=True`",
            f"Leave out `{unused[0]}`, or add `requantize=True`.",
        )


def check_conversion(model: str | Path, to: str, *, preview: bool = False, **options: Any) -> None:
    """PlanError for options of `convert`, or of its preview, that do not go together, or have no effect on `model`."""
    check_kind(model, to)
    adapter = to == PEFT or is_adapter(model)
    if preview and adapter:
        raise PlanError(f"{model} is an adapter, and a preview shows the tensors of a model", "Convert it.")
    _refuse_unused(model, to, **options)
    check_window(options.get("length"))
    if adapter:
        if to not in (PEFT, "gguf"):
            raise PlanError(f"{model} is an adapter, which can be converted to a GGUF file only", "Give `to=gguf`.")
        return
    target = targets.find(to)
    if options.get("requantize"):
        if options.get("set"):
            raise PlanError("`set` and `requantize=True` are given", "Give one of them.")
        requantizing(options["plan"], target, to)
    check_set(options.get("set"), between_files=bool(target.format.suffix))


def check_set(values: Any, *, between_files: bool) -> None:
    """PlanError if keys of a GGUF file are to be set, unless the output is a copy of one."""
    if values and not between_files:
        raise PlanError("`set` changes keys in a copy of a GGUF file", "Convert first, and then set them in the file.")


def check_upload(model: str | Path, report: str | Path | None) -> None:
    """PlanError if there is no finished model to upload, or no chart in `report`. FormatError for half an adapter."""
    if path_of(model) is None:
        raise PlanError(f"{model} is a model of fewbit, not an output", "Give the folder or file to upload.")
    path, name = Path(model).absolute(), str(model)
    _check_place(path, name)
    if report is not None and (path / ADAPTER).is_file():
        raise PlanError("`report`: an adapter's card has no chart", "Omit it.")
    chart(report)


def _check_place(path: Path, name: str) -> None:
    """PlanError if there is no finished model at `path`."""
    if not path.exists():
        raise PlanError(f"{name}: no such folder or file", "Give the output of fewbit quantize.")
    if path.is_file():
        return
    if (path / ADAPTER).is_file():
        if not (path / ADAPTER_WEIGHTS).is_file():
            raise FormatError(f"{name} is an adapter without {ADAPTER_WEIGHTS}", "Save it as safetensors.")
        return
    unfinished = list(path.glob("block-*.safetensors")) or re.search(r"^\..*\.fewbit-\w+$", path.name)
    if unfinished or path.resolve().is_relative_to((cache_folder() / "runs").resolve()):
        raise PlanError(f"{name} is an unfinished run", "Repeat the command that made it: it resumes.")
    if not (path / "config.json").is_file() and not list(path.glob("*.gguf")):
        raise PlanError(f"{name} is not a model: it has no config.json", "Give the output of fewbit quantize.")


def chart(report: str | Path | None) -> Path | None:
    """The chart of a comparison's report. PlanError if there is none."""
    if report is None:
        return None
    folder = Path(report)
    found = next((folder / name for name in CHARTS if (folder / name).is_file()), None)
    if found is None:
        raise PlanError(f"`report={report}` has no chart", "Give the folder of a report: fewbit compare -o REPORT.")
    return found


def report_folder(out: str | Path) -> Path:
    """`out` of compare as a path. PlanError unless it can be made, or is empty or holds an earlier report of fewbit."""
    publish.check_folder(out, "compare makes a folder")
    out = publish.check_writable(out)
    if out.exists() and not out.is_dir():
        raise PlanError(f"{out} is a file, not a folder", "Give another `out`.")
    if out.is_dir() and any(out.iterdir()):
        if not (out / FILE).exists():
            raise PlanError(f"{out} is not empty, and holds no {FILE}", "Give another `out`.")
        try:
            Comparison.read(out)
        except FormatError as error:
            raise PlanError(f"{out} cannot be replaced: {error.message}", "Give another `out`.") from None
    return out
