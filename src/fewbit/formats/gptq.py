"""GPTQ: the layout of AutoGPTQ and gptqmodel, which transformers, vLLM and others read.

A linear has N rows and K columns, b bits and groups of g columns. Code c means scale * (c - zero).

    qweight  int32   [K b / 32, N]       codes; column n of this tensor is the bit stream of row n of the weight
    qzeros   int32   [K / g, N b / 32]   zero points, a bit stream along each row; "gptq" (v1) stores
                                         (zero - 1) mod 2^b, "gptq_v2" stores zero itself
    scales   float16 [K / g, N]
    g_idx    int32   [K]                 the group of each column: j // g for column j, unless the file was written with
                                         act-order (`desc_act`)

For every b, qweight is the bit stream of `schemes/bits.py` viewed as little-endian 32-bit words and transposed:

    qweight[i, n], b = 4     bits 31 ..... 28  ......  7 ..... 4  3 ..... 0
                                  | 8 i + 7 |   ...   | 8 i + 1 |   8 i   |       columns of row n
    b = 3                    column j has bits 3 j to 3 j + 2 of three words; columns 10 and 21 cross words

fewbit writes 2, 3, 4 or 8 bits: symmetric weights as v1, asymmetric ones as v2. Weights may differ in bits and group
size. The config then has those of most weights, and `dynamic` those of the others (gptqmodel's patterns for modules).
vLLM looks its own modules up there, so patterns also match qkv_proj, gate_up_proj and `experts`, and weights that it
computes together need one scheme. v1 stores a zero point of 0 as 2^b - 1, which some kernels read back as 2^b.
Sources: the packing code of AutoGPTQ 0.7 and gptqmodel; vLLM's `gptq.py` and `gptq_utils.py` for what it accepts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, ClassVar

from fewbit.errors import FormatError
from fewbit.formats.base import Format, Shape, Stored, called, for_module, stored_order, wrong
from fewbit.lazy import Tensor, torch
from fewbit.names import in_short
from fewbit.registry import register
from fewbit.schemes import bits
from fewbit.schemes.affine import Affine
from fewbit.schemes.base import PartSpec, QTensor, Scheme

_WIDTHS = (2, 3, 4, 8)
_SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}  # by vLLM
_EXPERT = re.compile(r"(.+\.experts)\.\d+\..+")


@register("formats", "gptq")
class GPTQFormat(Format):
    """Reads v1 and v2, symmetric and asymmetric, with act-order and with one group per row. Writes: see the module."""

    name: ClassVar[str] = "gptq"
    quant_method: ClassVar[str] = "gptq"
    readers: ClassVar[str] = "transformers with gptqmodel, vLLM"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "v1": {"format": "gptq", "checkpoint_format": "gptq"},
        "v2": {"format": "gptq_v2", "checkpoint_format": "gptq_v2"},
    }
    absent: ClassVar[Mapping[str, Any]] = {"group_size": -1}  # transformers: 128
    packs_head: ClassVar[bool] = True
    permuted: ClassVar[Mapping[str, Any] | None] = {"desc_act": True, "static_groups": False}

    def why_not(self, shape: Shape, scheme: Scheme) -> str | None:
        if not isinstance(scheme, Affine):
            return f"gptq files store integers with scales, not {scheme}"
        if scheme.bf16:
            return f"gptq files store float16 scales: use {replace(scheme, bf16=False)}"
        if scheme.bits not in _WIDTHS:
            return f"gptq files store 2, 3, 4 or 8 bits: there is no common layout for {scheme.bits} bits"
        if reason := scheme.why_not(shape):
            return reason
        if shape[0] % 32 or shape[1] % 32:
            return f"gptq packs rows and columns by 32, which does not divide {shape[0]} x {shape[1]}"
        return None

    def why_not_together(self, weights: Sequence[Stored], kept: Sequence[str] = ()) -> str | None:
        alike = [
            replace(w, scheme=replace(w.scheme, bits=4, group=0)) if isinstance(w.scheme, Affine) else w
            for w in weights
        ]
        if super().why_not_together(alike) is not None:
            return super().why_not_together(weights)
        schemes = {weight.module: str(weight.scheme) for weight in weights}
        for members in _together(schemes).values():
            if len(found := sorted({schemes[module] for module in members})) > 1:
                return f"servers compute {in_short(members)} together: these need one scheme, not {' and '.join(found)}"
        return None

    def specs(self, shape: Shape, scheme: Scheme) -> Mapping[str, PartSpec]:
        assert isinstance(scheme, Affine)
        (n, k), groups = shape, scheme.groups(shape[1])
        return {
            "qweight": PartSpec((k * scheme.bits // 32, n), torch.int32),
            "qzeros": PartSpec((groups, n * scheme.bits // 32), torch.int32),
            "scales": PartSpec((groups, n), torch.float16),
            "g_idx": PartSpec((k,), torch.int32),
        }

    def lay_out(self, weight: QTensor, config: Mapping[str, Any], module: str = "") -> dict[str, Tensor]:
        scheme, (n, k) = weight.codec, weight.shape
        assert isinstance(scheme, Affine)
        groups = scheme.groups(k)
        if scheme.symmetric:
            zero = torch.full((groups, n), 2 ** (scheme.bits - 1), dtype=torch.uint8, device="cpu")
        else:
            zero = bits.unpack(weight.parts["zero"], scheme.bits, groups).T
        if not _is_v2(config):
            zero = (zero - 1) & (2**scheme.bits - 1)
        group_of = torch.arange(k, dtype=torch.int32, device="cpu") // (scheme.group or k)
        if weight.permutation is not None:
            group_of = torch.empty_like(group_of).index_copy_(0, weight.permutation.cpu(), group_of)
        codes = weight.parts["codes"]
        if weight.permutation is not None:
            codes = bits.unpack(codes, scheme.bits, k)
            codes = bits.pack(torch.empty_like(codes).index_copy_(1, weight.permutation, codes), scheme.bits)
        return {
            "qweight": bits.words(codes).T.contiguous(),
            "qzeros": bits.words(bits.pack(zero.contiguous(), scheme.bits)),
            "scales": weight.parts["scale"].T.contiguous(),
            "g_idx": group_of,
        }

    def read(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], module: str) -> QTensor:
        config = for_module(config, module)
        specs = {suffix: PartSpec.of(t) for suffix, t in tensors.items()}
        scheme, (n, k) = self.describe(specs, config, module, {})
        assert isinstance(scheme, Affine)
        width, groups = scheme.bits, scheme.groups(k)
        codes = tensors["qweight"].T.contiguous().view(torch.uint8)
        zero = _zero_points(tensors["qzeros"], width, config)
        order = stored_order(tensors.get("g_idx"), k, groups, f"{module}.g_idx")
        if order is not None:
            codes = bits.pack(bits.unpack(codes, width, k)[:, order], width)
        # The config may say `sym` while the file has other zero points. The stored zero points decide.
        scheme = _as_stored(scheme, zero)
        parts = {"codes": codes, "scale": tensors["scales"].T.to(torch.float16).contiguous()}
        if not scheme.symmetric:
            parts["zero"] = bits.pack(zero.contiguous(), width)
        if not torch.isfinite(parts["scale"]).all():
            raise FormatError(f"{module}.scales has NaN or Inf")
        return QTensor(scheme, (n, k), parts, order)

    def describe(
        self, tensors: Mapping[str, PartSpec], config: Mapping[str, Any], module: str, metadata: Mapping[str, Tensor]
    ) -> tuple[Scheme, Shape]:
        config = for_module(config, module)
        width, (words, n), groups = _width(config), tensors["qweight"].shape, tensors["scales"].shape[0]
        k = words * 32 // width
        group = 0 if groups == 1 else k // groups
        return Affine(group=group, bits=width, symmetric=bool(config.get("sym", True))), (n, k)

    def variant(self, config: Mapping[str, Any]) -> str:
        return "v2" if _is_v2(config) else "v1"

    def as_stored(
        self, scheme: Scheme, shape: Shape, tensors: Mapping[str, Any], config: Mapping[str, Any], module: str
    ) -> tuple[Scheme, bool]:
        assert isinstance(scheme, Affine)
        config, groups = for_module(config, module), scheme.groups(shape[1])
        group_of = tensors["g_idx"][...] if "g_idx" in tensors else None
        scheme = _as_stored(scheme, _zero_points(tensors["qzeros"][...], scheme.bits, config))
        return scheme, stored_order(group_of, shape[1], groups, f"{module}.g_idx") is not None

    def config(
        self, weights: Sequence[Stored], skipped: Iterable[str], dtype: torch.dtype | None = None
    ) -> dict[str, Any]:
        scheme = _usual(weights)
        kind = "gptq" if scheme.symmetric else "gptq_v2"
        return {
            "quant_method": "gptq",
            "bits": scheme.bits,
            "group_size": scheme.group or -1,
            "sym": scheme.symmetric,
            "desc_act": False,  # with static groups, act-order leaves the columns in their own order
            "static_groups": True,
            "lm_head": False,
            "format": kind,
            "checkpoint_format": kind,
            "pack_dtype": "int32",
            # gptqmodel and vLLM skip modules that match these patterns. Other readers check which have a qweight.
            "dynamic": {
                **{rf"-:^{re.escape(name)}$": {} for name in sorted(skipped)},
                **_overrides(weights, scheme),
            },
        }

    def with_head(self, config: Mapping[str, Any], head: str) -> dict[str, Any]:
        return {**config, "lm_head": True}  # gptqmodel and vLLM look for a packed head only then, whatever its name is

    def find(self, config: Mapping[str, Any], names: Mapping[str, PartSpec]) -> dict[str, dict[str, PartSpec]]:
        if str(config.get("pack_dtype", "int32")).removeprefix("torch.") != "int32":
            raise FormatError(f"gptq: codes packed in {config['pack_dtype']}; only int32 is supported")
        weights: dict[str, dict[str, PartSpec]] = {}
        for name in names:
            module, _, suffix = name.rpartition(".")
            if suffix in ("qweight", "qzeros", "scales") and module not in weights:
                weights[module] = {s: names[f"{module}.{s}"] for s in _SUFFIXES if f"{module}.{s}" in names}
                settings = for_module(config, module)
                _check(module, weights[module], _width(settings), settings)
        if not weights:
            raise FormatError("the config says gptq, but no tensor is named *.qweight")
        return weights


def _usual(weights: Sequence[Stored]) -> Affine:
    """The scheme that most of the weights' values have."""
    counts: dict[Scheme, int] = {}
    for weight in weights:
        counts[weight.scheme] = counts.get(weight.scheme, 0) + prod(weight.shape)
    scheme = max(counts, key=lambda each: counts[each])
    assert isinstance(scheme, Affine)
    return scheme


