"""The machine: devices, memory, processor, package versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from fewbit import checks
from fewbit.checks import Device
from fewbit.errors import PlanError


def versions() -> dict[str, str]:
    """Versions of the packages that affect results."""
    return {"python": platform.python_version(), **{p: _version(p) or "?" for p in ("fewbit", "torch", "transformers")}}


def _version(package: str) -> str | None:
    if package == "fewbit":  # an installed clone keeps the metadata of the version that it was installed at
        import fewbit

        return fewbit.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The name of the processor."""
    return _cpuinfo("model name").strip() or platform.processor() or platform.machine()


def _cpuinfo(*keys: str) -> str:
    """The value of the first line of /proc/cpuinfo that starts with one of `keys`; empty if there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return next((line for line in text.splitlines() if line.lower().startswith(keys)), "").partition(":")[2]


def gpu_memory() -> int:
    """Memory of the first GPU in bytes; 0 without a GPU."""
    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else 0


def gpu_capability() -> tuple[int, int] | None:
    """The compute capability of the first GPU, such as (9, 0); None without an NVIDIA GPU."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(0)


def main_memory() -> int:
    """Main memory in bytes; 0 if the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, AttributeError, OSError):
        return 0


def memory_of(device: torch.device) -> int:
    """Memory of a device in bytes: of that GPU, or the main memory."""
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else main_memory()


def free_memory(device: torch.device) -> int | None:
    """Memory of a device in bytes that is free or can be freed; at most all of it. None if the system does not say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch frees it if needed
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    found = [all_of_it] if (all_of_it := main_memory()) else []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
        # A container's limit, "max" if it has none. What it uses now may be mapped files, which can be freed.
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        found += [int(limit)] if limit.isdigit() else []
    except (OSError, ValueError):
        pass
    return min(found, default=None)


def device(wanted: Device) -> str:
    """The device to use: the requested one, else (None or "auto") a GPU if there is one, else the CPU.

    PlanError if the requested device does not exist.
    """
    if (wanted := checks.device("device", wanted)) in (None, "auto"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    here = ["cpu", "cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if not torch.cuda.is_available():
        here = ["cpu"]
    if wanted not in here:
        raise PlanError(f"`device={wanted}` is not available", f"Available: {', '.join(here)}.")
    return wanted


def placed(wanted: Device) -> str:
    """The device to load a whole model on. "auto" stays if there is a GPU: transformers uses all GPUs for the model."""
    spread = checks.device("device", wanted) == "auto" and torch.cuda.is_available()
    return "auto" if spread else device(wanted)
