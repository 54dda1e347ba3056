"""One token of one text on a CPU, without the model's own code between its blocks.

Between the blocks that the CPU library computes, a decoder makes masks and passes arguments on. For a small model that
takes a third of the time. So `Steps` takes the place of the decoder's forward, and calls what it consists of:
embedding, angles, blocks, last norm. The first such step is computed in both ways, and the outputs are compared, bit
for bit. All other calls run the decoder's own code.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as modules
from torch.utils.hooks import RemovableHandle

from fewbit.errors import KernelError
from fewbit.kernels.cpu.block import Cached, GrowingChain
from fewbit.models.decoding.caches import CACHE, InPlaceLayer
from fewbit.models.decoding.outside import Outside
from fewbit.models.decoding.replacement import Replacement

_CACHES = (CACHE, "past_key_values")
_KNOWN = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position", "use_cache", *_CACHES}
_CHECKED = 16  # steps of a text between two looks at all parts
_PLAIN = ("full_attention", "sliding_attention")  # kinds of layers whose one new token sees all that its cache keeps


class Steps:
    """The forward of a decoder whose blocks the library computes."""

    def __init__(self, model: Any, blocks: Sequence[Replacement]) -> None:
        """blocks: of all layers, in order. KernelError if the decoder has parts around them that are not known."""
        self.base = model.get_decoder()
        self.plain = self.base.forward
        self.blocks, self.outside = list(blocks), Outside(model, blocks)
        config = self.base.config
        if not set(getattr(config, "layer_types", None) or _PLAIN) <= set(_PLAIN):
            raise KernelError("layers of another kind")
        if len(self.blocks) != config.num_hidden_layers or "forward" in vars(self.base):
            raise KernelError("its blocks are others")
        self.own = [part for part in (self.outside.embedding, self.outside.norm, self.outside.rotary) if part]
        self.children = dict(self.base.named_children())
        self.training = self.base.training
        self.chain: GrowingChain | None = None
        self.kind: Any = None  # of the output, after the test
        self.last: weakref.ref[Any] | None = None  # the cache of the step before
        self.left = 0  # steps on this cache until the parts are looked at again
        self.hooks = -1  # the number of hooks at that time
        self.tested: bool | None = None
        self.lock = Lock()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cache: Any = next((given for name in _CACHES if (given := kwargs.get(name)) is not None), None)
        if args or self.tested is False or not self._takes(cache, kwargs):
            self.left = 0
            return self.plain(*args, **kwargs)
        with self.lock:
            try:
                hidden = self._hidden(cache, kwargs)
            except KernelError:  # the library rejects what a decoder of this kind gives it
                self.tested, hidden = False, None
            if hidden is not None and self.tested:
                for layer in cache.layers:
                    layer.advance(1)
                return self.kind(last_hidden_state=hidden, **{CACHE: cache})
        return self.plain(**kwargs) if hidden is None else self._test(hidden, cache, kwargs)

    def _test(self, hidden: Tensor, cache: Any, kwargs: dict[str, Any]) -> Any:
        """The decoder's own output, which writes the same keys and values again."""
        out = self.plain(**kwargs)
        same = isinstance(out, dict) and set(out) == {"last_hidden_state", CACHE} and out[CACHE] is cache
        self.tested = same and torch.equal(out["last_hidden_state"], hidden)
        self.kind = type(out)
        return out

    def _takes(self, cache: Any, kwargs: dict[str, Any]) -> bool:
        """Whether a call is of one token of one text, with a cache in place, and nobody changed the model."""
        ids, embedded = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        given = ids if embedded is None else embedded
        if not isinstance(given, Tensor) or given.shape[:2] != (1, 1) or (ids is not None) == (embedded is not None):
            return False
        if torch.is_grad_enabled() or not kwargs.get("use_cache", True) or kwargs.get("return_dict") is False:
            return False
        if any(name not in _KNOWN and value is not None and value is not False for name, value in kwargs.items()):
            return False
        mask, position = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2 and bool(mask.all())):
            return False
        if position is not None and position.shape != (1, 1):
            return False
        layers = getattr(cache, "layers", None) or ()
        if len(layers) < len(self.blocks):
            return False
        if not all(isinstance(layer, InPlaceLayer) and layer.is_initialized for layer in layers):
            return False
        hooks = RemovableHandle.next_id  # grows with each hook that is registered anywhere
        if self.left > 0 and self.last is not None and self.last() is cache and hooks == self.hooks:
            self.left -= 1
            return True
        sound = self._unchanged()
        self.last, self.hooks, self.left = weakref.ref(cache), hooks, _CHECKED if sound else 0
        return sound

    def _unchanged(self) -> bool:
        """Whether the decoder and its blocks are as they were, and nobody watches them. For a small model this takes a
        tenth of a step, so it is asked once for several."""
        base = self.base
        if base.training != self.training or modules._has_any_global_hook():
            return False
        if any(base._modules.get(name) is not part for name, part in self.children.items()):
            return False
        if getattr(base.config, "output_hidden_states", False) or getattr(base.config, "output_attentions", False):
            return False
        for part in self.own:
            if part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part):
                return False
        for block in self.blocks:
            own = block.module
            if own._forward_hooks or own._forward_pre_hooks or vars(own).get("forward") != block.forward:
                return False
            if not block.unchanged():
                return False
        return True

    def _hidden(self, cache: Any, kwargs: dict[str, Any]) -> Tensor | None:
        """The output of the last norm [1, 1, width]; None without room in the cache. The keys and values are written,
        and not yet counted."""
        caches = []
        for block in self.blocks:
            layer = cache.layers[block.layer]
            if not layer.reserve(1):
                return None
            keys, values = layer.whole
            caches.append(Cached(keys, values, layer.first(), layer.end))
        if self.chain is None:
            self.chain = GrowingChain([each.block for each in self.blocks], caches, self.outside.angles)
        x, embedded, position = self.chain.x, kwargs.get("inputs_embeds"), kwargs.get("position_ids")
        x.copy_(self.outside.embedded(int(kwargs["input_ids"])) if embedded is None else embedded)
        self.outside.turn(x, cache.get_seq_length() if position is None else int(position))
        out: Tensor = self.outside.norm(self.chain.next(caches))
        return out
