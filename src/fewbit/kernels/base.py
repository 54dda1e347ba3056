"""What a kernel is: y = x Wᵀ for packed W, in a layout that it prepares once at load.

Three layouts exist, each owned once: on disk (the format), canonical parts (the scheme), on the device (`prepare`).
`restore` gives the canonical parts back byte for byte, so the device layout can be the only copy in memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, TypeAlias

from fewbit.lazy import Tensor, torch
from fewbit.schemes.base import Codec, Parts

Prepared: TypeAlias = "tuple[Tensor, ...]"


class Kernel(ABC):
    """Stateless: one instance serves every weight."""

    name: ClassVar[str]
    activations: ClassVar[str] = "exact"  # or the rule by which they are rounded
    checked: ClassVar[tuple[int, ...]] = (
        4,
    )  # rows of x of the products that are compared with the reference's at load
    priority: ClassVar[int] = 0  # of the kernels that can serve, the highest is taken; below 0: only if asked for

    def unavailable(self) -> str | None:
        """None if this machine can run it at all, else a sentence that says what is missing."""
        return None

    def missed(self) -> str | None:
        """What to tell a user whose weights it would serve if it were available; None: nothing."""
        return None

    @abstractmethod
    def why_not(self, codec: Codec, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> str | None:
        """None if it can multiply activations of `dtype` by such a weight there, else a sentence that says why not."""

    def prepare(self, codec: Codec, parts: Parts, shape: tuple[int, int]) -> Prepared:
        """The device layout, by default the canonical parts. The first tensor holds the codes."""
        return tuple(parts[name].contiguous() for name in part_order(codec, shape))

    def restore(self, codec: Codec, prepared: Prepared, shape: tuple[int, int]) -> Parts:
        """The canonical parts, byte for byte as `prepare` got them."""
        return dict(zip(part_order(codec, shape), prepared, strict=True))

    def rounded(self, x: Tensor, codec: Codec) -> Tensor:
        """The activations that `linear` multiplies by, [M, K]: x itself, unless `activations` names a rule.

        A kernel that rounds is held to the reference's product of these, to the same tolerance as any other.
        """
        return x

    @abstractmethod
    def linear(self, x: Tensor, codec: Codec, prepared: Prepared, shape: tuple[int, int]) -> Tensor:
        """x Wᵀ, [M, N] in the dtype of `x` [M, K], accumulated in float32 or better."""


def part_order(codec: Codec, shape: tuple[int, int]) -> list[str]:
    """Names of the parts, the one that holds the codes first."""
    return [codec.payload, *(name for name in codec.part_specs(shape) if name != codec.payload)]
