"""Packed embeddings, which are no `nn.Embedding`, in methods of transformers' models.

`resize_token_embeddings` raises a clear error for them. `num_parameters(exclude_embeddings=True)` leaves them out.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from fewbit.errors import PlanError
from fewbit.models.patching import replace
from fewbit.nn.layers import QEmbedding


def _resized(theirs: Any, self: Any, old_embeddings: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return theirs(self, old_embeddings, *args, **kwargs)
    except TypeError:
        if not isinstance(old_embeddings, QEmbedding):
            raise
        raise PlanError(
            f"{old_embeddings.module}: packed embeddings ({old_embeddings.codec}) cannot be resized",
            "Unpack the model first: model.dequantize(). Or resize the original model, and quantize that.",
        ) from None


def _counted(theirs: Any, self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    count: int = theirs(self, only_trainable=only_trainable, exclude_embeddings=exclude_embeddings)
    if exclude_embeddings and not only_trainable:  # packed weights cannot be trained
        packed = {module.held for module in self.modules() if isinstance(module, QEmbedding)}
        count -= sum(held.numel() for held in packed if held is not None)
    return count


def register() -> None:
    """Replace both methods."""
    replace(PreTrainedModel, "num_parameters", _counted)
    replace(PreTrainedModel, "_get_resized_embeddings", _resized)
