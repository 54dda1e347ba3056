"""Lets `AutoTokenizer.from_pretrained(..., gguf_file=...)` use fewbit's reader, for architectures that fewbit knows.

`PreTrainedTokenizerFast`, the class of the result, is patched too. `fewbit.hook` patches both when AutoTokenizer's
module is imported.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.models.auto import tokenization_auto

from fewbit.models.plugin.patch_gguf_config import gguf_file, named

# Arguments that say where the files are and which class reads them. All others go to the tokenizer.
_LOADING = {
    "gguf_file",
    "cache_dir",
    "force_download",
    "resume_download",
    "proxies",
    "token",
    "use_auth_token",
    "revision",
    "code_revision",
    "subfolder",
    "local_files_only",
    "trust_remote_code",
    "use_fast",
    "tokenizer_type",
    "config",
    "backend",
    "_commit_hash",
    "_from_auto",
    "_from_pipeline",
    "user_agent",
    "fix_mistral_regex",
}


def _put_before(cls: Any) -> None:
    theirs = cls.from_pretrained
    if hasattr(theirs, "by_fewbit") and "from_pretrained" in vars(cls):
        return
    inner = getattr(theirs, "__func__", None)

    @wraps(theirs)
    def ours(kind: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        name = pretrained_model_name_or_path  # the parameter keeps transformers' name: callers may pass it by keyword
        # Subclasses read files themselves.
        file = named(name, kwargs, "*token*", "vocab*", "*.model") if kind is cls else None
        if file and (found := gguf_file(name, file, kwargs)) is not None:
            from fewbit.models.gguf.tokenizer import to_tokenizer

            return to_tokenizer(found, **{key: value for key, value in kwargs.items() if key not in _LOADING})
        return inner(kind, name, *args, **kwargs) if inner is not None else theirs(name, *args, **kwargs)

    ours.by_fewbit = True  # type: ignore[attr-defined]
    cls.from_pretrained = classmethod(ours)


def register() -> None:
    """Wrap the method of both classes."""
    _put_before(tokenization_auto.AutoTokenizer)
    _put_before(PreTrainedTokenizerFast)


register()
