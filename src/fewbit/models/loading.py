"""The settings of loading a model, with their checks."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewbit import registry
from fewbit.checks import Device, DType, device, dtype, flag, integer, invalid, path
from fewbit.errors import PlanError
from fewbit.names import check_adapter
from fewbit.settings import Settings, setting

if TYPE_CHECKING:
    import torch


_OLDEST_PEFT = (0, 20)


def need_peft() -> None:
    """PlanError unless PEFT is installed in version 0.20 or later."""
    try:
        version = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        raise PlanError("adapters need the package peft", "pip install 'fewbit[finetune]'") from None
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_PEFT:
        raise PlanError(f"peft {version} is too old", "pip install --upgrade 'fewbit[finetune]'")


def adapter(name: str, value: Any) -> str | Path:
    """A LoRA adapter, a folder or a file. What its files hold is checked when it is loaded."""
    given = path(name, value)
    need_peft()
    check_adapter(Path(given))
    return given


def _kernel(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise invalid(name, value, "a kernel by its name (fewbit list)")
    registry.get("kernels", value)
    return value.lower()


def _fuse(name: str, value: Any) -> int | bool:
    return value if isinstance(value, bool) else integer(1)(name, value)


@dataclass(frozen=True)
class Loading(Settings):
    """How a model is loaded. ArgumentError or PlanError for an invalid value."""

    device: Device = setting(None, device, "cpu, cuda, cuda:1 or auto. Default: a GPU if there is one.")
    dtype: DType = setting(None, dtype, "Type of activations and unquantized weights. Default: the checkpoint's.")
    kernel: str | None = setting(
        None, _kernel, "Kernel for all quantized weights (fewbit list). Default: the best for each weight."
    )
    adapter: str | Path | None = setting(None, adapter, "LoRA adapter to put on the model: a folder or a .gguf file.")
    fuse: int | bool | None = setting(
        None, _fuse, "Fuse linears that share an input, and generate in a static cache of this many tokens."
    )
    compile: bool = setting(False, flag, "With `fuse`, on a GPU: compile steps that fewbit's operations do not serve.")
    trust_remote_code: bool = setting(False, flag, "Run Python code that the model brings.")
    exact_activations: bool = setting(False, flag, "Use kernels that round activations only if named.")
    tensor_parallel: bool = setting(False, flag, "Under torchrun: load only this process's part of each linear.")

    @property
    def torch_dtype(self) -> torch.dtype | str:
        """`dtype` as transformers takes it; "auto" is the checkpoint's own."""
        return dtype("dtype", self.dtype)

    def exact(self) -> Loading:
        """These settings for a measurement of the weights, or a training.

        On a CPU: float32, unless a dtype is set, and no rounded activations. A kernel rounds them for few rows, which
        is what an expert often gets.
        """
        if str(self.device) != "cpu":
            return self
        return replace(self, dtype=self.dtype or "float32", exact_activations=True)
