"""Translate quantization configs of other tools into those of the formats that fewbit reads.

Old versions of AutoGPTQ and AutoAWQ wrote the config to a separate file, and named the weight file after the settings.
ModelOpt writes a separate file too.
AutoRound has its own names for the layouts of GPTQ and AWQ. Its native packing is GPTQ's with unshifted zero points
(v2).
Source: AutoRound 0.16 (`convert_model.py`, `backend.py`), AutoAWQ 0.2 (`_config.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewbit.errors import FormatError
from fewbit.formats.containers.safetensors import INDEX, SINGLE
from fewbit.system.files import read_json

# -> method if the file names none
_SIDE_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
_AUTO_ROUND = ("auto-round", "intel/auto-round")
_OLD_NAMES = {"w_bit": "bits", "q_group_size": "group_size"}
_GPTQ_KEYS = ("desc_act", "sym", "checkpoint_format", "damp_percent")
_AWQ_KEYS = ("w_bit", "zero_point", "version")
_INSTEAD = "Use the original model, or a copy in GPTQ, AWQ, bitsandbytes, compressed-tensors or GGUF format."
# Methods that fewbit does not read: quant_method -> what people call it.
_TOOLS = {
    "aqlm": "AQLM",
    "bitnet": "BitNet",
    "deepspeedfp": "DeepSpeed FP6 or FP8",
    "eetq": "EETQ",
    "exl2": "EXL2 (ExLlamaV2)",
    "exl3": "EXL3 (ExLlamaV3)",
    "fouroversix": "Four Over Six",
    "fp_quant": "FP-Quant",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "marlin": "Marlin, the old format of AutoGPTQ",
    "mlx": "MLX (mlx-lm)",
    "quanto": "Quanto (optimum-quanto)",
    "quark": "Quark (AMD)",
    "quip": "QuIP#",
    "quip_sharp": "QuIP#",
    "sinq": "SINQ",
    "spqr": "SpQR",
    "torchao": "torchao",
    "vptq": "VPTQ",
}


def completed(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The content of config.json, `config`, plus the quantization config in other files of its folder.

    If the weight file has a nonstandard name, the key `transformers_weights` gives it to transformers.
    """
    made = dict(config)
    if made.get("quantization_config") is None and (found := _beside(folder)) is not None:
        made["quantization_config"] = found
    if isinstance(found := made.get("quantization_config"), dict):
        made["quantization_config"] = _named(found)
        if "transformers_weights" not in made and (name := _weights(folder, found)) is not None:
            made["transformers_weights"] = name
    return made


def check(found: Any) -> None:
    """FormatError unless `found` is a quantization config with a method. The message names the tool if known."""
    if isinstance(found, str):
        raise FormatError(
            f"quantization_config in config.json is {found!r}, the name of a tool or method, but it must be an object "
            "with quant_method",
            _INSTEAD,
        )
    if not isinstance(found, Mapping):
        raise FormatError(f"quantization_config in config.json is {found!r}: it must be an object with quant_method")
    if found.get("load_in_4bit") or found.get("load_in_8bit") or isinstance(found.get("quant_method"), str):
        return
    if {"bits", "group_size"} <= set(found):
        raise unread("mlx")
    raise FormatError(f"quantization_config in config.json has no quant_method: {str(dict(found))[:200]}")


def unread(method: str) -> FormatError:
    """The error for a checkpoint of a quantization method that fewbit does not read. It names the tool if known."""
    tool = _TOOLS.get(method)
    if tool is None:
        return FormatError(f"quantization method {method!r} in config.json is unknown to fewbit", _INSTEAD)
    return FormatError(f"the weights are quantized by {tool}, and fewbit does not read this format", _INSTEAD)


def by_transformers(method: str) -> str:
    """A hint for a checkpoint that transformers could not load, if its method is one that fewbit does not read."""
    tool = _TOOLS.get(method)
    return f"It is quantized by {tool}, which fewbit leaves to transformers. {_INSTEAD}" if tool else ""


