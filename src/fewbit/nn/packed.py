"""What other code sees of packed weights: a parameter that reports the right sizes, and a readable `weight`.

A layer registers its codes as `Codes`. The sum of `numel()` over parameters is then the number of weights, and the sum
of `numel() * element_size()` is the number of bytes. The layer's attribute `weight` is a `Values`: it has the weight's
shape, dtype and device, but no data. An operation that reads it gets the dequantized numbers. An operation that writes
to it, or to a view of it (`Part`), raises PlanError, because new numbers would not be on the grid. So an adapter
method, a loss or a model's own code can read `layer.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fewbit.errors import PlanError


class Codes(nn.Parameter):
    """Integer codes of `weights` numbers. PyTorch operations see the integers."""

    weights: int

    def __new__(cls, codes: Tensor, weights: int) -> Codes:
        made: Codes = super().__new__(cls, codes.detach(), False)
        made.weights = weights
        # transformers initializes parameters that a checkpoint lacks, unless this is set
        made._is_hf_initialized = True
        return made

    def numel(self) -> int:
        """The number of weights."""
        return self.weights

    def nelement(self) -> int:
        """The number of weights."""
        return self.weights

    def element_size(self) -> float:  # type: ignore[override]
        """Bytes of codes per weight; may be a fraction."""
        return self.nbytes / self.weights if self.weights else 0

    def requires_grad_(self, requires_grad: bool = True) -> Codes:
        """PlanError if `requires_grad`: codes are integers, which have no gradient."""
        if requires_grad:
            raise PlanError(
                "packed weights cannot be trained: their codes are integers",
                "Train an adapter beside them; `modules_to_save` may name unquantized modules only. "
                "Or unpack the model first: model.dequantize().",
            )
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "requires_grad":
            self.requires_grad_(value)
        else:
            super().__setattr__(name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Codes:
        if id(self) not in memo:
            memo[id(self)] = Codes(self.data.clone(), self.weights)
        made: Codes = memo[id(self)]
        return made

    def __reduce_ex__(self, proto: Any) -> Any:
        return Codes, (self.data, self.weights)


class Layer(Protocol):
    """What `Values` needs of its layer."""

    module: str
    dtype: torch.dtype

    @property
    def held(self) -> Tensor | None: ...

    @property
    def values_shape(self) -> tuple[int, int]: ...

    def values(self) -> Tensor: ...


class _ReadOnly(Tensor):
    """Numbers of a packed weight. An operation that would write to them raises PlanError."""

    layer: Any

    def __init__(self, layer: Layer, *_: Tensor) -> None:
        super().__init__()

    @property
    def data(self) -> Tensor:
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        refuse(self.layer)

    def __setitem__(self, index: Any, value: Any) -> None:
        refuse(self.layer)


class Values(_ReadOnly):
    """The weight of a layer as numbers, dequantized for each operation that reads it. Writing raises PlanError."""

    @staticmethod
    def __new__(cls, layer: Layer) -> Values:
        assert layer.held is not None
        made: Values = torch.Tensor._make_wrapper_subclass(
            cls, layer.values_shape, dtype=layer.dtype, device=layer.held.device, requires_grad=False
        )
        made.layer = layer
        made._is_param = True  # makes isinstance(weight, nn.Parameter) true
        # transformers initializes weights that a checkpoint lacks, unless this is set
        made._is_hf_initialized = True  # type: ignore[attr-defined]
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return nn.Parameter(self.layer.values(), requires_grad=False)

    def __reduce_ex__(self, proto: Any) -> Any:
        return nn.Parameter(self.layer.values(), requires_grad=False).__reduce_ex__(proto)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Values({list(self.shape)}, dtype={self.dtype}, of {self.layer.module})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return Values(args[0].layer)
        return _run(func, args, kwargs or {})


class Part(_ReadOnly):
    """A view of a weight (a slice, its transpose) as numbers. PlanError for an operation that writes to it.

    The numbers are a copy, so writes to them would be lost.
    """

    plain: Tensor

    @staticmethod
    def __new__(cls, layer: Layer, plain: Tensor) -> Part:
        made: Part = torch.Tensor._make_subclass(cls, plain)
        made.layer, made.plain = layer, plain
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.plain.clone()

    def __reduce_ex__(self, proto: Any) -> Any:
        return self.plain.__reduce_ex__(proto)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.plain)

    def numpy(self, *, force: bool = False) -> Any:
        """The numbers as a read-only array."""
        found = self.plain.numpy(force=force)
        found.flags.writeable = False
        return found

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run the operation on dequantized numbers. PlanError if it writes to a weight or to a view of one."""
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | dict(kwargs)
    viewed: Layer | None = None
    for argument in func._schema.arguments:
        for value in pytree.tree_leaves(given.get(argument.name)) if argument.alias_info is not None else ():
            if isinstance(value, (Values, Part)):
                if argument.alias_info.is_write:
                    refuse(value.layer)
                viewed = value.layer
    result = func(*pytree.tree_map(_numbers, args), **pytree.tree_map(_numbers, dict(kwargs)))
    if viewed is None:
        return result
    layer = viewed
    return pytree.tree_map(lambda value: Part(layer, value) if isinstance(value, Tensor) else value, result)


def _numbers(value: Any) -> Any:
    if isinstance(value, Values):
        return value.layer.values()
    return value.plain if isinstance(value, Part) else value


def refuse(layer: Layer) -> NoReturn:
    """Raise PlanError: the weight of `layer` is packed and cannot be assigned."""
    raise PlanError(
        f"the weight of {layer.module or 'a quantized layer'} is packed, and cannot be changed or replaced",
        "Keep the adapter beside the model; fewbit merge writes both as one model in 16 bits. "
        "Or unpack the model first: model.dequantize().",
    )
