"""One pass over the columns of a weight, each rounded where those before it have moved it.

Two passes of that kind exist: GPTQ's, in which the error of a column moves the columns that remain, and coordinate
descent, in which each column moves to its best code while all others stay. Both go through a panel of columns one by
one, rows apart from one another, and hand the moves of a whole panel on to whatever lies beyond it: that is a matrix
product, and the caller's.

What is here is the definition, in torch, for any grids and any device: some ten operations a column. On a GPU each is
a launch, and 4096 columns of 4096 rows take half a second of launches for milliseconds of work. Where grids say that
they are uniform, `sweep_triton` does a panel in one launch, which is compared with the definition once for each kind
of grids, and serves only if the two agree.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

from fewbit.lazy import Tensor, torch
from fewbit.methods.sweep.definition import PANEL, Sweep
from fewbit.schemes.base import Grids, Uniform

_PROBE = 64  # rows on which the fused panel is compared with the definition
_DIFFERENT = 0.01  # share of codes that may differ there: ties, and what follows from them in a row


def over(grids: Grids, codes: Tensor, order: Tensor) -> Sweep:
    """The sweep for these grids: a panel in one launch where that can be had, else the definition."""
    uniform = grids.uniform() if _there(codes.device.type) else None
    if uniform is None or uniform.scale.dtype != torch.float32:
        return Sweep(grids, codes, order)
    return _fused(grids, uniform, codes, order) or Sweep(grids, codes, order)


@cache
def _there(device: str) -> bool:
    """Whether Triton can compile for that kind of device; its interpreter takes any."""
    if find_spec("triton") is None:
        return False
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    return device == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0)


_agreed: dict[tuple[object, ...], bool] = {}  # kind of grids -> whether the fused panel agreed with the definition


def _fused(grids: Grids, uniform: Uniform, codes: Tensor, order: Tensor) -> Sweep | None:
    """The fused sweep; None, with a warning the first time, where it differs from the definition."""
    from fewbit.methods.sweep.in_triton import FusedSweep

    kind = (codes.device, type(grids), uniform.top, uniform.group, uniform.offset is None)
    if kind not in _agreed:
        try:
            apart = _apart(grids, uniform, order, lambda codes: FusedSweep(grids, uniform, codes, order))
        except Exception as error:  # a compiler may fail in as many ways as there are drivers
            apart, why = 1.0, f": {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        else:
            why = f": {apart:.1%} of the codes differ"
        _agreed[kind] = apart <= _DIFFERENT
        if not _agreed[kind]:
            warnings.warn(f"columns are rounded one by one, slowly; the fused kernel failed{why}", stacklevel=2)
    return FusedSweep(grids, uniform, codes, order) if _agreed[kind] else None


def _apart(grids: Grids, uniform: Uniform, order: Tensor, fused: Callable[[Tensor], Sweep]) -> float:
    """The share of codes in which the two differ, on one panel: random numbers on the first rows' own grids."""
    rows, width = min(_PROBE, len(uniform.scale)), min(PANEL, len(order))
    n, k, device = len(uniform.scale), len(order), order.device
    seeded = torch.Generator().manual_seed(0)
    unit = uniform.scale[:rows].abs().mean() * uniform.top / 4
    noise = torch.randn(width, rows, generator=seeded, dtype=torch.float32, device="cpu").to(device) * unit
    panel = torch.zeros(width, n, device=device, dtype=torch.float32)
    panel[:, :rows] = noise
    mixed = torch.randn(width, width, generator=seeded, dtype=torch.float32, device="cpu").to(device) / width**0.5
    one = torch.eye(width, device=device, dtype=torch.float32)
    factor = (mixed.triu(1) / 2 + one).T.contiguous().T  # as `inverse_factor` lays it
    inner = mixed @ mixed.T + one
    values = torch.zeros(k, n, device=device, dtype=torch.float32)
    found: list[Tensor] = []
    for make in (lambda codes: Sweep(grids, codes, order), fused):
        for descent in (False, True):
            codes = torch.zeros(k, n, dtype=torch.uint8, device=device)
            if descent:
                make(codes).descend(0, width, panel.clone(), inner, values)
            else:
                make(codes).feed_back(0, width, panel.clone(), factor)
            found.append(codes[order[:width]][:, :rows])
    return max(float((found[i] != found[i + 2]).float().mean()) for i in (0, 1))
