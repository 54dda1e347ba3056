"""Keeps options that transformers' config objects accept and drop: `AwqConfig(do_fuse=True, fuse_max_seq_len=512)`.

transformers 5 ignores them silently. With this patch they are checked when the config is created and kept on the loaded
model. They are not written to config.json, because fusing belongs to one load and not to a file. The patch also lets
`GPTQConfig` take `modules_in_block_to_quantize` if optimum is not installed; transformers alone checks its version.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from transformers.utils.quantization_config import AwqConfig, GPTQConfig

from fewbit.errors import PlanError
from fewbit.models.plugin.options import FUSING


def register() -> None:
    """Let `AwqConfig` keep its fusing options, and `GPTQConfig` its list of modules to quantize."""
    keep_modules(GPTQConfig)
    config: Any = AwqConfig
    make, loading, to_dict = config.__init__, config.get_loading_attributes, config.to_dict

    @wraps(make)
    def with_fusing(self: AwqConfig, *args: Any, **kwargs: Any) -> None:
        fusing = {name: kwargs.pop(name, None) for name in FUSING}
        make(self, *args, **kwargs)
        if fusing["do_fuse"] is None:
            fusing["do_fuse"] = fusing["modules_to_fuse"] is not None
        if fusing["do_fuse"] and fusing["fuse_max_seq_len"] is None:
            raise PlanError(
                "AwqConfig(do_fuse=True) without a length",
                "Add fuse_max_seq_len, the number of tokens of prompt and answer, such as 512.",
            )
        vars(self).update(fusing)

    @wraps(loading)
    def with_them(self: AwqConfig) -> dict[str, Any]:
        return {**loading(self), **{name: getattr(self, name, None) for name in FUSING}}

    @wraps(to_dict)
    def without_them(self: AwqConfig) -> dict[str, Any]:
        return {key: value for key, value in to_dict(self).items() if key not in FUSING}

    config.__init__, config.get_loading_attributes, config.to_dict = with_fusing, with_them, without_them


def keep_modules(config: Any) -> None:
    """Hide `modules_in_block_to_quantize` from `GPTQConfig`'s own check, which would require optimum."""
    check = config.post_init

    @wraps(check)
    def without_optimum(self: Any) -> None:
        names, self.modules_in_block_to_quantize = self.modules_in_block_to_quantize, None
        check(self)
        self.modules_in_block_to_quantize = names

    config.post_init = without_optimum


register()
