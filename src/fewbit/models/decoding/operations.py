"""Replace what a fused model does besides products: norms, rotary positions and gated activations, on an NVIDIA GPU.

A step of one token starts some thirty small kernels in each block, and they take longer than the products. Here each of
these operations becomes one kernel (`fewbit.kernels.nvidia.operators`). Nothing is looked up by the name of a model: an
operation is replaced where ours gives the same result for random numbers. Then the model's logits are compared with
those before. What is not recognized, and every input that the kernels do not take, uses the model's own code.

Where these operations serve whole blocks, a step is faster than one that PyTorch compiles: 529 and 494 tokens a second
(benchmarks/results/2026-11-h200.md).
"""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from fewbit.kernels.nvidia import Nvidia, operators
from fewbit.models.blocks import find_blocks

_SAME = 4e-3  # relative distance of two results that round alike: half a unit in the last place of bfloat16 is 2e-3
_CLOSE = 0.03  # the same for the logits of a whole model, whose sums run in another order
_SENSITIVE = 4  # times the distance that one rounding of the input causes: what a sensitive model may differ by
_ROTARY = "apply_rotary_pos_emb"  # the name of the function in transformers' models
_LEFT = (nn.Linear, nn.Dropout, nn.Identity)  # what a compiler could not make faster in a step

Forward = Callable[..., Any]


def replace(model: Any, *, whole: bool = False) -> list[str]:
    """Replace the operations in place. Returns the names of the modules that now have another forward.

    whole: replace nothing in a model whose blocks keep other operations: see `serve_blocks`. If the model's logits
    differ afterwards, all is undone, with a warning.
    """
    if model.dtype not in (torch.float16, torch.bfloat16) or model.device.type != "cuda" or Nvidia().unavailable():
        return []
    with torch.inference_mode():
        finder = _Finder(model.dtype)
        forwards = {name: found for name, m in model.named_modules() if (found := finder.forward_of(m)) is not None}
        if whole and not serve_blocks(model, forwards):
            return []
        try:
            before, most = _logits(model), tolerance(model)
            for name, forward in forwards.items():
                model.get_submodule(name).forward = forward
            distance = _distance(_logits(model), before)
            why = "" if distance <= most else f"they change its logits by {distance:.1%}"
        except Exception as error:  # compilers, drivers and a model's own code raise errors of any type
            why = f"{type(error).__name__}: {str(error)[:200]}"
    if why:
        for name in forwards:
            model.get_submodule(name).__dict__.pop("forward", None)
        warnings.warn(f"the fused norms, rotary positions and activations are not used: {why}", stacklevel=2)
    return [] if why else list(forwards)


def serve_blocks(model: Any, replaced: Collection[str]) -> bool:
    """Whether all that a block does besides linears, attention and sums of two tensors is in the replaced modules.

    So its norms and its activation are replaced, and its attention has another forward, for the rotary positions.
    Attention itself is replaced where a text is generated, if it is PyTorch's (`fewbit.models.decoding.attention`).
    """
    gates = {name for name in replaced if hasattr(model.get_submodule(name), "act_fn")}
    served = {*replaced, *(f"{name}.act_fn" for name in gates)}
    for block in find_blocks(model):
        leaves = set[str]()
        for name, module in model.get_submodule(block).named_modules(prefix=block):
            if not list(module.children()) and not isinstance(module, _LEFT):
                leaves.add(name)
        rotated = any(name.startswith(f"{block}.") for name in set(replaced) - gates - leaves)
        if not rotated or not leaves <= served:
            return False
    return bool(model.config._attn_implementation == "sdpa")


def tolerance(model: Any) -> float:
    """By how much the logits may differ: more where one rounding of the input already changes them much.

    This is so for models with random weights, whose blocks enlarge any difference.
    """
    ids = torch.arange(4, device=model.device, dtype=torch.int64)[None]
    x = model.get_input_embeddings()(ids)
    seeded = torch.Generator(x.device).manual_seed(0)
    noise = torch.randn(x.shape, generator=seeded, dtype=torch.float32, device=x.device)
    changed = (x * (1 + torch.finfo(x.dtype).eps / 2 * noise)).to(x.dtype)
    before, after = (model(inputs_embeds=given, use_cache=False).logits for given in (x, changed))
    return max(_CLOSE, _SENSITIVE * _distance(after, before))


def _logits(model: Any) -> Tensor:
    """The logits of a short text, and of one more token that reads the cache."""
    ids = torch.arange(4, device=model.device, dtype=torch.int64)[None]
    taken = inspect.signature(model.forward).parameters
    cache = {"cache" if "cache" in taken else "past_key_values": DynamicCache(config=model.config)}
    first, second = (model(input_ids=part, use_cache=True, **cache) for part in (ids[:, :3], ids[:, 3:]))
    return torch.cat([first.logits, second.logits], dim=1).float()


