"""FP8 weights of compressed-tensors for which fewbit has no scheme. The format `compressed-tensors` reads all others.

    P.weight          float8_e4m3fn or float8_e5m2 [N, K]
    P.weight_scale    a float for blocks of any size, groups, channels or the tensor; E8M0 in uint8 [N, K / 32] (MXFP8)

The config has the sizes of blocks and groups. Source: compressed-tensors 0.20, `compressors/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fewbit.formats.base import missing
from fewbit.formats.compressed_tensors.config import Groups
from fewbit.formats.compressed_tensors.format import CARRIED, weights_in, without_scheme
from fewbit.formats.layouts.base import Layout, Packed, Read
from fewbit.formats.layouts.fp8 import packed_fp8
from fewbit.schemes.base import PartSpec


class CompressedTensors(Layout):
    """Reads FP8 weights of the kind E5M2, with E8M0 scales, and with scales for groups and for blocks of any size."""

    quant_method: ClassVar[str] = "compressed-tensors"
    beside_format: ClassVar[bool] = True

    def find(self, config: Mapping[str, Any], names: Mapping[str, PartSpec], read: Read) -> dict[str, Packed]:
        groups, weights = Groups.of(config), weights_in(names)
        found = {}
        for module in without_scheme(groups, weights):
            name, scale, args = f"{module}.weight", f"{module}.weight_scale", groups.for_module(module).args
            if scale not in names:
                raise missing(scale, name)
            block = args.block or ((1, args.group) if args.group else None)
            found[name] = packed_fp8(name, names[name], scale, names[scale], block, CARRIED)
        return found
