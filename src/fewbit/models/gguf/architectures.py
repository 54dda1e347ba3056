"""Every architecture of llama.cpp that fewbit reads and writes: one row of `rows/` for each.

CONTRIBUTING.md says how to add one. Code reads the fields of a row, and never compares its name. A type of
transformers whose mathematics llama.cpp does not have is refused: `required` and its neighbours say what llama.cpp
takes for granted.

Source: gguf-py's name tables, and conversion/ and src/models/ of llama.cpp, as in llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fewbit.formats.containers.gguf import GgufFile
from fewbit.models.gguf.architecture import Architecture
from fewbit.models.gguf.rows import dense, earlier, experts, gemma, latents, recurrent, states, windows

_ROWS = (
    *experts.ROWS,
    *dense.ROWS,
    *earlier.ROWS,
    *gemma.ROWS,
    *latents.ROWS,
    *recurrent.ROWS,
    *states.ROWS,
    *windows.ROWS,
)  # a file is of the first whose `when` fits

ARCHITECTURES: dict[str, tuple[Architecture, ...]] = {
    name: tuple(row for row in _ROWS if row.name == name) for name in dict.fromkeys(row.name for row in _ROWS)
}
# transformers' type -> its rows. A model is of the first whose `chosen` fits
TYPES: dict[str, tuple[Architecture, ...]] = {
    kind: tuple(row for row in _ROWS if row.model_type == kind)
    for kind in dict.fromkeys(row.model_type for row in _ROWS)
}

# Types of transformers that llama.cpp computes otherwise -> how
REFUSED = {
    "bamba": "in llama.cpp RoPE turns other columns of a head together",
    "bitnet": "llama.cpp has silu in its MLP, and this model has relu2",
    "dbrx": "llama.cpp has the RoPE base of `attn_config.rope_theta`, which transformers ignores",
    "dots3_note_text": "in llama.cpp RoPE turns other columns of its indexers together, so in texts longer than "
    "`index_topk` they choose other tokens",
    "hy_v4": "in llama.cpp RoPE turns other columns of a head together",
    "qwen4_exp_text": "in texts longer than `indexer_budget`, llama.cpp adds a part of one more block to the blocks of "
    "tokens that an indexer chooses",
    "phimoe": "in llama.cpp its norms do not subtract the mean, and it weights the experts of a token otherwise",
}

# Types that llama.cpp has, and fewbit has no row for -> what is missing
MISSING = {
    "deepseek_v4": "fewbit has no names for hyper-connections, compressed keys and experts chosen by token",
    "gemma4_assistant": "it drafts for another model",
    "gemma4_unified_assistant": "it drafts for another model",
}


def of_config(config: Any) -> Architecture | None:
    """The row for a model of transformers' `config`; None if fewbit does not know one."""
    return next((row for row in TYPES.get(config.model_type, ()) if _is_chosen(row, config)), None)


def _is_chosen(row: Architecture, config: Any) -> bool:
    if row.unwoven and getattr(config, "mrope_section", None) is None:
        return False
    for key, wanted in row.chosen.items():
        found = getattr(config, key, None)
        if set(found or ()) != wanted if isinstance(wanted, frozenset) else found != wanted:
            return False
    return True


def of_file(file: GgufFile) -> Architecture | None:
    """The row for a file; None if fewbit does not know its architecture."""
    name = file.metadata.get("general.architecture")
    rows = ARCHITECTURES.get(name, ()) if isinstance(name, str) else ()

    def has(what: str) -> bool:
        value = file.metadata.get(f"{name}.{what}")
        return what in file.entries or bool(value.any() if isinstance(value, np.ndarray) else value)

    special = (row for row in rows if any(map(has, row.when)))
    return next(special, next((row for row in rows if not row.when), None))
