"""Imports `fewbit.models.plugin`, which registers fewbit, once transformers' models can be imported, and not before.

A finder in front of `sys.meta_path` lets the ordinary finders find that one module and adds a step after its
execution; for every other module it answers None at once.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# The quantizers are imported in the midst of this one, when nothing that needs a model can be imported yet.
_WATCHED = "transformers.modeling_utils"
_PLUGIN = "fewbit.models.plugin"

preferred: set[str] = set()  # quantization methods that fewbit serves even where their own back end is installed


class _AfterImport(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    def __init__(self, inner: Loader) -> None:
        self.inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        _register()


def _register() -> None:
    # By name: this module lies below `models` and must not import it when it is itself imported. The plugin registers
    # when it is imported; if it is just being imported, it does so at its end.
    importlib.import_module(_PLUGIN)


def install() -> None:
    """Register with transformers now if it is imported, else as soon as it is."""
    if _WATCHED in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def prefer(methods: set[str]) -> None:
    """Serve these methods from now on; transformers need not be imported yet."""
    preferred.update(methods)
    if _PLUGIN in sys.modules:
        sys.modules[_PLUGIN].register()
