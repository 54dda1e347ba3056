"""Registers fewbit with transformers and with PEFT when they are imported, and not before.

A finder in front of `sys.meta_path` lets the ordinary finders find the modules that are waited for and adds a step
after their execution: importing the module of ours that registers itself. For every other module it answers None at
once.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Theirs -> ours. transformers imports its quantizers in the midst of its models, when nothing that needs a model can be
# imported yet; configs and tokenizers may be imported without any; PEFT's is the last that LoRA consists of.
_WATCHED = {
    "transformers.modeling_utils": "fewbit.models.plugin.quantizer",
    "transformers.configuration_utils": "fewbit.models.plugin.patch_gguf_config",
    "transformers.utils.quantization_config": "fewbit.models.plugin.patch_configs",
    "transformers.models.auto.tokenization_auto": "fewbit.models.plugin.patch_gguf_tokenizer",
    "peft.tuners.lora.model": "fewbit.models.adapters.lora",
    "peft.peft_model": "fewbit.models.adapters.refit",
}

preferred: set[str] = set()  # quantization methods that fewbit serves even where their own back end is installed


class _AfterImport(MetaPathFinder):
    def __init__(self, awaited: set[str]) -> None:
        self.awaited = awaited

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.awaited:
            return None
        self.awaited.remove(fullname)
        if not self.awaited:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader, _WATCHED[fullname])
        return spec


class _Registering(Loader):
    def __init__(self, inner: Loader, ours: str) -> None:
        self.inner, self.ours = inner, ours

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        _register(self.ours)


def _register(ours: str) -> None:
    # By name: this module lies below those, and must not import them when it is itself imported. They register when
    # they are imported; one that is just being imported does so at its end.
    importlib.import_module(ours)


def install() -> None:
    """Register now with what is imported already, and with the rest as soon as it is."""
    for theirs, ours in _WATCHED.items():
        if theirs in sys.modules:
            _register(ours)
    awaited = {theirs for theirs in _WATCHED if theirs not in sys.modules}
    if awaited and not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(awaited))


def on_load() -> Any:
    """`fewbit.api.on_load`, which quantizes a checkpoint while it is loaded; by name too, as it lies above who asks."""
    return importlib.import_module("fewbit.api.on_load")


def prefer(methods: set[str]) -> None:
    """Serve these methods from now on; transformers need not be imported yet."""
    preferred.update(methods)
    plugin = sys.modules.get(_WATCHED["transformers.modeling_utils"])
    if plugin is not None:
        plugin.register()
