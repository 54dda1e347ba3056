"""Modules of experts with linears of their own, in place of the fused experts of transformers (`experts.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.errors import NumericsError
from fewbit.models.pieces import Piece, leaves_of, pieces_of
from fewbit.nn.experts import ExpertSlice, expert_of

Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Routed:
    """The rows that one expert reads. tokens: int64 [n], their places among the tokens of the layer. shares: [n], the
    router's weights, by which the expert's outputs are multiplied. of: the number of tokens of the layer."""

    tokens: Tensor
    shares: Tensor
    of: int


class Expert(nn.Module):
    """The linears of one expert. `state` is what its layer has found out about them; a new linear resets it."""

    def __init__(self, state: dict[str, Any]) -> None:
        super().__init__()
        self.state = state

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            self.state.clear()


class SeparateExperts(nn.Module):
    """Mixin for a class of fused experts, after `separate` has moved its parameters into one module per expert.

    Packed linears of all experts are stacked (`models/stacking.py`) and then multiplied at once. Otherwise, and also if
    one of them is wrapped by an adapter or has hooks, the experts that have tokens are computed one after the other.
    """

    pieces: tuple[Piece, ...]
    leaves: tuple[str, ...]  # names of the gate, up and down linears; without a gate, of up and down
    count: int  # of experts
    shapes: dict[str, tuple[int, ...]]  # of the fused parameters
    running: frozenset[int] | None = None  # the experts that compute, None for all; see `only_of`
    state: dict[str, Any]  # shared with the experts
    watched: str | None = None  # the module's name, if `routed` is kept up to date; see `watched`
    routed: Routed | None = None  # the rows of the expert that computes now

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles name the class of transformers: that of this object is made by `separated`, and no module has it."""
        return _bare, (type(self).__bases__[1],), self.__dict__

    def laid_out(self, name: str, mapping: Sequence[Any]) -> tuple[tuple[str, ...], tuple[Piece, ...]]:
        """The names of the linears, and where they lie in the fused tensors of this module, which is called `name`."""
        fused: Any = self
        leaves = leaves_of(name, mapping, gated=fused.has_gate)
        return leaves, tuple(pieces_of(fused, leaves))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' outputs.

        hidden_states: [tokens, H]. top_k_index: int64 [tokens, k]; an entry >= `count` selects no expert.
        top_k_weights: [tokens, k].
        """
        tokens, k = top_k_index.shape
        chosen = top_k_index.reshape(-1)
        if (groups := self._stacks()) is not None:
            chosen, order = chosen.sort(stable=True)
            numbers = torch.arange(self.count, device=chosen.device, dtype=chosen.dtype)
            ends = torch.searchsorted(chosen, numbers, right=True, out_int32=True)
            rows = hidden_states[torch.div(order, k, rounding_mode="floor")]
            out = self._run_all(groups, rows, ends)
            out = torch.zeros_like(out).index_copy(0, order, out)
            weights = top_k_weights.masked_fill(top_k_index >= self.count, 0)
            return (out * weights.reshape(-1, 1)).view(tokens, k, -1).sum(dim=1).to(hidden_states.dtype)
        self._check_router(hidden_states.isfinite().all(-1), top_k_weights.isfinite().all(-1))
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=self.count)[: self.count].tolist()
        shape, dtype = (tokens, hidden_states.shape[-1]), torch.promote_types(hidden_states.dtype, torch.float32)
        out = torch.zeros(shape, dtype=dtype, device=hidden_states.device)
        weights, start = top_k_weights.reshape(-1, 1), 0
        for expert, rows in enumerate(counts):
            own = order[start : start + rows]
            start += rows
            if rows and self._runs(expert):
                token = torch.div(own, k, rounding_mode="floor")
                self._say(token, weights[own].flatten(), tokens)
                out.index_add_(0, token, (self.run(expert, hidden_states[token]) * weights[own]).to(dtype))
        return out.to(hidden_states.dtype)

    def _say(self, tokens: Tensor, shares: Tensor, of: int) -> None:
        if self.watched is not None:
            self.routed = Routed(tokens, shares, of)

    def _check_router(self, tokens: Tensor, weights: Tensor) -> None:
        """tokens, weights: bool [tokens], whether a token and the weights of its experts are finite."""
        if self.watched is not None and (wrong := int((tokens & ~weights).sum())):
            raise NumericsError(
                f"{self.watched}: the router gives {wrong} of {len(tokens)} calibration tokens weights with NaN or Inf",
                "The router's weight, or its arithmetic in this dtype, is broken. Check the original model.",
            )

    def _runs(self, expert: int) -> bool:
        return self.running is None or expert in self.running

    def run(self, expert: int, x: Tensor) -> Tensor:
        """The output [n, H] of one expert for its tokens [n, H]."""
        *into, down = (getattr(self.get_submodule(str(expert)), leaf) for leaf in self.leaves)
        return self._normed(down(self._gated([linear(x) for linear in into])))

    def _gated(self, into: Sequence[Tensor]) -> Tensor:
        """What the down linear reads. into: outputs of gate and up, which may be one tensor; without a gate, of up."""
        fused: Any = self  # for mypy: `has_gate`, `act_fn` and so on come from the class of fused experts
        both = torch.cat(tuple(into), -1) if len(into) > 1 else into[0]
        out: Tensor
        if not fused.has_gate:
            out = fused.act_fn(both)
        else:
            # The class of fused experts expects gate and up one after the other, or alternating.
            alternating = both.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
            out = fused._apply_gate(both if fused.is_concatenated else alternating)
        return out

    def _normed(self, out: Tensor) -> Tensor:
        # The oldest supported transformers has no experts with such a norm.
        fused: Any = self
        return fused.post_expert_norm(out) if getattr(fused, "has_post_expert_norm", False) else out

    def _run_all(self, groups: Groups, rows: Tensor, ends: Tensor) -> Tensor:
        """The outputs [n, H] of rows [n, H] that are sorted by expert. ends: int32 [experts], where their rows end."""
        *into, down = groups
        inner = self._gated([self._multiply(each, rows, ends) for each in into])
        return self._normed(self._multiply(down, inner, ends))

    def _multiply(self, group: tuple[str, ...], x: Tensor, ends: Tensor) -> Tensor:
        """The outputs of the linears of these names, side by side, of all experts for their rows of x."""
        firsts = [getattr(self.get_submodule("0"), leaf) for leaf in group]
        y: Tensor = firsts[0].stacked(x, ends)
        if all(linear.bias is None for linear in firsts):
            return y
        experts = [self.get_submodule(str(expert)) for expert in range(self.count)]
        each = [torch.stack([getattr(expert, leaf).bias for expert in experts]) for leaf in group]
        bias = torch.cat(each, -1)
        return y + bias.to(y.dtype)[expert_of(ends, len(x))]

    def _stacks(self) -> Groups | None:
        """Names of the linears, grouped as they are stacked, the down linear last. None if they are not stacked."""
        if "groups" not in self.state:
            self.state["groups"], self.state["hooks"] = self._find_stacks()
        if self.running is not None or any(self.state["hooks"]):
            return None
        groups: Groups | None = self.state["groups"]
        return groups

    def products(self) -> list[Any]:
        """The products that all experts share in a pass; none if they are computed one after the other."""
        return [getattr(self.get_submodule("0"), leaf).product for leaf, *_ in self._stacks() or ()]

    def _find_stacks(self) -> tuple[Groups | None, list[Any]]:
        """The groups, and the dictionaries of the linears' hooks."""
        every = [
            [getattr(self.get_submodule(str(expert)), leaf) for leaf in self.leaves] for expert in range(self.count)
        ]
        if not all(isinstance(linear, ExpertSlice) for own in every for linear in own):
            return None, []
        groups: dict[int, list[str]] = {}
        for leaf, linear in zip(self.leaves, every[0], strict=True):
            groups.setdefault(id(linear.product), []).append(leaf)
        for expert, own in enumerate(every):
            for linear, like in zip(own, every[0], strict=True):
                if linear.product is not like.product or linear.index != like.index + expert * len(like.product.rows):
                    return None, []
        hooks = [h for own in every for m in own for h in (m._forward_hooks, m._forward_pre_hooks)]
        return tuple(map(tuple, groups.values())), hooks


