"""Find a model: a local folder or GGUF file, a model of fewbit (tiny, smollm2), or one of the Hugging Face Hub."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from fewbit import names, registry
from fewbit.errors import FormatError, PlanError
from fewbit.formats.containers import gguf_parts, pickle, safetensors
from fewbit.formats.containers.gguf import GgufFile, is_gguf
from fewbit.models import foreign, scales, smollm2, stated
from fewbit.models.gguf import config as gguf_config
from fewbit.models.gguf import towers
from fewbit.names import DEMO, EMBEDDED
from fewbit.system.files import read_json

_NO_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)
# All files that a causal LM in the Hugging Face layout can need, without weights of other frameworks.
_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "*.spm"]
_PATTERNS += ["tokenizer.model*", "LICEN[SC]E*", "NOTICE*", safetensors.CARD, "USE_POLICY*", scales.FILE]

_TOKENIZERS = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "*.spm", "*.py")


@dataclass(frozen=True)
class Source:
    """A located model. All paths are absolute, because transformers, PEFT and other processes look in the working
    directory first.

    name: the user's name for it, for messages. folder: the model's folder; for weights in a pickle, a converted copy in
    the cache. files: the weight files (safetensors, or one GGUF file with its parts). origin: the path that the user
    named. gguf: the path of the GGUF file, for transformers' `gguf_file`; None for other models. mmproj: the file with
    the vision tower of a GGUF model; None without one, as a folder has its tower itself.
    """

    name: str
    folder: Path
    files: tuple[Path, ...]
    origin: Path
    gguf: str | None = None
    hosted: bool = False  # the name is a model of fewbit or the Hub, not a path
    mmproj: Path | None = None

    @property
    def address(self) -> str:
        """A name with which `locate` finds this model from any working directory."""
        return self.name if self.hosted else str(self.origin)

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json; for a GGUF file, the equivalent from its metadata."""
        if self.mmproj is not None:
            return deepcopy(_config_with_tower(self.files[0], self.mmproj))
        return read_config(self.folder) if self.gguf is None else deepcopy(_config_of(self.files[0]))

    @property
    def language(self) -> Source:
        """The language model alone, if the tower is in another file."""
        return replace(self, mmproj=None)

    @property
    def towers(self) -> list[Path]:
        """The vision and audio towers beside a GGUF model whose folder was named; empty for other models."""
        files = sorted(self.folder.glob("*.gguf")) if self.gguf is not None and self.origin.is_dir() else []
        return [file for file in files if towers.is_tower(GgufFile(file))]

    @property
    def beside(self) -> Path:
        """The folder with the tokenizer and other side files. For weights in a pickle, this is not `folder`."""
        return self.origin if self.origin.is_dir() else self.folder

    @property
    def without_tokenizer(self) -> bool:
        """Whether the folder has no file of a tokenizer."""
        return self.gguf is None and not any(any(self.folder.glob(pattern)) for pattern in _TOKENIZERS)

    @property
    def options(self) -> dict[str, Any]:
        """Further arguments of `from_pretrained`, besides the folder."""
        return {} if self.gguf is None else {"gguf_file": self.gguf}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in config.json: float16, float32 or bfloat16. bfloat16 if it is missing or another."""
        config = self.config
        name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
        return {"float16": torch.float16, "float32": torch.float32}.get(name, torch.bfloat16)

    @property
    def context(self) -> int:
        """The context length in tokens; 2048 if config.json has none."""
        return self.stated_context or 2048

    @property
    def stated_context(self) -> int | None:
        """The context length in config.json, in tokens. None if it has none, such as a model without positions."""
        return self._stated("max_position_embeddings", "n_positions", "max_seq_len")

    @property
    def rows(self) -> int | None:
        """Rows of the token embedding; None if config.json has no vocab_size."""
        return self._stated(*stated.ROWS)

    def _stated(self, *keys: str) -> int | None:
        """The value of the first of `keys` in the config of the language model inside config.json, or in config.json
        itself. FormatError if it is not an integer above 0."""
        config = self.config
        found = stated.number(config, keys, self.folder)
        return self._default(keys) if found is None and stated.language(config) else found

    def _default(self, keys: tuple[str, ...]) -> int | None:
        """The default of transformers for the first of `keys`: configs of models with towers often leave it out."""
        from transformers import AutoConfig  # slow to import

        try:
            own = AutoConfig.for_model(**self.config).get_text_config(decoder=True)
        except Exception:  # remote code, or a wrong config: loading it gives the error
            return None
        return next((found for key in keys if isinstance(found := getattr(own, key, None), int) and found > 0), None)

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The quantization_config of config.json, with the keys of fewbit's formats; None for unquantized models."""
        if self.gguf is not None:
            return {"quant_method": "gguf"}
        if (found := self.config.get("quantization_config")) is None:
            return None
        try:
            return foreign.normalized(found)
        except FormatError as error:
            raise FormatError(f"{self.folder}: {error.message}", error.hint) from None


