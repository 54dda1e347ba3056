"""AWQ: the 4-bit layouts of AutoAWQ, which transformers (with gptqmodel), vLLM and others read.

A linear has N rows, K columns and groups of g columns. Code c means scale * (c - zero). Version "gemm" packs along
columns of the weight, eight rows to a word, in an interleaved order:

    qweight  int32   [K, N / 8]          codes; nibble i of word w, from the lowest, is row
                                         8 w + (0, 2, 4, 6, 1, 3, 5, 7)[i]
    qzeros   int32   [K / g, N / 8]      zero points, packed in the same order
    scales   float16 [K / g, N]

    qweight[j, w]     bits 31-28 27-24 23-20 19-16 15-12 11-8  7-4  3-0
                          |  7  |  5  |  3  |  1  |  6  |  4  |  2  |  0  |       rows 8 w + ... of column j

Version "gemv" packs along rows, in plain order, and pads zeros and scales to whole words:

    qweight  int32   [N, K / 8]          codes; nibble i of word w, from the lowest, is column 8 w + i
    qzeros   int32   [N, Z]              zero points; Z = ceil(K / g / 8), rounded up to a multiple of 2 for groups of
                                         64 and of 4 for groups of 32
    scales   float16 [N, 8 Z]

fewbit reads both; `fewbit quantize` writes "gemm". Symmetric weights have the zero point 8 everywhere, and the config
has `sym`. Source: the packing code of AutoAWQ 0.2 (`WQLinear_GEMM`, `WQLinear_GEMV`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from fewbit.errors import FormatError
from fewbit.formats.base import Format, Shape, Stored, called, for_module, wrong
from fewbit.lazy import Tensor, torch
from fewbit.registry import register
from fewbit.schemes import bits
from fewbit.schemes.affine import Affine
from fewbit.schemes.base import PartSpec, QTensor, Scheme, chunk_rows

_BITS, _PER_WORD = 4, 8
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_AT_ONCE = 1 << 19  # bytes of codes that are moved at a time
_SUFFIXES = ("qweight", "qzeros", "scales")


@register("formats", "awq")
class AWQFormat(Format):
    """Reads "gemm" and "gemv". New checkpoints are "gemm"; a model loaded from "gemv" is saved as "gemv" again."""

    name: ClassVar[str] = "awq"
    quant_method: ClassVar[str] = "awq"
    readers: ClassVar[str] = "transformers with gptqmodel, vLLM"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"gemm": {"version": "gemm"}}

    def why_not(self, shape: Shape, scheme: Scheme) -> str | None:
        if not isinstance(scheme, Affine) or scheme.bits != _BITS:
            return f"awq files store 4-bit integers with scales, not {scheme}"
        if scheme.bf16:
            return f"awq files store float16 scales: use {replace(scheme, bf16=False)}"
        if reason := scheme.why_not(shape):
            return reason
        if shape[0] % _PER_WORD or shape[1] % _PER_WORD:
            return f"awq packs rows and columns by 8, which does not divide {shape[0]} x {shape[1]}"
        return None

    def specs(self, shape: Shape, scheme: Scheme) -> Mapping[str, PartSpec]:
        (n, k), groups = shape, scheme.groups(shape[1])
        return {
            "qweight": PartSpec((k, n // _PER_WORD), torch.int32),
            "qzeros": PartSpec((groups, n // _PER_WORD), torch.int32),
            "scales": PartSpec((groups, n), torch.float16),
        }

    def lay_out(self, weight: QTensor, config: Mapping[str, Any], module: str = "") -> dict[str, Tensor]:
        scheme, (n, k) = weight.codec, weight.shape
        assert isinstance(scheme, Affine)
        if weight.permutation is not None:
            raise FormatError("awq files have no act-order, but the columns of this weight are permuted")
        groups, scale = scheme.groups(k), weight.parts["scale"]
        if scheme.symmetric:
            zero = torch.full((n, groups), 2 ** (_BITS - 1), dtype=torch.uint8, device="cpu")
        else:
            zero = bits.unpack(weight.parts["zero"], _BITS, groups)
        if _version(config) == "gemv":
            padding = (0, _PER_WORD * _zero_words(k, groups) - groups)
            packed = bits.pack(torch.nn.functional.pad(zero, padding), _BITS)
            return {
                "qweight": bits.words(weight.parts["codes"]),
                "qzeros": bits.words(packed),
                "scales": torch.nn.functional.pad(scale, padding).contiguous(),
            }
        return {
            "qweight": _to_words(weight.parts["codes"]),
            "qzeros": bits.words(bits.pack(_interleaved(zero.T), _BITS)),
            "scales": scale.T.contiguous(),
        }

    def read(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], module: str) -> QTensor:
        specs = {suffix: PartSpec.of(t) for suffix, t in tensors.items()}
        config = for_module(config, module)
        _check(module, specs, config)
        scheme, (n, k) = self.describe(specs, config, module, {})
        assert isinstance(scheme, Affine)
        groups = scheme.groups(k)
        zero = _zero_points(tensors["qzeros"], (n, groups), config)
        if _version(config) == "gemv":
            codes, scale = tensors["qweight"].contiguous().view(torch.uint8), tensors["scales"][:, :groups]
        else:
            codes = _from_words(tensors["qweight"])
            scale = tensors["scales"].T
        # The config may say `sym` while the file has other zero points. The stored zero points decide.
        scheme = _as_stored(scheme, zero)
        parts = {"codes": codes, "scale": scale.to(torch.float16).contiguous()}
        if not scheme.symmetric:
            parts["zero"] = bits.pack(zero.contiguous(), _BITS)
        if not torch.isfinite(parts["scale"]).all():
            raise FormatError(f"{module}.scales has NaN or Inf, or is beyond the range of fp16")
        return QTensor(scheme, (n, k), parts)

    def describe(
        self, tensors: Mapping[str, PartSpec], config: Mapping[str, Any], module: str, metadata: Mapping[str, Tensor]
    ) -> tuple[Scheme, Shape]:
        config = for_module(config, module)
        rows, columns = tensors["qweight"].shape
        if _version(config) == "gemv":
            n, k = rows, columns * _PER_WORD
        else:
            n, k = columns * _PER_WORD, rows
        group = _group(config)
        return Affine(group=0 if group == k else group, bits=_BITS, symmetric=config.get("sym") is True), (n, k)

    def variant(self, config: Mapping[str, Any]) -> str:
        return _version(config)

    def as_stored(
        self, scheme: Scheme, shape: Shape, tensors: Mapping[str, Any], config: Mapping[str, Any], module: str
    ) -> tuple[Scheme, bool]:
        assert isinstance(scheme, Affine)
        groups = scheme.groups(shape[1])
        zero = _zero_points(tensors["qzeros"][...], (shape[0], groups), for_module(config, module))
        return _as_stored(scheme, zero), False

    def config(
        self, weights: Sequence[Stored], skipped: Iterable[str], dtype: torch.dtype | None = None
    ) -> dict[str, Any]:
        scheme = weights[0].scheme
        assert isinstance(scheme, Affine)
        return {
            "quant_method": "awq",
            "bits": _BITS,
            "group_size": scheme.group or -1,
            "zero_point": True,  # zero points are always stored, even if all are 8
            "sym": scheme.symmetric,  # explicit, because transformers writes true if it is missing
            "version": "gemm",
            "modules_to_not_convert": sorted(skipped) or None,
        }

    def find(self, config: Mapping[str, Any], names: Mapping[str, PartSpec]) -> dict[str, dict[str, PartSpec]]:
        if (width := config.get("bits", config.get("w_bit", _BITS))) != _BITS:
            raise FormatError(f"awq: bits = {width!r} in the quantization config", "Only 4 bits are supported.")
        weights: dict[str, dict[str, PartSpec]] = {}
        scaled = self.activations(names)
        for name in names:
            module, _, suffix = name.rpartition(".")
            if suffix in _SUFFIXES and module not in weights and module not in scaled:
                weights[module] = {s: names[f"{module}.{s}"] for s in _SUFFIXES if f"{module}.{s}" in names}
                _check(module, weights[module], for_module(config, module))
        if not weights:
            raise FormatError("the config says awq, but no tensor is named *.qweight")
        return weights

    def activations(self, names: Mapping[str, PartSpec]) -> dict[str, PartSpec]:
        return {
            name.removesuffix(".scales"): spec
            for name, spec in names.items()
            if name.endswith(".scales")
            and len(spec.shape) == 1
            and spec.dtype.is_floating_point
            and not any(f"{name.removesuffix('scales')}{other}" in names for other in ("qweight", "qzeros"))
        }


def _zero_points(qzeros: Tensor, shape: Shape, config: Mapping[str, Any]) -> Tensor:
    """The zero points uint8 [N, groups], of this `shape`, of a file's `qzeros`."""
    (n, groups), packed = shape, qzeros.contiguous().view(torch.uint8)
    if _version(config) == "gemv":
        return bits.unpack(packed, _BITS, groups)
    return _plain(bits.unpack(packed, _BITS, n)).T


