"""Options that transformers' config objects accept and drop, kept: `AwqConfig(do_fuse=True, fuse_max_seq_len=512)`.

transformers 5 takes them without a word, and does nothing. Here they are checked at once, travel with a model that is
loaded, and are not written to its config.json: fusing belongs to a load, not to a file. And `GPTQConfig` takes
`modules_in_block_to_quantize` without optimum, of which it would otherwise ask the version.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from transformers.utils.quantization_config import AwqConfig, GPTQConfig

from fewbit.errors import PlanError
from fewbit.models.plugin.options import FUSING


def register() -> None:
    """Let `AwqConfig` keep what it is told of fusing, and `GPTQConfig` the modules to quantize."""
    keep_modules(GPTQConfig)
    config: Any = AwqConfig
    make, loading, to_dict = config.__init__, config.get_loading_attributes, config.to_dict

    @wraps(make)
    def with_fusing(self: AwqConfig, *args: Any, **kwargs: Any) -> None:
        told = {name: kwargs.pop(name, None) for name in FUSING}
        make(self, *args, **kwargs)
        if told["do_fuse"] is None:
            told["do_fuse"] = told["modules_to_fuse"] is not None
        if told["do_fuse"] and told["fuse_max_seq_len"] is None:
            raise PlanError(
                "AwqConfig(do_fuse=True) without a length", "Add fuse_max_seq_len=512 or so: prompt and answer, tokens."
            )
        vars(self).update(told)

    @wraps(loading)
    def with_them(self: AwqConfig) -> dict[str, Any]:
        return {**loading(self), **{name: getattr(self, name, None) for name in FUSING}}

    @wraps(to_dict)
    def without_them(self: AwqConfig) -> dict[str, Any]:
        return {key: value for key, value in to_dict(self).items() if key not in FUSING}

    config.__init__, config.get_loading_attributes, config.to_dict = with_fusing, with_them, without_them


def keep_modules(config: Any) -> None:
    """Let `GPTQConfig` check all but `modules_in_block_to_quantize`, and keep that."""
    check = config.post_init

    @wraps(check)
    def without_optimum(self: Any) -> None:
        asked, self.modules_in_block_to_quantize = self.modules_in_block_to_quantize, None
        check(self)
        self.modules_in_block_to_quantize = asked

    config.post_init = without_optimum


register()
