"""Products with the weights of a packed model that stay in 16 bits, such as the output head of most files, on a CPU.

For one row of activations, PyTorch reads such a weight at half of the memory's speed. For more rows, it multiplies by
float16, and without AVX-512 by bfloat16, as if they came one after the other. The CPU library sums in float32.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fewbit.kernels.cpu import kernel
from fewbit.models.decoding.stand_in import StandIn
from fewbit.nn.choose import TOLERANCE
from fewbit.system import ambient, native

_LEAST = 1 << 16  # numbers of a weight: PyTorch starts a product sooner, which counts more for fewer
_FAST = 1 << 13  # activations that stay in a core's first cache, as float32
_NAMES = {"weight", "bias"}
_MANY = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


def products(model: Any) -> dict[Any, Product]:
    """The linears of `model` with unquantized weights that the library multiplies by, with what computes them."""
    if native.instructions() in ("", "scalar"):  # without vector instructions, PyTorch is faster
        return {}
    linears = [each for each in model.modules() if _takes(each)]
    equal = {_kind(each): _same(each) for each in {_kind(each): each for each in linears}.values()}
    return {each: Product(each) for each in linears if equal[_kind(each)]}


class Product:
    """A linear's forward by the library, and by its own code for everything else."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear, self.plain = linear, linear.forward
        self.stand_in = StandIn(linear, self.forward)

    def __call__(self, x: Tensor) -> Tensor:
        """What a call of the linear gives while `forward` takes the place of its own."""
        hooked = self.linear._forward_hooks or self.linear._forward_pre_hooks
        y: Tensor = self.linear(x) if hooked else self.forward(x)
        return y

    def forward(self, x: Tensor) -> Tensor:
        own: dict[str, Any] = self.linear._parameters  # without what a parametrization or pruning computes
        if not (own.keys() >= _NAMES and _serves(x, own["weight"])):
            return self.plain(x)
        weight, bias = own["weight"], own["bias"]
        rows = x.reshape(-1, x.shape[-1])
        y = kernel.product(rows if bias is None else rows.float(), weight)
        if bias is not None:
            y = (y + bias.float()).to(x.dtype)
        return y.view(*x.shape[:-1], len(weight))


def _takes(module: Any) -> bool:
    """Whether a module is an ordinary linear with a weight that the library reads."""
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward or "forward" in vars(module):
        return False
    weight = module._parameters.get("weight")
    plain = type(weight) is nn.Parameter and weight.is_cpu and weight.is_contiguous()
    return plain and weight.dtype in kernel.unquantized() and weight.numel() >= _LEAST  # type: ignore[union-attr]


def _kind(linear: nn.Linear) -> tuple[Any, ...]:
    return linear.weight.shape, linear.weight.dtype


def _serves(x: Tensor, weight: Any) -> bool:
    """Whether the library multiplies x, and not PyTorch."""
    if type(weight) is not nn.Parameter or weight.dtype not in _MANY:
        return False
    if torch.is_grad_enabled() or type(x) is not Tensor or torch.compiler.is_compiling():
        return False
    if x.dtype != weight.dtype or not (x.is_cpu and weight.is_cpu and weight.is_contiguous()):
        return False
    columns = x.shape[-1]
    rows = x.numel() // max(columns, 1)
    return 0 < rows <= _most(x.dtype, columns) and columns == weight.shape[1] and not torch.is_autocast_enabled("cpu")


@cache
def _most(dtype: torch.dtype, columns: int) -> int:
    """The largest number of rows of so many columns for which the library is faster than PyTorch."""
    has_own = getattr(torch.ops.mkldnn, _MANY[dtype], lambda: True)
    return min(kernel.FEW, max(1, _FAST // columns)) if has_own() else 1 << 62


@ambient.defaults()
def _same(linear: nn.Linear) -> bool:
    """Whether the library gives the linear's products, up to rounding."""
    weight = linear.weight.detach()
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(3, weight.shape[1], generator=generator, dtype=torch.float32, device="cpu").to(weight.dtype)
    with torch.inference_mode():
        expected, found = nn.functional.linear(x, weight).float(), kernel.product(x, weight).float()
    return float((found - expected).norm()) <= TOLERANCE[weight.dtype] * float(expected.norm())
