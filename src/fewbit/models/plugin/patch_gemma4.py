"""Lets models of Gemma 4 whose layers have no inputs of their own share keys and values in transformers 5.24.

Before the layers that use the keys and values of earlier ones, the forward pass keeps the last tokens of all that these
layers read, of `per_layer_inputs` too. These are None in such a model, so a prompt of several tokens fails. Here, an
empty tensor takes their place meanwhile.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch import Tensor
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextModel

_NAME = "_maybe_slice_kv_shared_inputs"


def _slicing(theirs: Any) -> Any:
    @wraps(theirs)
    def sliced(self: Any, states: Tensor, per_layer_inputs: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        if per_layer_inputs is not None:
            return theirs(self, states, per_layer_inputs, *args, **kwargs)
        states, _, *others = theirs(self, states, states.new_empty(*states.shape[:2], 0, 0), *args, **kwargs)
        return states, None, *others

    sliced.by_fewbit = True  # type: ignore[attr-defined]
    return sliced


def register() -> None:
    """Patch the class, once. Other versions of transformers do not have the method."""
    model: Any = Gemma4TextModel
    if hasattr(model, _NAME) and not hasattr(getattr(model, _NAME), "by_fewbit"):
        setattr(model, _NAME, _slicing(getattr(model, _NAME)))


register()
