"""Find the blocks (decoder layers) of a model."""

from __future__ import annotations

from torch import nn

from fewbit.errors import PlanError


def find_blocks(model: nn.Module) -> list[str]:
    """Names of the decoder layers: the members of the largest `nn.ModuleList`. PlanError without one."""
    best, size = "", 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and (held := sum(p.numel() for p in module.parameters())) > size:
            best, size = name, held
    if not best:
        raise PlanError(f"{type(model).__name__} has no list of blocks (decoder layers), so it cannot be quantized")
    return [f"{best}.{i}" for i in range(len(model.get_submodule(best)))]  # type: ignore[arg-type]
