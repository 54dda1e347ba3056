"""Tokens a second of one text on a CPU: quantized folders side by side, and llama.cpp on the same GGUF file.

Each row is a model, `folder`, `folder@kernel` or `file.gguf`, fused and in a static cache as `generate --fuse` has it,
`plain:folder` as `generate` has it without, or `own:folder` as plain, with blocks that run the model's own code;
`--dtype` is that of activations. `llama.cpp:file.gguf` is llama-cpp-python's decoding of the file, if it is installed.
Rows take turns, a text each, so that what else the machine does meets all of them; of each the fastest text counts.
`--random FOLDER` first writes a Llama of random weights in TinyLlama's shape (1.1 billion), to be quantized.

    python benchmarks/decode_cpu.py --random llama-1b
    fewbit quantize llama-1b --method rtn --plan q4_k_m -o llama-1b.gguf
    python benchmarks/decode_cpu.py llama-1b llama-1b.gguf llama.cpp:llama-1b.gguf --threads 1
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

import fewbit
from fewbit.models.decoding import compiled_blocks
from fewbit.models.source import locate
from fewbit.system import native
from fewbit.system.machine import processor

Text = Callable[[], float]  # makes one, and says how many seconds a token took
PROMPT, PLAIN, OWN = 8, "plain:", "own:"


def by_fewbit(model: str, tokens: int, dtype: torch.dtype) -> Text:
    """A text in fewbit, from the first token after the prompt to the last."""
    where, _, kernel = model.removeprefix(PLAIN).removeprefix(OWN).partition("@")
    fuses = (
        not model.startswith((PLAIN, OWN)) and locate(where).quantization is not None
    )  # only packed weights are fused
    fuse = PROMPT + tokens + 2 if fuses else None
    loaded = fewbit.load(where, dtype=dtype, device="cpu", kernel=kernel or None, fuse=fuse)
    if model.startswith(OWN):
        compiled_blocks.remove(loaded)
    loaded.generation_config.eos_token_id = None  # to forbid it by `min_new_tokens` would look at every token's logit
    ids = torch.arange(5, 5 + PROMPT)[None]

    def until(new: int) -> float:
        begin = time.perf_counter()
        with torch.inference_mode():
            loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        return time.perf_counter() - begin

    return lambda: (until(tokens + 1) - until(1)) / tokens


def by_llama_cpp(file: str, tokens: int, threads: int) -> Text:
    """The same work in llama.cpp: the prompt at once, then a token at a time."""
    from llama_cpp import Llama

    loaded = Llama(file, n_ctx=256 + tokens, n_threads=threads, n_threads_batch=threads, verbose=False)

    def text() -> float:
        loaded.reset()
        loaded.eval(list(range(5, 5 + PROMPT)))
        begin = time.perf_counter()
        for i in range(tokens):
            loaded.eval([100 + i])
        return (time.perf_counter() - begin) / tokens

    return text


def write_random(folder: str) -> None:
    """A Llama in TinyLlama's shape, bfloat16, with the tokenizer of `tiny`."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    )
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(str(locate("tiny").folder))
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--texts", type=int, default=4, help="for each row")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--random", metavar="FOLDER")
    options = parser.parse_args()
    if options.random:
        return write_random(options.random)
    torch.set_num_threads(options.threads)
    rows: dict[str, Text] = {}
    for model in options.models:
        if model.startswith("llama.cpp:"):
            rows[model] = by_llama_cpp(model.partition(":")[2], options.tokens, options.threads)
        else:
            rows[model] = by_fewbit(model, options.tokens, getattr(torch, options.dtype))
    taken: dict[str, list[float]] = {model: [] for model in rows}
    for _ in range(options.texts):
        for model, text in rows.items():
            taken[model].append(text())
    print(f"{processor()}, torch {torch.__version__}, Python {platform.python_version()}, {native.instructions()}")
    print(f"{options.threads} threads, {options.tokens} tokens after a prompt of {PROMPT}, {options.dtype}\n")
    print("| model | tokens/s | median | of the first |\n|---|---|---|---|")
    first = min(taken[options.models[0]]) if rows else 0.0
    for model, seconds in taken.items():
        best, median = min(seconds), sorted(seconds)[len(seconds) // 2]
        name = model if ":" in model else Path(model).name
        print(f"| {name} | {1 / best:.1f} | {1 / median:.1f} | {first / best:.2f} |")


if __name__ == "__main__":
    main()