def _overrides(weights: Sequence[Stored], usual: Affine) -> dict[str, dict[str, int]]:
    """Entries of `dynamic` for the weights that have another scheme than `usual`."""
    found: dict[str, dict[str, int]] = {}
    schemes = {w.module: w.scheme for w in weights if isinstance(w.scheme, Affine) and w.scheme != usual}
    for place, members in _together(schemes).items():
        scheme, one = schemes[members[0]], re.escape(place)
        parent, _, leaf = place.rpartition(".")
        if _EXPERT.fullmatch(members[0]):
            pattern = rf"{one}(?:\.\d+\..*)?$"
        elif fused := next((fused for fused, leaves in _FUSED.items() if leaf in leaves), None):
            leaves = "|".join([*(each.rpartition(".")[2] for each in members), fused])
            pattern = rf"{re.escape(parent)}\.(?:{leaves})$"
        else:
            pattern = rf"{one}$"
        own = {"bits": scheme.bits, "group_size": scheme.group or -1}
        before = {"bits": usual.bits, "group_size": usual.group or -1}
        found[f"+:^{pattern}"] = {key: value for key, value in own.items() if value != before[key]}
    return found


def _together(modules: Iterable[str]) -> dict[str, list[str]]:
    """The modules that vLLM computes as one, under one of their names, or under that of the module of their experts."""
    found: dict[str, list[str]] = {}
    for module in modules:
        parent, _, leaf = module.rpartition(".")
        expert = _EXPERT.fullmatch(module)
        first = next((leaves[0] for leaves in _FUSED.values() if leaf in leaves), leaf)
        found.setdefault(expert[1] if expert else f"{parent}.{first}" if parent else first, []).append(module)
    return found


