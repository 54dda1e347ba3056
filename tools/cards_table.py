"""Write the table "which plan fits which card" into docs/howto/choose.md, from `fewbit estimate` and the priors.

`python tools/cards_table.py`. A test compares the page with what this writes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tables

import fewbit
from fewbit.advise.estimate import PlanEstimate

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "howto" / "choose.md"
CARDS = (6, 8, 12, 16, 24)  # the nominal sizes, in GiB
HEADER = "| parameters | kind | " + " | ".join(f"{card} GB" for card in CARDS) + " |"
CONTEXT = 4096
GPTQ = ("gptq-3bit", "gptq-4bit", "gptq-8bit", "bf16")  # from the smallest to the largest
# Shapes of Llama 3.2, Llama 2 (7B and 13B) and Llama 3.1.
_SHARED = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "max_position_embeddings": 8192,
}
_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPES: dict[str, tuple[tuple[int, ...], int, bool]] = {
    "1B": ((2048, 8192, 16, 32, 8), 128256, True),
    "7B": ((4096, 11008, 32, 32, 32), 32000, False),
    "8B": ((4096, 14336, 32, 32, 8), 128256, False),
    "13B": ((5120, 13824, 40, 40, 40), 32000, False),
    "70B": ((8192, 28672, 80, 64, 8), 128256, False),
}


def main() -> None:
    tables.replace(PAGE, HEADER, table())


def table() -> str:
    """Two rows for each size: the GGUF plan of least loss that fits, and the GPTQ plan of most bits. In Markdown."""
    return "\n".join([HEADER, "|---|---|" + "---|" * len(CARDS), *_rows()]) + "\n"


def _rows() -> Iterator[str]:
    priors: dict[str, Any] = json.loads((ROOT / "src/fewbit/advise/priors.json").read_text(encoding="utf-8"))["plans"]
    for size, (widths, words, tied) in SHAPES.items():
        config = {**_SHARED, **dict(zip(_KEYS, widths, strict=True)), "vocab_size": words, "tie_word_embeddings": tied}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "config.json"
            file.write_text(json.dumps(config), encoding="utf-8")
            plans = fewbit.estimate(file, context=CONTEXT).plans
        gguf = [row for row in plans if row.format == "gguf" and row.plan in priors]
        gguf.sort(key=lambda row: -float(priors[row.plan]["kl"]))
        folders = sorted((row for row in plans if row.plan in GPTQ), key=lambda row: GPTQ.index(row.plan))
        yield f"| {size} | GGUF | {' | '.join(_best(gguf, card) for card in CARDS)} |"
        yield f"| | GPTQ | {' | '.join(_best(folders, card) for card in CARDS)} |"


def _best(plans: list[PlanEstimate], card: int) -> str:
    """The last of the plans that the card holds, and what it then uses."""
    memory = (card * 1024 - 512) * 2**20 - 600_000_000  # less the driver's share and a CUDA context: advise/cards.json
    fit = [row for row in plans if row.total <= memory]
    if not fit:
        return "none"
    name = "16 bits" if fit[-1].plan == "bf16" else f"`{fit[-1].plan}`"
    return f"{name}, {fit[-1].total / 1e9:.1f} GB"


if __name__ == "__main__":
    main()
