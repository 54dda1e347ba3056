"""Digests of what fewbit writes, to prove that a change of the code changes no output.

`python tools/outputs_digest.py` quantizes `tiny` by every plan and by a few combinations of scheme, method and format,
with a fixed random seed and on one thread. It uses the command line only, so it runs before and after any move of the
code. For each output it prints the sha256 of its tensors (names, types, shapes, bytes), of its config, and of its
record without times, versions and paths. Digests depend on the processor and on PyTorch, so compare those of one
machine: `--out FILE` writes them, `--against FILE` compares with such a file and exits 1 if one differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from safetensors import safe_open

# Combinations besides the named plans: name -> (suffix of the output, flags).
COMBINATIONS: Mapping[str, tuple[str, str]] = {
    "nf4 by gptq": ("", "--scheme nf4-b64 --method gptq --format bnb"),
    "int3-g128-sym by awq+gptq": ("", "--scheme int3-g128-sym --method awq+gptq --format gptq"),
    "q3_k_m by gptq": (".gguf", "--plan q3_k_m --method gptq"),
}
CALIBRATION = "--samples 16 --length 128 --seed 0"
# Keys of a record that differ from run to run: times, versions, where things are.
VOLATILE = ("versions", "seconds", "origin")


def main() -> int:
    """Print, write or compare the digests; 1 if one differs from the file given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="Plans or combinations to make. Default: all.")
    parser.add_argument("--out", type=Path, help="Write the digests to this JSON file.")
    parser.add_argument("--against", type=Path, help="Compare with the digests in this JSON file.")
    given = parser.parse_args()
    found = digests(given.names or every())
    for name, parts in found.items():
        print(name, *(f"{part}:{digest[:16]}" for part, digest in parts.items()), flush=True)
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if given.against is None:
        return 0
    before = json.loads(given.against.read_text(encoding="utf-8"))
    wrong = [name for name in found if found[name] != before.get(name)]
    print(f"{len(found) - len(wrong)} of {len(found)} agree" + (f"; not {', '.join(wrong)}" if wrong else ""))
    return bool(wrong)


def every() -> list[str]:
    """Names of all plans and combinations."""
    return [*_plans(), *COMBINATIONS]


def digests(names: list[str]) -> dict[str, dict[str, str]]:
    """name -> {"tensors", "config", "record"} -> sha256."""
    plans, found = _plans(), {}
    with tempfile.TemporaryDirectory() as folder:
        for index, name in enumerate(names):
            suffix, flags = COMBINATIONS.get(name) or (plans[name], f"--plan {name}")
            out = Path(folder) / f"out-{index}{suffix}"
            _fewbit("quantize", "tiny", "-o", str(out), "--device", "cpu", *flags.split(), *CALIBRATION.split())
            found[name] = _digest(out)
            print(f"{index + 1}/{len(names)} {name}", file=sys.stderr, flush=True)
    return found


def _plans() -> dict[str, str]:
    """Name of each plan -> suffix of its output."""
    rows = json.loads(_fewbit("list", "--json"))["plans"]
    return {row["name"]: ".gguf" if row["what"].endswith("; gguf files") else "" for row in rows}


def _fewbit(*arguments: str) -> str:
    command = [sys.executable, "-m", "fewbit", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


def _digest(out: Path) -> dict[str, str]:
    if out.is_file():
        reader = GGUFReader(out)
        keys = {key: field.contents() for key, field in reader.fields.items()}
        record = json.loads(keys.pop("fewbit.record"))
        config = {key: value for key, value in keys.items() if not key.startswith("GGUF.")}
        tensors = ((t.name, t.tensor_type.name, list(t.shape), t.data.tobytes()) for t in reader.tensors)
        return {"tensors": _of_tensors(tensors), "config": _of(config), "record": _of(_stable(record))}
    record = json.loads((out / "fewbit.json").read_text(encoding="utf-8"))
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    return {"tensors": _of_tensors(_safetensors(out)), "config": _of(config), "record": _of(_stable(record))}


def _safetensors(folder: Path) -> Iterator[tuple[str, str, list[int], bytes]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in sorted(opened.keys()):
                tensor = opened.get_tensor(name)
                data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                yield name, str(tensor.dtype), list(tensor.shape), data


def _stable(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in VOLATILE}


def _of_tensors(tensors: Iterator[tuple[str, str, list[int], bytes]]) -> str:
    digest = hashlib.sha256()
    for name, dtype, shape, data in tensors:
        digest.update(f"{name} {dtype} {shape} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def _of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
