"""The tensors of a quantized model as floats, decoded when they are read.

So a model in FP8, MXFP4, compressed-tensors, one of fewbit's formats or GGUF can be quantized like any other: its
checkpoint has ordinary tensors `X.weight`, and only the one that is read exists in 16 bits. They have the dtype in
config.json (for a GGUF file, that of its unquantized matrices, or bfloat16), as if the model had been dequantized and
saved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import FormatError
from fewbit.formats.base import Format, by_quant_method
from fewbit.formats.containers.gguf import PLAIN, Entry, GgufFile
from fewbit.formats.containers.safetensors import Checkpoint
from fewbit.formats.layouts.base import Handles, Held, Layout, Packed, Read, is_fp8
from fewbit.formats.layouts.compressed_tensors import CompressedTensors
from fewbit.formats.layouts.fp8 import FP8, FbgemmFP8, scale_names
from fewbit.formats.layouts.mxfp4 import MXFP4
from fewbit.models import foreign
from fewbit.models.gguf import hybrid, names
from fewbit.models.gguf.names import Route
from fewbit.models.gguf.pieces import Joined
from fewbit.models.packing import FusedWeights, Packing, Weight
from fewbit.models.source import Source
from fewbit.schemes.base import Codec, PartSpec, QTensor, Scheme, chunk_rows
from fewbit.schemes.fp8 import FP8 as FP8Scheme
from fewbit.schemes.ggml import codec
from fewbit.schemes.ggml.table import BLOCK_TYPES
from fewbit.schemes.nvfp4 import NVFP4

_ALL: tuple[Layout, ...] = (FP8(), FbgemmFP8(), MXFP4(), CompressedTensors())
LAYOUTS = {each.quant_method: each for each in _ALL}
_INSTEAD = "Use a copy of the model with ordinary weights."
DAMAGED = "The checkpoint is damaged."


def opened(source: Source, config: Any = None) -> tuple[Checkpoint, Packing | None]:
    """The tensors of `source` as floats, and how its weights are stored; None if they are not quantized.

    config: transformers' config object, for a GGUF file. FormatError that names the tensor if one is missing, has a
    wrong shape or dtype, or is a scale with NaN or Inf. FormatError for an unknown quantization method.
    """
    if source.gguf is not None:
        return _of_gguf(source, names.routes(config), names.architecture(config).extra)
    checkpoint = Checkpoint(list(source.files))
    if source.quantization is None:
        for name, spec in checkpoint.specs.items():
            scale = next((each for each in scale_names(name) if each in checkpoint.specs), None)
            if is_fp8(spec) and scale is not None:
                raise FormatError(
                    f"{source.folder}: {name} is FP8 with the scales {scale}, but config.json has no "
                    "quantization_config, so their meaning is unknown",
                    'For DeepSeek\'s layout it is {"quant_method": "fp8", "weight_block_size": [128, 128]}.',
                )
        return checkpoint, None
    file_bytes = sum(spec.nbytes for spec in checkpoint.specs.values())
    packed, fused = found_in(source, checkpoint), _fused_in(source.quantization, checkpoint)
    _check_scales(source, packed, checkpoint)
    stored = dict(checkpoint.specs)
    for each in packed.values():
        checkpoint.hide([*each.parts.values(), *each.unused])
    weights = dict[str, Weight]()
    for name, each in packed.items():
        handles = {role: checkpoint.stored(part) for role, part in each.parts.items()}
        if each.weight is not None:
            weights[name] = Weight(each.weight, handles)
        checkpoint.add(name, PartSpec(each.shape, source.dtype), _Decoded(each, handles, source.dtype))
    parts = {part for each in packed.values() for part in each.parts.values()}
    nbytes = sum(stored[part].nbytes for part in parts)
    method = str(source.quantization["quant_method"])
    found = _packing(method, packed.values(), checkpoint, source.dtype, (nbytes, file_bytes))
    format = by_quant_method(method)
    carried = () if format is None else format.carried_suffixes
    unused = [part for each in packed.values() for role, part in each.parts.items() if role in carried]
    unused += [name for each in packed.values() for name in each.unused if name in stored]
    floats = tuple(name for name in packed if name not in weights and name not in fused)
    return checkpoint, replace(found, weights=weights, fused=fused, floats_only=floats, unused=tuple(unused))


def _fused_in(config: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, FusedWeights]:
    """Fused parameter -> the weights in it, of a folder in one of fewbit's own formats."""
    format = by_quant_method(str(config["quant_method"]))
    if format is None or layout_of(config, checkpoint.specs) is not None:
        return {}
    return {
        fused: FusedWeights(format, config, fused, {e: checkpoint.stored(f"{fused}{e}") for e in tensors}, tensors)
        for fused, tensors in format.find_fused(config, checkpoint.specs).items()
    }


