"""Tensor parallelism: each rank of a torchrun launch holds a part of every linear, by the model's plan in transformers.

The plan (`tp_plan`) gives modules a style. transformers' own loader cannot follow it with packed weights: it cuts every
tensor of a layer in the same dimension, which is not the rows in every format, and it knows no groups. So packed
linears are cut when they get their weights (`stacking.pack`), and all others after the model is loaded (`finish`):

    colwise                 a part of the rows; heads and activations between it and `rowwise` are then this rank's
    colwise_gather_output   a part of the rows; the outputs of all ranks are joined
    rowwise                 a part of the columns; the products of all ranks are added
    rowwise_split_input     the same, where each rank has the whole input
    the input embedding     a part of its columns, whatever the plan says, and of a head that is tied to it

    moe_tp_experts          a part of every expert (`parallel_experts.py`)

Modules that the plan does not name stay whole on each rank. A packed linear whose weight cannot be cut between groups
stays whole too: it gets its whole input, or keeps its part of the output.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fewbit.errors import PlanError
from fewbit.models import parallel_experts
from fewbit.models.parallel_experts import Experts
from fewbit.nn.layers import QEmbedding, QLinear
from fewbit.nn.parallel import Gather, Keep, Sum, Take
from fewbit.schemes.base import QTensor
from fewbit.schemes.parted import part

_ROWS = {"colwise": False, "colwise_gather_output": True, "colwise_rep": True}  # style -> whether outputs are joined
_COLUMNS = {"rowwise": False, "rowwise_split_input": True, "rowwise_rep": True}  # style -> whether the input is whole
_WHOLE = ("replicate", "replicated_with_grad_allreduce", "mla_kv_a_proj", "local_params", "moe_identity_expert")
_MARK = "_fewbit_ranks"
_HINT = "Load it with device_map='auto', or with another number of processes."

Layer = QLinear | QEmbedding


def is_split(model: Any) -> bool:
    """Whether this process has only its part of the model."""
    return hasattr(model, _MARK)


class Split:
    """How a model is cut: this is rank `rank` of `size`, and what it holds goes to `device`."""

    def __init__(self, rank: int, size: int, device: str) -> None:
        self.rank, self.size, self.device = rank, size, torch.device(device)
        self.styles: dict[str, str] | None = None  # of the linears that are cut, by their names in the model
        self.cut_embedding = False
        self.tied = ""  # the name of the head, if it has the weight of the embedding
        self.kept: dict[str, list[str]] = {}  # why packed layers stay whole, and which
        self.experts: dict[str, Experts] = {}  # by the names of their linears

    def read_plan(self, model: Any) -> None:
        """Find the style of each linear. PlanError if the model has no plan, or one that cannot be followed."""
        if self.styles is not None:
            return
        plan, kind, self.styles = _plan(model), type(model).__name__, {}
        config = model.config.get_text_config(decoder=True)
        for name in ("num_attention_heads", "num_key_value_heads"):
            heads = getattr(config, name, None)
            if isinstance(heads, int) and heads % self.size:
                what = name.removeprefix("num_").replace("_", " ")
                raise PlanError(f"{kind}: {self.size} processes cannot share {heads} {what}", _HINT)
        modules = dict(model.named_modules())
        for name, module in modules.items():
            style = plan.get(_generic(name), "replicate")
            if style in (*_WHOLE, parallel_experts.STYLE) or style.startswith(("ep_", "embedding_")):
                continue
            if not isinstance(module, nn.Linear) or style not in (*_ROWS, *_COLUMNS):
                raise PlanError(f"{kind}: fewbit cannot cut {name}, a {type(module).__name__}, as {style}", _HINT)
            self.styles[name] = style
        self.experts = parallel_experts.of_linears(model, plan, _generic)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        self.cut_embedding = embedding.embedding_dim % self.size == 0
        for name, module in modules.items():
            same_kind = isinstance(module, QLinear) == isinstance(embedding, QEmbedding)
            if module is head and same_kind and f"{name}.weight" in model.all_tied_weights_keys:
                self.tied = name
                self.styles.pop(name, None)

    # ---- packed layers, before they get their weight

    def own(self, name: str, layer: Layer, weight: QTensor) -> QTensor:
        """This rank's part of `weight`, on its device. The layer gets the size of that part, and its hooks."""
        own: QTensor | None = None
        if isinstance(layer, QEmbedding):
            own = self._part(name, weight, 1) if self.cut_embedding else None
            self.cut_embedding = own is not None
            if own is not None:
                layer.embedding_dim = own.shape[1]
                layer.register_forward_hook(Gather())
        elif (experts := self.experts.get(name)) is not None:
            own = self._own_of_expert(name, experts, layer, weight)
        elif name == self.tied or name in (self.styles or {}):
            style = self._style(name)
            axis, free = (0, _ROWS[style]) if style in _ROWS else (1, _COLUMNS[style])
            self._check(name, weight.shape, axis, free=free)
            own = self._part(name, weight, axis) if name != self.tied or self.cut_embedding else None
            if own is not None:
                order = weight.permutation
                order = None if order is None else order[self._range(weight.shape[1])].to(self.device)
                self._fit(layer, axis, free=free, order=order)
            elif not free:
                self._stay(layer, axis)
        return (own or weight).map(lambda tensor: tensor.to(self.device))

    def share(self, experts: Experts, why_whole: str | None) -> bool:
        """Let each rank have its part of experts, or note why they stay whole. Whether they are shared."""
        if why_whole is None:
            experts.begin()
        else:
            experts.cut = False
            self.kept.setdefault(why_whole, []).append(experts.path)
        return why_whole is None

    def _own_of_expert(self, name: str, experts: Experts, linear: nn.Linear, weight: QTensor) -> QTensor | None:
        """This rank's part of the weight of an expert; None if the experts of its layer stay whole."""
        if not experts.cut:
            return None
        axis = experts.axis(name)
        self._fit(linear, axis, hooks=False)
        return part(weight, axis, self.rank, self.size)

    def _style(self, name: str) -> str:
        return "rowwise_split_input" if name == self.tied else (self.styles or {})[name]

    def _check(self, name: str, shape: tuple[int, ...], axis: int, *, free: bool) -> None:
        """PlanError if the ranks cannot share what a linear reads or writes. free: as in `_fit`."""
        if shape[axis] % self.size and not free:
            kind = ("rows", "columns")[axis]
            raise PlanError(f"{name} has {shape[axis]} {kind}, which {self.size} processes cannot share", _HINT)

    def _part(self, name: str, weight: QTensor, axis: int) -> QTensor | None:
        """This rank's part; None, and a note, if there is none."""
        try:
            return part(weight, axis, self.rank, self.size)
        except PlanError as error:
            self.kept.setdefault(error.message, []).append(name)
            return None

    def _stay(self, linear: nn.Linear, axis: int) -> None:
        """Let a linear stay whole on each rank, between layers that have only parts of its input or output."""
        if axis == 0:
            linear.register_forward_hook(Keep(self._range(linear.out_features)))
        else:
            linear.register_forward_pre_hook(Take(slice(None), gathers=True))

    # ---- sizes, biases and hooks of any linear

    def _range(self, size: int) -> slice:
        return slice(size * self.rank // self.size, size * (self.rank + 1) // self.size)

    def _fit(
        self, linear: nn.Linear, axis: int, *, free: bool = False, order: Tensor | None = None, hooks: bool = True
    ) -> None:
        """Give a linear the size of this rank's rows (axis 0) or columns (axis 1), its bias, and its hooks.

        free: the whole output is wanted, or the whole input is given. order: the columns of this rank, if they are
        stored in another order. hooks: False if the modules around the linear do what hooks do.
        """
        bias = linear._parameters["bias"]
        if axis == 0:
            own = self._range(linear.out_features)
            linear.out_features = own.stop - own.start
            if bias is not None:
                linear.bias = nn.Parameter(bias.data[own].clone(), requires_grad=False)
            if free and hooks:
                linear.register_forward_hook(Gather())
            return
        own = self._range(linear.in_features)
        linear.in_features = own.stop - own.start
        if bias is not None and self.rank > 0:  # else the sum would have it several times
            linear.bias = None  # type: ignore[assignment]
        if not hooks:
            return
        if order is not None:
            linear.register_forward_pre_hook(Take(order, gathers=not free))
        elif free:
            linear.register_forward_pre_hook(Take(own))
        linear.register_forward_hook(Sum())

    # ---- everything else, after loading

    def finish(self, model: Any) -> None:
        """Cut what is not packed, move the model to this rank's device, and mark it."""
        self.read_plan(model)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        for name, style in (self.styles or {}).items():
            linear = model.get_submodule(name)
            if not isinstance(linear, QLinear):
                self._cut_linear(name, linear, style)
        self._cut_experts(model)
        self._cut_parameters(model)
        if isinstance(embedding, nn.Embedding) and self.cut_embedding:
            own = self._range(embedding.embedding_dim)
            embedding.weight = nn.Parameter(embedding.weight.data[:, own].clone(), requires_grad=False)
            embedding.embedding_dim = own.stop - own.start
            embedding.register_forward_hook(Gather())
            if self.tied:
                head.weight = embedding.weight
                self._fit(head, 1, free=True)
        nn.Module.to(model, self.device)
        model.requires_grad_(False)
        setattr(model, _MARK, self.size)
        model.save_pretrained = _refuse
        for why, names in self.kept.items() if self.rank == 0 else ():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            warnings.warn(f"each process has the whole of {names[0]}{more}: {why}", stacklevel=2)

    def _cut_linear(self, name: str, linear: nn.Linear, style: str) -> None:
        axis, free = (0, _ROWS[style]) if style in _ROWS else (1, _COLUMNS[style])
        self._check(name, linear.weight.shape, axis, free=free)
        if linear.weight.shape[axis] % self.size:
            return
        self._cut_weight(linear, axis)
        self._fit(linear, axis, free=free)

    def _cut_weight(self, linear: nn.Linear, axis: int) -> None:
        own = self._range(linear.weight.shape[axis])
        weight = linear.weight.data[own] if axis == 0 else linear.weight.data[:, own]
        linear.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format), requires_grad=False)

    def _cut_experts(self, model: Any) -> None:
        """Cut experts of which no linear is packed."""
        for experts in dict.fromkeys(self.experts.values()):
            linears = experts.linears
            if any(isinstance(each, QLinear) for each in linears.values()):
                continue
            if self.share(experts, experts.why_whole(self.size)):
                for name, linear in linears.items():
                    self._cut_weight(linear, experts.axis(name))
                    self._fit(linear, experts.axis(name), hooks=False)
        plan = _plan(model)
        whole = parallel_experts.cut_fused(
            model, self.rank, self.size, lambda name: plan.get(_generic(name)) == parallel_experts.STYLE
        )
        for name, why in whole.items():
            self.kept.setdefault(why, []).append(name)

    def _cut_parameters(self, model: Any) -> None:
        """Cut parameters that the plan names by themselves, such as one number for each head."""
        plan = _plan(model)
        for name, value in list(model.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            style = plan.get(_generic(name))
            if style is None or style in _WHOLE or plan.get(_generic(owner)) == parallel_experts.STYLE:
                continue
            if style != "colwise" or value.dim() != 1 or len(value) % self.size:
                raise PlanError(f"fewbit cannot cut {name} {list(value.shape)} as {style}", _HINT)
            own = nn.Parameter(value.data[self._range(len(value))].clone(), requires_grad=False)
            setattr(model.get_submodule(owner), leaf, own)


_split: ContextVar[Split | None] = ContextVar("fewbit_split", default=None)


@contextmanager
def splitting(split: Split | None) -> Iterator[Split | None]:
    """Inside this context, each packed layer of a model that is loaded gets only this rank's part of its weight."""
    token = _split.set(split)
    try:
        yield split
    finally:
        _split.reset(token)


def parts_of(model: Any, weight_of: Callable[[str, Any], QTensor]) -> Callable[[str, Any], QTensor]:
    """`weight_of`, which returns the weight of a layer, for a model that is being loaded. Inside `splitting` it returns
    this rank's part, on its device."""
    split = _split.get()
    if split is None:
        return weight_of
    split.read_plan(model)
    early: dict[str, QTensor] = {}  # a weight is read once

    def whole(name: str, layer: Any) -> QTensor:
        if name in early:
            return early.pop(name)
        for held in layer.placeholders:  # its format is read where that is quick
            tensor = getattr(layer, held)
            tensor.data = tensor.data.to(split.device)
        return weight_of(name, layer)

    def read(name: str, layer: Any) -> QTensor:
        if name not in early:
            early[name] = whole(name, layer)
        return early[name]

    def own(name: str, layer: Any) -> QTensor:
        if (experts := split.experts.get(name)) is not None and experts.cut is None:
            split.share(experts, experts.why_whole(split.size, read))
        return split.own(name, layer, whole(name, layer))

    return own


def check_loader(model: Any) -> None:
    """PlanError if transformers is going to cut the tensors of a model with packed layers itself (`tp_plan`)."""
    distributed = getattr(model.config, "distributed_config", None)
    if getattr(distributed, "tp_size", 1) not in (None, 1):
        raise PlanError(
            "transformers' tp_plan cuts the tensors of packed weights in the wrong places",
            "Load the model with fewbit.load(model, tensor_parallel=True), or with device_map='auto'.",
        )


def _plan(model: Any) -> dict[str, str]:
    """The styles of modules and parameters. PlanError if transformers has none for this model."""
    plan = dict(getattr(model, "tp_plan", None) or {})
    if not any(style in _COLUMNS for style in plan.values()):
        raise PlanError(f"transformers has no plan for tensor parallelism of {type(model).__name__}", _HINT)
    return plan


def _generic(name: str) -> str:
    """The name with * in place of the number of a layer, as plans have it."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise PlanError("this process has only a part of the model, which cannot be saved", "Copy the folder instead.")
