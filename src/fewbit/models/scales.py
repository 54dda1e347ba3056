"""The scales that AWQ folded into a model. With them, adapters can move between this model and its original.

Folding multiplies columns of some linears by s, and divides the rows of the preceding module by s. A linear then maps
x' = x / c to y' = y / r. An adapter B A that was trained on it becomes diag(r) B A diag(1/c) on the original model.

A folder stores the scales in a safetensors file, `fewbit.scales`. Its name does not end in .safetensors, because other
packages read every such file in a folder as weights. A GGUF file stores them as one array in its metadata.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import FormatError
from fewbit.formats.containers.safetensors import read_file, write_file
from fewbit.system.files import parse_json, read_json, write_json
from fewbit.system.publish import RECORD

FILE = "fewbit.scales"
GGUF_RECORD = "fewbit.record"
_KINDS = ("columns:", "rows:")
_ATTRIBUTE = "fewbit_scales"  # attribute of a loaded model: its scales; of the model's config: their digest


@dataclass(frozen=True, eq=False)
class Scales:
    """Scales of one model.

    values: "columns:LINEAR" -> [K], the factors of the linear's columns; "rows:MODULE" -> [N], the divisors of a
    linear's rows or a norm's channels, bias included. origin: the model before any folding.
    """

    values: Mapping[str, Tensor] = field(default_factory=dict)
    origin: str | None = None

    def __bool__(self) -> bool:
        return bool(self.values)

    @property
    def digest(self) -> str:
        """SHA-256 digest of names and values, 32 hex digits. Without scales, it is the same for all models."""
        digest = hashlib.sha256()
        for name in sorted(self.values):
            digest.update(name.encode() + self.values[name].float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]

    def columns(self, names: Iterable[str]) -> Tensor | None:
        """The factors of the columns of the linear that has one of these names."""
        return self._of("columns:", names)

    def rows(self, names: Iterable[str]) -> Tensor | None:
        """The divisors of the rows of the linear that has one of these names."""
        return self._of("rows:", names)

    def _of(self, kind: str, names: Iterable[str]) -> Tensor | None:
        return next((self.values[kind + name] for name in names if kind + name in self.values), None)

    def after(self, before: Scales) -> Scales:
        """The product of two folds: these scales were folded into a model that already had those of `before`."""
        values = dict(before.values)
        for name, tensor in self.values.items():
            values[name] = values[name] * tensor if name in values else tensor
        return Scales(values, before.origin or self.origin)

    def to_json(self) -> dict[str, Any] | None:
        """The entry in the record of a folder; None without scales."""
        return {"file": FILE, "digest": self.digest, "origin": self.origin} if self else None


def of_blocks(tensors: Mapping[str, Any]) -> list[str]:
    """The names among a run's `tensors` that are scales."""
    return [name for name in tensors if name.startswith(_KINDS)]


def write(folder: Path, scales: Scales) -> None:
    """Write `fewbit.scales`, unless there are no scales."""
    if scales:
        write_file(folder / FILE, scales.values, {"origin": scales.origin or ""})


def read(folder: Path) -> Scales:
    """The scales in a folder's `fewbit.scales`; empty without this file. FormatError if it contains anything else."""
    if not (folder / FILE).is_file():
        return Scales()
    values, metadata = read_file(folder / FILE)
    if wrong := [name for name, t in values.items() if not name.startswith(_KINDS) or t.dim() != 1]:
        raise FormatError(f"{folder / FILE} contains {wrong[0]}, which is not a vector of scales")
    return Scales(values, metadata.get("origin") or None)


def of_folder(folder: Path) -> Scales | None:
    """The scales of a model's folder. None if the model has, or may have, scales that the folder does not contain."""
    if (folder / FILE).is_file():
        return read(folder)
    try:
        config = read_json(folder / "config.json")
    except (OSError, FormatError):
        return Scales()
    return _without_file(config) if isinstance(config, dict) else Scales()


def _without_file(config: Mapping[str, Any]) -> Scales | None:
    """The scales of a model without `fewbit.scales`: empty, or None (unknown) for AWQ and copies of folded models."""
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return None if _ATTRIBUTE in config or str(getattr(method, "value", method)) == "awq" else Scales()


def to_metadata(scales: Scales) -> dict[str, Any]:
    """The metadata key of a GGUF file with all values. Their names and lengths are in its record (`to_record`)."""
    return {FILE: torch.cat([t.float() for t in scales.values.values()]).numpy()} if scales else {}


def to_record(scales: Scales) -> dict[str, Any] | None:
    """The entry in the record of a GGUF file; None without scales."""
    if not scales:
        return None
    lengths = {name: len(tensor) for name, tensor in scales.values.items()}
    return {"key": FILE, "digest": scales.digest, "origin": scales.origin, "lengths": lengths}


def of_metadata(metadata: Mapping[str, Any]) -> Scales:
    """The scales in the metadata of a GGUF file; empty without any. FormatError if its keys contradict each other."""
    record = metadata.get(GGUF_RECORD)
    said = parse_json(record, f"the key {GGUF_RECORD}") if isinstance(record, str) else None
    said = said.get("scales") if isinstance(said, dict) else None
    if said is None:
        return Scales()
    try:
        lengths = {str(name): int(length) for name, length in said["lengths"].items()}
        whole = torch.tensor(metadata[FILE], dtype=torch.float32, device="cpu")
        found = Scales(dict(zip(lengths, whole.split(list(lengths.values())), strict=True)), said["origin"])
        if found.digest != said["digest"]:
            raise ValueError(f"their digest is {found.digest}")
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise FormatError(f"the key {FILE} does not contain the scales that {GGUF_RECORD} lists: {error}") from None
    return found


def attach(model: Any, scales: Scales | None) -> None:
    """Store the scales on a model that is being loaded; None if they are unknown."""
    setattr(model, _ATTRIBUTE, scales)
    if scales:  # so that a copy saved by transformers is not taken for the original
        setattr(model.config, _ATTRIBUTE, scales.digest)


def of_model(model: Any) -> Scales | None:
    """The scales of a loaded model. None if it has, or may have, scales that are unknown."""
    if hasattr(model, _ATTRIBUTE):
        known: Scales | None = getattr(model, _ATTRIBUTE)
        return known
    name = str(getattr(model, "name_or_path", "") or "")
    if name and (Path(name) / FILE).is_file():
        return read(Path(name))
    config: Any = getattr(model, "config", None)
    return _without_file(config.to_dict() if hasattr(config, "to_dict") else {})


def write_record(folder: Path, scales: Scales, model: str) -> None:
    """Record in an adapter's folder the model that it was trained on, and the scales of that model."""
    write_json(folder / RECORD, {"schema_version": 1, "model": model, "scales": scales.to_json()}, indent=1)
    if scales:
        write(folder, scales)
    else:
        (folder / FILE).unlink(missing_ok=True)


def read_record(folder: Path) -> Scales | None:
    """The scales of the model that an adapter was trained on; None if its folder has no record.

    FormatError if the record and `fewbit.scales` disagree.
    """
    try:
        record = read_json(folder / RECORD)
    except FileNotFoundError:
        return None
    if not isinstance(record, dict) or "scales" not in record:
        return None
    if record["scales"] is None:
        return Scales()
    found = read(folder)
    if not isinstance(record["scales"], dict) or found.digest != record["scales"].get("digest"):
        raise FormatError(
            f"{folder / FILE} does not contain the scales that {RECORD} lists",
            "Copy the whole folder of the adapter again.",
        )
    return found
