"""Registers fewbit with transformers and PEFT as soon as they are imported, without importing them itself.

An import finder at the front of `sys.meta_path` watches for a few modules. The ordinary finders still load them. After
a watched module has been executed, the fewbit module that registers itself with it is imported. For every other module
the finder returns None at once.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Watched module -> the fewbit module that registers itself after it.
# transformers imports its quantizers while it is still importing `modeling_utils`, too early for code that needs a
# model class; so the quantizer waits for `modeling_utils`. Configs and tokenizers can be imported without a model, so
# they have entries of their own. `peft.tuners.lora.model` is the last module of PEFT's LoRA package to be imported.
_WATCHED = {
    "transformers.modeling_utils": "fewbit.models.plugin.quantizer",
    "transformers.configuration_utils": "fewbit.models.plugin.patch_gguf_config",
    "transformers.utils.quantization_config": "fewbit.models.plugin.patch_configs",
    "transformers.models.auto.tokenization_auto": "fewbit.models.plugin.patch_gguf_tokenizer",
    "transformers.models.auto.processing_auto": "fewbit.models.plugin.patch_processor",
    "transformers.models.auto.modeling_auto": "fewbit.models.plugin.patch_auto_models",
    "transformers.models.gemma4.modeling_gemma4": "fewbit.models.plugin.patch_gemma4",
    "peft.tuners.lora.model": "fewbit.models.adapters.lora",
    "peft.peft_model": "fewbit.models.adapters.refit",
    "peft.utils.transformers_weight_conversion": "fewbit.models.adapters.patch_experts",
}

_OURS = "fewbit.models."

preferred: set[str] = set()  # quantization methods that fewbit handles even if their own back end is installed


class _State(threading.local):
    """depth: how many modules of `fewbit.models` are being imported. waiting: registrations until they are finished."""

    depth = 0

    def __init__(self) -> None:
        self.waiting: list[str] = []


_state = _State()


class _AfterImport(MetaPathFinder):
    def __init__(self, awaited: set[str]) -> None:
        self.awaited = awaited

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.awaited and not fullname.startswith(_OURS):
            return None
        if fullname in self.awaited:
            self.awaited.remove(fullname)
            if not self.awaited:
                sys.meta_path.remove(self)
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader, _WATCHED.get(fullname))
        return spec


class _Registering(Loader):
    """Loads a watched module, and then registers `ours`. None: the module is fewbit's own.

    A module of fewbit may import a watched one first. What registers itself may need that module of fewbit, so it waits
    until it is complete.
    """

    def __init__(self, inner: Loader, ours: str | None) -> None:
        self.inner, self.ours = inner, ours

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)  # such as `get_source`, for tools that ask a module's loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        own = self.ours is None
        _state.depth += own
        try:
            self.inner.exec_module(module)
        finally:
            _state.depth -= own
        if self.ours is not None:
            _state.waiting.append(self.ours)
        while _state.waiting and not _state.depth:
            _register(_state.waiting.pop(0))


def _register(ours: str) -> None:
    # Imported by name: this module is in a lower layer, and must not import these modules when it is itself imported.
    # Each registers itself on import; a module that is being imported right now registers when its import ends.
    importlib.import_module(ours)


def install() -> None:
    """Register with the watched modules that are already imported, and with the others when they are imported."""
    for theirs, ours in _WATCHED.items():
        if theirs in sys.modules:
            _register(ours)
    awaited = {theirs for theirs in _WATCHED if theirs not in sys.modules}
    if awaited and not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(awaited))


def on_load() -> Any:
    """The module `fewbit.api.on_load`, which quantizes a checkpoint during loading.

    It is imported by name because it is in a higher layer than its caller.
    """
    return importlib.import_module("fewbit.api.on_load")


def saved() -> Any:
    """The module `fewbit.api.saved`, which describes what `save_pretrained` writes. Imported by name, as `on_load`."""
    return importlib.import_module("fewbit.api.saved")


def prefer(methods: set[str]) -> None:
    """Handle these quantization methods from now on, even if their own back end is installed.

    This works before and after transformers is imported.
    """
    preferred.update(methods)
    plugin = sys.modules.get(_WATCHED["transformers.modeling_utils"])
    if plugin is not None:
        plugin.register()
