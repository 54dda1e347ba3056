"""`QLinear` and `QEmbedding`: the quantized layers, for every scheme, format and kernel.

A layer starts as a placeholder with one tensor for each tensor on disk, so that any loader can fill it. Then `adopt`
converts these to the kernel's device layout: the codes become the parameter `weight`, and the kernel's other tensors
become buffers. A tied embedding and output head share that parameter. Reading the attribute `weight` gives the
dequantized values (`fewbit.nn.packed`); `held` is the parameter itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from threading import RLock
from typing import Any, Self

import torch
from torch import Tensor, nn

from fewbit.errors import KernelError
from fewbit.kernels.base import Kernel
from fewbit.nn.choose import TOLERANCE, choose
from fewbit.nn.packed import Codes, Values, refuse
from fewbit.schemes.base import Codec, PartSpec, QTensor, chunk_rows

_adopting = RLock()  # of all layers: one with a lock could not be copied or pickled


def slot(name: str) -> str:
    """The attribute name for the tensor `name` on disk. PyTorch does not allow dots in the names of parameters."""
    return name.replace(".", "__")


class _Placeholder(nn.Module):
    """A module with placeholders for the tensors that a checkpoint has for it."""

    placeholders: dict[str, str]  # attribute name -> the tensor's name on disk
    module: str
    dtype: torch.dtype

    @property
    def held(self) -> Tensor | None:
        """The parameter that holds the codes; None before `adopt`."""
        held = self._parameters.get("weight")
        return held if isinstance(held, Codes) else None

    @property
    def weight(self) -> Any:
        """The weight as `Values`, which read as dequantized numbers. Before `adopt`: the tensor that a loader fills."""
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
            # nn.DataParallel assigns plain tensors to its replicas. Here they are used like parameters.
            self._parameters[name] = Codes(value, math.prod(self.values_shape)) if name == "weight" else value
            return
        if name == "weight" and not isinstance(value, Codes) and self.held is not None:
            if not isinstance(value, Values):
                refuse(self)
            value = value.layer.held  # tied weights: share the parameter of the other layer
        super().__setattr__(name, value)

    def qtensor(self) -> QTensor:
        raise NotImplementedError

    @property
    def values_shape(self) -> tuple[int, int]:
        """[N, K] of the weight."""
        raise NotImplementedError

    def values(self) -> Tensor:
        """The dequantized weight, [N, K] in `dtype`."""
        return self.qtensor().dequantize(self.dtype)

    def await_tensors(self, specs: Mapping[str, PartSpec]) -> Self:
        """Register a tensor on the meta device for each tensor that the checkpoint has, by its name on disk."""
        for name, spec in specs.items():
            empty = nn.Parameter(torch.empty(spec.shape, dtype=spec.dtype, device="meta"), False)
            self.register_parameter(slot(name), empty)
        self.placeholders = {slot(name): name for name in specs}
        if "weight" in specs:
            return self
        # Initializers of transformers models access `weight`. This empty one is marked as initialized already.
        nothing = torch.empty(0, dtype=torch.float32, device="cpu")
        nothing._is_hf_initialized = True  # type: ignore[attr-defined]
        self.register_buffer("weight", nothing, persistent=False)
        return self

    def take_tensors(self) -> dict[str, Tensor]:
        """Remove the loaded tensors from the layer and return them by their names on disk."""
        loaded = {name: getattr(self, held).data for held, name in self.placeholders.items()}
        for held in {*self.placeholders, "weight"}:
            delattr(self, held)
        self.placeholders = {}
        return loaded


class Packed(_Placeholder):
    """A module with a packed weight in the device layout of a kernel: `QLinear`, and the stacked weights of experts."""

    def __init__(self, in_features: int, out_features: int, module: str = "") -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.module = in_features, out_features, module
        self.placeholders = {}
        self.kernel: Kernel | None = None
        self.compute: torch.dtype | None = None  # if set, x is cast to this dtype and y back
        self.kept: tuple[str, ...] = ()
        self.permutation: Tensor | None
        self.register_buffer("permutation", None)

    def adopt(self, weight: QTensor, dtype: torch.dtype, kernel: str | None = None) -> Self:
        """Take `weight` and prepare it for activations of `dtype`, with the best kernel or the one named `kernel`.

        KernelError if no kernel supports it.
        """
        device = weight.parts[weight.codec.payload].device
        self.codec, self.shape, self.forced = weight.codec, weight.shape, kernel
        self.kernel = self._choose(weight, device, dtype)
        prepared = self.kernel.prepare(weight.codec, weight.parts, weight.shape)
        for name in self.kept:  # buffers of the previous kernel, which may have had more
            delattr(self, name)
        self.weight = Codes(prepared[0], weight.shape[0] * weight.shape[1])
        self.kept = tuple(f"kept_{i}" for i in range(1, len(prepared)))
        for name, tensor in zip(self.kept, prepared[1:], strict=True):
            self.register_buffer(name, tensor)
        self.permutation = weight.permutation
        self.dtype = dtype  # last: `forward` in another thread takes it as the sign that the rest is there
        return self

    def _choose(self, weight: QTensor, device: torch.device, dtype: torch.dtype) -> Kernel:
        return choose(weight, device, dtype, self.forced)

    @property
    def prepared(self) -> tuple[Tensor, ...]:
        """The device tensors, codes first."""
        # Read from the dictionaries directly: attribute lookup in a module takes as long as a small product.
        own, beside = self._parameters, self._buffers
        return (own["weight"], *[beside[name] for name in self.kept])  # type: ignore[arg-type]

    def qtensor(self) -> QTensor:
        """The weight as canonical parts, byte for byte as given to `adopt`."""
        assert self.kernel is not None
        parts = self.kernel.restore(self.codec, self.prepared, self.shape)
        return QTensor(self.codec, self.shape, parts, self.permutation)

    @property
    def values_shape(self) -> tuple[int, int]:
        return (self.out_features, self.in_features)

    def multiplied(self, x: Tensor, where: Any = None) -> Tensor:
        """x times the transpose of the weight, in the dtype of x or of autocast. where: see `kernel_product`."""
        assert self.kernel is not None, f"{self.module} was never given a weight"
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype in TOLERANCE:
            # Autocast sets the dtype of x and y only. Inside a kernel it would also round the decoded weight.
            x = x.to(torch.get_autocast_dtype(kind))
            with torch.autocast(kind, enabled=False):
                return self.multiplied(x, where)
        if self.compute is not None and x.dtype != self.compute and x.dtype in TOLERANCE:
            return self.multiplied(x.to(self.compute), where).to(x.dtype)
        if x.dtype != self.dtype and x.dtype in TOLERANCE:
            with _adopting:
                if x.dtype != self.dtype:
                    self.adopt(self.qtensor(), x.dtype, self.forced)
        rows = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        y: Tensor
        if torch.is_grad_enabled() and x.requires_grad:
            y = _Multiply.apply(rows, self, where)  # type: ignore[no-untyped-call]
        else:  # recording an unused autograd graph would take as long as a small product
            y = self.kernel_product(rows, where)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])

    def kernel_product(self, x: Tensor, where: Any) -> Tensor:
        """The product of x [M, K] that the kernel computes. where: which rows of x meet which weight, if several."""
        assert self.kernel is not None
        if (order := self._buffers["permutation"]) is not None:
            x = x[:, order]
        return self.kernel.linear(x, self.codec, self.prepared, self.shape)

    def gradient(self, grad: Tensor, where: Any) -> Tensor:
        """The gradient of x [M, K] from that of the product."""
        return input_gradient(grad, self.qtensor())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Apply moves to packed tensors but not casts: `model.half()` must not round packed weights or their scales.

        A layout belongs to a device. So a move to another device restores the canonical parts and prepares them again.
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


class QLinear(Packed, nn.Linear):
    """y = x Wᵀ + bias with packed W; `in_features`, `out_features` and `bias` as in `nn.Linear`.

    It is a subclass of `nn.Linear`, so that code that looks for linears finds it, such as PEFT's "all-linear".
    """

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None, module: str = "") -> None:
        Packed.__init__(self, in_features, out_features, module)
        self.bias: nn.Parameter | None  # type: ignore[assignment]
        self.register_parameter("bias", bias)
        self.transposed = False  # whether the layer that it replaces stores its weight as [K, N]

    def forward(self, x: Tensor) -> Tensor:
        y = self.multiplied(x)
        bias = self._parameters["bias"]
        return y if bias is None else y + bias.to(y.dtype)

    def extra_repr(self) -> str:
        kind = f"{self.codec}, kernel={self.kernel.name}" if self.kernel is not None else "empty"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {kind}"


class QEmbedding(_Placeholder):
    """An embedding with a packed weight [vocabulary, width]. Only the requested rows are decoded.

    `scale`: a factor for the rows, as Gemma has. This is not an `nn.Embedding`, so that code that resizes embeddings
    does not find it.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, module: str = "", scale: float | None = None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.module, self.scale, self.placeholders = module, scale, {}
        self.stands_for: tuple[nn.Embedding, ...] = ()
        self.codec: Codec | None = None

    def adopt(self, weight: QTensor, dtype: torch.dtype) -> Self:
        """Take `weight`; its rows will be decoded to `dtype`. KernelError if rows cannot be decoded one by one."""
        parts = weight.codec.part_specs(weight.shape)
        if set(parts) != {weight.codec.payload} or parts[weight.codec.payload].shape[0] != weight.shape[0]:
            raise KernelError(f"{self.module}: rows of {weight.codec} cannot be decoded one by one")
        self.codec, self.dtype = weight.codec, dtype
        self.weight = Codes(weight.parts[weight.codec.payload], weight.shape[0] * weight.shape[1])
        return self

    def qtensor(self) -> QTensor:
        """The weight as canonical parts, byte for byte as given to `adopt`."""
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
        """A cast changes the dtype of decoded rows, not the codes."""
        if self.codec is not None:
            self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.codec or 'empty'}"


class _Multiply(torch.autograd.Function):
    """Forward uses the kernel. Backward computes grad_x = grad_y W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Packed, where: Any) -> Tensor:
        ctx.layer, ctx.where = layer, where
        return layer.kernel_product(x, where)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.layer.gradient(grads[0], ctx.where), None, None


def input_gradient(grad: Tensor, weight: QTensor) -> Tensor:
    """grad_x [M, K] = grad_y W, in the dtype of grad_y [M, N]. W is dequantized a chunk of rows at a time.

    The chunks' contributions are summed in float32. On a CPU, where half precision is slow, everything is float32.
    """
    work = torch.float32 if grad.device.type == "cpu" else grad.dtype
    out = torch.zeros(grad.shape[0], weight.shape[1], dtype=torch.float32, device=grad.device)
    for rows in chunk_rows(*weight.shape):
        with torch.autocast(grad.device.type, enabled=False):  # backward may be called inside an autocast block
            out += grad[:, rows].to(work) @ weight.codec.dequantize(weight.parts, weight.shape, work, rows)
    if weight.permutation is not None:
        out = torch.empty_like(out).index_copy_(1, weight.permutation, out)
    return out.to(grad.dtype)
