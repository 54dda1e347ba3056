"""Lets `AutoConfig.from_pretrained` read GGUF files with fewbit's reader, and old AutoGPTQ and AutoAWQ folders.

transformers' own GGUF reader does not validate the file. Folders of old AutoGPTQ and AutoAWQ keep the quantization
config in a file beside config.json. `fewbit.hook` applies this patch to `PreTrainedConfig._get_config_dict` when
`transformers.configuration_utils` is imported. This module must not import more of transformers than that.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import configuration_utils

from fewbit.models.patching import replace

if TYPE_CHECKING:
    from fewbit.formats.containers.gguf import GgufFile

LOCATING = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
_USED = {*LOCATING, "trust_remote_code", "_from_pipeline", "_from_auto"}  # not passed on as part of a config


def gguf_path(name: Any, file: str, options: Mapping[str, Any]) -> str:
    """The absolute path of `file` in the folder or Hub repository `name`; OSError if it is not there.

    If it is a part of a split model in a repository, the other parts are downloaded too.
    transformers looks for weights in the working directory first, but for the config in the folder.
    """
    from transformers.utils.hub import cached_file

    from fewbit.formats.containers import gguf_parts

    local = {key: options[key] for key in LOCATING if options.get(key) is not None}
    path = cached_file(str(name), str(file), **local)
    assert path is not None  # cached_file raises an error if there is none
    if not os.path.isdir(str(name)):
        for part in gguf_parts.siblings(Path(file)):
            cached_file(str(name), part.as_posix(), **local)
    return os.path.abspath(path)


def named(name: Any, options: Mapping[str, Any], *others: str) -> str | None:
    """The GGUF file to read: `gguf_file` of the options, or the only model in a folder that has nothing else to read.

    others: patterns of files that are read instead, besides config.json and an adapter. FormatError if the folder has
    several models.
    """
    if name is None or (file := options.get("gguf_file")):
        return None if name is None else file
    folder = Path(str(name)) / (options.get("subfolder") or "")
    others = ("config.json", "adapter_config.json", *others)
    if not folder.is_dir() or any(next(folder.glob(other), None) for other in others):
        return None
    from fewbit.models.source import only_gguf

    found = only_gguf(folder)
    return None if found is None else found.name


def gguf_file(name: Any, file: str, options: Mapping[str, Any]) -> GgufFile | None:
    """The file that these arguments name; None if fewbit does not load its architecture."""
    from fewbit.formats.containers.gguf import GgufFile
    from fewbit.models.gguf.architectures import of_file

    opened = GgufFile(gguf_path(name, file, options))
    return opened if of_file(opened) is not None else None


def _get_config_dict(theirs: Any, kind: Any, name: Any, **kwargs: Any) -> Any:
    from fewbit.models.gguf.config import to_config

    default = kwargs.get("_configuration_file", "config.json") == "config.json"
    file = named(name, kwargs) if default else kwargs.get("gguf_file")
    if file and (found := gguf_file(name, file, kwargs)) is not None:
        return to_config(found), {key: value for key, value in kwargs.items() if key not in _USED}
    config, rest = theirs(kind, name, **kwargs)
    folder = Path(str(name)) / (kwargs.get("subfolder") or "")
    if config is not None and default:
        from fewbit.models.foreign import check, completed

        config = completed(config, folder) if folder.is_dir() else config
        if not isinstance(quantized := config.get("quantization_config", {}), (dict, type(None))):
            check(quantized)  # transformers' own error does not say why
    return config, rest


def register() -> None:
    """Replace the method of transformers that reads a config file."""
    if hasattr(configuration_utils.PreTrainedConfig, "_get_config_dict"):
        replace(configuration_utils.PreTrainedConfig, "_get_config_dict", _get_config_dict)


register()
