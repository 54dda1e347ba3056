"""Find which norm or linear feeds which linear in a block, by experiment instead of by architecture.

A norm feeds the linears whose input *is* its output tensor. A linear feeds another one if doubling some of its rows
doubles some of the other's input columns, and leaves the rest unchanged. v feeds o this way (with grouped queries too),
up feeds down, and fc1 feeds fc2 if a ReLU is between them. Doubling is exact in floating point, so the answer is yes or
no. To find the row of each column takes as many passes as row numbers have bits: pass b doubles the rows whose number
has bit b. In a fused projection, some rows do more than scale (q, k and gate); repeated halving excludes them. If
attention mixes them in, only the first position is compared, which attends to itself alone.

The result is a guess from one batch of random states. Code that folds scales into a link has to check the block's
output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fewbit.models.experts import experts_own, is_of_expert, of_any
from fewbit.models.linears import is_linear, weight_of

_HALVINGS = 3  # how often the rows of a fused projection are halved
_SAME = 1e-3  # relative distance up to which a column counts as doubled, or as unchanged
_EQUAL = 1e-5  # the same for what a norm gives in float32


@dataclass(frozen=True)
class Link:
    """Channels of `source` feed the input columns of `readers`. All names are relative to the block.

    channel: int64 [K], the channel (index of a norm's weight, or row of a linear) that feeds each column; -1 if no
    channel can be scaled. offset: a norm multiplies by weight + offset (Gemma's by 1 + w); None if the source is a
    linear.
    """

    source: str
    readers: tuple[str, ...]
    channel: Tensor
    offset: float | None


def find_links(block: nn.Module, run: Callable[[], object]) -> list[Link]:
    """The links of a block, in the order in which their readers run. `run` is the forward pass of the block."""
    linears: dict[str, nn.Module] = {name: m for name, m in block.named_modules() if is_linear(m)}
    links, order = _fed_by_norms(block, linears, run)
    before = _inputs(linears, run)
    tried: set[str] = set()  # experts are alike, so one of them is tried: each try runs the block a dozen times
    for source in order:
        if of_any(source) not in tried:
            tried.add(of_any(source))
            links += _fed_by_rows(source, order, linears, before, run)
    return _of_all_experts(sorted(links, key=lambda link: order.index(link.readers[0])), linears)


def _of_all_experts(links: list[Link], linears: Mapping[str, nn.Module]) -> list[Link]:
    """`links`, and those of one expert for each other expert, also for one that no token of `run` chose."""
    known: dict[str, Link] = {}
    for link in links:
        if all(is_of_expert(name) for name in (link.source, *link.readers)):
            known.setdefault(of_any(link.source), link)
    sources, more = {link.source for link in links}, list[Link]()
    for source in linears:
        alike = known.get(of_any(source))
        if alike is not None and source not in sources:
            expert = experts_own(source)
            readers = tuple(of_any(name).replace("experts.*.", expert) for name in alike.readers)
            pairs = zip((source, *readers), (alike.source, *alike.readers), strict=True)
            if all(weight_of(linears[own]).shape == weight_of(linears[other]).shape for own, other in pairs):
                more.append(replace(alike, source=source, readers=readers))
    return links + more


def _fed_by_norms(
    block: nn.Module, linears: dict[str, nn.Module], run: Callable[[], object]
) -> tuple[list[Link], list[str]]:
    """One link for each norm whose output linears read, and the names of all linears in the order of their calls."""
    outputs: dict[int, tuple[str, Tensor]] = {}  # keeps the tensors alive, so that their ids stay unique
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
    """The shape of the module's weight if it is a vector, else ()."""
    weight = getattr(module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, Tensor) and weight.dim() == 1 else ()


def _offset(norm: nn.Module) -> float | None:
    """What a norm adds to its weight before the multiplication: 0 or 1, found by doubling; None if neither.

    In float32, up to its rounding: one more is little where the weights are large, as Gemma's are.
    """
    norm = deepcopy(norm).float()
    weight, bias = norm.weight, getattr(norm, "bias", None)
    assert isinstance(weight, Tensor)
    seeded = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(4, len(weight), generator=seeded, dtype=torch.float32, device="cpu").to(weight)
    shift = bias if isinstance(bias, Tensor) else torch.zeros_like(weight)
    kept = weight.clone()
    once = norm(x) - shift
    for offset in (0.0, 1.0):
        weight.copy_(2 * (kept + offset) - offset)
        if (norm(x) - shift - 2 * once).norm() <= _EQUAL * once.norm():
            return offset
    return None


def _fed_by_rows(
    source: str, order: list[str], linears: dict[str, nn.Module], before: dict[str, Tensor], run: Callable[[], object]
) -> Iterator[Link]:
    """The link from rows of `source` to columns of the first linear that they affect, if there is one."""
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
    """The subset of `rows` that only scale the reader's input, found by halving."""
    if (times(rows) > 0).all():
        return rows
    if not halvings or len(rows) < 2:
        return rows[:0]
    return torch.cat([_scalable(half, times, halvings - 1) for half in rows.tensor_split(2)])


def _channels(rows: Tensor, times: Callable[[Tensor], Tensor]) -> Tensor:
    """The row that feeds each column, -1 if there is none."""
    linear = times(rows) == 2
    number = torch.zeros(len(linear), dtype=torch.long, device="cpu")
    for bit in range(max(1, (len(rows) - 1).bit_length())):
        found = times(rows[(torch.arange(len(rows), dtype=torch.int64, device="cpu") >> bit) & 1 == 1])
        number += (found == 2).long() << bit
        linear &= found > 0
    linear &= number < len(rows)
    return torch.where(linear, rows[number.clamp(max=len(rows) - 1)], -1)


def _times(before: Tensor, after: Tensor) -> Tensor:
    """For each column: 2 if it doubled, 1 if it is unchanged, else 0."""
    before, after = before.reshape(-1, before.shape[-1]), after.reshape(-1, after.shape[-1])
    size = _SAME * before.norm(dim=0)
    stayed, twice = ((after - factor * before).norm(dim=0) <= size for factor in (1, 2))
    return torch.where(stayed, 1, torch.where(twice, 2, 0)).cpu()


def _all_positions(x: Tensor) -> Tensor:
    return x


def _first_position(x: Tensor) -> Tensor:
    return x[:, :1] if x.dim() > 2 else x[:1]


def _inputs(linears: dict[str, nn.Module], run: Callable[[], object]) -> dict[str, Tensor]:
    """The input of the first call of each linear."""
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
