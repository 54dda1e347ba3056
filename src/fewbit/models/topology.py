"""What feeds which linear in a block, found by looking and not listed by architecture.

A norm feeds the linears whose input *is* its output tensor. A linear feeds another where doubling some of its rows
doubles some of the other's columns and leaves the rest: v does that to o (grouped queries included), up to down, and
fc1 to fc2 where a ReLU lies between. Doubling is exact in floating point, so an answer is yes or no. Which column
belongs to which row is asked in as many passes as row numbers have bits: in pass b, rows whose number has bit b are
doubled. Rows of a fused projection that do more than scale (q, k and gate) are set aside by halving; where attention
mixes them in, the first position is looked at, which attends to itself alone.

All this is a guess from one batch of random states; whoever folds scales into a link checks the block's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_HALVINGS = 3  # of the rows of a fused projection
_SAME = 1e-3  # relative distance within which a column counts as doubled, or as it was


@dataclass(frozen=True)
class Link:
    """The columns of `readers` are fed by channels of `source`, all named within the block.

    channel [K]: the channel (a norm's weight, a linear's row) that feeds each column, -1 for none that may be scaled.
    offset: a norm multiplies by weight + offset (Gemma's by 1 + w); None where the source is a linear.
    """

    source: str
    readers: tuple[str, ...]
    channel: Tensor
    offset: float | None


def find_links(block: nn.Module, run: Callable[[], object]) -> list[Link]:
    """The links of a block whose forward pass is `run`, in the order in which their readers run."""
    linears: dict[str, nn.Module] = {name: m for name, m in block.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    links, order = _fed_by_norms(block, linears, run)
    before = _inputs(linears, run)
    for source in order:
        links += _fed_by_rows(source, order, linears, before, run)
    return sorted(links, key=lambda link: order.index(link.readers[0]))


def weight_of(linear: nn.Module) -> Tensor:
    """The weight [N, K], to be written through; GPT-2's Conv1D keeps it transposed."""
    assert isinstance(linear.weight, Tensor)
    return linear.weight.T if isinstance(linear, Conv1D) else linear.weight


def _fed_by_norms(
    block: nn.Module, linears: dict[str, nn.Module], run: Callable[[], object]
) -> tuple[list[Link], list[str]]:
    """A link for each norm whose output linears read; and the linears in the order in which they ran."""
    outputs: dict[int, tuple[str, Tensor]] = {}  # the tensors are kept, so that no two have the same id
    readers: dict[str, list[str]] = {}
    order: list[str] = []

    def made(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[object, ...], output: object) -> None:
            if isinstance(output, Tensor) and output.shape[-1:] == _vector(module):
                outputs[id(output)] = name, output

        return hook

    def read(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[object, ...]) -> None:
            order.append(name)
            if id(args[0]) in outputs:
                readers.setdefault(outputs[id(args[0])][0], []).append(name)

        return hook

    norms = {name: m for name, m in block.named_modules() if name not in linears and _vector(m)}
    handles = [m.register_forward_hook(made(name)) for name, m in norms.items()]
    handles += [m.register_forward_pre_hook(read(name)) for name, m in linears.items()]
    with _removing(handles):
        run()
    links = []
    for name, found in readers.items():
        if (offset := _offset(norms[name])) is not None:
            links.append(
                Link(name, tuple(found), torch.arange(*_vector(norms[name]), dtype=torch.int64, device="cpu"), offset)
            )
    return links, list(dict.fromkeys(order))


def _vector(module: nn.Module) -> tuple[int, ...]:
    """The shape of a module's own weight where that is a vector, else nothing."""
    weight = getattr(module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, Tensor) and weight.dim() == 1 else ()


def _offset(norm: nn.Module) -> float | None:
    """What a norm adds to its weight before multiplying by it: 0 or 1, told by doubling; None if neither."""
    weight, bias = norm.weight, getattr(norm, "bias", None)
    assert isinstance(weight, Tensor)
    x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu").to(
        weight
    )
    shift = bias if isinstance(bias, Tensor) else torch.zeros_like(weight)
    kept = weight.clone()
    once = norm(x) - shift
    for offset in (0.0, 1.0):
        weight.copy_(2 * (kept + offset) - offset)
        twice = norm(x) - shift
        weight.copy_(kept)
        if (twice - 2 * once).norm() <= 10 * _SAME * once.norm():
            return offset
    return None


