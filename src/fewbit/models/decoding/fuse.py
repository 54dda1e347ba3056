"""Fuse projections of a loaded model: q, k and v into one multiplication, gate and up into another.

One token runs through the model, with linears that only record their input. This shows which linears read the same
tensor. Blocks with the same linears are assumed to be wired alike, so blocks on other devices do not run.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.models import blocks
from fewbit.nn.fused import Slice, slices
from fewbit.nn.layers import QLinear

Groups = list[tuple[str, ...]]


class _Elsewhere(Exception):
    """The next block is on another device."""


def fuse(model: Any) -> Groups:
    """Fuse linears in place. Returns the names of each fused group. Warnings name the groups that cannot be fused."""
    fused: Groups = []
    refused: dict[str, list[str]] = {}
    for group in _of_one_scheme(model, shared_inputs(model), refused):
        made = slices([model.get_submodule(name) for name in group])
        if isinstance(made, str):
            refused.setdefault(made, []).append(" + ".join(group))
            continue
        for name, piece in zip(group, made, strict=True):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, piece)
        fused.append(group)
    gc.collect()  # hooks of accelerate and the linears that were replaced refer to one another
    for why, groups in refused.items():
        more = f" and {len(groups) - 1} more" if len(groups) > 1 else ""
        warnings.warn(f"not fused: {groups[0]}{more}: {why}", stacklevel=2)
    if not fused and not refused:
        warnings.warn("not fused: no two quantized linears of this model read the same tensor", stacklevel=2)
    return fused


def _of_one_scheme(model: Any, groups: Groups, refused: dict[str, list[str]]) -> Groups:
    """The groups; of one whose linears differ in scheme, the neighbours of one module that agree.

    So a decoder block finds q, k and v in their order. refused: gets those that stay alone.
    """

    def scheme(name: str) -> tuple[Any, str]:
        return model.get_submodule(name).codec, name.rpartition(".")[0]

    found: Groups = []
    for group in groups:
        runs = [tuple(names) for _, names in groupby(group, scheme)]
        together = [run for run in runs if len(run) > 1]
        if len({model.get_submodule(name).codec for name in group}) == 1 or not together:
            found.append(group)
            continue
        found += together
        for (name,) in (run for run in runs if len(run) == 1):
            why = f"its neighbours have other schemes than {model.get_submodule(name).codec}"
            refused.setdefault(why, []).append(name)
    return found


def shared_inputs(model: Any) -> Groups:
    """Groups of quantized linears in blocks that read the same tensor: their names, in the order of their calls."""
    alike: dict[tuple[str, ...], Groups] = {}  # names of a block's linears -> groups of names
    groups: Groups = []
    readers = _readers(model)
    linears = {block: _linears(model.get_submodule(block)) for block in blocks.find_blocks(model)}
    for block, names in linears.items():
        inside = [tuple(n.removeprefix(block + ".") for n in group if n.startswith(block + ".")) for group in readers]
        if any(inside):
            alike.setdefault(names, [group for group in inside if len(group) > 1])
    for block, names in linears.items():
        groups += [tuple(f"{block}.{name}" for name in group) for group in alike.get(names, [])]
    return groups


def _linears(block: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, m in block.named_modules() if isinstance(m, QLinear) and not isinstance(m, Slice))


def _readers(model: Any) -> Groups:
    """For each tensor that quantized linears read in a step, their names. Linears called twice are left out."""
    seen: dict[int, tuple[Tensor, list[str]]] = {}  # keeps the tensors alive, so that their ids stay unique
    calls: dict[str, int] = {}

    def note(name: str, linear: QLinear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            calls[name] = calls.get(name, 0) + 1
            seen.setdefault(id(x), (x, []))[1].append(name)
            return x.new_zeros(*x.shape[:-1], linear.out_features)

        return forward

    with _noting(model, note), torch.no_grad(), suppress(_Elsewhere):
        token = torch.zeros(1, 1, dtype=torch.long, device=model.get_input_embeddings().weight.device)
        model(input_ids=token, use_cache=False)
    return [tuple(name for name in names if calls[name] == 1) for _, names in seen.values()]


@contextmanager
def _noting(model: Any, note: Callable[[str, QLinear], Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Inside this context, quantized linears only record their input. The model stops at a block on another device."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, QLinear) and not isinstance(m, Slice)}
    before = {name: linear.__dict__.get("forward") for name, linear in linears.items()}  # set if a hook has replaced it
    home: set[torch.device] = set()

    def stop(block: nn.Module, *_: Any) -> None:
        home.add(next(block.parameters()).device)
        if len(home) > 1:
            raise _Elsewhere

    handles = [model.get_submodule(block).register_forward_pre_hook(stop) for block in blocks.find_blocks(model)]
    for name, linear in linears.items():
        linear.forward = note(name, linear)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, linear in linears.items():
            del linear.forward
            if (own := before[name]) is not None:
                linear.forward = own  # type: ignore[method-assign]
