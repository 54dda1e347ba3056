"""Names of models, checked before anything is read or imported, and of an adapter's files; module names in short."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from fewbit.errors import FormatError, PlanError

EMBEDDED = "tiny"  # comes with fewbit itself
DEMO = "smollm2"
PEFT = "peft"  # what `convert` makes of a GGUF file with a LoRA
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's files


def expanded(path: str) -> str:
    """`path` with the home folder for a leading ~ or ~USER. PlanError if there is neither that nor such a file here."""
    found = os.path.expanduser(path)
    if found.startswith("~") and not os.path.lexists(home := Path(found).parts[0]):
        raise PlanError(f"{path}: there is no home folder {home}", f"Write ./{path} for a name that begins with ~.")
    return found


def path_of(name: str | Path) -> Path | None:
    """`name` as an absolute path. None for fewbit's own models, even if a folder of that name exists."""
    if isinstance(name, str) and name in (EMBEDDED, DEMO):
        return None
    return Path(expanded(os.fspath(name))).absolute()


def is_hub_name(name: str) -> bool:
    """Whether the Hub could have a model of this name."""
    # The Hub's oldest models have no owner in their name, such as gpt2.
    return re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", name) is not None and not name.startswith(".")


def hub_file(name: str) -> tuple[str, str] | None:
    """The repository and the file of a name such as org/model/model-Q4_K_M.gguf; None for other names."""
    match = re.fullmatch(r"([\w\-][\w.\-]*/[\w.\-]+)/([\w.\-/]+\.gguf)", name)
    return None if match is None or ".." in name.split("/") else (match[1], match[2])


def check(name: str | Path) -> None:
    """PlanError unless `name` is one of fewbit's own models, an existing path, or a possible Hub name."""
    path = path_of(name)
    if path is None or path.exists() or hub_file(str(name)) is not None:
        return
    if path.suffix == ".gguf" and str(name).count("/") != 1:  # org/x.gguf may be a repository
        raise PlanError(f"model {name}: no such file", "Give a .gguf file, here or of the Hub (org/model/file.gguf).")
    if is_hub_name(str(name)):
        return
    kind = "file" if str(name).endswith(".gguf") else "folder"
    raise PlanError(
        f"model {name}: no such {kind}", f"Give a local folder, a Hub name such as org/model, {EMBEDDED} or {DEMO}."
    )


def check_adapter(place: Path) -> None:
    """PlanError if there is no adapter; FormatError if it is a folder without PEFT's files."""
    if place.is_file():
        return
    if not place.is_dir():
        raise PlanError(f"adapter {place}: no such folder", f"Give the folder that holds {ADAPTER}, or a .gguf file.")
    for name in (ADAPTER, ADAPTER_WEIGHTS):
        if not (place / name).is_file():
            raise FormatError(f"adapter {place} has no {name}", "An adapter is a folder that PEFT has written.")


def in_short(modules: Iterable[str]) -> str:
    """Module names as one string. Names that differ only in a number are merged: model.layers.0-7.mlp.up_proj."""
    found = [tuple(name.split(".")) for name in dict.fromkeys(modules)]
    for at in range(max(map(len, found), default=0)):
        alike: dict[tuple[str, ...], list[int]] = {}
        for parts in found:
            if at < len(parts) and parts[at].isdigit():
                alike.setdefault((*parts[:at], "", *parts[at + 1 :]), []).append(int(parts[at]))
            else:
                alike[parts] = []
        found = [(*k[:at], _ranges(numbers), *k[at + 1 :]) if numbers else k for k, numbers in alike.items()]
    return ", ".join(".".join(parts) for parts in found)


def lacking(tensors: Sequence[str]) -> str:
    """What an error says of the tensors that a file lacks, at least one."""
    if len(tensors) == 1:
        return f"the tensor {tensors[0]} is missing"
    return f"{len(tensors):,} tensors are missing, the first is {tensors[0]}"


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