def _packing(
    method: str, packed: Iterable[Packed], checkpoint: Checkpoint, dtype: torch.dtype, nbytes: tuple[int, int]
) -> Packing:
    kinds = Counter[str]()
    for each in packed:
        kinds[each.kind] += each.numel
    share = kinds.total() / max(sum(prod(spec.shape) for spec in checkpoint.specs.values()), 1)
    return Packing(method, dict(kinds.most_common()), dtype, kinds.total(), *nbytes, share)


def layout_of(config: Mapping[str, Any], specs: Mapping[str, PartSpec]) -> Layout | None:
    """The layout by which a checkpoint with these headers is decoded. None if fewbit's own format reads it packed."""
    method = str(config["quant_method"])
    layout, format = LAYOUTS.get(method), by_quant_method(method)
    return layout if format is None or format.why_unpacked(config, specs) is not None else None


def is_packed(source: Source) -> bool:
    """Whether one of fewbit's formats reads the quantized weights of `source`, and keeps them packed."""
    if source.quantization is None or by_quant_method(str(source.quantization["quant_method"])) is None:
        return False
    return source.gguf is not None or layout_of(source.quantization, Checkpoint(list(source.files)).specs) is None


def is_read_here(source: Source, device: str) -> bool:
    """Whether a whole model is loaded through `opened`, dequantized, because nothing keeps it packed.

    transformers would dequantize FP8 and MXFP4 on CPUs and older GPUs. It then takes ragged blocks for even ones, and
    it ignores scales whose names it does not know.
    """
    method = None if source.gguf is not None or source.quantization is None else source.quantization["quant_method"]
    return method in LAYOUTS and not is_packed(source) and not is_left(source, device)


def is_left(source: Source, device: str) -> bool:
    """Whether transformers loads the model of `source`, which fewbit would dequantize.

    transformers has kernels for more kinds of FP8 and MXFP4 on recent GPUs.
    """
    method = None if source.gguf is not None or source.quantization is None else source.quantization["quant_method"]
    if method not in ("fp8", "mxfp4") or not device.startswith("cuda") or is_packed(source):
        return False
    if method == "mxfp4":
        return True
    scales = [each.parts["scale"] for each in LAYOUTS["fp8"].find(*_headers(source)).values()]
    known = all(name.endswith(("_scale_inv", ".scale", ".qscale_weight")) for name in scales)
    return known and torch.cuda.get_device_capability(device) >= (8, 9)


def _headers(source: Source) -> tuple[Mapping[str, Any], Mapping[str, PartSpec], Read]:
    """What a layout needs to find weights."""
    checkpoint = Checkpoint(list(source.files))
    return source.quantization or {}, checkpoint.specs, checkpoint.get


def found_in(source: Source, checkpoint: Checkpoint) -> dict[str, Packed]:
    """Name -> packed tensor, of every quantized tensor of a folder. FormatError if a header is not as expected."""
    try:
        return _found_in(source.quantization or {}, checkpoint)
    except FormatError as error:
        raise FormatError(f"{source.folder}: {error.message}", error.hint) from None