def _distance(found: Tensor, expected: Tensor) -> float:
    """The relative distance of two results; infinite if they differ in shape or dtype."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30))


class _Finder:
    """Finds the replacement of a module. What holds for one module of a class is tested once."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.known: dict[tuple[Any, ...], Any] = {}

    def forward_of(self, module: nn.Module) -> Forward | None:
        """The forward that replaces the module's own; None to leave it. Modules with another forward are left.

        It is a method of the module, so a copy of the module gets one of its own.
        """
        if "forward" in module.__dict__:
            return None
        return self._norm(module) or self._gated(module) or self._rotary(module)

    def _once(self, key: tuple[Any, ...], test: Callable[[], Any]) -> Any:
        if key not in self.known:
            try:
                self.known[key] = test()
            except Exception:  # a module that only looks like one of these: it is left as it is
                self.known[key] = None
        return self.known[key]

    def _random(self, device: torch.device, *shape: int) -> Tensor:
        seeded = torch.Generator(device).manual_seed(0)
        return torch.randn(*shape, generator=seeded, dtype=torch.float32, device=device).to(self.dtype)

    def _same(self, results: dict[int, Tensor], expected: Tensor) -> int | None:
        """The key of the result that is closest to `expected`; None if none is close."""
        distances = {key: _distance(result, expected) for key, result in results.items()}
        best = min(distances, key=distances.__getitem__)
        return best if distances[best] <= _SAME else None

    def _norm(self, module: nn.Module) -> Forward | None:
        own = dict(module.named_parameters(recurse=False))
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        weight = own.get("weight")
        if weight is None or len(own) > 1 or weight.dim() != 1 or not isinstance(eps, float) or list(module.children()):
            return None
        if len(weight) > operators.WIDEST:
            return None
        original = type(module).forward

        def test() -> int | None:
            x = self._random(weight.device, 3, len(weight))
            kinds = (operators.ROUNDED, operators.SCALED, operators.ONE)
            return self._same({kind: operators.rms_norm(x, weight, eps, kind) for kind in kinds}, original(module, x))

        kind = self._once((type(module), weight.shape, weight.dtype, eps), test)
        if kind is None:
            return None

        def forward(held: Any, x: Tensor) -> Tensor:
            trained = torch.is_grad_enabled() and held.weight.requires_grad  # our kernel has no gradient
            served = operators.serves(x) and x.dtype == self.dtype and not trained
            out: Tensor = operators.rms_norm(x, held.weight, eps, kind) if served else original(held, x)
            return out

        return types.MethodType(forward, module)

    def _gated(self, module: nn.Module) -> Forward | None:
        held: Any = module
        parts = [getattr(held, name, None) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")]
        if not all(callable(part) for part in parts) or len(list(module.children())) > 4:
            return None
        columns = getattr(parts[0], "in_features", None)
        device = next(module.buffers(), next(module.parameters(), None))
        if not isinstance(columns, int) or device is None:
            return None

        def of(kind: int) -> Forward:
            def forward(held: Any, x: Tensor) -> Tensor:
                a, b = held.gate_proj(x), held.up_proj(x)
                served = operators.serves(a) and operators.serves(b) and a.shape == b.shape and a.dtype == b.dtype
                product: Tensor = held.down_proj(operators.gated(a, b, kind) if served else held.act_fn(a) * b)
                return product

            return types.MethodType(forward, module)

        def test() -> int | None:
            a, b = self._random(device.device, 2, 3, 64).unbind()
            kinds = (operators.SILU, operators.TANH, operators.ERF)
            kind = self._same({kind: operators.gated(a, b, kind) for kind in kinds}, held.act_fn(a) * b)
            if kind is None:
                return None
            x = self._random(device.device, 1, 3, columns)
            return self._same({kind: of(kind)(x)}, module.forward(x))

        kind = self._once((type(module), type(held.act_fn), columns), test)
        return None if kind is None else of(kind)

    def _rotary(self, module: nn.Module) -> Forward | None:
        """The module's forward with another function for rotary positions: a copy of its code with other globals."""
        function = inspect.unwrap(type(module).forward)
        original = getattr(function, "__globals__", {}).get(_ROTARY)
        if original is None or _ROTARY not in function.__code__.co_names:
            return None
        device = next(module.buffers(), next(module.parameters(), None))
        if device is None:
            return None
        copied = self._once((function, original), lambda: self._with_rotary(function, original, device.device))
        return None if copied is None else types.MethodType(copied, module)

    def _with_rotary(self, function: Any, original: Forward, device: torch.device) -> Any:
        q, k = self._random(device, 2, 3, 5, 64).transpose(1, 2), self._random(device, 2, 3, 2, 64).transpose(1, 2)
        fits: dict[bool, bool] = {}  # whether only a part of a head is rotated -> whether ours does the same
        for part in (False, True):
            cos, sin = self._random(device, 2, 2, 3, 32 if part else 64).unbind()
            try:
                pairs = zip(operators.rotate(q, k, cos, sin), original(q, k, cos, sin), strict=True)
                fits[part] = all(_distance(ours, theirs) <= _SAME for ours, theirs in pairs)
            except Exception:  # a function that takes no such shapes
                fits[part] = False
        if not fits[False]:
            return None

        def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
            served = (
                not args
                and kwargs.get("unsqueeze_dim", 1) == 1
                and len(kwargs) <= ("unsqueeze_dim" in kwargs)
                and operators.rotates(q, k, cos, sin)
                and fits[cos.shape[-1] < q.shape[-1]]
            )
            return operators.rotate(q, k, cos, sin) if served else original(q, k, cos, sin, *args, **kwargs)

        names = {**function.__globals__, _ROTARY: rotary}
        copied = types.FunctionType(
            function.__code__, names, function.__name__, function.__defaults__, function.__closure__
        )
        copied.__kwdefaults__ = function.__kwdefaults__
        return copied
