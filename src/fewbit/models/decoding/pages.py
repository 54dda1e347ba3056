"""The pages of transformers' continuous batching, as the CPU library's blocks read them.

`PagedAttentionCache` is not a stable interface. Where a name is missing, or a layer has a sliding window, blocks run
their own code in all steps, because a text must not depend on the others of its step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fewbit.kernels.cpu.block import Pages, Slots

# What continuous batching passes to a block besides its cache.
ARGUMENTS = {
    *("read_index", "write_index", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
    *("block_table", "logits_indices", "logits_processor_args", "logits_to_keep", "is_causal"),
}
_STEP = "_fewbit_step"  # the attribute of a cache with its layers' pages in this step


def is_paged(cache: Any) -> bool:
    """Whether a cache is in pages that `begin` knows."""
    allocators = getattr(cache, "cache_allocators", None)
    if not isinstance(allocators, dict) or not hasattr(cache, "layer_to_allocator"):
        return False
    return all(type(each).__name__ == "FullAttentionCacheAllocator" for each in allocators.values())


def begin(cache: Any, given: Mapping[str, Any]) -> None:
    """Note where the tokens of a step are. given: the arguments of the model in this step."""
    steps: dict[int, Pages] = {}
    for allocator in cache.cache_allocators.values():
        slots = _slots(
            given["cu_seq_lens_q"],
            given["cu_seq_lens_k"][allocator.layer_type],
            given["read_index"][allocator.index],
            given["write_index"][allocator.index],
        )
        if slots is not None:
            for layer, (keys, values) in allocator._kv_token_views.items():
                steps[layer] = Pages(keys, values, slots)
    setattr(cache, _STEP, steps)


def of_layer(cache: Any, layer: int) -> Pages | None:
    """The pages of a layer in this step. None if blocks run their own code."""
    steps: dict[int, Pages] = getattr(cache, _STEP, {})
    return steps.get(layer)


def _slots(ends_q: Tensor, ends_k: Tensor, read: Tensor, write: Tensor) -> Slots | None:
    """Where the new tokens of a step are. None if it has rows of no text.

    ends_q, ends_k: where the new tokens of each text end, and where all its tokens in `read` do, [texts + 1] from 0.
    read: empty if all texts are new; then they see what they write.
    """
    ends_q, ends_k = ends_q.to(torch.int64), ends_k.to(torch.int64)
    if int(ends_q[-1]) != len(write):
        return None
    new = ends_q.diff()
    text = torch.repeat_interleave(new)
    before = ends_k.diff() - new
    count = before[text] + torch.arange(1, len(write) + 1, dtype=torch.int64, device="cpu") - ends_q[text]
    return Slots(write.to(torch.int64), (read if len(read) else write).to(torch.int64), ends_k[text], count)