def locate(name: str | Path, *, safetensors_only: bool = False) -> Source:
    """Find the model `name` and its files, and check their headers.

    A string can name a model of fewbit, such as tiny. A `Path` always means a file or folder, even one called tiny.
    safetensors_only: refuse weights in pickle files. PlanError if there is no such model, FormatError if its files are
    malformed.
    """
    path = names.path_of(name)
    if path is not None and path.is_file() and is_gguf(path):
        return _of_gguf(str(name), path, path)
    if path is not None and not path.exists() and (place := names.hub_file(str(name))) is not None:
        found = _download_file(str(name), *place)
        return _of_gguf(str(name), found, found, hosted=True)
    origin = folder = _folder(str(name), path, safetensors_only)
    if not (folder / "config.json").exists() and (file := only_gguf(folder)) is not None:
        return _of_gguf(str(name), file, folder)
    files = safetensors.files_in(folder, _weights_name(read_config(folder)))
    if not files:
        pickles = pickle.files_in(folder)
        if not pickles:
            raise FormatError(f"{folder} has no weights", "Expected model.safetensors or pytorch_model.bin.")
        if safetensors_only:
            raise FormatError(
                f"{folder} has its weights only as a pickle ({pickles[0].name}), which `safetensors_only` forbids"
            )
        folder = pickle.converted(folder, str(name))
        files = safetensors.files_in(folder)
    return Source(str(name), folder, tuple(files), origin, hosted=origin != path)


def outlined(name: str | Path) -> Source:
    """Find the model `name`, with or without weights: a config.json, a folder with a config.json, or a Hub name.

    From the Hub, only config.json is downloaded. Local weights are found, except pickles. PlanError if there is no such
    model, FormatError if its files are malformed.
    """
    path = names.path_of(name)
    if path is None:
        return locate(name)
    if path.is_file() and path.suffix == ".json":
        if path.name != "config.json":
            raise PlanError(f"model {name}: this is not a config.json", "Give the folder, or its config.json.")
        read_config(path.parent)
        return Source(str(name), path.parent, (), path.parent)
    if (
        path.is_dir()
        and (path / "config.json").exists()
        and not safetensors.files_in(path, _weights_name(read_config(path)))
    ):
        return Source(str(name), path, (), path)
    if path.exists() or not names.is_hub_name(str(name)):
        return locate(name)
    folder = _download(str(name), safetensors_only=True, patterns=["config.json"])
    read_config(folder)
    return Source(str(name), folder, (), folder, hosted=True)


def with_tower(source: Source, mmproj: str | Path | None) -> Source:
    """`source` with the vision tower in the file `mmproj`; None: with the one that is beside a GGUF model in a folder.

    mmproj: a file, or one of the Hub (org/model/mmproj.gguf). Without `mmproj`, a folder must be named, not a file in
    it. PlanError for a model that is no GGUF file; FormatError if the tower belongs to another model.
    """
    if mmproj is None:
        found = source.towers
        if len(found) > 1:
            listed = ", ".join(file.name for file in found[:5])
            raise FormatError(f"{source.folder} has several vision towers ({listed})", "Name one as `mmproj`.")
        place = found[0] if found else None
    elif source.gguf is None:
        raise PlanError(
            f"`mmproj={mmproj}`: {source.name} is no GGUF file",
            "Leave out `mmproj`: other models have their vision tower, if any, in their own files.",
        )
    else:
        place = Path(mmproj).absolute()
        if not place.exists() and (there := names.hub_file(str(mmproj))) is not None:
            place = _download_file(str(mmproj), *there)
    if place is None:
        return source
    try:
        _config_with_tower(source.files[0], place)
    except FormatError as error:
        if mmproj is not None:
            raise
        hint = f"Name the language model's file, which runs on text: {source.files[0]}"
        raise FormatError(error.message, hint) from None
    return replace(source, mmproj=place)


def _of_gguf(name: str, path: Path, origin: Path, *, hosted: bool = False) -> Source:
    file = GgufFile(path)
    _config_of(file.path)
    return Source(name, path.parent, file.files, origin, str(file.path), hosted)


