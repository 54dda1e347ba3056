"""`QLinear` and `QEmbedding`: the quantized layers, for every scheme, format and kernel.

Each starts as a placeholder that has a tensor for each one on disk, so that any loader can fill it, and `adopt` turns
it into prepared device tensors: the codes as the parameter called `weight`, what else the kernel keeps as buffers. An
embedding and an output head that are tied share that parameter. The attribute `weight` reads as the numbers that the
codes stand for (`fewbit.nn.packed`); `held` is the parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from fewbit.errors import KernelError
from fewbit.kernels.base import Kernel
from fewbit.kernels.choose import TOLERANCE, choose
from fewbit.nn.packed import Codes, Values, refuse
from fewbit.schemes.base import Codec, PartSpec, QTensor, chunk_rows


def slot(name: str) -> str:
    """The name under which a module can hold what is called `name` on disk: PyTorch's have no dots."""
    return name.replace(".", "__")


class _Placeholder(nn.Module):
    """A module that waits for the tensors that a checkpoint has for it."""

    placeholders: dict[str, str]  # what waits for a tensor -> the tensor's name on disk
    module: str
    dtype: torch.dtype

    @property
    def held(self) -> Tensor | None:
        """The parameter that holds the codes; None before `adopt`."""
        held = self._parameters.get("weight")
        return held if isinstance(held, Codes) else None

    @property
    def weight(self) -> Any:
        """The weight, which reads as numbers; before `adopt` what a loader fills."""
        if self.held is not None:
            return Values(self)
        waiting = self._parameters.get("weight", self._buffers.get("weight"))
        if waiting is None:
            raise AttributeError("weight")
        return waiting

    @weight.setter
    def weight(self, value: Any) -> None:
        raise AttributeError("weight is a parameter or a buffer")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias") and self.__dict__.get("_is_replica"):
            # nn.DataParallel gives its copies plain tensors. They serve here as parameters do.
            self._parameters[name] = Codes(value, math.prod(self.values_shape)) if name == "weight" else value
            return
        if name == "weight" and not isinstance(value, Codes) and self.held is not None:
            if not isinstance(value, Values):
                refuse(self)
            value = value.layer.held  # of what it is tied to
        super().__setattr__(name, value)

    def qtensor(self) -> QTensor:
        raise NotImplementedError

    @property
    def values_shape(self) -> tuple[int, int]:
        """[N, K] of the weight."""
        raise NotImplementedError

    def values(self) -> Tensor:
        """The weight dequantized."""
        return self.qtensor().dequantize(self.dtype)

    def await_tensors(self, specs: Mapping[str, PartSpec]) -> Self:
        """Register a tensor on the meta device for each one that a checkpoint will bring, by its name on disk."""
        for name, spec in specs.items():
            empty = nn.Parameter(torch.empty(spec.shape, dtype=spec.dtype, device="meta"), False)
            self.register_parameter(slot(name), empty)
        self.placeholders = {slot(name): name for name in specs}
        if "weight" in specs:
            return self
        # Models' own initializers touch a linear's `weight`; this one is marked as initialized and holds nothing.
        nothing = torch.empty(0, dtype=torch.float32, device="cpu")
        nothing._is_hf_initialized = True  # type: ignore[attr-defined]
        self.register_buffer("weight", nothing, persistent=False)
        return self

    def take_tensors(self) -> dict[str, Tensor]:
        """The tensors that were loaded, leaving the layer empty."""
        loaded = {name: getattr(self, held).data for held, name in self.placeholders.items()}
        for held in {*self.placeholders, "weight"}:
            delattr(self, held)
        self.placeholders = {}
        return loaded


