"""Divides the linears of a block into groups, so that the calibration statistics of one group fit a budget.

The Hessian of an input of K columns takes 4 K² bytes. The 256 experts of a DeepSeek-V3 layer (K 7168 and 2048) have
55 GB of Hessians, more than twice the layer in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fewbit.formats.base import Shape
from fewbit.stats import Need

_LEAST_ROOM = 2 << 30
_SHARE = 16


def room_for_statistics(memory: int) -> int:
    """The budget for the statistics of a group, in bytes, on a device with `memory` bytes.

    A sixteenth of the device, but at least 2 GiB: a group costs a run of the block, so small groups take long.
    """
    return max(_LEAST_ROOM, memory // _SHARE)


def groups_of(shapes: Mapping[str, Shape], need: Need, room: int) -> list[list[str]]:
    """The linears (name -> shape [N, K]) in groups whose statistics take at most `room` bytes.

    The linears of one module stay together, because they may read the same tensor: such a group may be larger.
    """
    groups: list[list[str]] = []
    free = 0
    for names in by_module(shapes):
        size = statistics_bytes({name: shapes[name] for name in names}, need)
        if not groups or size > free:
            groups.append([])
            free = room
        groups[-1] += names
        free -= size
    return groups


def statistics_bytes(shapes: Mapping[str, Shape], need: Need) -> int:
    """Bytes of the statistics of these linears."""
    matrices = 4 if need >= Need.SHIFT else 1
    return sum(4 * k * k * matrices if need >= Need.HESSIAN else 4 * k for k in distinct_inputs(shapes))


def distinct_inputs(shapes: Mapping[str, Shape]) -> list[int]:
    """The columns of each tensor that these linears read. The linears of a module are taken to read one tensor of each
    width, except the last, which reads what they computed."""
    inputs = {
        (number, shapes[name][1], name == names[-1]) for number, names in enumerate(by_module(shapes)) for name in names
    }
    return [k for _, k, _ in inputs]


def by_module(names: Iterable[str]) -> list[list[str]]:
    """The names of linears, those of one module together."""
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(name.rpartition(".")[0], []).append(name)
    return list(members.values())
