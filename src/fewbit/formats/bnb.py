"""bitsandbytes: the layout that its linear layers save and transformers loads, 4-bit (NF4, FP4) and LLM.int8().

A 4-bit linear has N rows and K columns, in blocks of B entries of the flattened weight:

    weight                    uint8 [ceil(N K / 2), 1]       two codes a byte, the first in the high nibble. The bytes
                                                             may be viewed as another dtype (`bnb_4bit_quant_storage`)
    weight.absmax             float32 [blocks]               or uint8 [blocks] with double quantization
    weight.quant_map          float32 [16]                   the levels
    weight.nested_absmax      float32 [ceil(blocks / 256)]   double quantization only
    weight.nested_quant_map   float32 [256]                  double quantization only
    weight.quant_state.bitsandbytes__nf4 (or __fp4)
                              uint8 [bytes]                  JSON: quant_type, blocksize, dtype and shape of the weight;
                                                             with double quantization also nested_blocksize,
                                                             nested_dtype and nested_offset

    byte       0       1
    weight   | 0, 1 | 2, 3 | ...       entries of the flattened weight (high half, low half)

An LLM.int8() linear:

    weight                    int8 [N, K]
    SCB                       float32 [N]
    weight_format             uint8 []                       0: row by row

A reader takes N, K and B from the JSON; everything else is in the headers. fewbit pads the JSON with spaces to a length
that depends only on scheme and shape, so file sizes are known in advance. The JSON's `dtype` is the config's compute
dtype. fewbit only writes it: it computes in the dtype of the activations. Sources: bitsandbytes 0.50 (`QuantState`,
`Linear8bitLt`) and transformers' `BitsAndBytesConfig`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from fewbit.checks import is_finite
from fewbit.errors import FormatError, PlanError
from fewbit.formats.base import Format, Shape, Stored, called, wrong
from fewbit.lazy import Tensor, torch
from fewbit.registry import register
from fewbit.schemes.base import PartSpec, QTensor, Scheme
from fewbit.schemes.int8 import THRESHOLD, Int8
from fewbit.schemes.nf4 import BLOCKS, LEVELS, NESTED, FourBit

_STATE = "weight.quant_state.bitsandbytes__"
_SUFFIX = re.compile(
    r"(.+)\.(weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)|SCB|weight_format)"
)
_PARTS = {"absmax": "absmax", "nested": "nested_absmax", "map": "nested_quant_map"}  # ours -> theirs, after "weight."
_STORAGE = ("uint8", "int8", "bfloat16", "float16", "float32", "float64")  # of torch
_FLOATS = ("bfloat16", "float16", "float32")
_LONGEST_STATE = 4096
_LONGEST_OFFSET = 24  # characters of a float32 written as a Python float


@register("formats", "bnb")
class BnbFormat(Format):
    """Reads and writes NF4, FP4 (single and double quantization) and LLM.int8()."""

    name: ClassVar[str] = "bnb"
    quant_method: ClassVar[str] = "bitsandbytes"
    readers: ClassVar[str] = "transformers with bitsandbytes, vLLM"
    metadata_suffixes: ClassVar[tuple[str, ...]] = tuple(_STATE + kind for kind in LEVELS)

    def why_not(self, shape: Shape, scheme: Scheme) -> str | None:
        if not isinstance(scheme, (FourBit, Int8)):
            return f"bnb files store nf4, fp4 and llm.int8, not {scheme}"
        return scheme.why_not(shape)

    def specs(self, shape: Shape, scheme: Scheme) -> Mapping[str, PartSpec]:
        parts = scheme.part_specs(shape)
        if isinstance(scheme, Int8):
            return {"weight": parts["codes"], "SCB": parts["scb"], "weight_format": PartSpec((), torch.uint8)}
        assert isinstance(scheme, FourBit)
        return {
            "weight": PartSpec((*parts["codes"].shape, 1), torch.uint8),
            **{f"weight.{theirs}": parts[ours] for ours, theirs in _PARTS.items() if ours in parts},
            "weight.quant_map": PartSpec((16,), torch.float32),
            _STATE + scheme.kind: PartSpec((_state_length(scheme, shape),), torch.uint8),
        }

    def lay_out(self, weight: QTensor, config: Mapping[str, Any], module: str = "") -> dict[str, Tensor]:
        scheme, parts = weight.codec, weight.parts
        if weight.permutation is not None:
            raise FormatError("bnb files have no act-order, but the columns of this weight are permuted")
        if isinstance(scheme, Int8):
            kind = torch.zeros((), dtype=torch.uint8, device="cpu")
            return {"weight": parts["codes"], "SCB": parts["scb"], "weight_format": kind}
        assert isinstance(scheme, FourBit)
        name = str(config.get("bnb_4bit_quant_storage") or "uint8")
        storage: torch.dtype | None = getattr(torch, name) if name in _STORAGE else None
        if storage is None or len(parts["codes"]) % storage.itemsize:
            raise FormatError(f"bnb: {len(parts['codes'])} bytes of codes cannot be stored as {name}")
        state = _state(scheme, weight.shape, str(config.get("bnb_4bit_compute_dtype")), parts)
        text = json.dumps(state).ljust(_state_length(scheme, weight.shape)).encode()
        return {
            "weight": parts["codes"].view(storage).unsqueeze(1),
            **{f"weight.{theirs}": parts[ours] for ours, theirs in _PARTS.items() if ours in parts},
            "weight.quant_map": torch.tensor(LEVELS[scheme.kind], dtype=torch.float32, device="cpu") + 0.0,
            _STATE + scheme.kind: torch.tensor(list(text), dtype=torch.uint8, device="cpu"),
        }

    def read(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], module: str) -> QTensor:
        specs = {suffix: PartSpec.of(t) for suffix, t in tensors.items()}
        scheme, shape = self.describe(specs, config, module, tensors)
        for suffix, tensor in tensors.items():
            if suffix != "weight" and tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise FormatError(f"{module}.{suffix} has NaN or Inf")
        if isinstance(scheme, Int8):
            if "weight_format" in tensors and int(tensors["weight_format"]):
                raise FormatError(
                    f"{module}.weight_format is {int(tensors['weight_format'])}; only 0 (row by row) is supported"
                )
            return QTensor(scheme, shape, {"codes": tensors["weight"], "scb": tensors["SCB"]})
        assert isinstance(scheme, FourBit)
        quant_map = tensors["weight.quant_map"].cpu()
        levels = torch.tensor(LEVELS[scheme.kind], dtype=torch.float32, device=quant_map.device)
        if not torch.allclose(quant_map, levels, rtol=0, atol=1e-4):
            raise FormatError(f"{module}.weight.quant_map does not hold the levels of {scheme.kind}")
        codes = tensors["weight"].contiguous().view(torch.uint8).flatten()
        parts = {"codes": codes, "absmax": tensors["weight.absmax"]}
        if scheme.double:
            offset = _read_state(tensors, module)["nested_offset"]
            parts |= {
                "nested": tensors["weight.nested_absmax"],
                "offset": torch.tensor([offset], dtype=torch.float32, device=codes.device),
                "map": tensors["weight.nested_quant_map"],
            }
        return QTensor(scheme, shape, parts)

    def describe(
        self, tensors: Mapping[str, PartSpec], config: Mapping[str, Any], module: str, metadata: Mapping[str, Tensor]
    ) -> tuple[Scheme, Shape]:
        if "SCB" in tensors:
            n, k = tensors["weight"].shape
            return Int8(threshold=_threshold(config)), (n, k)
        state = _read_state(metadata, module)
        (n, k), block = state["shape"], state["blocksize"]
        scheme = FourBit(block, state["quant_type"], "weight.nested_absmax" in tensors)
        size = tensors["weight"].nbytes
        if size != -(-n * k // 2):
            raise FormatError(
                f"{module}.weight has {size} bytes; {_state_suffix(metadata)} says {n} x {k} entries of 4 bits"
            )
        if tensors["weight.absmax"].shape != (scheme.blocks((n, k)),):
            raise FormatError(
                f"{module}.weight.absmax has shape {list(tensors['weight.absmax'].shape)}; "
                f"{_state_suffix(metadata)} says {n} x {k} entries in blocks of {block}"
            )
        if scheme.double and (state.get("nested_blocksize") != NESTED or not is_finite(state.get("nested_offset"))):
            raise FormatError(
                f"{module}.{_state_suffix(metadata)}: nested_blocksize {state.get('nested_blocksize')!r} and "
                f"nested_offset {state.get('nested_offset')!r}; {NESTED} and a number expected"
            )
        return scheme, (n, k)

    def config(
        self, weights: Sequence[Stored], skipped: Iterable[str], dtype: torch.dtype | None = None
    ) -> dict[str, Any]:
        scheme = weights[0].scheme
        four = scheme if isinstance(scheme, FourBit) else None
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": four is not None,
            "load_in_8bit": four is None,
            "_load_in_4bit": four is not None,
            "_load_in_8bit": four is None,
            "llm_int8_threshold": scheme.threshold if isinstance(scheme, Int8) else THRESHOLD,
            "llm_int8_skip_modules": sorted(skipped) or None,  # with None, readers skip the output head
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "bnb_4bit_quant_type": four.kind if four else "fp4",
            "bnb_4bit_use_double_quant": four.double if four else False,
            "bnb_4bit_compute_dtype": called(dtype) if dtype is not None and called(dtype) in _FLOATS else "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
        }

    def scheme(self, config: Mapping[str, Any]) -> Scheme | None:
        if config.get("llm_int8_has_fp16_weight"):
            raise PlanError(
                "llm_int8_has_fp16_weight keeps weights in 16 bits, which is not quantization", "Leave it out."
            )
        if config.get("load_in_8bit"):
            return Int8(threshold=_threshold(config))
        kind = config.get("bnb_4bit_quant_type", "fp4")
        if kind not in LEVELS:
            raise PlanError(f"bnb_4bit_quant_type = {kind!r}", f"Known: {', '.join(LEVELS)}.")
        return FourBit(64, kind, bool(config.get("bnb_4bit_use_double_quant")))

    def find(self, config: Mapping[str, Any], names: Mapping[str, PartSpec]) -> dict[str, dict[str, PartSpec]]:
        _threshold(config)
        weights: dict[str, dict[str, PartSpec]] = {}
        for name, spec in names.items():
            if match := _SUFFIX.fullmatch(name):
                weights.setdefault(match[1], {})[match[2]] = spec
            elif name.endswith(".weight") and not spec.dtype.is_floating_point:
                weights.setdefault(name.removesuffix(".weight"), {})
        if not weights:
            raise FormatError("the config says bitsandbytes, but no tensor is named *.weight.absmax or *.SCB")
        for module, tensors in weights.items():
            if f"{module}.weight" not in names:
                raise FormatError(f"{module}.weight is missing")
            weights[module] = tensors = {"weight": names[f"{module}.weight"], **tensors}
            four = any(suffix.startswith("weight.") for suffix in tensors) or tensors["weight"].dtype == torch.uint8
            matching, other = ("load_in_4bit", "load_in_8bit") if four else ("load_in_8bit", "load_in_4bit")
            if config.get(other) and not config.get(matching):
                raise FormatError(f"{module} is stored in {4 if four else 8} bits, but the config says {other}")
            _check(module, tensors, _expected_4_bit(module, tensors, config) if four else _expected_8_bit(tensors))
        return weights


def _expected_8_bit(tensors: Mapping[str, PartSpec]) -> dict[str, PartSpec]:
    """The headers that an LLM.int8() weight must have, given the shape of its codes. -1 matches no size."""
    shape = tensors["weight"].shape
    return {
        "weight": PartSpec(shape if len(shape) == 2 and min(shape) else (-1, -1), torch.int8),
        "SCB": PartSpec(shape[:1], torch.float32),
        "weight_format": PartSpec((), torch.uint8),
    }


def _expected_4_bit(module: str, tensors: Mapping[str, PartSpec], config: Mapping[str, Any]) -> dict[str, PartSpec]:
    """The headers that a 4-bit weight must have, given the sizes of its codes and scales. -1 matches no size."""
    weight, absmax = tensors["weight"], tensors.get("weight.absmax", PartSpec((1,), torch.float32))
    states = [suffix for suffix in tensors if suffix.startswith("weight.quant_state.")]
    if unknown := [suffix for suffix in states if suffix.removeprefix(_STATE) not in LEVELS]:
        raise FormatError(f"{module}.{unknown[0]}: unknown quantization type", f"Known: {', '.join(LEVELS)}.")
    if len(states) > 1:
        raise FormatError(f"{module} has {' and '.join(sorted(states))}; one quantization type expected")
    state = states[0] if states else _STATE + str(config.get("bnb_4bit_quant_type"))
    length = tensors[state].shape if states else (1,)
    if len(length) != 1 or not 0 < length[0] <= _LONGEST_STATE:
        raise FormatError(f"{module}.{state} has shape {list(length)}; at most {_LONGEST_STATE} bytes expected")
    double = any(suffix.startswith("weight.nested_") for suffix in tensors)
    blocks = absmax.shape[0] if len(absmax.shape) == 1 else 0
    entries = 2 * weight.nbytes
    if not any(blocks in (-(-entries // block), -(-(entries - 1) // block)) for block in BLOCKS):
        raise FormatError(
            f"{module}.weight.absmax has shape {list(absmax.shape)}, which does not fit "
            f"{module}.weight of {weight.nbytes} bytes with any block size"
        )
    expected = {
        "weight": PartSpec(
            (weight.shape[0] if weight.shape and weight.shape[0] else -1, 1),
            weight.dtype if called(weight.dtype) in _STORAGE else torch.uint8,
        ),
        "weight.absmax": PartSpec((blocks,), torch.uint8 if double else torch.float32),
        "weight.quant_map": PartSpec((16,), torch.float32),
        state: PartSpec(length, torch.uint8),
    }
    if double:
        expected["weight.nested_absmax"] = PartSpec((-(-blocks // NESTED),), torch.float32)
        expected["weight.nested_quant_map"] = PartSpec((256,), torch.float32)
    return expected


def _check(module: str, tensors: Mapping[str, PartSpec], expected: Mapping[str, PartSpec]) -> None:
    """FormatError unless the headers of one module are the expected ones. `weight_format` may be missing."""
    for suffix, spec in expected.items():
        if suffix not in tensors and suffix != "weight_format":
            raise FormatError(f"{module}.{suffix} is missing")
        if suffix in tensors and tensors[suffix] != spec:
            shape = ["?" if size < 0 else size for size in spec.shape]
            raise wrong(f"{module}.{suffix}", tensors[suffix], f"{called(spec.dtype)} {shape}")
    if surplus := sorted(set(tensors) - set(expected)):
        raise FormatError(f"{module}.{surplus[0]} is unexpected beside {', '.join(sorted(expected))}")


def _state(scheme: FourBit, shape: Shape, dtype: str, parts: Mapping[str, Tensor] | None) -> dict[str, Any]:
    """The content of the JSON, keys in the order of bitsandbytes. Without parts, the offset has its greatest length."""
    state = {
        "quant_type": scheme.kind,
        "blocksize": scheme.group,
        "dtype": dtype if dtype in _FLOATS else "bfloat16",
        "shape": list(shape),
    }
    if scheme.double:
        offset = float(parts["offset"]) if parts else "9" * (_LONGEST_OFFSET - 2)
        state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": offset}
    return state


def _state_length(scheme: FourBit, shape: Shape) -> int:
    """The number of bytes of the padded JSON."""
    return len(json.dumps(_state(scheme, shape, "bfloat16", None)))


def _state_suffix(metadata: Mapping[str, Tensor]) -> str:
    return next(suffix for suffix in metadata if suffix.startswith(_STATE))


def _read_state(metadata: Mapping[str, Tensor], module: str) -> dict[str, Any]:
    """The JSON of a 4-bit weight, parsed. FormatError if it is malformed or has invalid values."""
    suffix = _state_suffix(metadata)
    try:
        state = json.loads(bytes(metadata[suffix].cpu().flatten().tolist()).decode())
        shape, block = state["shape"], state["blocksize"]
        if state["quant_type"] != suffix.removeprefix(_STATE):
            raise ValueError(f"quant_type is {state['quant_type']!r}")
        if not isinstance(block, int) or block not in BLOCKS:
            raise ValueError(f"blocksize is {block!r}")
        if not isinstance(shape, list) or len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
            raise ValueError(f"shape is {shape!r}; rows and columns expected")
        if state["dtype"] not in _FLOATS:
            raise ValueError(f"dtype is {state['dtype']!r}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise FormatError(f"{module}.{suffix} does not describe a 4-bit weight: {reason[:200]}") from None
    return dict(state)


def _threshold(config: Mapping[str, Any]) -> float:
    threshold = config.get("llm_int8_threshold", THRESHOLD)
    if not is_finite(threshold) or threshold < 0:
        raise FormatError(
            f"bnb: llm_int8_threshold = {threshold!r} in the quantization config", "It must be 0 or more."
        )
    return float(threshold)
