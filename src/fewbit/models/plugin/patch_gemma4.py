"""Lets models of Gemma 4 whose layers have no inputs of their own share keys and values in transformers 5.24.

Before the layers that use the keys and values of earlier ones, the forward pass keeps the last tokens of all that these
layers read, of `per_layer_inputs` too. These are None in such a model, so a prompt of several tokens fails. Here, an
empty tensor takes their place meanwhile.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextModel

from fewbit.models.patching import replace

_NAME = "_maybe_slice_kv_shared_inputs"


def _sliced(theirs: Any, self: Any, states: Tensor, per_layer_inputs: Tensor | None, *args: Any, **kwargs: Any) -> Any:
    if per_layer_inputs is not None:
        return theirs(self, states, per_layer_inputs, *args, **kwargs)
    states, _, *others = theirs(self, states, states.new_empty(*states.shape[:2], 0, 0), *args, **kwargs)
    return states, None, *others


def register() -> None:
    """Replace the method. Other versions of transformers do not have it."""
    if hasattr(Gemma4TextModel, _NAME):
        replace(Gemma4TextModel, _NAME, _sliced)


register()