def _found_in(config: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, Packed]:
    method = str(config["quant_method"])
    format, layout = by_quant_method(method), layout_of(config, checkpoint.specs)
    if layout is not None:
        found = layout.find(config, checkpoint.specs, checkpoint.get)
        if format is not None and layout.beside_format:
            found |= dict(_of_format(format, config, checkpoint))
        return found
    if format is None:
        raise foreign.unread(method)
    if scaled := format.activations(checkpoint.specs):
        raise FormatError(
            f"{next(iter(scaled))} has scales of activations, and fewbit cannot fold them into weights", _INSTEAD
        )
    found = dict(_of_format(format, config, checkpoint))
    if format.find_fused(config, checkpoint.specs):
        found |= LAYOUTS[method].find(config, checkpoint.specs, checkpoint.get)
    return found


def _of_format(format: Format, config: Mapping[str, Any], checkpoint: Checkpoint) -> Iterator[tuple[str, Packed]]:
    """The weights of one of fewbit's own formats."""
    for module, tensors in format.find(config, checkpoint.specs).items():
        metadata = {s: checkpoint.get(f"{module}.{s}") for s in format.metadata_suffixes if s in tensors}
        scheme, shape = format.describe(tensors, config, module, metadata)
        scales, positive = scales_in(format, scheme, tensors)
        yield (
            f"{module}.weight",
            Packed(
                shape=shape,
                kind=str(scheme) if str(scheme).startswith(format.name) else f"{format.name} {scheme}",
                parts={suffix: f"{module}.{suffix}" for suffix in tensors},
                decode=partial(_read, format=format, config=config, module=module),
                scales=scales,
                positive=positive,
                by_rows=False,
                weight=Held(
                    scheme,
                    shape,
                    partial(_weight, format=format, config=config, module=module),
                    partial(_as_stored, format=format, config=config, module=module, headers=(scheme, shape, tensors)),
                ),
            ),
        )


