"""Keep PEFT from treating separate experts as fused ones.

For some model types PEFT renames the targets of an adapter, and its weights in loading, from single experts to fused
parameters. If fewbit has given each expert linears of its own (`models/experts.py`), PEFT would then train no expert,
or lose the adapter's weights for them. `fewbit.hook` imports this module after PEFT's.
"""

from __future__ import annotations

import inspect
from typing import Any

from peft.utils import transformers_weight_conversion

from fewbit.models.experts import are_separate
from fewbit.models.patching import replace

# The first changes a config in place, the second returns the weights of an adapter.
_RENAMING = ("convert_peft_config_for_transformers", "convert_peft_adapter_state_dict_for_transformers")


def _unless_separate(convert: Any, *args: Any, **kwargs: Any) -> Any:
    given = inspect.signature(convert).bind(*args, **kwargs).arguments
    return given.get("adapter_state_dict") if are_separate(given["model"]) else convert(*args, **kwargs)


def register() -> None:
    """Make both functions do nothing for a model with separate experts."""
    for name in _RENAMING:
        replace(transformers_weight_conversion, name, _unless_separate)


register()
