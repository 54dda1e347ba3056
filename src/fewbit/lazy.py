"""PyTorch, imported when it is first used: its import takes seconds, and a misspelled name must not cost them.

A module that declares more than it computes (plans, schemes, methods) takes `torch` from here:

    if TYPE_CHECKING:
        import torch
        from torch import Tensor
    else:
        from fewbit.lazy import torch

The first use of an attribute imports PyTorch and puts the real module in the place of the stand-in wherever fewbit
holds it, so that later uses cost nothing more.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _Lazy(ModuleType):
    def __getattr__(self, name: str) -> Any:
        module = importlib.import_module(self.__name__)
        for place, holder in list(sys.modules.items()):
            if place.partition(".")[0] == __package__:
                for held in [key for key, value in vars(holder).items() if value is self]:
                    setattr(holder, held, module)
        return getattr(module, name)


torch: Any = sys.modules.get("torch") or _Lazy("torch")
distributed: Any = sys.modules.get("torch.distributed") or _Lazy("torch.distributed")
