"""The kernel interface: y = x Wᵀ for packed W, in a device layout that the kernel prepares once at load.

A weight has three layouts: on disk (owned by the format), canonical parts (owned by the scheme), and on the device
(owned by the kernel, see `prepare`). `restore` returns the canonical parts byte for byte, so the device layout can be
the only copy in memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, TypeAlias

from fewbit.lazy import Tensor, torch
from fewbit.schemes.base import Codec, Parts

Prepared: TypeAlias = "tuple[Tensor, ...]"
Shapes = tuple[int, int, int]  # (E, N, K) of E weights [N, K]


class Kernel(ABC):
    """A kernel has no state: one instance can serve every weight."""

    name: ClassVar[str]
    activations: ClassVar[str] = "exact"  # or a description of how they are rounded
    checked: ClassVar[tuple[int, ...]] = (4,)  # numbers of rows of x with which it is checked against the reference
    priority: ClassVar[int] = 0  # the highest usable one is chosen; a negative one only if requested by name

    def unavailable(self) -> str | None:
        """None if this machine can run the kernel, else a sentence that says what is missing."""
        return None

    def missed(self) -> str | None:
        """A warning for users whose weights this kernel would support if it were available; None: no warning."""
        return None

    @abstractmethod
    def why_not(self, codec: Codec, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> str | None:
        """None if the kernel can multiply activations of `dtype` on `device` by a weight [N, K] of this codec.

        Otherwise a sentence that says why not.
        """

    def prepare(self, codec: Codec, parts: Parts, shape: tuple[int, int]) -> Prepared:
        """The weight in the device layout; by default the canonical parts. The first tensor holds the codes."""
        return tuple(parts[name].contiguous() for name in part_order(codec, shape))

    def restore(self, codec: Codec, prepared: Prepared, shape: tuple[int, int]) -> Parts:
        """The inverse of `prepare`: the canonical parts, byte for byte."""
        return dict(zip(part_order(codec, shape), prepared, strict=True))

    def why_not_grouped(self, codec: Codec, shape: Shapes) -> str | None:
        """None if `grouped` can multiply by E weights [N, K] that `why_not` accepts one by one.

        Otherwise a sentence that says why not. shape: (E, N, K).
        """
        if type(self).prepare is not Kernel.prepare:
            return "its layout of several weights cannot be cut into those of each"
        return None

    def grouped(self, x: Tensor, codec: Codec, prepared: Prepared, shape: Shapes, offsets: Tensor) -> Tensor:
        """Multiply each row of x [M, K] by the weight of its expert: [M, N] in the dtype of x.

        prepared: of the weights [N, K] of E experts, concatenated to [E·N, K]. shape: (E, N, K). Rows are sorted by
        expert. offsets: int32 [E] on the device of x, the end of each expert's rows. Rows after the last end belong to
        no expert, and their result is 0. By default, a loop over the experts that have rows.
        """
        y = x.new_zeros(x.shape[0], shape[1])
        for expert, start, end in runs(offsets):
            own = self.of_expert(codec, prepared, shape, expert)
            y[start:end] = self.linear(x[start:end], codec, own, shape[1:])
        return y

    def of_expert(self, codec: Codec, prepared: Prepared, shape: Shapes, expert: int) -> Prepared:
        """The device tensors of one expert's weight, as views of those of the stacked weight."""
        return tuple(cut(tensor, shape[0], expert) for tensor in prepared)

    def rounded(self, x: Tensor, codec: Codec) -> Tensor:
        """The activations [M, K] as `linear` uses them: x itself, or x rounded as `activations` describes.

        The check against the reference multiplies these rounded activations. So a kernel that rounds must meet the same
        tolerance as any other.
        """
        return x

    @abstractmethod
    def linear(self, x: Tensor, codec: Codec, prepared: Prepared, shape: tuple[int, int]) -> Tensor:
        """x Wᵀ, [M, N] in the dtype of `x` [M, K], accumulated in float32 or better."""


def runs(offsets: Tensor) -> list[tuple[int, int, int]]:
    """(expert, start, end) for each expert that has rows."""
    ends = offsets.tolist()
    return [(e, start, end) for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)) if start < end]


def cut(tensor: Tensor, pieces: int, index: int) -> Tensor:
    """One of several equal pieces of a tensor's first dimension."""
    size = tensor.shape[0] // pieces
    return tensor.narrow(0, index * size, size)


def part_order(codec: Codec, shape: tuple[int, int]) -> list[str]:
    """Names of the parts; the part that holds the codes comes first."""
    return [codec.payload, *(name for name in codec.part_specs(shape) if name != codec.payload)]
