"""One token of one text on a CPU, without the model's own code between its blocks.

Between the blocks that the CPU library computes, a decoder makes masks and passes arguments on: a tenth of the time of
SmolLM2, a quarter of that of `tiny`. So `Steps` takes the place of the decoder's forward, and calls what it consists
of: embedding, angles, blocks, last norm. The first step with each kind of cache, and the first beyond each sliding
window, is computed in both ways, and the outputs are compared, bit for bit. A call that is not such a step, and one of
a model that somebody changed or watches, runs the decoder's own code.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as modules
from torch.utils.hooks import RemovableHandle

from fewbit.errors import KernelError
from fewbit.kernels.cpu.block import Cached, GrowingChain
from fewbit.models.decoding.caches import CACHE, InPlaceLayer, WindowLayer
from fewbit.models.decoding.outside import Outside
from fewbit.models.decoding.replacement import Replacement
from fewbit.models.decoding.stand_in import StandIn

_CACHES = (CACHE, "past_key_values")
_KNOWN = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position", "use_cache", *_CACHES}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_EVERY = 1 << 62  # the window of a layer that sees all tokens


class Steps:
    """The forward of a decoder whose blocks the library computes."""

    def __init__(self, model: Any, blocks: Sequence[Replacement]) -> None:
        """blocks: of all layers, in order. KernelError if the decoder is of another kind."""
        self.base = model.get_decoder()
        self.plain, config = self.base.forward, self.base.config
        self.stand_in = StandIn(self.base, self.forward)
        self.blocks = list(blocks)
        self.outside: Outside | None = Outside(model, self.blocks)
        self.windows = _windows(config, self.blocks)
        inside = {part for block in self.blocks for part in block.module.modules()}
        self.around = [part for part in self.base.modules() if part is not self.base and part not in inside]
        # Where each part is, and which it is: the blocks, too.
        self.places = [
            (part._modules, name, own) for part in (self.base, *self.around) for name, own in part._modules.items()
        ]
        known = len(self.blocks) == config.num_hidden_layers and self.outside.embedding in self.around
        if not known or "forward" in vars(self.base):
            raise KernelError("its blocks are others")
        self.training = self.base.training
        self.chain: GrowingChain | None = None
        self.kind: Any = None  # of the output, after the first comparison
        self.equal: dict[Any, bool] = {}  # for each kind of step: whether its output is the decoder's own
        self.hooks = -1  # the number of hooks that were ever registered, when nobody watched a part
        self.lock = Lock()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cache: Any = next((given for name in _CACHES if (given := kwargs.get(name)) is not None), None)
        if args or not self._takes(cache, kwargs) or not self._unchanged():
            return self.plain(*args, **kwargs)
        layers = [cache.layers[block.layer] for block in self.blocks]
        step = self._kind_of_step(layers)
        equal = self.equal.get(step)
        if equal is False:
            return self.plain(**kwargs)
        with self.lock:
            try:
                hidden = self._hidden(cache, layers, kwargs)
            except Exception:  # the own code of a decoder can do otherwise, and tells the user what is wrong
                if equal is None:
                    self.equal[step] = False
                hidden = None
            if hidden is not None and equal:
                for layer in layers:
                    layer.advance(1)
                return self.kind(last_hidden_state=hidden, **{CACHE: cache})
        out = self.plain(**kwargs)  # writes the same keys and values again
        if hidden is not None:
            same = isinstance(out, dict) and set(out) == {"last_hidden_state", CACHE} and out[CACHE] is cache
            self.equal[step] = same and torch.equal(out["last_hidden_state"], hidden)
            self.kind = type(out)
        return out

    def _takes(self, cache: Any, kwargs: dict[str, Any]) -> bool:
        """Whether a call is of one token of one text, with a cache that is written in place, and nothing else."""
        ids, embedded = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if torch.is_grad_enabled() or (ids is None) == (embedded is None):
            return False
        if ids is not None and not (isinstance(ids, Tensor) and ids.shape == (1, 1) and not ids.is_floating_point()):
            return False
        if embedded is not None and not (isinstance(embedded, Tensor) and self._fits(embedded)):
            return False
        if not kwargs.get("use_cache", True) or kwargs.get("return_dict") is False:
            return False
        if any(name not in _KNOWN and value is not None and value is not False for name, value in kwargs.items()):
            return False
        layers = getattr(cache, "layers", None) or ()
        if len(layers) <= max(block.layer for block in self.blocks):
            return False
        if not all(isinstance(layer, InPlaceLayer) and layer.is_initialized for layer in layers):
            return False
        mask, position = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if position is not None and not (isinstance(position, Tensor) and position.shape == (1, 1)):
            return False
        if mask is None:
            return True
        if not isinstance(mask, Tensor) or mask.dim() != 2 or len(mask) != 1:
            return False
        return mask.shape[1] > cache.get_seq_length() and bool(mask.all())

    def _fits(self, embedded: Tensor) -> bool:
        block = self.blocks[0].block
        return embedded.shape == (1, 1, block.width) and embedded.dtype == block.dtype

    def _unchanged(self) -> bool:
        """Whether the decoder and its blocks are as they were, and nobody watches them. Plain loops, as this runs for
        each token; hooks are looked for where one was registered, whatever it is for."""
        base = self.base
        if base.training != self.training or modules._has_any_global_hook() or self.outside is None:
            return False
        config = base.config
        if getattr(config, "output_hidden_states", False) or getattr(config, "output_attentions", False):
            return False
        if config.num_hidden_layers != len(self.blocks):
            return False
        for owner, name, part in self.places:
            if owner.get(name) is not part:
                self.outside = self.chain = None  # for good: what was replaced may go
                self.places, self.around = [], []
                return False
        for part in self.around:
            if "forward" in vars(part):
                return False
        for block in self.blocks:
            if not (block.stand_in.serves() and block.same()):
                return False
        hooks = RemovableHandle.next_id  # grows with each hook that is registered anywhere
        if hooks != self.hooks:
            parts = [*self.around, *(block.module for block in self.blocks)]
            watched = any(part._forward_hooks or part._forward_pre_hooks for part in parts)
            if watched or any(block.watched() for block in self.blocks):
                return False
            self.hooks = hooks
        return True

    def _kind_of_step(self, layers: Sequence[InPlaceLayer]) -> Any:
        """Steps of the same kind have the same result if one has."""
        beyond = sum(_known(layers[i]) >= window for i, window in enumerate(self.windows) if window < _EVERY)
        return (beyond, *map(type, layers))

    def _hidden(self, cache: Any, layers: Sequence[InPlaceLayer], kwargs: dict[str, Any]) -> Tensor | None:
        """The output of the last norm [1, 1, width]; None without room in the cache. The keys and values are written,
        and not yet counted."""
        caches, outside = [], self.outside
        for layer, window in zip(layers, self.windows, strict=True):
            if not layer.reserve(1):
                return None
            keys, values = layer.whole
            caches.append(Cached(keys, values, max(layer.first(), layer.end - window + 1), layer.end))
        if outside is None:  # another thread saw a change
            return None
        if self.chain is None:
            self.chain = GrowingChain([each.block for each in self.blocks], caches, outside.angles)
        x, embedded, position = self.chain.x, kwargs.get("inputs_embeds"), kwargs.get("position_ids")
        x.copy_(outside.embedded(int(kwargs["input_ids"])) if embedded is None else embedded)
        outside.turn(x, cache.get_seq_length() if position is None else int(position))
        out: Tensor = outside.norm(self.chain.next(caches))
        return out


def _known(layer: InPlaceLayer) -> int:
    """The tokens of the text before this one."""
    return int(layer.cumulative_length) if isinstance(layer, WindowLayer) else layer.end - layer.start


def _windows(config: Any, blocks: Sequence[Replacement]) -> list[int]:
    """How many tokens each block sees, its own included. KernelError for a kind of layer that is not known."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is None:
        kinds = [_FULL if window is None else _SLIDING] * len(blocks)
    if not set(kinds) <= {_FULL, _SLIDING} or (_SLIDING in kinds and not isinstance(window, int)):
        raise KernelError("layers of another kind")
    return [_EVERY if kinds[block.layer] == _FULL or window is None else int(window) for block in blocks]