class SeparateBatchedExperts(SeparateExperts):
    """For Llama 4: every expert gets every token, scaled by its router weight, which is 0 if it is not chosen."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """The experts' outputs [E · tokens, H] for their rows [E · tokens, H]."""
        rows = hidden_states.view(self.count, -1, hidden_states.shape[-1])
        if self.watched is not None:
            finite = rows.isfinite().all(-1)  # a token that is not finite is so for all experts
            self._check_router(finite.any(0), finite.all(0))
        if (groups := self._stacks()) is not None:
            numbers = torch.arange(1, self.count + 1, device=rows.device, dtype=torch.int32)
            return self._run_all(groups, hidden_states, numbers * rows.shape[1])
        return torch.cat([self._run_scaled(e, x) if self._runs(e) else torch.zeros_like(x) for e, x in enumerate(rows)])

    def _run_scaled(self, expert: int, x: Tensor) -> Tensor:
        # The rows are scaled already, so the weight of an output is 1, or 0 if the token did not choose the expert.
        self._say(torch.arange(len(x), device=x.device, dtype=torch.int64), (x != 0).any(1).to(x.dtype), len(x))
        return self.run(expert, x)


class SeparateExpertsBesideIdle(SeparateExperts):
    """For LongCat: an entry of `top_k_index` >= `count` selects an expert that returns its input."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        own = super().forward(hidden_states, top_k_index, top_k_weights)
        idle = (top_k_weights * (top_k_index >= self.count)).sum(dim=-1, keepdim=True)
        return own + (hidden_states * idle).to(own.dtype)


class SeparateSharedExperts(SeparateExperts):
    """For Inkling: every expert gets every token. Gate, up and down are three fused tensors."""

    def products(self) -> list[Any]:
        return []

    def laid_out(self, name: str, mapping: Sequence[Any]) -> tuple[tuple[str, ...], tuple[Piece, ...]]:
        leaves = ("gate_proj", "up_proj", "down_proj")
        return leaves, tuple(Piece(leaf, "weight", leaf, slice(None), False) for leaf in leaves)

    def forward(self, hidden_states: Tensor, gammas: Tensor) -> Tensor:  # type: ignore[override]
        """The sum of the experts' outputs. gammas: factors of what the down linears read, one per token and expert."""
        fused: Any = self
        gammas = gammas.view(*hidden_states.shape[:-1], self.count)
        outputs = [torch.zeros_like(hidden_states, dtype=torch.float32)]
        for expert in filter(self._runs, range(self.count)):
            gate, up, down = (getattr(self.get_submodule(str(expert)), leaf) for leaf in self.leaves)
            inner = fused.act_fn(gate(hidden_states)) * up(hidden_states) * gammas[..., expert, None]
            outputs.append(down(inner).float())
        return torch.stack(outputs).sum(dim=0).to(hidden_states.dtype)