def normalized(found: Mapping[str, Any]) -> dict[str, Any]:
    """The quantization config with the keys of fewbit's formats. FormatError for packings of AutoRound without one."""
    check(found)
    config = _named(found)
    if config["quant_method"] not in _AUTO_ROUND:
        return config
    packing = str(config.get("packing_format") or config.get("backend") or "auto_round:auto_gptq")
    kind, form = str(config.get("data_type", "int")), packing.removeprefix("auto_round:")
    if not packing.startswith("auto_round") and packing != "auto":
        raise FormatError(f"AutoRound's packing {packing!r} is unknown", _INSTEAD)
    if form == "llm_compressor" and config.get("bits") == 4 and kind.startswith(("mx_fp", "nv_fp")):
        return _as_compressed_tensors(config, nvfp4=kind.startswith("nv_fp"))
    if kind != "int" or form.startswith(("llm_compressor", "fp8", "nv_fp", "mx_fp", "fake", "mlx")):
        raise FormatError(f"AutoRound packed these weights as {packing}, data type {kind}: fewbit reads only integers")
    made = {key: value for key, value in config.items() if key not in ("packing_format", "backend", "extra_config")}
    extra = config.get("extra_config") or {}
    if not isinstance(extra, dict) or not all(isinstance(said, dict) for said in extra.values()):
        raise FormatError("AutoRound's extra_config is not an object of objects")
    made["dynamic"] = {_pattern(name, said): said for name, said in extra.items()}
    if "awq" in form:
        return made | {"quant_method": "awq", "version": "gemm"}
    first = form in ("auto", "auto_gptq", "gptq")
    return made | {"quant_method": "gptq", "checkpoint_format": "gptq" if first else "gptq_v2"}


def _beside(folder: Path) -> dict[str, Any] | None:
    """The quantization config in a separate file of the folder, with its method; None without such a file."""
    for name, method in _SIDE_FILES.items():
        file = folder / name
        if not file.is_file():
            continue
        try:
            found = read_json(file)
        except OSError as error:
            raise FormatError(f"{file}: {error}") from None
        if not isinstance(found, dict):
            raise FormatError(f"{file} does not contain a JSON object")
        return _named({"quant_method": method, **found})
    return None


def _named(found: Mapping[str, Any]) -> dict[str, Any]:
    """The config with its method, and with today's names for old keys of AutoAWQ."""
    config = {_OLD_NAMES.get(key, key): value for key, value in found.items()}
    if config.get("quant_method") is None:
        if config.get("load_in_4bit") or config.get("load_in_8bit"):
            config["quant_method"] = "bitsandbytes"
        elif any(key in found for key in _AWQ_KEYS):
            config["quant_method"] = "awq"
        elif any(key in found for key in _GPTQ_KEYS):
            config["quant_method"] = "gptq"
    if config.get("quant_method") == "awq" and isinstance(version := config.get("version"), str):
        config["version"] = version.lower()
    if config.get("quant_method") == "gptq" and config.get("is_marlin_format"):
        config.setdefault("checkpoint_format", "marlin")
    if config.get("quant_method") == "intel/auto-round":
        config["quant_method"] = "auto-round"
    return config


def _weights(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Name of the weight file, or its index, with a name of AutoGPTQ; None if the folder has the standard names."""
    if (folder / SINGLE).exists() or (folder / INDEX).exists():
        return None
    base = config.get("model_file_base_name") or config.get("model_basename")
    for suffix in (".safetensors.index.json", ".safetensors"):
        if isinstance(base, str) and Path(base).name == base and (folder / f"{base}{suffix}").is_file():
            return f"{base}{suffix}"
        files = sorted(file.name for file in folder.glob(f"*{suffix}"))
        if len(files) == 1:
            return files[0]
    return None


def _pattern(name: str, said: Mapping[str, Any]) -> str:
    """The pattern in `dynamic` for a name in extra_config, which may itself be a regular expression."""
    left = isinstance(bits := said.get("bits"), int) and bits >= 16
    plain = re.fullmatch(r"[\w.\-]+", name) is not None
    return f"{'-' if left else '+'}:{f'^{re.escape(name)}$' if plain else f'.*(?:{name})'}"


def _as_compressed_tensors(config: Mapping[str, Any], *, nvfp4: bool) -> dict[str, Any]:
    """The config of compressed-tensors for MXFP4 or NVFP4 weights of AutoRound, which have the same tensors.

    FormatError if single layers have other settings, except those that stay in 16 bits. Source: auto-round,
    export_to_autoround/export_to_nvfp_mxfp.py and qlinear_fp.py.
    """
    extra = config.get("extra_config") or {}
    if not isinstance(extra, dict) or not all(isinstance(said, dict) for said in extra.values()):
        raise FormatError("AutoRound's extra_config is not an object of objects")
    for name, said in extra.items():
        if not (isinstance(bits := said.get("bits"), int) and bits >= 16):
            raise FormatError(f"AutoRound's extra_config gives {name} settings of its own, {dict(said)}", _INSTEAD)
    plain = {name: re.fullmatch(r"[\w.\-]+", name) is not None for name in extra}
    ignored = [name if plain[name] else f"re:.*(?:{name})" for name in extra]
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False}
    kind = {"strategy": "tensor_group", "group_size": 16} if nvfp4 else {"strategy": "group", "group_size": 32}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{'nvfp4' if nvfp4 else 'mxfp4'}-pack-quantized",
        "ignore": ["lm_head", *ignored],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {**weights, **kind}}},
    }
