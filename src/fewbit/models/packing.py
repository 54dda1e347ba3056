"""How the weights of a quantized source are stored, and the weights themselves, packed as they are in its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fewbit.formats.base import Format
from fewbit.formats.layouts.base import Handles, Held
from fewbit.schemes.base import Codec, PartSpec, QTensor


@dataclass(frozen=True)
class Weight:
    """A quantized weight of a source, and the lazy handles of its tensors."""

    held: Held
    handles: Handles

    @property
    def shape(self) -> tuple[int, int]:
        return self.held.shape

    def read(self) -> QTensor:
        """The weight with its codes and scales as they are in the file."""
        return self.held.read(self.handles)

    def as_stored(self) -> tuple[Codec, bool]:
        """Its codec, and whether its columns are permuted. It reads zero points, scales and orders, never the codes.

        FormatError if reading the weight rounds its scales.
        """
        return self.held.as_stored(self.handles)


@dataclass(frozen=True)
class FusedWeights:
    """The quantized weights of all experts in one fused parameter, and the lazy handles of its tensors, by ending."""

    format: Format
    config: Mapping[str, Any]
    fused: str
    handles: Handles
    specs: Mapping[str, PartSpec]

    def of(self, expert: int, rows: slice) -> Weight:
        """The weight of some rows of one expert, which are the outputs of one linear."""
        _, scheme, (n, k) = self.format.describe_fused(self.specs, self.config, self.fused)
        shape = len(range(n)[rows]), k

        def read(parts: Handles) -> QTensor:
            own = {ending: handle[expert][rows].contiguous() for ending, handle in parts.items()}
            return self.format.read(own, self.config, self.fused)

        return Weight(Held(scheme, shape, read, lambda _: (scheme, False)), self.handles)


@dataclass(frozen=True)
class Packing:
    """How the weights of a quantized model are stored. Counts are of parameters, and of bytes of tensors.

    method: the name of the format. kinds: kind -> number of parameters, the most frequent first. dtype: of the decoded
    tensors. share: of all parameters that are quantized. weights: name of a decoded tensor -> the quantized weight that
    it comes from, where fewbit can keep it packed. fused: the same for decoded tensors of all experts of a layer.
    floats_only: names of decoded tensors whose weight fewbit cannot keep packed. unused: scales of activations and of
    the KV cache beside quantized weights, which an output leaves out.
    """

    method: str
    kinds: Mapping[str, int]
    dtype: torch.dtype
    parameters: int
    nbytes: int
    file_bytes: int
    share: float
    weights: dict[str, Weight] = field(default_factory=dict, repr=False)
    fused: Mapping[str, FusedWeights] = field(default_factory=dict, repr=False)
    floats_only: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def add_part(self, name: str, fused: str, expert: int, rows: slice) -> None:
        """Take note that the decoded tensor `name` is some rows of one expert in the tensor `fused`."""
        if fused in self.fused:
            self.weights[name] = self.fused[fused].of(expert, rows)

    @property
    def left_out(self) -> str | None:
        """A note on `unused`; None if there are none."""
        if not self.unused:
            return None
        return f"left out: {len(self.unused)} scales of activations or of the KV cache, such as {self.unused[0]}"

    def to_json(self) -> dict[str, Any]:
        """For the record of an output."""
        return {"format": self.method, "kinds": dict(self.kinds), "share": self.share, "bits": self.bits}

    @property
    def bits(self) -> float:
        """Bits per quantized weight."""
        return 8 * self.nbytes / max(self.parameters, 1)

    @property
    def said(self) -> str:
        """The kinds, for people."""
        return " and ".join(self.kinds)