class SeparateProducts(SeparateExperts):
    """For JetMoe: one linear for each expert. The rows are sorted by expert."""

    def products(self) -> list[Any]:
        return []

    def laid_out(self, name: str, mapping: Sequence[Any]) -> tuple[tuple[str, ...], tuple[Piece, ...]]:
        return ("linear",), (Piece("linear", "weight", "weight", slice(None), False),)

    def forward(self, inputs: Tensor, expert_size: list[int]) -> Tensor:  # type: ignore[override]
        """The experts' outputs [rows, N]. expert_size: the number of rows of each expert."""
        width, outputs = self.shapes["weight"][1], []
        for expert, rows in enumerate(inputs.split(expert_size, dim=0)):
            runs = len(rows) and self._runs(expert)
            linear = self.get_submodule(f"{expert}.linear")
            outputs.append(linear(rows) if runs else rows.new_zeros(len(rows), width))
        return torch.cat(outputs)


# What transformers' decorator for fused experts sets, to describe their layout.
LAYOUT = {"has_gate", "has_bias", "is_transposed", "is_concatenated"}
# Classes that lack the decorator.
_USUAL = {
    **dict.fromkeys(("has_gate", "is_concatenated"), True),
    **dict.fromkeys(("has_bias", "is_transposed"), False),
    "_apply_gate": lambda self, both: _gated(self.act_fn, both),
}
UNDECORATED: dict[str, tuple[type[SeparateExperts], dict[str, Any]]] = {
    "Llama4TextExperts": (SeparateBatchedExperts, {**_USUAL, "is_transposed": True}),
    "InklingExperts": (SeparateExperts, _USUAL),
    "InklingSharedExperts": (SeparateSharedExperts, {}),
    "JetMoeParallelExperts": (SeparateProducts, {}),
    "LongcatFlashExperts": (SeparateExpertsBesideIdle, _USUAL),
}


def _gated(act: nn.Module, both: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    out: Tensor = up * act(gate)
    return out


def separated(cls: type[nn.Module]) -> type[SeparateExperts]:
    """The class of separate experts for a class of fused ones."""
    base, known = UNDECORATED.get(cls.__name__, (SeparateExperts, {}))
    return type(f"Separate{cls.__name__}", (base, cls), known)


def _bare(cls: type[nn.Module]) -> SeparateExperts:
    """Separate experts without any attributes, which a pickle or a copy then adds."""
    made = separated(cls)
    return made.__new__(made)