def scales_in(
    format: Format, scheme: Codec, tensors: Mapping[str, PartSpec]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The suffixes of the scales of a weight, and of those that must be above 0."""
    # Not FP8 weights themselves, which are as large as the model. Their flaws are found when they are read.
    scales = tuple(
        s
        for s, spec in tensors.items()
        if s not in format.carried_suffixes
        and ((spec.dtype.is_floating_point and s != "weight") or s.endswith(("_scale", "_scales")))
    )
    return scales, scales if isinstance(scheme, (FP8Scheme, NVFP4)) else ()


def flaw_of(scales: Tensor, *, positive: bool) -> str | None:
    """What is wrong with the values of scales: floats, or E8M0 as uint8. None if they are finite and, if `positive`,
    above 0."""
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    byte, values = scales.element_size() == 1, scales.float()
    if not torch.isfinite(values).all():
        nan = " (the E8M0 code 255)" if scales.dtype == torch.float8_e8m0fnu else ""
        return f"has NaN or Inf{nan}, and a scale must be finite"
    if positive and byte:  # the scales of NVFP4's groups, which may be 0
        return "has negative numbers" if bool((values < 0).any()) else None
    return "has numbers that are not above 0" if positive and bool((values <= 0).any()) else None


def _weight(parts: Handles, *, format: Format, config: Mapping[str, Any], module: str) -> QTensor:
    return format.read({suffix: handle[...] for suffix, handle in parts.items()}, config, module)


def _read(parts: Handles, rows: slice, *, format: Format, config: Mapping[str, Any], module: str) -> Tensor:
    return _weight(parts, format=format, config=config, module=module).dequantize(rows=rows)


def _as_stored(
    parts: Handles,
    *,
    format: Format,
    config: Mapping[str, Any],
    module: str,
    headers: tuple[Scheme, tuple[int, int], Mapping[str, PartSpec]],
) -> tuple[Codec, bool]:
    scheme, shape, found = headers
    for suffix, spec in format.specs(shape, scheme).items():
        if spec.dtype.is_floating_point and suffix in found and found[suffix].dtype != spec.dtype:
            stored = parts[suffix][...]
            if not torch.equal(stored.to(spec.dtype).to(stored.dtype), stored):
                kinds = [str(dtype).removeprefix("torch.") for dtype in (stored.dtype, spec.dtype)]
                raise FormatError(f"{module}.{suffix} is {kinds[0]}, and {kinds[1]} cannot hold all of its values")
    return format.as_stored(scheme, shape, parts, config, module)


@dataclass(frozen=True)
class _Decoded:
    """A lazy handle of a packed tensor: it decodes the entries of the first dimension that an index selects."""

    packed: Packed
    parts: Handles
    dtype: torch.dtype

    def __getitem__(self, index: Any) -> Tensor:
        first, *rest = index if isinstance(index, tuple) else (index,)
        if first is Ellipsis:
            return self._rows(0, self.packed.shape[0])[index]
        if isinstance(first, int):
            start = first % self.packed.shape[0]
            return self._rows(start, start + 1)[(0, *rest)]
        if isinstance(first, slice) and first.step in (None, 1):
            start, stop, _ = first.indices(self.packed.shape[0])
            return self._rows(start, max(start, stop))[(slice(None), *rest)]
        return self._rows(0, self.packed.shape[0])[index]

    def get_shape(self) -> list[int]:
        return list(self.packed.shape)

    def _rows(self, start: int, stop: int) -> Tensor:
        count, columns = stop - start, self.packed.numel // self.packed.shape[0]
        if not self.packed.by_rows:
            return self.packed.decode(self.parts, slice(start, stop)).to(self.dtype)
        out = torch.empty((count, *self.packed.shape[1:]), dtype=self.dtype, device="cpu")
        for rows in chunk_rows(count, columns, 1 << 24):
            out[rows] = self.packed.decode(self.parts, slice(start + rows.start, start + rows.stop)).to(self.dtype)
        return out


@dataclass(frozen=True)
class Transposed:
    """A lazy handle of the transpose of a matrix."""

    handle: Any

    def __getitem__(self, index: Any) -> Tensor:
        whole: Tensor = self.handle[...].T.contiguous()
        return whole[index]

    def get_shape(self) -> list[int]:
        rows, columns = self.handle.get_shape()
        return [columns, rows]


def _check_scales(source: Source, packed: Mapping[str, Packed], checkpoint: Checkpoint) -> None:
    """FormatError that names the tensor if a scale is NaN or infinite, or not above 0 where it must be."""
    for each in packed.values():
        for role in each.scales:
            if flaw := flaw_of(checkpoint.stored(each.parts[role])[...], positive=role in each.positive):
                raise FormatError(f"{source.folder}: {each.parts[role]} {flaw}", DAMAGED)


def _of_gguf(source: Source, routes: Mapping[str, Route], extra: frozenset[str]) -> tuple[Checkpoint, Packing]:
    """The tensors of a GGUF file under transformers' names."""
    stored, checkpoint = GgufFile(source.files[0]), Checkpoint([])
    file = Joined(stored, names.splits_of(routes), names.listed_of(routes))
    ours = names.names_of(routes)
    dtype, found, nbytes = _dtype_of(stored), list[Packed](), 0
    weights, floats = dict[str, Weight](), list[str]()
    ignored = extra | hybrid.beyond(stored)
    for entry in file.entries.values():
        if entry.name in ignored:
            continue
        if entry.name not in ours:
            raise FormatError(f"{file.path}: fewbit does not know the tensor {entry.name}", _INSTEAD)
        packed = entry.type not in PLAIN
        nbytes += entry.spec.nbytes if packed else 0
        for name, own in _members(file, entry, ours[entry.name], routes):
            route = routes[name]
            shape = route.shape_in_model(own.shape)
            decode = partial(_of_entry, entry=own, route=route)
            handle = Packed(shape, f"GGUF {own.type}", {"data": entry.name}, decode, by_rows=not route.transposed)
            mapped = _Mapped(file, own, route)
            if route.listed is not None:  # it may have no dimension of rows
                checkpoint.add(name, PartSpec(shape, torch.float32), mapped)
                continue
            kind = dtype if packed else own.spec.dtype if route.is_exact else torch.float32
            checkpoint.add(name, PartSpec(shape, kind), _Decoded(handle, {"data": mapped}, kind))
            if packed:
                found.append(handle)
                if route.run % BLOCK_TYPES[own.type].columns == 0:
                    weights[name] = Weight(_blocks(own, route), {"data": mapped})
                else:  # its blocks cannot be put in the model's order
                    floats.append(name)
    packing = _packing("gguf", found, checkpoint, dtype, (nbytes, file.nbytes))
    return checkpoint, replace(packing, weights=weights, floats_only=tuple(floats))


def _members(
    file: Joined, entry: Entry, ours: Sequence[str], routes: Mapping[str, Route]
) -> Iterator[tuple[str, Entry]]:
    """The names in the model of a tensor, each with its part of it: a tensor of experts has one part for each."""
    if routes[ours[0]].expert is None:
        yield ours[0], entry
        return
    heights = routes[ours[0]].heights
    if entry.shape != ((sum(heights), *entry.shape[1:]) if heights else (len(ours), *entry.shape[-2:])):
        wanted = f"{sum(heights)} rows" if heights else f"three dimensions for {len(ours)} experts"
        raise FormatError(f"{file.path}: {entry.name} has shape {list(entry.shape)}, not {wanted}")
    for place, name in enumerate(ours):
        yield name, entry._replace(shape=(*heights[place : place + 1], *entry.shape[1:]))


def _blocks(entry: Entry, route: Route) -> Held:
    """The weight of a GGUF tensor, its rows and columns in the model's order."""
    blocks, (n, k) = codec(entry.type), entry.shape

    def read(parts: Handles) -> QTensor:
        stored = route.blocks_from_file(parts["data"][...], BLOCK_TYPES[entry.type].columns)
        return QTensor(blocks, (n, k), {blocks.payload: stored})

    return Held(blocks, (n, k), read, lambda _: (blocks, False))


def _dtype_of(file: GgufFile) -> torch.dtype:
    """The dtype of most bytes of unquantized matrices: float32, float16 or bfloat16. bfloat16 if there are none."""
    sizes = Counter[torch.dtype]()
    for entry in file.entries.values():
        if entry.type in ("f32", "f16", "bf16") and len(entry.shape) > 1:
            sizes[entry.spec.dtype] += entry.spec.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.bfloat16)


@dataclass(frozen=True)
class _Mapped:
    """A lazy handle of a tensor of a GGUF file, or of what it has of one tensor of the model."""

    file: Joined
    entry: Entry
    route: names.Route

    def __getitem__(self, index: Any) -> Tensor:
        own = self.route.part_of(self.file.get(self.entry.name))[index].clone()
        self.file.release(self.entry.name)
        return own


def _of_entry(parts: Handles, rows: slice, *, entry: Entry, route: Route) -> Tensor:
    """The values of a slice of a GGUF tensor, in the model's layout."""
    order, other = route.rows_back, route.transposed or route.led  # whether rows are no rows of the file
    stored: Tensor = parts["data"][... if other else rows if order is None else order[rows]]
    if entry.type not in PLAIN:
        blocks = codec(entry.type)
        stored = QTensor(blocks, (len(stored), entry.shape[-1]), {blocks.payload: stored}).dequantize()
    stored = route.from_rows(stored)
    return stored[rows] if other else stored
