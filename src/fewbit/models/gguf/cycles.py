"""Blocks that run several times, as the metadata of a GGUF file.

    transformers (HRM-Text)                           file (`a` is the name of the architecture)
    num_layers_per_stack, H_cycles, L_cycles          a.hrm.layers_per_stack, a.hrm.h_cycles, a.hrm.l_cycles
    num_hidden_layers                                 a.block_count: one layer for each run of a block
    L_module.layers, then H_module.layers             blk.0, blk.1, ...: each block once

A high cycle runs the first list of blocks once in each of its low cycles, then the second list once.
"""

from __future__ import annotations

from typing import Any

from fewbit.errors import PlanError
from fewbit.models.gguf.architecture import Architecture

_MOST = 512  # layers of a model of llama.cpp (LLAMA_MAX_LAYERS)


def check(config: Any, arch: Architecture) -> None:
    """PlanError if config.json counts other runs of blocks than there are."""
    if arch.cycles and config.num_hidden_layers != (runs := _runs(*(getattr(config, key) for key in arch.cycles))):
        raise PlanError(
            f"llama.cpp runs {arch.name} with a layer for each run of a block, here {runs}; this model's "
            f"num_hidden_layers is {config.num_hidden_layers}"
        )


def blocks(keys: Any, layers: int) -> int:
    """How many blocks a file of so many layers has. keys: its `Metadata` (metadata.py)."""
    arch: Architecture = keys.architecture
    if not arch.cycles:
        return layers
    length, high, low = (keys.count(arch.counts[key]) for key in arch.cycles)
    if (runs := _runs(length, high, low)) > _MOST:
        raise keys.wrong(f"its keys say that its blocks run {runs} times; llama.cpp runs at most {_MOST} layers")
    if layers != runs:
        raise keys.wrong(f"its keys say that its blocks run {runs} times, and that it has {layers} layers")
    found: int = len(arch.layers) * length
    return found


def _runs(length: int, high: int, low: int) -> int:
    return length * high * (low + 1)
