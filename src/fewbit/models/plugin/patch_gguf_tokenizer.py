"""Lets `AutoTokenizer.from_pretrained(..., gguf_file=...)` use fewbit's reader, for architectures that fewbit knows.

`PreTrainedTokenizerFast`, the class of the result, is patched too. `fewbit.hook` patches both when AutoTokenizer's
module is imported.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.models.auto import tokenization_auto

from fewbit.models.patching import replace
from fewbit.models.plugin.patch_gguf_config import gguf_file, named

_CLASSES = (tokenization_auto.AutoTokenizer, PreTrainedTokenizerFast)

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


def _from_pretrained(theirs: Any, kind: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
    name = pretrained_model_name_or_path  # the parameter keeps transformers' name: callers may pass it by keyword
    # Subclasses read files themselves.
    file = named(name, kwargs, "*token*", "vocab*", "*.model") if kind in _CLASSES else None
    if file and (found := gguf_file(name, file, kwargs)) is not None:
        from fewbit.models.gguf.tokenizer import to_tokenizer

        return to_tokenizer(found, **{key: value for key, value in kwargs.items() if key not in _LOADING})
    return theirs(kind, name, *args, **kwargs)


def register() -> None:
    """Replace the method of both classes."""
    for cls in _CLASSES:
        replace(cls, "from_pretrained", _from_pretrained)


register()
