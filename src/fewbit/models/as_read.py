"""What transformers reads for a model, as a folder that the pipeline can read: its weight files and its config.

`variant`, `use_safetensors` and `config` of from_pretrained choose other files, or another config, than the folder
alone would give.
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

_OF_A_LOAD = ("quantization_config", "dtype", "torch_dtype", "transformers_version", "name_or_path")


@contextmanager
def folder_of(model: PreTrainedModel, files: list[str], *, trust_remote_code: bool) -> Iterator[Path]:
    """The folder of `files`, where it means this model; else one with these weights and this model's config."""
    paths = [Path(file).absolute() for file in files]
    folder = paths[0].parent
    changed = _changes(model, folder, trust_remote_code)
    if not changed and set(paths) == {
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
        (staged / "config.json").write_text(json.dumps({**read_config(folder), **changed}), encoding="utf-8")
        _link(paths, folder, staged)
        yield staged


def _changes(model: PreTrainedModel, folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    """What the model's config says other than the config.json of the folder."""
    own: Any = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    there, here = own.to_dict(), model.config.to_dict()
    return {
        key: value
        for key, value in here.items()
        if key not in _OF_A_LOAD and not key.startswith("_") and there.get(key) != value
    }


def _link(paths: list[Path], folder: Path, staged: Path) -> None:
    """The weight files in `staged`, under the names that are looked for; PlanError where no index lists them."""
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
