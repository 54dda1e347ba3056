"""Make a folder for the pipeline with exactly the weight files and the config that transformers loads.

The arguments `variant`, `use_safetensors` and `config` of from_pretrained can select other weight files, or another
config, than the defaults of the folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from fewbit.errors import PlanError
from fewbit.formats.containers import pickle, safetensors
from fewbit.models.source import read_config
from fewbit.system.files import read_json

_LOAD_KEYS = ("quantization_config", "dtype", "torch_dtype", "transformers_version", "name_or_path")


@contextmanager
def folder_of(model: PreTrainedModel, files: list[str], *, trust_remote_code: bool) -> Iterator[Path]:
    """The folder of `files` if it describes this model by itself; else a temporary folder with links to these weight
    files and this model's config. PlanError if no index lists the files."""
    paths = [Path(file).absolute() for file in files]
    folder = paths[0].parent
    config = _config(model, folder, trust_remote_code)
    if config is None and set(paths) == {
        file.absolute() for file in safetensors.files_in(folder) or pickle.files_in(folder)
    }:
        yield folder
        return
    with TemporaryDirectory(prefix="fewbit-") as made:
        staged = Path(made)
        for file in safetensors.side_files(folder):
            if str(file) != "config.json":
                (staged / file).parent.mkdir(parents=True, exist_ok=True)
                (staged / file).symlink_to((folder / file).absolute())
        (staged / "config.json").write_text(json.dumps(config or read_config(folder)), encoding="utf-8")
        _link(paths, folder, staged)
        yield staged


def _config(model: PreTrainedModel, folder: Path, trust_remote_code: bool) -> dict[str, Any] | None:
    """The content of config.json that describes this model; None if that of the folder does."""
    own: Any = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    there, here = own.to_dict(), {**model.config.to_dict(), "architectures": [type(model).__name__]}
    here = {key: value for key, value in here.items() if key not in _LOAD_KEYS and not key.startswith("_")}
    if type(own) is not type(model.config):  # the text-only class of a model with towers has the config of the text
        return {**here, "dtype": str(model.dtype).removeprefix("torch.")}
    changed = {key: value for key, value in here.items() if there.get(key) != value}
    return {**read_config(folder), **changed} if changed else None


def _link(paths: list[Path], folder: Path, staged: Path) -> None:
    """Link the weight files into `staged` under their standard names. PlanError if no index lists all of them."""
    suffix = paths[0].suffix
    single = {".safetensors": safetensors.SINGLE, ".bin": "pytorch_model.bin"}[suffix]
    if len(paths) == 1:
        (staged / single).symlink_to(paths[0])
        return
    names = {path.name for path in paths}
    for index in sorted(folder.glob(f"*{suffix}.index*.json")):
        if set(read_json(index)["weight_map"].values()) == names:
            (staged / f"{single}.index.json").symlink_to(index.absolute())
            for path in paths:
                (staged / path.name).symlink_to(path)
            return
    raise PlanError(f"{folder}: no index lists the files that transformers reads, such as {paths[0].name}")
