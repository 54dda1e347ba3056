"""Gives each expert of a mixture-of-experts layer linears of its own, so that they are quantized like all others.

transformers keeps the experts of a layer as fused parameters. Checkpoints, plans and servers name one weight for each
expert. With E experts, hidden size H and intermediate size I:

    gate_up_proj [E, 2·I, H]   ->   experts.e.gate_proj.weight [I, H], experts.e.up_proj.weight [I, H]
    up_proj [E, I, H]          ->   experts.e.up_proj.weight [I, H]       where experts have no gate
    down_proj [E, H, I]        ->   experts.e.down_proj.weight [H, I]

gpt-oss keeps the transposes, and its rows of gate and up alternate. The names of the linears are those that the model
type has in checkpoints (Mixtral: w1, w3, w2), which transformers' conversion mapping knows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from fewbit.errors import NumericsError
from fewbit.models.pieces import SOURCE, Piece, leaves_of, pieces_of, sources
from fewbit.nn.experts import ExpertSlice, expert_of

Groups = tuple[tuple[str, ...], ...]
_OWN = re.compile(r"experts\.\d+\.")  # in the name of a weight of one expert


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
_LAYOUT = {"has_gate", "has_bias", "is_transposed", "is_concatenated"}
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


def fused_in(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of the fused experts of each layer, where `separate` knows how they are laid out."""
    for name, module in model.named_modules():
        known = vars(module).keys() >= _LAYOUT or type(module).__name__ in UNDECORATED
        if known and not isinstance(module, SeparateExperts):
            yield name, module


def separate(model: PreTrainedModel) -> None:
    """Give the experts of every layer linears of their own, in place. Their values are copied."""
    mapping = get_model_conversion_mapping(model)
    for name, module in list(fused_in(model)):
        base, known = UNDECORATED.get(type(module).__name__, (SeparateExperts, {}))
        cls: type[nn.Module] = type(module)
        module.__class__ = type(f"Separate{cls.__name__}", (base, cls), known)
        leaves, pieces = module.laid_out(name, mapping)
        fused: dict[str, Tensor] = {each.fused: getattr(module, each.fused) for each in pieces}
        for each in fused:
            delattr(module, each)
        count = min(map(len, fused.values()))  # LongCat's gates have rows for experts that do nothing
        trained = any(tensor.requires_grad for tensor in fused.values())
        state: dict[str, Any] = {}
        module.state = state
        for expert in range(count):
            own = Expert(state)
            for leaf in leaves:
                values = {p.kind: p.of(fused[p.fused], expert).contiguous() for p in pieces if p.leaf == leaf}
                rows, columns = values["weight"].shape
                linear = nn.Linear(columns, rows, bias="bias" in values, device="meta")
                for kind, value in values.items():
                    setattr(linear, kind, nn.Parameter(value.detach(), requires_grad=trained))
                own.add_module(leaf, linear)
            module.add_module(str(expert), own)
        module.leaves, module.pieces, module.count = leaves, pieces, count
        module.shapes = {each: tuple(tensor.shape) for each, tensor in fused.items()}
        # Else transformers would initialize the removed fused parameters; some models do so in the layer around them.
        module._is_hf_initialized = True
        around: Any = model.get_submodule(name.rpartition(".")[0])
        around._is_hf_initialized = not around._parameters or getattr(around, "_is_hf_initialized", False)
    _tie_apart(model)


def _tie_apart(model: PreTrainedModel) -> None:
    """Replace the ties between fused tensors by ties between the tensors of their experts."""
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    for second, first in list(ties.items()):
        own, other = second.rpartition(".")[0], first.rpartition(".")[0]
        apart = {name: f"{other}{name.removeprefix(own)}" for name, _, _ in split(model, second)}
        if apart:
            del ties[second]
            ties.update(apart)


def join(model: PreTrainedModel) -> None:
    """Undo `separate`, in place: fuse the experts of every layer again. Their linears must not be packed."""
    apart = [each for each in model.modules() if isinstance(each, SeparateExperts)]
    for module in apart:
        experts = [module.get_submodule(str(expert)) for expert in range(module.count)]
        like = experts[0].get_submodule(module.leaves[-1]).get_parameter("weight")
        for name, shape in module.shapes.items():
            fused = torch.zeros(shape, dtype=like.dtype, device=like.device)
            for piece in module.pieces:
                for number, expert in enumerate(experts if piece.fused == name else []):
                    own = expert.get_submodule(piece.leaf).get_parameter(piece.kind)
                    piece.of(fused, number).copy_(own.detach())
            module.register_parameter(name, nn.Parameter(fused, requires_grad=like.requires_grad))
        for number in range(module.count):
            delattr(module, str(number))
        module.__class__ = type(module).__bases__[1]
    # Saving undoes the conversions of loading. A model that was loaded with separate experts did not merge them.
    used = getattr(model, "_weight_conversions", None)
    if apart and used is not None and len(unmerged(used)) == len(used):
        merging = [each for each in get_model_conversion_mapping(model) if not unmerged([each])]
        model._weight_conversions = [*used, *merging]  # type: ignore[assignment]


