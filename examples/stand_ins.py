"""Local stand-ins for the repositories of the guide: the same layouts, made from a model that is here.

They have the layouts of AutoGPTQ (v1, symmetric), AutoAWQ (gemm) and llama.cpp (Q4_K_M): the same tensors, of the same
names, types and shapes. The texts are samples of the model itself.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import mkdtemp
from typing import NamedTuple

import torch
from transformers import AutoTokenizer

import fewbit

GGUF_FILE = "model.Q4_K_M.gguf"
TEXTS, TOKENS = 16, 400


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
    place = Path(mkdtemp(prefix="fewbit-guide-"))
    some = fewbit.Calibration(samples=8, length=256)
    fewbit.quantize(model, place / "gptq", plan="gptq-4bit", calibration=some)
    fewbit.quantize(model, place / "awq", plan="awq-4bit", calibration=some)
    (place / "gguf").mkdir()
    fewbit.quantize(model, place / "gguf" / GGUF_FILE, plan="q4_k_m", calibration=some)
    original = fewbit.load(model)
    texts = samples(original)
    return Names(
        original=original.name_or_path,
        gptq=str(place / "gptq"),
        awq=str(place / "awq"),
        gguf=str(place / "gguf"),
        gguf_file=GGUF_FILE,
        text=texts[4:],
        other="\n\n".join(texts[:4]),
    )


def samples(model) -> list[str]:
    """Texts that the model writes, the same ones each time."""
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    start = tokenizer(["The"] * TEXTS, return_tensors="pt").to(model.device)
    torch.manual_seed(0)
    written = model.generate(**start, do_sample=True, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
    return tokenizer.batch_decode(written, skip_special_tokens=True)
