"""PyTorch, imported at its first use. Its import takes seconds; a misspelled name must fail without that wait.

Modules that mostly declare things (plans, schemes, methods) import `torch` and `Tensor` from here. `Tensor` is
for annotations only; at run time it is `torch.Tensor`.

The first use of an attribute imports PyTorch and replaces the placeholder by the real module in all modules of fewbit,
so that later uses have no overhead.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any


class _Lazy(ModuleType):
    def __getattr__(self, name: str) -> Any:
        module = importlib.import_module(self.__name__)
        for place, holder in list(sys.modules.items()):
            if place.partition(".")[0] == __package__:
                for held in [key for key, value in vars(holder).items() if value is self]:
                    setattr(holder, held, module)
        return getattr(module, name)


if TYPE_CHECKING:
    import torch as torch
    from torch import Tensor as Tensor
    from torch import distributed as distributed
else:
    torch = sys.modules.get("torch") or _Lazy("torch")
    distributed = sys.modules.get("torch.distributed") or _Lazy("torch.distributed")
    Tensor = "Tensor"
