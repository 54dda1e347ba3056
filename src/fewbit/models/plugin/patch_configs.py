"""Keeps options that transformers' config objects accept and drop: `AwqConfig(do_fuse=True, fuse_max_seq_len=512)`.

transformers 5 ignores them silently. With this patch they are checked when the config is created and kept on the loaded
model. They are not written to config.json, because fusing belongs to one load and not to a file. The patch also lets
`GPTQConfig` take `modules_in_block_to_quantize` if optimum is not installed; transformers alone checks its version.
"""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import AwqConfig, GPTQConfig

from fewbit.errors import PlanError
from fewbit.models.patching import replace
from fewbit.models.plugin.options import FUSING


def register() -> None:
    """Let `AwqConfig` keep its fusing options, and `GPTQConfig` its list of modules to quantize."""
    replace(GPTQConfig, "post_init", _without_optimum)
    replace(AwqConfig, "__init__", _with_fusing)
    replace(AwqConfig, "get_loading_attributes", _with_them)
    replace(AwqConfig, "to_dict", _without_them)


def _without_optimum(theirs: Any, self: Any) -> None:
    """Hide `modules_in_block_to_quantize` from `GPTQConfig`'s own check, which would require optimum."""
    names, self.modules_in_block_to_quantize = self.modules_in_block_to_quantize, None
    theirs(self)
    self.modules_in_block_to_quantize = names


def _with_fusing(theirs: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    fusing = {name: kwargs.pop(name, None) for name in FUSING}
    theirs(self, *args, **kwargs)
    if fusing["do_fuse"] is None:
        fusing["do_fuse"] = fusing["modules_to_fuse"] is not None
    if fusing["do_fuse"] and fusing["fuse_max_seq_len"] is None:
        raise PlanError(
            "AwqConfig(do_fuse=True) without a length",
            "Add fuse_max_seq_len, the number of tokens of prompt and answer, such as 512.",
        )
    vars(self).update(fusing)


def _with_them(theirs: Any, self: Any) -> dict[str, Any]:
    return {**theirs(self), **{name: getattr(self, name, None) for name in FUSING}}


def _without_them(theirs: Any, self: Any) -> dict[str, Any]:
    return {key: value for key, value in theirs(self).items() if key not in FUSING}


register()
