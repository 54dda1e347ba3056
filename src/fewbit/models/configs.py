"""Options that transformers' config objects accept and drop, kept: `AwqConfig(do_fuse=True, fuse_max_seq_len=512)`.

transformers 5 takes them without a word, and does nothing. Here they are checked at once, travel with a model that is
loaded, and are not written to its config.json: fusing belongs to a load, not to a file.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from transformers.utils.quantization_config import AwqConfig

from fewbit.errors import PlanError

_FUSING = ("do_fuse", "fuse_max_seq_len", "modules_to_fuse")


def register() -> None:
    """Let `AwqConfig` keep what it is told of fusing."""
    config: Any = AwqConfig
    make, loading, to_dict = config.__init__, config.get_loading_attributes, config.to_dict

    @wraps(make)
    def with_fusing(self: AwqConfig, *args: Any, **kwargs: Any) -> None:
        told = {name: kwargs.pop(name, None) for name in _FUSING}
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
        return {**loading(self), **{name: getattr(self, name, None) for name in _FUSING}}

    @wraps(to_dict)
    def without_them(self: AwqConfig) -> dict[str, Any]:
        return {key: value for key, value in to_dict(self).items() if key not in _FUSING}

    config.__init__, config.get_loading_attributes, config.to_dict = with_fusing, with_them, without_them


register()