def _zero_points(qzeros: Tensor, width: int, config: Mapping[str, Any]) -> Tensor:
    """The zero points uint8 [N, groups] of a file's `qzeros`."""
    zero = bits.unpack(qzeros.contiguous().view(torch.uint8), width, qzeros.shape[1] * 32 // width).T
    return zero if _is_v2(config) else (zero + 1) & (2**width - 1)


def _as_stored(scheme: Affine, zero: Tensor) -> Affine:
    """The scheme, asymmetric if a zero point is not the middle, whatever the config says."""
    return replace(scheme, symmetric=scheme.symmetric and bool((zero == 2 ** (scheme.bits - 1)).all()))


def _width(config: Mapping[str, Any]) -> int:
    width = config.get("bits")
    if width not in _WIDTHS:
        raise FormatError(
            f"gptq: bits = {width!r} in the quantization config", "Only 2, 3, 4 and 8 bits are supported."
        )
    return int(width)


def _is_v2(config: Mapping[str, Any]) -> bool:
    kind = config.get("checkpoint_format") or config.get("format") or "gptq"
    if kind not in ("gptq", "gptq_v2"):
        raise FormatError(f"gptq: unknown checkpoint format {kind!r}", "Known: gptq, gptq_v2.")
    return bool(kind == "gptq_v2")


def _check(module: str, specs: Mapping[str, PartSpec], width: int, config: Mapping[str, Any]) -> None:
    """FormatError unless the headers of one module agree with each other and with the config's group size."""
    _is_v2(config)
    for suffix in ("qweight", "qzeros", "scales"):
        if suffix not in specs:
            raise FormatError(f"{module}.{suffix} is missing")
        if len(specs[suffix].shape) != 2:
            raise FormatError(f"{module}.{suffix} has shape {list(specs[suffix].shape)}; two dimensions expected")
    words, n = specs["qweight"].shape
    k, groups = words * 32 // width, specs["scales"].shape[0]
    if not words or not n or words * 32 % width or n * width % 32:
        raise FormatError(f"{module}.qweight: {words} x {n} words are not a whole number of {width}-bit codes")
    if not groups or (k % groups and "g_idx" not in specs):
        raise FormatError(f"{module}.scales: {groups} groups do not divide {k} columns")
    group = config.get("group_size", -1)
    if group is not None and (not isinstance(group, int) or group < -1):
        raise FormatError(
            f"gptq: group_size = {group!r} in the quantization config",
            "It must be a positive integer, or -1 for a row.",
        )
    if groups != (1 if group in (-1, 0, None) else -(-k // int(group))):
        raise FormatError(
            f"{module}.scales has {groups} groups, but the config says group_size {group}, with {k} columns"
        )
    expected = {
        "qweight": PartSpec((words, n), torch.int32),
        "qzeros": PartSpec((groups, n * width // 32), torch.int32),
        "scales": PartSpec((groups, n), specs["scales"].dtype),
        "g_idx": PartSpec((k,), torch.int32),
    }
    if not specs["scales"].dtype.is_floating_point:
        raise wrong(f"{module}.scales", specs["scales"], "a float")
    for suffix, spec in specs.items():
        if spec != expected[suffix]:
            wanted = expected[suffix]
            raise wrong(f"{module}.{suffix}", spec, f"{called(wanted.dtype)} {list(wanted.shape)}")