class QLinear(_Placeholder, nn.Linear):
    """y = x Wᵀ + bias with W packed; `in_features`, `out_features` and `bias` as in `nn.Linear`.

    It is one for whoever asks a model for its linears, such as PEFT's "all-linear".
    """

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None, module: str = "") -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.module = in_features, out_features, module
        self.bias: nn.Parameter | None  # type: ignore[assignment]
        self.register_parameter("bias", bias)
        self.placeholders = {}
        self.transposed = False  # whether the layer it stands for keeps its weight as [K, N]
        self.kernel: Kernel | None = None
        self.compute: torch.dtype | None = None  # what activations are cast to and back, where that is asked for
        self.kept: tuple[str, ...] = ()
        self.permutation: Tensor | None
        self.register_buffer("permutation", None)

    def adopt(self, weight: QTensor, dtype: torch.dtype, kernel: str | None = None) -> Self:
        """Prepare `weight` for activations of `dtype` by the best kernel or the one named; KernelError if none can."""
        device = weight.parts[weight.codec.payload].device
        self.codec, self.shape, self.dtype, self.forced = weight.codec, weight.shape, dtype, kernel
        self.kernel = choose(weight, device, dtype, kernel)
        prepared = self.kernel.prepare(weight.codec, weight.parts, weight.shape)
        for name in self.kept:  # of another kernel, which may have kept more
            delattr(self, name)
        self.weight = Codes(prepared[0], weight.shape[0] * weight.shape[1])
        self.kept = tuple(f"kept_{i}" for i in range(1, len(prepared)))
        for name, tensor in zip(self.kept, prepared[1:], strict=True):
            self.register_buffer(name, tensor)
        self.permutation = weight.permutation
        return self

    @property
    def prepared(self) -> tuple[Tensor, ...]:
        """The device tensors, codes first."""
        # By their dictionaries: a module's own search for a name takes as long as a small product does.
        own, beside = self._parameters, self._buffers
        return (own["weight"], *[beside[name] for name in self.kept])  # type: ignore[arg-type]

    def qtensor(self) -> QTensor:
        """The weight in its canonical parts, byte for byte as adopted."""
        assert self.kernel is not None
        parts = self.kernel.restore(self.codec, self.prepared, self.shape)
        return QTensor(self.codec, self.shape, parts, self.permutation)

    @property
    def values_shape(self) -> tuple[int, int]:
        return (self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        assert self.kernel is not None, f"{self.module} was never given a weight"
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype in TOLERANCE:
            # Its part is the dtype of x and y. Inside a kernel it would round the decoded weight too.
            x = x.to(torch.get_autocast_dtype(kind))
            with torch.autocast(kind, enabled=False):
                return self(x)  # type: ignore[no-any-return]
        if self.compute is not None and x.dtype != self.compute and x.dtype in TOLERANCE:
            y: Tensor = self(x.to(self.compute))
            return y.to(x.dtype)
        if x.dtype != self.dtype and x.dtype in TOLERANCE:
            self.adopt(self.qtensor(), x.dtype, self.forced)
        rows = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        if torch.is_grad_enabled() and x.requires_grad:
            y = _Multiply.apply(rows, self)  # type: ignore[no-untyped-call]
        else:  # a graph that nobody wants takes as long as a small product
            y = _multiply(rows, self)
        if x.dim() != 2:
            y = y.view(*x.shape[:-1], self.out_features)
        bias = self._parameters["bias"]
        return y if bias is None else y + bias.to(y.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves go through, casts do not: `model.half()` must not round packed weights or their scales.

        A layout belongs to a device, so a move to another one goes by way of the canonical parts.
        """
        if self.held is not None:
            now = self.held.device
            device = fn(torch.empty(0, dtype=torch.uint8, device=now)).device
            if device != now and device.type != "meta":
                weight = self.qtensor()
                del self.weight
                super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
                return self.adopt(weight.map(lambda part: part.to(device)), self.dtype, self.forced)

        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        frozen = {
            id(self._parameters.get("weight")),
            *(id(self._buffers[name]) for name in ("permutation", *self.kept)),
        }
        super()._apply(lambda t: move_only(t) if id(t) in frozen else fn(t), recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        kind = f"{self.codec}, kernel={self.kernel.name}" if self.kernel is not None else "empty"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {kind}"


class QEmbedding(_Placeholder):
    """Rows of a packed weight [vocabulary, width], of which only those asked for are decoded.

    `scale` is what rows are multiplied by (Gemma's). It is no `nn.Embedding`: what resizes one shall find none.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, module: str = "", scale: float | None = None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.module, self.scale, self.placeholders = module, scale, {}
        self.stands_for: tuple[nn.Embedding, ...] = ()
        self.codec: Codec | None = None

    def adopt(self, weight: QTensor, dtype: torch.dtype) -> Self:
        """Take `weight`, whose rows come out in `dtype`; KernelError where its rows cannot be taken one by one."""
        parts = weight.codec.part_specs(weight.shape)
        if set(parts) != {weight.codec.payload} or parts[weight.codec.payload].shape[0] != weight.shape[0]:
            raise KernelError(f"{self.module}: rows of {weight.codec} cannot be decoded one by one")
        self.codec, self.dtype = weight.codec, dtype
        self.weight = Codes(weight.parts[weight.codec.payload], weight.shape[0] * weight.shape[1])
        return self

    def qtensor(self) -> QTensor:
        """The weight in its canonical parts, byte for byte as adopted."""
        assert self.codec is not None
        assert self.held is not None
        shape = (self.num_embeddings, self.embedding_dim)
        return QTensor(self.codec, shape, {self.codec.payload: self.held.data})

    @property
    def values_shape(self) -> tuple[int, int]:
        return (self.num_embeddings, self.embedding_dim)

    def forward(self, ids: Tensor) -> Tensor:
        assert self.codec is not None, f"{self.module} was never given a weight"
        assert self.held is not None
        rows = self.held[ids.flatten()]
        out = self.codec.dequantize({self.codec.payload: rows}, (len(rows), self.embedding_dim), self.dtype)
        out = out.view(*ids.shape, self.embedding_dim)
        return out if self.scale is None else out * torch.tensor(self.scale, dtype=out.dtype, device=out.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Casts change what rows come out as, and not the codes."""
        if self.codec is not None:
            self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.codec or 'empty'}"


class _Multiply(torch.autograd.Function):
    """Forward by the kernel; backward grad_x = grad_y W with W dequantized a chunk of rows at a time.

    The chunks' shares are summed in float32; on a CPU, where half precision is slow, all is float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QLinear) -> Tensor:
        ctx.layer = layer
        return _multiply(x, layer)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        weight = ctx.layer.qtensor()
        work = torch.float32 if grad.device.type == "cpu" else grad.dtype
        out = torch.zeros(grad.shape[0], weight.shape[1], dtype=torch.float32, device=grad.device)
        for rows in chunk_rows(*weight.shape):
            with torch.autocast(grad.device.type, enabled=False):  # of a backward that is called within one
                out += grad[:, rows].to(work) @ weight.codec.dequantize(weight.parts, weight.shape, work, rows)
        if weight.permutation is not None:
            out = torch.empty_like(out).index_copy_(1, weight.permutation, out)
        return out.to(grad.dtype), None


def _multiply(x: Tensor, layer: QLinear) -> Tensor:
    assert layer.kernel is not None
    if (order := layer._buffers["permutation"]) is not None:
        x = x[:, order]
    return layer.kernel.linear(x, layer.codec, layer.prepared, layer.shape)
