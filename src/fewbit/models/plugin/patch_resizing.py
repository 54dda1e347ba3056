"""Makes transformers' `resize_token_embeddings` raise a clear error for packed embeddings, which cannot be resized."""

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


def register() -> None:
    """Patch `PreTrainedModel`, once."""
    model: Any = PreTrainedModel
    if not hasattr(model._get_resized_embeddings, "by_fewbit"):
        model._get_resized_embeddings = _refusing(model._get_resized_embeddings)
