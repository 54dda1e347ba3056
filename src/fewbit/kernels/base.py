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

    def rounded(self, x: Tensor, codec: Codec) -> Tensor:
        """The activations [M, K] as `linear` uses them: x itself, or x rounded as `activations` describes.

        The check against the reference multiplies these rounded activations. So a kernel that rounds must meet the same
        tolerance as any other.
        """
        return x

    @abstractmethod
    def linear(self, x: Tensor, codec: Codec, prepared: Prepared, shape: tuple[int, int]) -> Tensor:
        """x Wᵀ, [M, N] in the dtype of `x` [M, K], accumulated in float32 or better."""


def part_order(codec: Codec, shape: tuple[int, int]) -> list[str]:
    """Names of the parts; the part that holds the codes comes first."""
    return [codec.payload, *(name for name in codec.part_specs(shape) if name != codec.payload)]
