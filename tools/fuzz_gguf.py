"""Fuzzing of what reads GGUF files: nothing but FormatError may come of any bytes.

    make fuzz                      # five minutes of atheris, on mutations of small real files
    make fuzz ARGS='-runs=100000'  # options of libFuzzer

`read_all` is the target; tests/unit/test_gguf_fuzz.py runs it under hypothesis.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from fewbit.errors import FormatError
from fewbit.formats.containers.gguf import Entry, GgufFile, GgufWriter
from fewbit.models.gguf import config, header, tokenizer
from fewbit.models.skeleton import load_tokenizer
from fewbit.models.source import locate


def read_all(path: Path) -> None:
    """Read a file's header, tensors, config and tokenizer; FormatError where it cannot be."""
    file = GgufFile(path)
    for name in file.entries:
        file.get(name)
    config.to_config(file)
    tokenizer.to_tokenizer(file)


def seeds(folder: Path) -> list[bytes]:
    """Two real files, small: the embedded model's keys with a vocabulary of a few tokens, of either kind."""
    source = locate("tiny")
    head = header.of(AutoConfig.from_pretrained(source.folder), load_tokenizer(source), source.name, source.folder)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "c", "ab", "abc"]
    shared = {
        **head.metadata,
        "llama.block_count": 1,
        "llama.embedding_length": 32,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([3, 3, 3, 1, 1, 1, 1, 1], np.int32),
    }
    kinds: dict[str, dict[str, Any]] = {
        "bytes": {"tokenizer.ggml.merges": ["a b", "ab c"]},
        "pieces": {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": np.arange(8, dtype=np.float32)},
    }
    entries = [
        Entry("token_embd.weight", "q8_0", (len(tokens), 32)),
        Entry("blk.0.attn_q.weight", "f32", (32, 32)),
        Entry("rope_freqs.weight", "f32", (8,)),
    ]
    found = []
    for kind, own in kinds.items():
        path = folder / f"{kind}.gguf"
        with GgufWriter(path, shared | own, entries, overwrite=True) as writer:
            for entry in entries:
                writer.add(entry.name, torch.ones(entry.spec.shape, dtype=entry.spec.dtype))
        found.append(path.read_bytes())
    return found


def main() -> None:
    """Fuzz until atheris is told to stop."""
    import atheris

    # In memory where that is: a file is written for each of many thousand runs.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as place:
        folder = Path(place)
        (folder / "corpus").mkdir()
        for number, raw in enumerate(seeds(folder)):
            (folder / "corpus" / str(number)).write_bytes(raw)
        path = folder / "fuzzed.gguf"

        def one(raw: bytes) -> None:
            path.unlink(missing_ok=True)  # a new file: the old one may still be mapped
            path.write_bytes(raw)
            with suppress(FormatError):
                read_all(path)

        for module in (config, tokenizer, sys.modules["fewbit.formats.containers.gguf"]):
            own = [each for each in vars(module).values() if getattr(each, "__module__", None) == module.__name__]
            methods = [each for kind in own if isinstance(kind, type) for each in vars(kind).values()]
            for function in [*own, *methods]:
                if isinstance(function, FunctionType):
                    atheris.instrument_func(function)
        atheris.Setup(
            [sys.argv[0], "-max_total_time=300", "-max_len=65536", *sys.argv[1:], str(folder / "corpus")], one
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main()
