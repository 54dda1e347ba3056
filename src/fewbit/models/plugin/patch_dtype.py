"""Lets transformers know the dtype of a model without any unpacked weight: that of the embeddings' decoded rows.

A model whose norms have no weights (OLMo 1) may have packed parameters only, and transformers then finds no dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from fewbit.models.patching import replace
from fewbit.nn.layers import QEmbedding


def _dtype(theirs: Any, self: Any) -> torch.dtype:
    if any(parameter.is_floating_point() for parameter in self.parameters()):
        own: torch.dtype = theirs(self)
        return own
    return next(module.dtype for module in self.modules() if isinstance(module, QEmbedding))


def register() -> None:
    """Replace the property."""
    replace(PreTrainedModel, "dtype", _dtype)
