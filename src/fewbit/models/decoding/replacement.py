"""The forward of one decoder block on a CPU: one call of the CPU library, or the block's own code where it must be."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from fewbit.kernels.cpu.block import Block, Cached, Wiring
from fewbit.models.decoding import pages
from fewbit.models.decoding.block_parts import ATTENTION, child, mlp_of, norm_names
from fewbit.models.decoding.caches import CACHE, InPlaceLayer
from fewbit.models.decoding.known import Known
from fewbit.models.decoding.stand_in import StandIn

Forward = Callable[..., Any]
_MOST = 64  # rows of a call: for long prompts, PyTorch is as fast
_CACHES = (CACHE, "layer_past", "past_key_values")  # names of the argument that holds the cache
_KNOWN = {"attention_mask", "position_ids", "position_embeddings", "use_cache", "cache_position", *_CACHES}


class Turns:
    """The cosine and sine of a step in float32, which blocks share."""

    def __init__(self) -> None:
        # The tensors that were converted last, their version, the width, and the result.
        self.last: tuple[Any, Any, tuple[int, int], tuple[Tensor, Tensor] | None] = (None, None, (0, 0), None)

    def of(self, given: Any, batch: int, tokens: int, rotated: int) -> tuple[Tensor, Tensor] | None:
        """None if they are no tensors [batch or 1, tokens, rotated], or with half of these, which are repeated."""
        if not isinstance(given, tuple) or len(given) != 2:
            return None
        cosine, sine = given
        *known, turned = self.last
        state = (_version(cosine), rotated)
        if turned is None or known[0] is not cosine or known[1] is not sine or known[2] != state:
            twice = 2 if 2 * cosine.shape[-1] == rotated else 1
            turned = (torch.cat([cosine.float()] * twice, -1), torch.cat([sine.float()] * twice, -1))
            self.last = (cosine, sine, state, turned)
        shape = turned[0].shape
        if turned[1].shape != shape or len(shape) != 3 or shape[0] not in (1, batch) or shape[1:] != (tokens, rotated):
            return None
        return turned


def names_of(forward: Forward) -> list[str]:
    """The names of a block's arguments, in order."""
    return list(signature(forward).parameters)


def named(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments after the first by their names."""
    return {**dict(zip(names[1:], args[1:], strict=False)), **kwargs}


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class Replacement:
    """A block's forward by the library, and by its own code for everything else."""

    def __init__(
        self, module: Any, wiring: Wiring, dtype: torch.dtype, turns: Turns, beside: list[None] | None = None
    ) -> None:
        self.module, self.stand_in = module, StandIn(module, self.forward)
        self.names, self.beside, self.parallel = names_of(module.forward), beside, wiring.parallel
        self.block, self.dtype = Block(wiring, dtype), dtype
        self.layer: int = child(module, ATTENTION).layer_idx
        self.shape, self.rotated = (wiring.shared, wiring.head), wiring.rotated
        self.turns = turns
        self.before: int | None = None  # if set, tokens from this position on run the block's own code
        # The second half by the module's own parts, if the library computes the first half only.
        mlp = None if wiring.down is not None else mlp_of(module)
        before, after = (getattr(module, name) if name else None for name in norm_names(module)[2:])
        self.rest, self.residual = None if mlp is None else (before, mlp, after), wiring.residual
        apart = set() if mlp is None else set(mlp.modules())
        inner = [each for each in module.modules() if each is not module and each not in apart]
        self.parts = [(m._modules, name, part) for m in (module, *inner) for name, part in m.named_children()]
        self.hooks = [hooks for each in inner for hooks in (each._forward_hooks, each._forward_pre_hooks)]
        self.known = Known((module, *inner))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], Tensor):
            out = self.served(args[0], kwargs if len(args) == 1 else named(self.names, args, kwargs))
            if out is not None:
                return out if self.beside is None else (out, *self.beside)
        return self.module.forward(*args, **kwargs)

    def served(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """The block's output; None, with nothing written, if the library does not take this call."""
        if torch.is_grad_enabled() or x.dim() != 3 or x.dtype != self.dtype or not x.is_contiguous():
            return None
        batch, tokens, _ = x.shape
        if self.before is not None:
            at = kwargs.get("position_ids")
            if not isinstance(at, Tensor) or int(at.max()) >= self.before:
                return None
        angles = kwargs.get("position_embeddings")
        turned = self.turns.of(angles, batch, tokens, self.rotated) if self.rotated else None
        if (self.rotated and turned is None) or not self.unchanged():
            return None
        cache = next((given for name in _CACHES if (given := kwargs.get(name)) is not None), None)
        found = pages.of_layer(cache, self.layer)
        known = _KNOWN if found is None else _KNOWN | pages.ARGUMENTS
        if any(name not in known and value is not None and value is not False for name, value in kwargs.items()):
            return None
        if found is not None:
            out = self.block(x, found, turned)
        else:
            layer = self._layer(cache, x)
            if layer is None or not layer.reserve(tokens):
                return None
            cached, mask = (
                Cached(layer.whole[0], layer.whole[1], layer.first(), layer.end),
                kwargs.get("attention_mask"),
            )
            if mask is not None:
                seen = (1, tokens, cached.end + tokens - cached.first)
                if mask.dim() != 4 or mask.shape[1:] != seen or len(mask) not in (1, batch):
                    return None
                mask = mask if mask.dtype in (torch.bool, torch.float32) else mask.float()
                mask = mask if mask.stride(-1) == 1 else mask.contiguous()
            out = self.block(x, cached, turned, mask)
            layer.advance(tokens)
        return out if self.rest is None else self._second_half(x, out)

    def _layer(self, cache: Any, x: Tensor) -> InPlaceLayer | None:
        """The layer of a cache that is written in place, for the texts of x. None if there is none."""
        layers = getattr(cache, "layers", None) or ()
        layer = layers[self.layer] if self.layer < len(layers) else None
        if not isinstance(layer, InPlaceLayer) or x.shape[0] * x.shape[1] > _MOST:
            return None
        if not layer.is_initialized:
            empty = x.new_empty(x.shape[0], self.shape[0], 0, self.shape[1])
            layer.lazy_initialization(empty, empty)
        return layer if len(layer.whole[0]) == x.shape[0] else None

    def _second_half(self, x: Tensor, h: Tensor) -> Tensor:
        assert self.rest is not None
        before, mlp, after = self.rest
        read = x if self.parallel else h
        y: Any = mlp(read if before is None else before(read))
        y = y[0] if isinstance(y, tuple) else y
        y = y if after is None else after(y)
        out: Tensor = h + (y if self.residual == 1 else y * self.residual)
        return out

    def unchanged(self) -> bool:
        """Whether nobody has replaced, hooked or changed a part."""
        return self.same() and not self.watched()

    def watched(self) -> bool:
        """Whether a part has a hook."""
        return any(self.hooks)

    def same(self) -> bool:
        """Whether nobody has replaced or changed a part, and none drops numbers at random. This runs for each token."""
        for owner, name, part in self.parts:
            if owner.get(name) is not part:
                return False
        return self.known.same()
