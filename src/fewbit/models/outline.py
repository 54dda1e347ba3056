"""The shapes of all tensors of a model, from its config alone.

The model is built on the meta device, as for quantizing. Its parameters give the names and shapes of the checkpoint. So
plans can be settled and sizes computed before any weights are downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fewbit.formats.containers.safetensors import Checkpoint
from fewbit.models import experts
from fewbit.models.skeleton import Skeleton
from fewbit.models.source import Source
from fewbit.schemes.base import PartSpec


@dataclass(frozen=True)
class Geometry:
    """The sizes that determine memory.

    rows: query heads · head width. values: key-value heads · head width. inner: width of the MLP.
    context: the model's context length in tokens.
    windows: for each layer, the most tokens that its cache keeps; 0 for no limit.
    """

    layers: int
    hidden: int
    rows: int
    values: int
    inner: int
    vocab: int
    context: int
    windows: tuple[int, ...]


class Outline(Skeleton):
    """A skeleton that works without weight files: tensors then have the dtype in the config."""

    def __init__(self, source: Source, *, trust_remote_code: bool = False, for_gguf: bool = False) -> None:
        options = {"trust_remote_code": trust_remote_code, "for_gguf": for_gguf}
        super().__init__(source, source.dtype, torch.device("cpu"), **options)

    def _open(self) -> None:
        if self.source.files:
            super()._open()
            return
        self.tied = dict(self.model.all_tied_weights_keys)
        self.checkpoint = Checkpoint([])
        self.checkpoint.specs |= {
            name: PartSpec.of(tensor) for name, tensor in self._expected.items() if name not in self.tied
        }
        self.name_of = {name: name for name in self.checkpoint.specs}
        self.merged, self.splits, self.multiplied = set(), {}, {}
        self.without_place = {}

    def largest_block(self) -> Mapping[str, Any]:
        """The block with the most parameters: their number ("parameters"), name -> shape [N, K] of its linears
        ("linears"), and whether it has experts ("experts")."""
        sizes = {b: sum(p.numel() for p in self.model.get_submodule(b).parameters()) for b in self.blocks}
        block = max(sizes, key=lambda name: sizes[name])
        linears = self.linears(block)
        return {"parameters": sizes[block], "linears": linears, "experts": any(map(experts.is_of_expert, linears))}


def geometry(config: Any, context: int) -> Geometry:
    """The sizes of a model of transformers' `config`, with this context length in tokens."""
    text = config.get_text_config()
    layers, hidden = text.num_hidden_layers, text.hidden_size
    heads = getattr(text, "num_attention_heads", None) or 0  # a model without attention has no KV cache
    width = _largest(text, "head_dim") or hidden // max(heads, 1)
    kinds = getattr(text, "layer_types", None)
    window = getattr(text, "sliding_window", None) or 0
    if kinds is None:  # all layers are alike: all have a window, or none
        window = window if getattr(text, "use_sliding_window", True) else 0
        windows = (window,) * layers
    else:
        windows = tuple(window if "sliding" in kind else 0 for kind in kinds)
    inner = next(
        (found for key in ("intermediate_size", "ffn_dim", "n_inner") if (found := getattr(text, key, None))),
        4 * hidden,
    )
    return Geometry(
        layers=layers,
        hidden=hidden,
        rows=heads * width,
        values=(_largest(text, "num_key_value_heads") or heads) * width,
        inner=inner,
        vocab=text.vocab_size,
        context=context,
        windows=windows,
    )


def _largest(config: Any, key: str) -> int:
    """The largest number that a layer has for `key`, which a config may set for each layer; 0 if none has one."""
    layers = getattr(config, "per_layer_config", None) or [config]
    return max(getattr(each, key, None) or 0 for each in layers)
