"""MXFP4 experts in the layout of gpt-oss.

    T_blocks    uint8 [E, R, G, 16]     FP4 codes of 32 columns, two in a byte
    T_scales    uint8 [E, R, G]         their E8M0 scales

T is the transpose, [E, 32 G, R], as in transformers. Source: transformers 5.24, integrations/mxfp4.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from fewbit.errors import FormatError
from fewbit.formats.base import missing, wrong
from fewbit.formats.layouts.base import Handles, Layout, Packed, Read
from fewbit.lazy import Tensor, torch
from fewbit.schemes.base import PartSpec
from fewbit.schemes.floats import e2m1, e8m0

BLOCKS, SCALES = "_blocks", "_scales"


class MXFP4(Layout):
    """Reads the fused experts of gpt-oss."""

    quant_method: ClassVar[str] = "mxfp4"

    def find(self, config: Mapping[str, Any], names: Mapping[str, PartSpec], read: Read) -> dict[str, Packed]:
        found = {}
        for tensor in fused_in(names):
            experts, rows, groups = check(tensor, names)
            parts = {"blocks": f"{tensor}{BLOCKS}", "scales": f"{tensor}{SCALES}"}
            found[tensor] = Packed((experts, 32 * groups, rows), "MXFP4", parts, _decode, ("scales",))
        if not found:
            raise FormatError("the config says mxfp4, but no tensor is named *_blocks")
        return found


def _decode(parts: Handles, rows: slice) -> Tensor:
    values = e2m1(parts["blocks"][rows])
    values *= e8m0(parts["scales"][rows]).unsqueeze(-1)
    return values.flatten(-2).transpose(-1, -2)


def fused_in(names: Iterable[str]) -> list[str]:
    """The fused parameters that have blocks or scales."""
    return list(
        dict.fromkeys(name.removesuffix(end) for name in names for end in (BLOCKS, SCALES) if name.endswith(end))
    )


def check(fused: str, names: Mapping[str, PartSpec]) -> tuple[int, int, int]:
    """The numbers of experts, rows and groups. FormatError that names the tensor if a header is not as expected."""
    blocks, scales = f"{fused}{BLOCKS}", f"{fused}{SCALES}"
    for name, other in ((blocks, scales), (scales, blocks)):
        if name not in names:
            raise missing(name, other)
    if fused in names:
        raise FormatError(f"{fused} and {blocks} hold the same weights; one of them expected")
    shape = names[blocks].shape
    if names[blocks].dtype != torch.uint8 or len(shape) != 4 or shape[-1] != 16 or not min(shape):
        raise wrong(blocks, names[blocks], "uint8 [experts, rows, groups, 16]")
    if names[scales] != PartSpec(shape[:3], torch.uint8):
        raise wrong(scales, names[scales], f"uint8 {list(shape[:3])}")
    return shape[0], shape[1], shape[2]