def only_gguf(folder: Path) -> Path | None:
    """The only GGUF file of a folder, or the first part of a split one. FormatError if there are several."""
    files = [file for file in sorted(folder.glob("*.gguf")) if not gguf_parts.is_later(file)]
    found = [file for file in files if len(files) == 1 or not towers.is_tower(GgufFile(file))]
    if files and not found:
        raise FormatError(
            f"{folder} has vision or audio towers alone, such as {files[0].name}",
            "Put the GGUF file of the language model beside the one of its tower.",
        )
    files = found
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:5])
        raise FormatError(
            f"{folder} has several GGUF files ({names})",
            f"Name one, such as {files[0]}; with transformers, gguf_file={files[0].name!r}.",
        )
    return files[0] if files else None


def name_of(model: Any) -> str:
    """What names a loaded model for `locate`: its name_or_path, or its GGUF file if that folder has other models, too.

    name_or_path stays a folder: transformers reads tokenizers and configs there. Empty if the model has no name.
    """
    name = str(getattr(model, "name_or_path", None) or "")
    file: Path | None = getattr(getattr(model, "hf_quantizer", None), "origin", None)
    if file is None or not name or Path(name).resolve() != file.parent.resolve():
        return name
    with suppress(FormatError):
        if not (file.parent / "config.json").exists() and only_gguf(file.parent) is not None:
            return name
    return str(file)


def _config_of(path: Path) -> dict[str, Any]:
    """The config of a GGUF file, cached, because reading the file's vocabulary takes long."""
    return _read_config_of(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _read_config_of(path: Path, changed: int) -> dict[str, Any]:
    return gguf_config.to_config(GgufFile(path))


def _config_with_tower(path: Path, tower: Path) -> dict[str, Any]:
    """The config of a GGUF file with a vision tower, cached as well."""
    return _read_config_with_tower(path, path.stat().st_mtime_ns, tower, tower.stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _read_config_with_tower(path: Path, changed: int, tower: Path, tower_changed: int) -> dict[str, Any]:
    text = _config_of(path)
    return towers.to_config(text, towers.opened(tower, text["model_type"]), GgufFile(path))


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a folder's config.json. FormatError if it is missing or not a JSON object."""
    try:
        config = read_json(folder / "config.json")
    except FileNotFoundError:
        raise FormatError(f"{folder} has no config.json", "A model is a folder in the Hugging Face layout.") from None
    except OSError as error:
        raise FormatError(f"{folder / 'config.json'}: {error}") from None
    if not isinstance(config, dict):
        raise FormatError(f"{folder / 'config.json'} does not contain a JSON object")
    return foreign.completed(config, folder)


def _weights_name(config: dict[str, Any]) -> str | None:
    """The name of the weight file, or of its index, if config.json or AutoGPTQ's settings give one."""
    name = config.get("transformers_weights")
    return name if isinstance(name, str) and Path(name).name == name else None


def _folder(name: str, path: Path | None, safetensors_only: bool) -> Path:
    if path is None:
        return stated.TINY if name == EMBEDDED else smollm2.folder()
    if path.is_dir():
        return path
    if path.exists():
        raise PlanError(f"model {name}: this is a file", "Give a .gguf file, or the folder that holds config.json.")
    names.check(name)
    return _download(name, safetensors_only)


def _download_file(name: str, repo: str, file: str) -> Path:
    """A GGUF file of a repository, with the other parts if it is one. PlanError if it cannot be had."""
    patterns = [str(each) for each in gguf_parts.siblings(Path(file))]
    with _as_plan_error(name):
        folder = Path(snapshot_download(repo, allow_patterns=patterns))
    if not (folder / file).is_file():
        raise PlanError(f"model {name}: {repo} has no file {file}", "Look at the files of the repository.")
    return folder / file


def _download(name: str, safetensors_only: bool, patterns: list[str] = _PATTERNS) -> Path:
    with _as_plan_error(name):
        folder = Path(snapshot_download(name, allow_patterns=patterns))
        if not safetensors_only and not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*_PATTERNS, "pytorch_model*.bin"]))
        return folder


@contextmanager
def _as_plan_error(name: str) -> Iterator[None]:
    """Errors of a download as a PlanError."""
    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, OSError) and error.errno in _NO_PLACE:
            at = f" ({error.filename})" if error.filename else ""
            raise PlanError(
                f"model {name}: cannot save it in the cache of the Hub: {error.strerror}{at}",
                "Set HF_HOME to a writable folder with enough free space.",
            ) from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        unreached = isinstance(error, LocalEntryNotFoundError)
        failed = "Hub could not be reached" if unreached else "download from the Hub failed"
        near = [] if "/" in name else registry.close(name, (EMBEDDED, DEMO))
        sought = "file" if name.endswith(".gguf") else "folder"
        raise PlanError(
            f"model {name}: no such {sought} here, and the {failed}: {reason.removeprefix('Got: ')}",
            f"Did you mean {near[0]}?"
            if near
            else f"Check the name and the connection, or use a local folder or the embedded model {EMBEDDED!r}.",
        ) from None
