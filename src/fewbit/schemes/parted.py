"""Cut a quantized weight into equal parts by rows or by columns, without decoding it.

A part of a weight is an ordinary weight of the same codec: its tensors are slices of those of the whole, so its values
are the same. Where a codec stores numbers of the whole weight (NF4's double quantization), the codec's `single` form is
cut. A cut must not go through a group or a block.

>>> from fewbit.schemes.base import parse
>>> scheme, w = parse("int4-g32"), torch.arange(256.0).view(2, 128)
>>> whole = QTensor(scheme, (2, 128), scheme.pack(*scheme.nearest(w)))
>>> second = part(whole, 1, 1, 2)
>>> second.shape, tuple(second.parts["codes"].shape)
((2, 64), (2, 32))
>>> torch.equal(second.dequantize(), whole.dequantize()[:, 64:])
True
"""

from __future__ import annotations

from collections.abc import Mapping

from fewbit.errors import PlanError
from fewbit.lazy import Tensor, torch
from fewbit.schemes import bits
from fewbit.schemes.base import Codec, Parts, QTensor

_NAMES = ("rows", "columns")
_TRIED = 2  # rows at the beginning, in the middle and at the end of a part whose values are compared


def part(weight: QTensor, axis: int, index: int, count: int) -> QTensor:
    """Part `index` of `count` equal parts of a weight: of its rows (axis 0) or of its stored columns (axis 1).

    Columns are cut in the order in which they are stored; that part has no permutation. PlanError if the weight cannot
    be cut so: for each index or for none, so that all ranks of a run decide alike.
    """
    size, shape = weight.shape[axis], list(weight.shape)
    if size % count:
        raise PlanError(f"its {size} {_NAMES[axis]} cannot be cut into {count} equal parts")
    shape[axis] //= count
    small = (shape[0], shape[1])
    for codec, parts in ((weight.codec, weight.parts), weight.codec.single(weight.parts, weight.shape)):
        own: Parts = {}
        for at in range(count):
            if (cut := _cut(codec, parts, weight.shape, small, (axis, at))) is None:
                break
            own = cut if at == index else own
        else:
            return QTensor(codec, small, own, None if axis else weight.permutation)
    raise PlanError(
        f"its {size} {_NAMES[axis]} cannot be cut into {count} parts of {weight.codec}: groups would cross a border"
    )


def _cut(
    codec: Codec, parts: Mapping[str, Tensor], shape: tuple[int, int], small: tuple[int, int], at: tuple[int, int]
) -> Parts | None:
    """The tensors of one part; None if a slice of each does not give its values."""
    if codec.why_not(small) is not None:
        return None
    cut: Parts = {}
    streams = codec.streams(shape[1]) if at[0] else {}
    for name, spec in codec.part_specs(small).items():
        if name in streams and streams[name][1] % (shape[1] // small[1]) == 0:
            width, count = streams[name]
            piece: Tensor | None = _bits(parts[name], width, count, count * small[1] // shape[1], at[1])
        else:
            piece = _piece(parts[name], spec.shape, shape, at)
        if piece is None:
            return None
        cut[name] = piece.contiguous()
    axis, index = at
    for start in {0, small[0] // 2, small[0] - _TRIED}:
        rows = slice(max(start, 0), max(start, 0) + _TRIED)
        first = 0 if axis else index * small[0]
        same = slice(rows.start + first, min(rows.stop, small[0]) + first)
        whole = codec.dequantize(parts, shape, torch.float32, same)
        whole = whole[:, index * small[1] : (index + 1) * small[1]] if axis else whole
        if not torch.equal(codec.dequantize(cut, small, torch.float32, rows), whole):
            return None
    return cut


def _bits(tensor: Tensor, width: int, count: int, length: int, index: int) -> Tensor:
    """Numbers `index * length` to `(index + 1) * length` of each row of bit streams of `count` numbers."""
    start, stop = index * length * width, (index + 1) * length * width
    if start % 8 == stop % 8 == 0:
        return tensor[:, start // 8 : stop // 8]
    return bits.pack(bits.unpack(tensor, width, count)[:, index * length : (index + 1) * length].contiguous(), width)


def _piece(tensor: Tensor, wanted: tuple[int, ...], shape: tuple[int, int], at: tuple[int, int]) -> Tensor | None:
    """The slice of a tensor of a weight that belongs to the part `at`: as it is if its size does not change."""
    axis, index = at
    if tuple(tensor.shape) == wanted:
        return tensor
    if tensor.dim() == 1 and axis == 1:  # one row after the other
        if tensor.numel() % shape[0] or wanted[0] % shape[0]:
            return None
        width = wanted[0] // shape[0]
        return tensor.view(shape[0], -1)[:, index * width : (index + 1) * width].reshape(-1)
    changed = [d for d, size in enumerate(wanted) if tensor.shape[d] != size]
    if len(changed) != 1:
        return None
    length = wanted[changed[0]]
    fits = (index + 1) * length <= tensor.shape[changed[0]]
    return tensor.narrow(changed[0], index * length, length) if fits else None