def _fed_by_rows(
    source: str, order: list[str], linears: dict[str, nn.Module], before: dict[str, Tensor], run: Callable[[], object]
) -> Iterator[Link]:
    """The link from rows of `source` to columns of the first linear that they reach, if there is one."""
    later = order[order.index(source) + 1 :]
    weight, bias = weight_of(linears[source]), linears[source].bias

    def doubled(rows: Tensor) -> dict[str, Tensor]:
        own = [weight, bias] if isinstance(bias, Tensor) else [weight]
        rows = rows.to(weight.device)
        try:
            for tensor in own:
                tensor[rows] *= 2
            return _inputs({name: linears[name] for name in later}, run)
        finally:
            for tensor in own:
                tensor[rows] /= 2

    whole = torch.arange(weight.shape[0], dtype=torch.int64, device="cpu")
    after = doubled(whole)
    reader = next((name for name in later if name not in after or not torch.equal(before[name], after[name])), None)
    if reader is None:
        return
    later = later[: later.index(reader) + 1]
    for view in (_all_positions, _first_position):

        def times(rows: Tensor, view: Callable[[Tensor], Tensor] = view) -> Tensor:
            after = doubled(rows).get(reader)
            if after is None or after.shape != before[reader].shape:  # routed elsewhere
                return torch.zeros(before[reader].shape[-1], dtype=torch.float32, device="cpu")
            return _times(view(before[reader]), view(after))

        rows = _scalable(whole, times, _HALVINGS if view is _first_position else 0)
        if len(rows) and (times(rows) == 2).any():
            yield Link(source, (reader,), _channels(rows, times), None)
            return


def _scalable(rows: Tensor, times: Callable[[Tensor], Tensor], halvings: int) -> Tensor:
    """Those of `rows` that only scale what they reach, found by halving."""
    if (times(rows) > 0).all():
        return rows
    if not halvings or len(rows) < 2:
        return rows[:0]
    return torch.cat([_scalable(half, times, halvings - 1) for half in rows.tensor_split(2)])


def _channels(rows: Tensor, times: Callable[[Tensor], Tensor]) -> Tensor:
    """The row that feeds each column, or -1."""
    linear = times(rows) == 2
    number = torch.zeros(len(linear), dtype=torch.long, device="cpu")
    for bit in range(max(1, (len(rows) - 1).bit_length())):
        found = times(rows[(torch.arange(len(rows), dtype=torch.int64, device="cpu") >> bit) & 1 == 1])
        number += (found == 2).long() << bit
        linear &= found > 0
    linear &= number < len(rows)
    return torch.where(linear, rows[number.clamp(max=len(rows) - 1)], -1)


def _times(before: Tensor, after: Tensor) -> Tensor:
    """2 for each column that doubled, 1 for each that stayed, 0 for each that did something else."""
    before, after = before.reshape(-1, before.shape[-1]), after.reshape(-1, after.shape[-1])
    size = _SAME * before.norm(dim=0)
    stayed, twice = ((after - factor * before).norm(dim=0) <= size for factor in (1, 2))
    return torch.where(stayed, 1, torch.where(twice, 2, 0)).cpu()


def _all_positions(x: Tensor) -> Tensor:
    return x


def _first_position(x: Tensor) -> Tensor:
    return x[:, :1] if x.dim() > 2 else x[:1]


def _inputs(linears: dict[str, nn.Module], run: Callable[[], object]) -> dict[str, Tensor]:
    """What each linear reads first."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.setdefault(name, args[0])

        return record

    with _removing([m.register_forward_pre_hook(hook(name)) for name, m in linears.items()]):
        run()
    return found


@contextmanager
def _removing(handles: list[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
