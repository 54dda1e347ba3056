"""Rotary positions (RoPE) as the metadata of a GGUF file, and back.

transformers' rope_parameters                     file (`a` is the name of the architecture)
rope_theta                                        a.rope.freq_base
  linear, yarn                                    a.rope.scaling.*
  llama3                                          no key, but the tensor rope_freqs.weight [head_dim / 2]: the
                                                  divisor of each frequency
  proportional                                    the same tensor: 1 for columns that are turned, 1e30 for others
  longrope                                        the tensors rope_factors_long.weight and rope_factors_short.weight
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbit.errors import PlanError
from fewbit.models.gguf import kinds
from fewbit.models.gguf.architecture import Architecture
from fewbit.models.gguf.metadata import Metadata

SECTIONS = (11, 11, 10)  # of RoPE, for images
_NOT_TURNED = 1e30  # the divisor of columns that are not turned, as llama.cpp's converter writes it
_TENSORS = {"llama3": "rope_freqs.weight", "proportional": "rope_freqs.weight", "longrope": "rope_factors_long.weight"}
_RAMP = {"beta_fast": 32.0, "beta_slow": 1.0}  # of YaRN, as it is without these entries


def of_config(config: Any) -> dict[str, Any]:
    """The rotary parameters; those of full attention if there are two kinds of layers.

    The base is that of the layers, if the config has the one of each.
    """
    found = getattr(config, "rope_parameters", None) or {}
    bases = _bases(getattr(config, "layer_rope_theta", None) or ())
    return {**found.get("full_attention", found), **({"rope_theta": bases[0]} if bases else {})}


def _bases(each: Sequence[float]) -> list[float]:
    """The bases of RoPE in a list of one for each layer, which is 0 for those without RoPE."""
    return sorted({float(base) for base in each} - {0.0})


def to_keys(config: Any, arch: Architecture, rope: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of scaled positions. PlanError if llama.cpp would compute something else."""
    kind = rope.get("rope_type", "default")
    if arch.two_kinds and (kind != "proportional" or rope.get("factor", 1.0) != 1):
        raise PlanError(
            f"llama.cpp runs {arch.name} with proportional RoPE with factor 1 in layers with full attention; this "
            f"model has {rope}"
        )
    local = {} if arch.local_theta is None else config.rope_parameters.get("sliding_attention") or {}
    part = local.get("partial_rotary_factor", arch.turned_part)
    wanted = rope.get("partial_rotary_factor", arch.turned_part) if arch.partial_rotary else 1.0
    if local.get("rope_type", "default") != "default" or (local and not arch.turned_in_windows and part != wanted):
        raise PlanError(
            f"llama.cpp runs {arch.name} with {windows(arch)} in layers with a sliding window; this model has {local}"
        )
    for key, wanted in arch.rope_required.items():
        if (one := rope.get(key)) != wanted:
            raise PlanError(
                f"llama.cpp runs {arch.name} with {key} = {wanted} in rope_parameters; this model has {one}"
            )
    if (tensors := _TENSORS.get(kind)) and tensors not in arch.extra:
        raise PlanError(f"llama.cpp runs {arch.name} without rope scaling of type {kind!r}")
    if kind in ("default", "llama3", "proportional"):
        return {}
    if kind == "longrope":
        original = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
        scale = config.max_position_embeddings / original
        stretched = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        return {
            "rope.scaling.original_context_length": original,
            "rope.scaling.attn_factor": float(rope.get("attention_factor") or stretched),
        }
    if "rope.scaling.type" in arch.constants:
        raise PlanError(f"llama.cpp runs {arch.name} without rope scaling of type {kind!r}")
    if kind not in ("linear", "yarn"):
        raise PlanError(f"a GGUF file cannot express rope scaling of type {kind!r}")
    found: dict[str, Any] = {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    return found | _yarn(arch, rope) if kind == "yarn" else found


def windows(arch: Architecture) -> str:
    """The RoPE of layers with a sliding window."""
    if arch.turned_in_windows:
        return "unscaled RoPE"
    return "unscaled RoPE of the same part of a head" if arch.partial_rotary else "whole, unscaled RoPE"


def columns(rope: Mapping[str, Any], width: int, arch: Architecture) -> int:
    """The columns of a head that RoPE turns. PlanError for an odd number."""
    found = int(width * rope.get("partial_rotary_factor", arch.turned_part))
    if found % 2:
        raise PlanError(f"llama.cpp runs {arch.name} with RoPE of an even number of columns; this model has {found}")
    return found


def sections(found: Any, most: int) -> np.ndarray[Any, Any]:
    """The sections of RoPE for images as a file has them. PlanError unless they are of at most `most` columns."""
    numbers = isinstance(found, list | tuple) and all(type(each) is int and each >= 0 for each in found)
    if not numbers or len(found) != len(SECTIONS) or sum(found) > most:
        raise PlanError(
            f"mrope_section is {str(found)[:80]}, not {len(SECTIONS)} integers from 0 with a sum of at most {most}",
            "Use the mrope_section of the original model's config.json.",
        )
    return np.array([*found, 0], np.int32)


def turned_to_keys(bases: Sequence[float], key: str) -> dict[str, Any]:
    """The key that says which layers have RoPE. PlanError if none has, or if they have several bases.

    bases: of each layer.
    """
    if len(found := _bases(bases)) != 1:
        raise PlanError(f"a GGUF file has one base of RoPE; the layers of this model have {found or 'no RoPE'}")
    return {} if all(bases) else {key: np.array([base != 0 for base in bases])}


def turned_of_keys(keys: Metadata, key: str, base: float) -> list[float]:
    """The base of RoPE of each layer, 0 for those without."""
    found = keys.get(key)
    if found is None:
        return [base] * keys.layers
    if not isinstance(found, np.ndarray) or len(found) != keys.layers:
        raise keys.wrong(f"{key} does not say of {keys.layers} layers whether they have RoPE")
    return [base if each else 0.0 for each in found.tolist()]


def _yarn(arch: Architecture, rope: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of YaRN besides its factor."""
    if rope.get("truncate", True) == arch.exact_ramp:
        raise PlanError(f"a GGUF file of {arch.name} means truncate = {not arch.exact_ramp} in its YaRN scaling")
    found: dict[str, Any] = {"rope.scaling.original_context_length": rope["original_max_position_embeddings"]}
    for key, usual in _RAMP.items():
        if (value := rope.get(key)) is None:
            continue
        if value != usual and not arch.other_ramp:
            raise PlanError(
                f"llama.cpp runs {arch.name} with {key} = {usual} in its YaRN scaling; this model has {value}"
            )
        found[f"rope.scaling.yarn_{key}"] = float(value)
    usual, given = _stretch(rope["factor"]), rope.get("attention_factor")
    one, other = rope.get("mscale"), rope.get("mscale_all_dim")
    if given is None and one and other and not (arch.latent or arch.rope_numbers):
        factor = _stretch(rope["factor"], one) / _stretch(rope["factor"], other)
    else:
        factor = usual if given is None else float(given)
    if abs(factor - usual) > 1e-6:
        raise PlanError(
            f"llama.cpp runs {arch.name} with attention_factor = {usual:.6g} in its YaRN scaling; "
            f"this model has {factor:.6g}"
        )
    if given is not None:
        found["rope.scaling.yarn_attn_factor"] = float(given)
    return found | {ours: float(rope[theirs]) for theirs, ours in arch.rope_numbers.items()}


def _stretch(factor: float, scale: float = 1.0) -> float:
    """What queries and keys are multiplied by in YaRN."""
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0


def extra_tensors(config: Any) -> dict[str, Tensor]:
    """Tensors of the file, float32, that are not weights of the model: divisors of the rotary frequencies."""
    rope = of_config(config)
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return {"rope_freqs.weight": _llama3(rope, width)}
    if kind == "proportional":
        width = kinds.width(config)
        turned = int(rope.get("partial_rotary_factor", 1.0) * width // 2)
        divisors = [1.0] * turned + [_NOT_TURNED] * (width // 2 - turned)
        return {"rope_freqs.weight": torch.tensor(divisors, dtype=torch.float32, device="cpu")}
    if kind == "longrope":
        return {
            f"rope_factors_{which}.weight": torch.tensor(rope[f"{which}_factor"], dtype=torch.float32, device="cpu")
            for which in ("long", "short")
        }
    return {}


def of_keys(keys: Metadata, width: int) -> dict[str, Any]:
    """rope_parameters of config.json for heads of `width` columns. FormatError for an unknown scaling."""
    arch, entries = keys.architecture, keys.file.entries
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.real("rope.freq_base", 10000.0)}
    turned = keys.count("rope.dimension_count", width)
    if turned > width or (turned < width and not arch.partial_rotary):
        raise keys.wrong(f"{turned} of {width} columns of a head are rotated, which {arch.name} does not support")
    if arch.sections:
        found = keys.get("rope.dimension_sections")
        rope |= {"mrope_section": list(SECTIONS) if found is None else found.tolist()[:3], "mrope_interleaved": True}
    if arch.partial_rotary:
        rope["partial_rotary_factor"] = turned / width
    rope |= arch.rope_required
    kind = keys.get("rope.scaling.type")
    if "rope_freqs.weight" in entries:
        rope |= _of_factors(keys, rope["rope_theta"], width)
    elif "rope_factors_long.weight" in entries:
        rope |= {"rope_type": "longrope"}
        for which in ("long", "short"):
            rope[f"{which}_factor"] = _factors(keys, f"rope_factors_{which}.weight", turned // 2)
        rope["original_max_position_embeddings"] = keys.count(
            "rope.scaling.original_context_length", keys.count("context_length")
        )
        if keys.get("rope.scaling.attn_factor") is not None:
            rope["attention_factor"] = keys.real("rope.scaling.attn_factor")
    elif kind in ("linear", "yarn") or (kind is None and keys.get("rope.scaling.factor") is not None):
        rope |= {"rope_type": kind or "linear", "factor": keys.real("rope.scaling.factor")}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = keys.count("rope.scaling.original_context_length")
            rope |= {"truncate": False} if arch.exact_ramp else {}
            rope |= {key: keys.real(ours) for key in _RAMP if keys.get(ours := f"rope.scaling.yarn_{key}") is not None}
            if keys.get("rope.scaling.yarn_attn_factor") is not None:
                rope["attention_factor"] = keys.real("rope.scaling.yarn_attn_factor")
            rope |= {key: keys.real(ours, 0.0) for key, ours in arch.rope_numbers.items()}
    elif kind not in (None, "none", "longrope"):
        raise keys.wrong(f"rope scaling of type {str(kind)[:80]!r} is unknown")
    if arch.local_theta is None:
        return rope
    theta = keys.real("rope.freq_base_swa", arch.local_theta or rope["rope_theta"])
    local: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if arch.partial_rotary:
        own = keys.count(arch.turned_in_windows, turned) if arch.turned_in_windows else turned
        local["partial_rotary_factor"] = own / width
    return {"full_attention": rope, "sliding_attention": local}


def _llama3(rope: Mapping[str, Any], width: int) -> Tensor:
    """The divisor of each of the `width` / 2 rotary frequencies, float32."""
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    frequencies = 1.0 / (rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width))
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - smooth) / factor + smooth)
    return factors


def _factors(keys: Metadata, name: str, length: int) -> list[float]:
    entry = keys.file.entries.get(name)
    if entry is None or entry.shape != (length,) or entry.type != "f32":
        raise keys.wrong(f"{name} is not a list of {length} float32 numbers")
    return [float(str(x)) for x in keys.file.get(name).numpy()]


def _of_factors(keys: Metadata, theta: float, width: int) -> dict[str, Any]:
    """The parameters of llama3 scaling that give the file's factors; a file does not store the parameters."""
    wanted = torch.tensor(_factors(keys, "rope_freqs.weight", width // 2), dtype=torch.float32, device="cpu")
    if not torch.isfinite(wanted).all() or (wanted < 1 - 1e-3).any():
        raise keys.wrong("rope_freqs.weight has factors below 1")
    if bool((wanted == 1).all()):
        return {}
    turned = int((wanted == 1).sum())
    if bool((wanted[turned:] > 0.99 * _NOT_TURNED).all()):
        return {"rope_type": "proportional", "partial_rotary_factor": 2 * turned / width}
    rope = {"rope_type": "llama3", "rope_theta": theta, "factor": float(str(wanted.max().numpy()))}
    for high in (4.0, 2.0, 8.0, 16.0, 32.0):
        for original in (1 << power for power in range(5, 21)):
            rope |= {"low_freq_factor": 1.0, "high_freq_factor": high, "original_max_position_embeddings": original}
            # No match if no frequency is low enough to be divided by the full factor: the file then lacks that factor.
            if torch.allclose(_llama3(rope, width), wanted, rtol=1e-3):
                return rope
    raise keys.wrong("rope_freqs.weight contains factors of a scaling other than llama3's")
