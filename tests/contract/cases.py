"""What the contract tests run over: everything that is registered, and weights that are hard on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from fewbit import registry
from fewbit.formats.base import Format
from fewbit.kernels.base import Kernel
from fewbit.nn.choose import TOLERANCE
from fewbit.schemes.base import Scheme, parse
from fewbit.stats import Need, Stats

# Every family's own examples, so that a new family is tested because it exists.
EXAMPLES = [spec for family in registry.entries("schemes").values() for spec in family.examples]
GROUPS = ("g16", "g24", "g32", "g64", "g128", "g256", "g512", "g1024", "row")
SPECS = list(
    dict.fromkeys(
        EXAMPLES
        + [
            f"int{bits}-{group}{sym}"
            for bits in range(2, 9)
            for group, sym in (("g16", ""), ("g32", "-sym"), ("row", ""))
        ]
        + [f"int4-{group}{sym}" for group in GROUPS for sym in ("", "-sym")]
        + ["nf4-b32", "nf4-b128-dq", "fp4-b4096", "fp4-b32-dq", "llm.int8-t0", "nvfp4-mul"]
    )
)
CPU = torch.device("cpu")
METHODS = list(registry.entries("methods"))
FORMATS: dict[str, Format] = {name: entry() for name, entry in registry.entries("formats").items()}
KERNELS: dict[str, Kernel] = {name: entry() for name, entry in registry.entries("kernels").items()}


def shape_for(spec: str, n: int = 6) -> tuple[int, int]:
    """The smallest shape of a few groups, ragged where the scheme allows it, that can be stored."""
    scheme = parse(spec)
    return next((n, k) for k in (37, 96, 256, 512, 1024, 2048) if scheme.why_not((n, k)) is None)


def several_groups(spec: str, n: int = 6) -> tuple[int, int]:
    """A shape of rows with several groups each, or of one row group where the whole row is the group."""
    group = parse(spec).group
    return (n, 3 * group) if group else shape_for(spec, n)


def ordinary(n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A weight [n, k] as models have them: heavy tails, and rows of different size."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator) + 0.1 * torch.randn(n, k, generator=generator) ** 3
    return (w * torch.linspace(0.01, 0.1, n)[:, None]).to(dtype)


def hard(n: int, k: int) -> Tensor:
    """Rows, in turn: ordinary, positive only, one outlier, 1e-7, up to 6e4, constant with a zero half."""
    w = ordinary(n, k, seed=1) * 20
    w[1::6] = w[1::6].abs() + 1
    w[2::6, k // 3] = 50
    w[3::6] *= 1e-7
    w[4::6] *= 6e4 / w[4::6].abs().amax(1, keepdim=True)
    w[5::6], w[5::6, : k // 2] = -0.75, 0
    return w


def inputs(rows: int, k: int, seed: int = 2) -> Tensor:
    """Correlated input rows [rows, k], some columns much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mixed: Tensor = torch.randn(rows, k, generator=generator) @ torch.randn(k, k, generator=generator) / k**0.5
    return mixed * torch.logspace(-0.5, 0.5, k)[torch.randperm(k, generator=generator)]


def stats_of(x: Tensor, need: Need = Need.HESSIAN) -> Stats:
    stats = Stats(x.shape[-1], need)
    stats.add(x)
    return stats


def quantized(scheme: Scheme, w: Tensor) -> dict[str, Tensor]:
    """The parts of `w` rounded to nearest."""
    codes, grids = scheme.nearest(w)
    return scheme.pack(codes, grids)


def is_sentence(reason: str | None) -> bool:
    """Words that a user can read after the name of a tensor or kernel."""
    return reason is not None and len(reason.split()) >= 3 and "None" not in reason and "<" not in reason


def same_bytes(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


def serves(kernel: Kernel, spec: str, dtype: torch.dtype, shapes: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The shapes that the kernel can multiply here."""
    if kernel.unavailable() is not None:
        return []
    return [shape for shape in shapes if kernel.why_not(parse(spec), shape, CPU, dtype) is None]


def served(
    shapes: Callable[[str], list[tuple[int, int]]], *, specs: Iterable[str], exact: bool = False
) -> pytest.MarkDecorator:
    """A case for each kernel, scheme and type that multiplies one of the shapes, and for no other."""
    cases = [
        pytest.param(name, spec, dtype, id=f"{str(dtype).removeprefix('torch.')}-{spec}-{name}")
        for dtype in TOLERANCE
        for spec in specs
        for name, kernel in KERNELS.items()
        if serves(kernel, spec, dtype, shapes(spec)) and (kernel.activations == "exact" or not exact)
    ]
    return pytest.mark.parametrize(("name", "spec", "dtype"), cases)
