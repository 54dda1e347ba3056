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

from fewbit.models.pieces import SOURCE, Piece, leaves_of, sources
from fewbit.models.separated import LAYOUT, UNDECORATED, Expert, separated
from fewbit.models.separated import Routed as Routed
from fewbit.models.separated import SeparateExperts as SeparateExperts

_OWN = re.compile(r"experts\.\d+\.")  # in the name of a weight of one expert


def fused_in(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of the fused experts of each layer, where `separate` knows how they are laid out."""
    for name, module in model.named_modules():
        known = vars(module).keys() >= LAYOUT or type(module).__name__ in UNDECORATED
        if known and not isinstance(module, SeparateExperts):
            yield name, module


def separate(model: PreTrainedModel) -> None:
    """Give the experts of every layer linears of their own, in place. Their values are copied."""
    mapping = get_model_conversion_mapping(model)
    for name, module in list(fused_in(model)):
        module.__class__ = separated(type(module))
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
