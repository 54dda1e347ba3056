"""Compute the calls of a module by another function for a while. A copy of the module knows nothing of it.

`module.forward = other` would be part of a copy or a pickle that another thread makes during the call. PyTorch keeps
what `Module.compile` makes in an attribute that copies and pickles leave out, and that each call looks at first.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch.nn.modules import module as modules

PLACE = "_compiled_call_impl"


class StandIn:
    """A function in place of a module's forward. The module's hooks run as before.

    Under torch.compile, with gradients, hooks of all modules, or a forward that somebody has replaced, a call runs the
    module's own code.
    """

    def __init__(self, module: Any, forward: Callable[..., Any]) -> None:
        self.module, self.forward = module, forward

    def put(self) -> None:
        """Compute the module's calls from now on, unless something else does."""
        vars(self.module).setdefault(PLACE, self)

    def take_away(self) -> None:
        """Undo `put`."""
        if vars(self.module).get(PLACE) is self:
            del vars(self.module)[PLACE]

    def serves(self) -> bool:
        """Whether the next call of the module is computed by the function."""
        own = vars(self.module)
        return own.get(PLACE) is self and "forward" not in own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return module._call_impl(*args, **kwargs)
        if modules._has_any_global_hook() or "forward" in vars(module):
            return module._call_impl(*args, **kwargs)
        if not (module._forward_hooks or module._forward_pre_hooks):
            return self.forward(*args, **kwargs)
        out, waiting = None, dict(module._forward_hooks)
        try:
            for key, hook in list(module._forward_pre_hooks.items()):
                if key in module._forward_pre_hooks_with_kwargs:
                    args, kwargs = hook(module, args, kwargs) or (args, kwargs)
                elif (given := hook(module, args)) is not None:
                    args = given if isinstance(given, tuple) else (given,)
            out = self.forward(*args, **kwargs)
            while waiting:
                key = next(iter(waiting))
                changed = self._ran(key, waiting.pop(key), args, kwargs, out)
                out = out if changed is None else changed
            return out
        except Exception:
            for key in waiting.keys() & module._forward_hooks_always_called.keys():
                with suppress(Exception):  # as PyTorch does: the first error counts
                    self._ran(key, waiting[key], args, kwargs, out)
            raise

    def _ran(self, key: int, hook: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        named = key in self.module._forward_hooks_with_kwargs
        return hook(self.module, args, kwargs, out) if named else hook(self.module, args, out)
