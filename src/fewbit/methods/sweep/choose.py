"""Chooses the implementation of a sweep: the definition in torch, or one fused launch per panel in Triton.

There are two kinds of sweep. In GPTQ's pass the error of a column moves the columns that remain. In coordinate descent
each column moves to its best code while all others stay. Both process a panel of columns one by one, and no row depends
on another. The caller then applies the moves of the whole panel to the columns beyond it, in one matrix product.

`definition` works for any grids on any device, with about ten operations per column. On a GPU each operation is a
kernel launch: 4096 columns of 4096 rows take half a second of launches for milliseconds of work. For grids that are
plain, `in_triton` processes a panel in one launch. It is compared with the definition once for each kind of grids, and
used only if the two agree.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.util import find_spec

from fewbit.lazy import Tensor, torch
from fewbit.methods.sweep.definition import PANEL, Sweep, VectorSweep
from fewbit.methods.sweep.groups import GroupSweep
from fewbit.schemes.base import Grids, Plain

_PROBE = 64  # rows used to compare the fused panel with the definition
_DIFFERENT = 0.01  # share of values that may differ: sums in another order can break ties, which changes a row's rest


def sweep_for(grids: Grids, codes: Tensor, order: Tensor, run: int) -> Sweep:
    """The sweep for these grids: fused if Triton is available and the grids are plain, else the definition.

    run: columns of a step, `run` or `vector` of the grids. Other arguments as for `Sweep`.
    """
    if grids.vector > 1:
        return VectorSweep(grids, codes, order)
    definition = GroupSweep if run > 1 else Sweep
    plain = grids.plain() if _has_triton(codes.device.type) else None
    if plain is None or plain.scale.dtype != torch.float32:
        return definition(grids, codes, order)
    return _fused(grids, plain, codes, order, definition) or definition(grids, codes, order)


@cache
def _has_triton(device: str) -> bool:
    """Whether Triton can compile for this type of device. Its interpreter runs on any."""
    if find_spec("triton") is None:
        return False
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    return device == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0)


_agreed: dict[tuple[object, ...], bool] = {}  # kind of grids -> whether the fused panel agreed with the definition


def _fused(grids: Grids, plain: Plain, codes: Tensor, order: Tensor, definition: type[Sweep]) -> Sweep | None:
    """The fused sweep. None if it fails or differs from the definition, with a warning the first time."""

    from fewbit.methods.sweep import in_triton

    def fused(codes: Tensor) -> Sweep:
        if definition is GroupSweep:
            return in_triton.FusedGroups(grids, codes, order)
        return in_triton.FusedSweep(grids, plain, codes, order)

    kind = (codes.device, type(grids), definition, *plain.kind)
    if kind not in _agreed:
        try:
            share = _disagreement(grids, plain, order, (partial(definition, grids, order=order), fused))
        except Exception as error:  # compilers and drivers raise errors of any type
            share, why = 1.0, f": {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        else:
            why = f": {share:.1%} of the values differ"
        _agreed[kind] = share <= _DIFFERENT
        if not _agreed[kind]:
            warnings.warn(f"quantizing column by column in torch, slowly: the fused kernel failed{why}", stacklevel=2)
    return fused(codes) if _agreed[kind] else None


def _disagreement(grids: Grids, plain: Plain, order: Tensor, sweeps: Sequence[Callable[..., Sweep]]) -> float:
    """The share of values in which two sweeps differ, the larger of both kinds of sweep. sweeps: make them for codes.

    Values are compared, and not codes: a sweep may choose scales too.

    Both run on one panel of random numbers, with the grids of the first rows.
    """
    rows, width = min(_PROBE, len(plain.scale)), min(PANEL, len(order))
    n, k, device = len(plain.scale), len(order), order.device
    seeded = torch.Generator().manual_seed(0)
    unit = plain.scale[:rows].abs().mean() * plain.span / 4
    noise = torch.randn(width, rows, generator=seeded, dtype=torch.float32, device="cpu").to(device) * unit
    panel = torch.zeros(width, n, device=device, dtype=torch.float32)
    panel[:, :rows] = noise
    mixed = torch.randn(width, width, generator=seeded, dtype=torch.float32, device="cpu").to(device) / width**0.5
    one = torch.eye(width, device=device, dtype=torch.float32)
    factor = (mixed.triu(1) / 2 + one).T.contiguous().T  # column-major, as `feed_back` passes it
    inner = mixed @ mixed.T + one
    values = torch.zeros(k, n, device=device, dtype=torch.float32)
    results: list[Tensor] = []
    for make in sweeps:
        for descent in (False, True):
            codes = torch.zeros(k, n, dtype=torch.uint8, device=device)
            if descent:
                (sweep := make(codes=codes)).descend(0, width, panel.clone(), inner, values)
            else:
                (sweep := make(codes=codes)).feed_back(0, width, panel.clone(), factor)
            results.append(sweep.chosen.decode(codes.T.contiguous())[:rows, order[:width]].clone())
    return max(float((results[i] != results[i + 2]).float().mean()) for i in (0, 1))
