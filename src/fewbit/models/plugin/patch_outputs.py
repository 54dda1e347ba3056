"""Lets Llama 4 with its tower run in transformers 5.24.

Its forward pass reads `image_outputs` of what its language model returns, and the class of that has no such field. So
every forward pass fails, with images and without. The class gets the field here, with None: a language model has no
outputs of an encoder.
"""

from __future__ import annotations

from typing import Any

from transformers.modeling_outputs import MoeCausalLMOutputWithPast


def register() -> None:
    """Patch the class, unless it has the field."""
    outputs: Any = MoeCausalLMOutputWithPast
    if not hasattr(outputs, "image_outputs"):
        outputs.image_outputs = None
