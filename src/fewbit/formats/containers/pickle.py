"""Converts `pytorch_model.bin` checkpoints to safetensors in a separate process.

`torch.load(weights_only=True)` builds only tensors and rejects any other object in the pickle, so no code of the file
runs. The separate process limits the damage if that protection fails, and keeps the whole model out of this process's
memory.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

from fewbit.errors import FormatError
from fewbit.formats.containers import safetensors
from fewbit.system import kept, processes
from fewbit.system.cache import made
from fewbit.system.files import read_json, write_json

_SINGLE = "pytorch_model.bin"
_INDEX = "pytorch_model.bin.index.json"


def files_in(folder: Path) -> list[Path]:
    """The pickled weight files of a folder; empty if there are none."""
    if (folder / _INDEX).exists():
        try:
            names = sorted(set(read_json(folder / _INDEX)["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{folder / _INDEX} is not a valid index of shards: {error!r}") from None
        missing = [name for name in names if Path(str(name)).name != name or not (folder / str(name)).is_file()]
        if missing:
            raise FormatError(f"{folder / _INDEX} names {missing[0]!r}, which is not in {folder}", safetensors.LACKING)
        return [folder / name for name in names]
    return [folder / _SINGLE] if (folder / _SINGLE).exists() else []


def converted(folder: Path, name: str) -> Path:
    """A cached folder with the same model in safetensors, made on first use. name: what the user calls it.

    FormatError if a pickle contains anything but tensors.
    """
    files = files_in(folder)
    beside = [folder / path for path in safetensors.side_files(folder) if path.parent == Path()]
    stats = [f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in (*files, *beside)]
    key = hashlib.sha256("\n".join(stats).encode()).hexdigest()[:24]

    def make(target: Path) -> None:
        for number, file in enumerate(files, 1):
            shard = safetensors.SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
            command = processes.command("fewbit.formats.containers.pickle", str(file), str(target / shard))
            run = subprocess.run(
                command, capture_output=True, encoding="utf-8", errors="replace", env=processes.environment()
            )
            if run.returncode != 0:
                raise FormatError(
                    f"{file} could not be read as plain tensors: {_last_line(run.stderr)}",
                    "fewbit loads only tensors from a pickle. Ask its author for safetensors, or get the file again.",
                )
        if len(files) > 1:
            shards = sorted(target.iterdir())
            names = {name: shard.name for shard in shards for name in safetensors.read_specs(shard)}
            write_json(target / safetensors.INDEX, {"metadata": {}, "weight_map": names})
        for file in beside:
            shutil.copy(file, target)
        kept.label(target, name, "its pickle as safetensors")

    return made(f"unpickled-{key}", make, sum(file.stat().st_size for file in files))


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:300] if lines else "the process died"


def _convert(source: Path, target: Path) -> None:
    import torch

    try:
        try:
            loaded = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files older than torch 1.6 cannot be memory-mapped
            loaded = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch's long message advises how to load the file all the same. One sentence of it names the rejected object.
        rejected = re.search(r"WeightsUnpickler error: (.+?)(?:\. Please|\n|$)", str(error))
        sys.exit(rejected[1] if rejected else f"{type(error).__name__} {error}".replace("\n", " ")[:300])
    if not isinstance(loaded, dict) or not all(isinstance(t, torch.Tensor) for t in loaded.values()):
        sys.exit("it is not a dictionary of tensors")
    # Tensors that share storage (tied weights) are written twice: safetensors cannot store aliases.
    safetensors.write_file(target, {str(name): tensor.detach().clone() for name, tensor in loaded.items()})


if __name__ == "__main__":
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
