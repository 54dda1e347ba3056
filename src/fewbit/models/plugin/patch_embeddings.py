"""Packed embeddings, which are no `nn.Embedding`, in methods of transformers' models.

`resize_token_embeddings` raises a clear error for them. `num_parameters(exclude_embeddings=True)` leaves them out.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from transformers import PreTrainedModel

from fewbit.errors import PlanError
from fewbit.nn.layers import QEmbedding


def _refusing(theirs: Any) -> Any:
    @wraps(theirs)
    def resized(self: Any, old_embeddings: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return theirs(self, old_embeddings, *args, **kwargs)
        except TypeError:
            if not isinstance(old_embeddings, QEmbedding):
                raise
            raise PlanError(
                f"{old_embeddings.module}: packed embeddings ({old_embeddings.codec}) cannot be resized",
                "Unpack the model first: model.dequantize(). Or resize the original model, and quantize that.",
            ) from None

    resized.by_fewbit = True  # type: ignore[attr-defined]
    return resized


def _counting(theirs: Any) -> Any:
    @wraps(theirs)
    def counted(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        count: int = theirs(self, only_trainable=only_trainable, exclude_embeddings=exclude_embeddings)
        if exclude_embeddings and not only_trainable:  # packed weights cannot be trained
            packed = {module.held for module in self.modules() if isinstance(module, QEmbedding)}
            count -= sum(held.numel() for held in packed if held is not None)
        return count

    counted.by_fewbit = True  # type: ignore[attr-defined]
    return counted


def register() -> None:
    """Patch `PreTrainedModel`, once."""
    model: Any = PreTrainedModel
    if not hasattr(model.num_parameters, "by_fewbit"):
        model.num_parameters = _counting(model.num_parameters)
    if not hasattr(model._get_resized_embeddings, "by_fewbit"):
        model._get_resized_embeddings = _refusing(model._get_resized_embeddings)