@contextmanager
def only_of(prefix: str, block: nn.Module, linears: Iterable[str]) -> Iterator[None]:
    """A context in which the block `prefix` runs only the experts that have one of `linears`, by their names.

    The other experts return 0. That is right for the inputs of `linears` only if they all are in one module of experts:
    otherwise a linear may read what experts computed, and all experts run.
    """
    names = list(linears)
    limited = [
        (path, module)
        for path, module in block.named_modules(prefix=prefix)
        if isinstance(module, SeparateExperts) and all(name.startswith(f"{path}.") for name in names)
    ]
    for path, module in limited:
        module.running = frozenset(int(name.removeprefix(f"{path}.").partition(".")[0]) for name in names)
    try:
        yield
    finally:
        for _, module in limited:
            module.running = None


@contextmanager
def watched(prefix: str, block: nn.Module) -> Iterator[None]:
    """A context in which the experts of the block `prefix` say which rows they read, in `SeparateExperts.routed`.

    NumericsError that names the experts' module if its router gives weights that are not finite.
    """
    modules = {path: m for path, m in block.named_modules(prefix=prefix) if isinstance(m, SeparateExperts)}
    for path, module in modules.items():
        module.watched = path
    try:
        yield
    finally:
        for module in modules.values():
            module.watched = module.routed = None


@dataclass(frozen=True)
class ExpertInput:
    """An input of one expert: of its gate and up linears, or of its down linear."""

    module: SeparateExperts
    path: str  # "model.layers.0.mlp.experts"
    expert: int
    is_inner: bool  # what the gate and up linears computed

    @property
    def pool(self) -> tuple[str, bool]:
        """The same for this input of all experts of the layer."""
        return self.path, self.is_inner


def inputs_of(prefix: str, block: nn.Module) -> dict[str, ExpertInput]:
    """Linear -> its input, for all linears of experts in the block `prefix`."""
    return {
        f"{path}.{expert}.{leaf}": ExpertInput(module, path, expert, leaf == module.leaves[-1])
        for path, module in block.named_modules(prefix=prefix)
        if isinstance(module, SeparateExperts)
        for expert in range(module.count)
        for leaf in module.leaves
    }


def of_any(name: str) -> str:
    """The name of a linear, with a star for the number of its expert."""
    return _OWN.sub("experts.*.", name)


def experts_own(name: str) -> str:
    """The part of the name of an expert's tensor or module that says which expert it is of: "experts.17."."""
    found = _OWN.search(name)
    assert found is not None
    return found[0]


def is_of_expert(name: str) -> bool:
    """Whether `name` is of a module or tensor of one expert."""
    return _OWN.search(name) is not None


def like_experts(model: PreTrainedModel, names: Iterable[str]) -> bool:
    """Whether one of these modules has the name that a linear of the model's fused experts would have.

    Such is the gate_proj of a dense layer, or of a shared expert.
    """
    mapping, leaves = get_model_conversion_mapping(model), set[str]()
    for name, module in fused_in(model):
        _, known = UNDECORATED.get(type(module).__name__, (None, {}))
        leaves.update(leaves_of(name, mapping, gated={**vars(module), **known}.get("has_gate", True)))
    return any(name.rpartition(".")[2] in leaves for name in names)


def names_one(model: nn.Module, names: Iterable[str]) -> bool:
    """Whether one of `names` is of a module or tensor of one expert of `model`, whose experts may be fused."""
    apart = [name for name, module in model.named_modules() if isinstance(module, SeparateExperts)]
    paths = [re.escape(name) for name in (*apart, *(name for name, _ in fused_in(model)))]
    own = re.compile(rf"(?:{'|'.join(paths)})\.\d+\.")
    return bool(paths) and any(own.match(name) for name in names)


def are_separate(model: nn.Module) -> bool:
    return any(isinstance(module, SeparateExperts) for module in model.modules())


def unmerged(conversions: Sequence[Any]) -> list[Any]:
    """`conversions` without those that merge experts."""
    return [each for each in conversions if not any(SOURCE.search(source) for source in sources(each))]


def fused_count(model: nn.Module, name: str) -> int | None:
    """How many experts the fused tensor `name` of a checkpoint must hold; None if it holds none."""
    path, _, tensor = name.rpartition(".")
    shapes = getattr(dict(model.named_modules()).get(path), "shapes", {})
    return shapes[tensor][0] if tensor in shapes else None


def fused_name(model: nn.Module, name: str) -> str | None:
    """The fused tensor that the tensor `name` of a single expert may be a part of; None if it is not of an expert."""
    if not names_one(model, [name]):
        return None
    path, _, leaf, kind = name.rsplit(".", 3)
    module: Any = model.get_submodule(path)
    return next(f"{path}.{piece.fused}" for piece in module.pieces if (piece.leaf, piece.kind) == (leaf, kind))


def split(model: nn.Module, name: str) -> Iterator[tuple[str, int, Piece]]:
    """(name, expert, piece) for each single-expert tensor inside of the fused tensor `name` of a checkpoint."""
    path, _, tensor = name.rpartition(".")
    try:
        experts = model.get_submodule(path)
    except AttributeError:
        return
    if isinstance(experts, SeparateExperts):
        for piece in experts.pieces:
            if piece.fused == tensor:
                for expert in range(experts.count):
                    yield f"{path}.{expert}.{piece.leaf}.{piece.kind}", expert, piece