def _as_stored(scheme: Affine, zero: Tensor) -> Affine:
    """The scheme, asymmetric if a zero point is not the middle, whatever the config says."""
    return replace(scheme, symmetric=scheme.symmetric and bool((zero == 2 ** (_BITS - 1)).all()))


def _to_words(codes: Tensor) -> Tensor:
    """`qweight` of a "gemm" file, int32 [K, N / 8], from the packed codes uint8 [N, K / 2] of the scheme.

    Nibbles move without being unpacked to bytes, some rows at a time: 9 times as fast as by an index.
    """
    n, half = codes.shape
    out = torch.empty(2 * half, n // _PER_WORD, dtype=torch.int32, device=codes.device)
    for rows in chunk_rows(n // _PER_WORD, _PER_WORD * half, _AT_ONCE):
        eights: Tensor = codes[rows.start * _PER_WORD : rows.stop * _PER_WORD].unflatten(0, (-1, _PER_WORD))
        made = torch.empty(len(eights), 2 * half, 4, dtype=torch.uint8, device=codes.device)
        for byte in range(4):
            low, high = (eights[:, row] for row in _ORDER[2 * byte : 2 * byte + 2])
            made[:, 0::2, byte] = low & 15 | high << 4
            made[:, 1::2, byte] = low >> 4 | high & 240
        out[:, rows] = made.view(torch.int32).squeeze(2).T
    return out


def _from_words(qweight: Tensor) -> Tensor:
    """The inverse of `_to_words`."""
    k, n = qweight.shape[0], qweight.shape[1] * _PER_WORD
    out = torch.empty(n // _PER_WORD, _PER_WORD, k // 2, dtype=torch.uint8, device=qweight.device)
    for rows in chunk_rows(n // _PER_WORD, _PER_WORD * k // 2, _AT_ONCE):
        held: Tensor = qweight[:, rows].T.contiguous().unsqueeze(2).view(torch.uint8)
        for byte in range(4):
            even, odd = held[:, 0::2, byte], held[:, 1::2, byte]
            low, high = _ORDER[2 * byte : 2 * byte + 2]
            out[rows, low] = even & 15 | odd << 4
            out[rows, high] = even >> 4 | odd & 240
    return out.view(n, k // 2)


def _interleaved(codes: Tensor) -> Tensor:
    """Codes [R, C] with each eight codes of a row reordered as a "gemm" word holds them."""
    eights: Tensor = codes.unflatten(1, (-1, _PER_WORD))
    return eights[..., list(_ORDER)].flatten(1)


def _plain(codes: Tensor) -> Tensor:
    """The inverse of `_interleaved`."""
    eights: Tensor = codes.unflatten(1, (-1, _PER_WORD))
    return eights[..., [_ORDER.index(i) for i in range(_PER_WORD)]].flatten(1)


def _zero_words(k: int, groups: int) -> int:
    """Z: the number of words of zero points in a row of a "gemv" file."""
    multiple = {64: 2, 32: 4}.get(k // groups, 1)
    words = -(-groups // _PER_WORD)
    return -(-words // multiple) * multiple


def _version(config: Mapping[str, Any]) -> str:
    version = config.get("version") or config.get("format") or "gemm"
    if not isinstance(version, str) or version.lower() not in ("gemm", "gemv"):
        raise FormatError(f"awq: unknown version {version!r}", "Known: gemm, gemv.")
    return version.lower()


def _group(config: Mapping[str, Any]) -> int:
    """The group size in the config; 0: the whole row is one group."""
    group = config.get("group_size", config.get("q_group_size", 128))
    if not isinstance(group, int) or isinstance(group, bool) or (group < 1 and group != -1):
        raise FormatError(
            f"awq: group_size = {group!r} in the quantization config", "It must be a positive integer, or -1 for a row."
        )
    return max(group, 0)


def _check(module: str, specs: Mapping[str, PartSpec], config: Mapping[str, Any]) -> None:
    """FormatError unless the headers of one module agree with each other and with the config's group size."""
    version, group = _version(config), _group(config)
    for suffix in _SUFFIXES:
        if suffix not in specs:
            raise FormatError(f"{module}.{suffix} is missing")
        if len(specs[suffix].shape) != 2:
            raise FormatError(f"{module}.{suffix} has shape {list(specs[suffix].shape)}; two dimensions expected")
    if not specs["scales"].dtype.is_floating_point:
        raise wrong(f"{module}.scales", specs["scales"], "a float")
    rows, columns = specs["qweight"].shape
    n, k = (rows, columns * _PER_WORD) if version == "gemv" else (columns * _PER_WORD, rows)
    if not n or not k:
        raise FormatError(f"{module}.qweight is empty: {rows} x {columns} words")
    group = group or k
    if k % group:
        raise FormatError(f"{module}.qweight: the config's groups of {group} do not divide its {k} columns")
    groups = k // group
    words = _zero_words(k, groups)
    shapes = {
        "qweight": (rows, columns),
        "qzeros": (n, words) if version == "gemv" else (groups, n // _PER_WORD),
        "scales": (n, words * _PER_WORD) if version == "gemv" else (groups, n),
    }
    for suffix, shape in shapes.items():
        expected = PartSpec(shape, specs["scales"].dtype if suffix == "scales" else torch.int32)
        if specs[suffix] != expected:
            wanted = f"{called(expected.dtype)} {list(expected.shape)}"
            raise wrong(f"{module}.{suffix}", specs[suffix], f"{wanted}, for a {version} file with groups of {group},")
