"""pack-quantized and int-quantized: integers of 2 to 8 bits, as the scheme `affine` holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fewbit.errors import FormatError
from fewbit.formats.base import Shape, called, of_all_rows, scales_were_rounded, stored_order, wrong
from fewbit.formats.compressed_tensors.config import Args, Group
from fewbit.lazy import Tensor, torch
from fewbit.schemes import bits
from fewbit.schemes.affine import Affine
from fewbit.schemes.base import PartSpec, QTensor, Scheme

_FLOATS = ("bfloat16", "float16", "float32")
# The entry `input_activations` of a group, for activations that a server rounds.
ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
PACKED, UNPACKED = "pack-quantized", "int-quantized"


def specs(shape: Shape, scheme: Affine, form: str) -> dict[str, PartSpec]:
    """Suffix -> shape and dtype, in the layout `form`."""
    (n, k), width, groups = shape, scheme.bits, scheme.groups(shape[1])
    scale = PartSpec((n, groups), torch.bfloat16 if scheme.bf16 else torch.float16)
    if form == UNPACKED:
        made = {"weight": PartSpec((n, k), torch.int8), "weight_scale": scale}
        return made if scheme.symmetric else {**made, "weight_zero_point": PartSpec((n, groups), torch.int8)}
    made = {
        "weight_packed": PartSpec((n, _words(k, width)), torch.int32),
        "weight_scale": scale,
        "weight_shape": PartSpec((2,), torch.int64),
    }
    return (
        made if scheme.symmetric else {**made, "weight_zero_point": PartSpec((_words(n, width), groups), torch.int32)}
    )


def lay_out(weight: QTensor, form: str, args: Args | None) -> dict[str, Tensor]:
    """The tensors of a weight in the layout `form`. args: the settings of a file that exists."""
    scheme, (n, k), parts = weight.codec, weight.shape, weight.parts
    assert isinstance(scheme, Affine)
    width, groups = scheme.bits, scheme.groups(k)
    codes, order = parts["codes"], weight.permutation
    made = {"weight_scale": parts["scale"].to(torch.bfloat16 if scheme.bf16 else torch.float16)}
    if order is not None:
        if args is None or not args.ordered or form == UNPACKED:
            raise FormatError("compressed-tensors files have no act-order, but the columns of this weight are permuted")
        stored = bits.unpack(codes, width, k)
        codes = bits.pack(torch.empty_like(stored).index_copy_(1, order, stored), width)
        group_of = torch.arange(k, dtype=torch.int32, device="cpu") // (scheme.group or k)
        made["weight_g_idx"] = torch.empty_like(group_of).index_copy_(0, order.cpu(), group_of)
    zero = None if scheme.symmetric else bits.unpack(parts["zero"], width, groups)
    if form == UNPACKED:
        if zero is not None:
            made["weight_zero_point"] = _signed(zero, width)
        if args is not None and args.strategy == "tensor":
            made = {name: of_all_rows(each, f"int-quantized files have one {name}") for name, each in made.items()}
        return {**made, "weight": _signed(bits.unpack(codes, width, k), width)}
    made["weight_packed"] = _to_words(codes)
    made["weight_shape"] = torch.tensor([n, k], dtype=torch.int64, device="cpu")
    if zero is not None:
        made["weight_zero_point"] = _to_words(bits.pack(zero.T.contiguous(), width)).T.contiguous()
    return made


def describe(tensors: Mapping[str, PartSpec], group: Group, module: str, shape: Tensor | None) -> tuple[Scheme, Shape]:
    """Scheme and shape. shape: the content of `weight_shape`; None where only headers are known.

    FormatError that names the tensor if headers, config and shape contradict each other.
    """
    args, packed = group.args, tensors.get("weight_packed")
    scale = tensors["weight_scale"]
    if args.kind != "int" or not 2 <= args.bits <= 8:
        raise FormatError(
            f"{module}: num_bits = {args.bits}, type = {args.kind!r} in the quantization config, but "
            f"{module}.{'weight' if packed is None else 'weight_packed'} holds integers",
            "2 to 8 bits and int are expected.",
        )
    stored = tensors["weight"] if packed is None else packed
    if len(stored.shape) != 2 or not min(stored.shape):
        name = "weight" if packed is None else "weight_packed"
        raise wrong(f"{module}.{name}", stored, "two dimensions")
    n = stored.shape[0]
    whole = packed is None and args.strategy == "tensor"
    sizes = [(1,), (), (1, 1)] if whole else [(n,)]
    if called(scale.dtype) not in _FLOATS or not (
        scale.shape in sizes or (len(scale.shape) == 2 and scale.shape[0] == n and scale.shape[1])
    ):
        raise wrong(f"{module}.weight_scale", scale, f"a float [{1 if whole else n}, groups]")
    groups = scale.shape[1] if len(scale.shape) == 2 else 1
    if args.group == 1:
        raise FormatError(f"{module}: group_size = {args.group} in the quantization config: more than 1 is expected")
    if not args.group and groups > 1:
        raise FormatError(f"{module}.weight_scale has {groups} groups, but the config says strategy {args.strategy!r}")
    if packed is None:
        k = stored.shape[1]
    elif shape is not None:
        if int(shape[0]) != n or int(shape[1]) < 1:
            raise FormatError(f"{module}.weight_shape is {shape.tolist()}, but {module}.weight_packed has {n} rows")
        k = int(shape[1])
    else:  # known by the groups; for a channel, any number that fills the words
        k = groups * args.group or _columns(stored.shape[1], args.bits)
    if k != groups * (args.group or k):
        what = f"{module}.weight_shape is {[n, k]}" if packed is not None else f"{module}.weight is {[n, k]}"
        raise FormatError(
            f"{what}, but {module}.weight_scale has {groups} groups and the config says group_size {args.group}"
        )
    if packed is not None and packed.shape[1] not in (_words(k, args.bits), _old_words(k, args.bits)):
        raise wrong(
            f"{module}.weight_packed", packed, f"{[n, _words(k, args.bits)]} for {k} codes of {args.bits} bits in a row"
        )
    zero, symmetric = tensors.get("weight_zero_point"), args.symmetric
    if zero is None and not symmetric:
        raise FormatError(f"{module}.weight_zero_point is missing: the quantization config says symmetric false")
    if zero is not None:
        old = packed is not None and packed.shape[1] != _words(k, args.bits)
        rows = n if packed is None else (_old_words if old else _words)(n, args.bits)
        spec = PartSpec(scale.shape, torch.int8) if packed is None else PartSpec((rows, groups), torch.int32)
        if zero != spec:
            raise wrong(f"{module}.weight_zero_point", zero, f"{called(spec.dtype)} {list(spec.shape)}")
    order = tensors.get("weight_g_idx")
    if order is not None and order != PartSpec((k,), torch.int32):
        raise wrong(f"{module}.weight_g_idx", order, f"int32 {[k]}")
    return Affine(args.group, args.bits, symmetric, scale.dtype == torch.bfloat16), (n, k)


def read(tensors: Mapping[str, Tensor], group: Group, module: str) -> QTensor:
    """The weight in its canonical parts."""
    found = {suffix: PartSpec.of(tensor) for suffix, tensor in tensors.items()}
    scheme, (n, k) = describe(found, group, module, tensors.get("weight_shape"))
    assert isinstance(scheme, Affine)
    width, groups = scheme.bits, scheme.groups(k)
    scale = _half(tensors["weight_scale"], f"{module}.weight_scale").reshape(-1, groups)
    scale = scale.expand(n, groups).contiguous()
    if "weight_packed" in tensors:
        codes = _codes(tensors["weight_packed"], width, k)
    else:
        codes = bits.pack(_unsigned(tensors["weight"], width, f"{module}.weight"), width)
    zero = _zero_points(tensors.get("weight_zero_point"), scheme, (n, k), module)
    permutation = _permutation(tensors.get("weight_g_idx"), k, groups, module)
    if permutation is not None:
        codes = bits.pack(bits.unpack(codes, width, k)[:, permutation], width)
    parts = {"codes": codes, "scale": scale}
    scheme = _as_symmetric(scheme, zero)
    if not scheme.symmetric:
        assert zero is not None
        parts["zero"] = bits.pack(zero, width)
    return QTensor(scheme, (n, k), parts, permutation)


def as_stored(scheme: Affine, shape: Shape, tensors: Mapping[str, Any], module: str) -> tuple[Affine, bool]:
    """The scheme as the zero points decide, and whether the columns are permuted. tensors: suffix -> lazy handle.

    FormatError if float16 cannot hold the scales.
    """
    found = {s: tensors[s][...] for s in ("weight_scale", "weight_zero_point", "weight_g_idx") if s in tensors}
    scale = found["weight_scale"]
    if not torch.equal(scale.to(torch.float16).to(scale.dtype), scale):
        raise FormatError(f"{module}.weight_scale has values that float16 cannot hold exactly")
    zero = _zero_points(found.get("weight_zero_point"), scheme, shape, module)
    order = _permutation(found.get("weight_g_idx"), shape[1], scheme.groups(shape[1]), module)
    return _as_symmetric(scheme, zero), order is not None


def _zero_points(stored: Tensor | None, scheme: Affine, shape: Shape, module: str) -> Tensor | None:
    """Zero points uint8 [N, groups] of `weight_zero_point`: int32 words packed along N, or int8."""
    (n, k), width = shape, scheme.bits
    if stored is None:
        return None
    if stored.dtype == torch.int32:
        return bits.unpack(_codes(stored.T.contiguous(), width, n), width, n).T.contiguous()
    groups = scheme.groups(k)
    zero = _unsigned(stored.reshape(-1, groups), width, f"{module}.weight_zero_point")
    return zero.expand(n, groups).contiguous()


def _as_symmetric(scheme: Affine, zero: Tensor | None) -> Affine:
    """The scheme, asymmetric if a zero point is not the middle, whatever the config says."""
    middle = zero is None or bool((zero == 2 ** (scheme.bits - 1)).all())
    return replace(scheme, symmetric=scheme.symmetric and middle)


def _permutation(order: Tensor | None, k: int, groups: int, module: str) -> Tensor | None:
    if order is not None and int(order.max()) < 0:
        order = None  # compressed-tensors fills it with -1 where there is no act-order
    return stored_order(order, k, groups, f"{module}.weight_g_idx")


def scheme_args(scheme: Affine) -> dict[str, Any]:
    """The entry `weights` of a group with this scheme."""
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if scheme.group else "channel",
        "group_size": scheme.group or None,
        "dynamic": False,
    }


def _half(scale: Tensor, name: str) -> Tensor:
    """Scales as float16. FormatError if one is not finite or too large; a warning if one changes."""
    if not torch.isfinite(scale).all():
        raise FormatError(f"{name} has NaN or Inf")
    half = scale.to(torch.float16)
    if not torch.isfinite(half).all():
        raise FormatError(f"{name} has a scale beyond the range of float16, {float(scale.abs().max()):g}")
    if changed := int((half.to(scale.dtype) != scale).sum()):
        scales_were_rounded(name, changed)
    return half


def _words(count: int, width: int) -> int:
    """32-bit words of one dense stream of `count` codes."""
    return -(-count * width // 32)


def _old_words(count: int, width: int) -> int:
    """The same in older files, where no code crosses a word."""
    return -(-count // (32 // width))


def _columns(words: int, width: int) -> int:
    """A number of codes that fills `words` of a dense stream."""
    return words * 32 // width


def _to_words(streams: Tensor) -> Tensor:
    """Rows of bytes as rows of little-endian words; 0 fills the last word."""
    return bits.words(torch.nn.functional.pad(streams, (0, -streams.shape[1] % 4)).contiguous())


def _codes(words: Tensor, width: int, count: int) -> Tensor:
    """The dense streams of bytes of rows of words, which are dense or in the older packing."""
    if words.shape[1] == _words(count, width):
        return words.contiguous().view(torch.uint8)[:, : bits.packed_bytes(count, width)].contiguous()
    shifts = torch.arange(32 // width, device=words.device, dtype=torch.int32) * width
    codes = (words.unsqueeze(-1) >> shifts) & ((1 << width) - 1)
    return bits.pack(codes.flatten(1)[:, :count].to(torch.uint8), width)


def _signed(codes: Tensor, width: int) -> Tensor:
    return (codes.to(torch.int16) - (1 << (width - 1))).to(torch.int8)


def _unsigned(values: Tensor, width: int, name: str) -> Tensor:
    middle = 1 << (width - 1)
    if width < 8 and values.numel() and (int(values.min()) < -middle or int(values.max()) >= middle):
        raise FormatError(f"{name} has values beyond {width} bits, which the quantization config states")
    return (values.to(torch.int16) + middle).to(torch.uint8)
