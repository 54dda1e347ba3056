"""Local stand-ins for the repositories of the guide: the same layouts, made from a model that is here.

They have the layouts of AutoGPTQ (v1, symmetric), AutoAWQ (gemm) and llama.cpp (Q4_K_M): the same tensors, of the same
names, types and shapes.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import mkdtemp
from typing import NamedTuple

import fewbit
from fewbit.models.source import locate
from fewbit.texts.calibration import Calibration
from fewbit.texts.sources import load_text, own_source

GGUF_FILE = "model.Q4_K_M.gguf"


class Names(NamedTuple):
    """What the guide calls by name; `text` is for calibration, `other` for measuring."""

    original: str
    gptq: str
    awq: str
    gguf: str
    gguf_file: str
    text: list[str]
    other: str


def make(model: str) -> Names:
    """Stand-ins for `model`, "tiny" or "smollm2", in a folder of their own."""
    source, place = locate(model), Path(mkdtemp(prefix="fewbit-guide-"))
    some = Calibration(samples=8, length=256)
    fewbit.quantize(model, place / "gptq", plan="gptq-4bit", calibration=some)
    fewbit.quantize(model, place / "awq", plan="awq-4bit", calibration=some)
    (place / "gguf").mkdir()
    fewbit.quantize(model, place / "gguf" / GGUF_FILE, plan="q4_k_m", calibration=some)
    own = own_source(source.config)
    text, other = (load_text(own, part).documents for part in ("calibration", "evaluation"))
    return Names(
        original=str(source.folder),
        gptq=str(place / "gptq"),
        awq=str(place / "awq"),
        gguf=str(place / "gguf"),
        gguf_file=GGUF_FILE,
        text=[str(document)[:4000] for document in text[:6]],
        other="\n\n".join(map(str, other))[:6000],
    )
