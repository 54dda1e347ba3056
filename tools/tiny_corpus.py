"""Writes the corpus of `tiny` and `tiny-moe`: a teacher answers thousands of prompts at a time.

All texts of a batch get one token at each step, and texts that end early leave the batch. Most of the time goes to the
cache of keys and values, so prompts are fed through the same steps: all rows are then at one position, without a mask.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tiny_prompts import prompts
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM

from fewbit.models.source import locate

SEED = 20261123
SYSTEM = "You write clear, simple English."
USER, END = "<|im_start|>", "<|im_end|>"
LONGEST = 352  # tokens of a prompt and its answer together, in the teacher's tokenizer


class Teacher:
    """A Llama's forward pass for one token of each of many texts, over a cache that is allocated once.

    `keys` and `values` are [layers, rows, kv heads, positions, head size]; a step reads and writes the first rows.
    """

    def __init__(self, model: Any, rows: int, length: int) -> None:
        self.config, self.model = model.config, model
        layers, heads = self.config.num_hidden_layers, self.config.num_key_value_heads
        self.size = self.config.hidden_size // self.config.num_attention_heads
        like = {"dtype": model.dtype, "device": model.device}
        self.keys = torch.empty(layers, rows, heads, length, self.size, **like)
        self.values = torch.empty_like(self.keys)
        self.heads = [self.config.num_attention_heads, heads, heads]
        self.qkv = [torch.cat([m.q_proj.weight, m.k_proj.weight, m.v_proj.weight]) for m in self._attention()]
        self.up = [torch.cat([b.mlp.gate_proj.weight, b.mlp.up_proj.weight]) for b in model.model.layers]
        positions = torch.arange(length, device=model.device).unsqueeze(0)
        cos, sin = model.model.rotary_emb(self.keys, positions)
        self.cos, self.sin = cos[0], sin[0]

    def _attention(self) -> Iterator[Any]:
        return (block.self_attn for block in self.model.model.layers)

    def step(self, ids: Tensor, position: int) -> Tensor:
        """Logits [rows, vocabulary] of what follows `ids` [rows], which stand at `position` in all texts."""
        n, eps, kv = len(ids), self.config.rms_norm_eps, self.keys.shape[2]
        x = self.model.model.embed_tokens.weight[ids]
        for i, block in enumerate(self.model.model.layers):
            h = F.rms_norm(x, x.shape[1:], block.input_layernorm.weight, eps)
            q, k, v = F.linear(h, self.qkv[i]).view(n, -1, self.size).split(self.heads, 1)
            self.keys[i, :n, :, position] = self._rotate(k, position)
            self.values[i, :n, :, position] = v
            seen = slice(position + 1)
            # The query heads that share a key head are the rows of its one small matrix.
            q = self._rotate(q, position).reshape(n, kv, -1, self.size)
            h = F.scaled_dot_product_attention(q, self.keys[i, :n, :, seen], self.values[i, :n, :, seen])
            x = x + F.linear(h.reshape(n, -1), block.self_attn.o_proj.weight)
            h = F.rms_norm(x, x.shape[1:], block.post_attention_layernorm.weight, eps)
            gate, up = F.linear(h, self.up[i]).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, block.mlp.down_proj.weight)
        x = F.rms_norm(x, x.shape[1:], self.model.model.norm.weight, eps)
        return F.linear(x, self.model.lm_head.weight)

    def keep(self, rows: Tensor, positions: int) -> None:
        """Move these rows of the cache to its front."""
        for cache in (self.keys, self.values):
            for layer in cache:
                layer[: len(rows), :, :positions] = layer[rows, :, :positions]

    def _rotate(self, x: Tensor, position: int) -> Tensor:
        a, b = x.chunk(2, -1)
        turned: Tensor = x * self.cos[position] + torch.cat([-b, a], -1) * self.sin[position]
        return turned


def choose(logits: Tensor, before: Tensor, temperature: float = 0.75, least: float = 0.1) -> Tensor:
    """A token a row, sampled from those at least `least` as likely as the likeliest.

    `before` [rows, positions] are the tokens so far: what would make four of them stand there a second time is made
    e^4 times less likely, since a small teacher goes round in circles.
    """
    circles = torch.ones_like(before[:, 3:], dtype=torch.bool)
    for back in (1, 2, 3):
        circles &= before[:, 3 - back : -back] == before[:, -back, None]
    logits = logits.float().scatter_add(1, before[:, 3:], circles * -4.0)
    scaled = logits / temperature
    share = (scaled - scaled.amax(-1, keepdim=True)).exp()
    share = torch.where(share < least, 0.0, share)
    return (share / -torch.rand_like(share).clamp_(min=1e-20).log()).argmax(-1)


def answers(teacher: Teacher, asked: list[list[int]], end: int, sampler: Any) -> list[list[int]]:
    """What the teacher writes after each of these token lists, without the end, which may be missing."""
    device, length, count = teacher.keys.device, teacher.keys.shape[3], len(asked)
    forced = torch.full((count, max(map(len, asked))), -1)
    for row, prompt in enumerate(asked):
        forced[row, : len(prompt)] = torch.tensor(prompt)
    forced = forced.to(device)
    written = torch.full((count, length), end, device=device)
    rows, ids = torch.arange(count, device=device), forced[:, 0]
    written[:, 0] = ids
    alive = torch.ones(count, dtype=torch.bool, device=device)
    for position in range(length - 1):
        following = sampler(teacher.step(ids, position), written[rows, : max(4, position + 1)])
        if position + 1 < forced.shape[1]:
            given = forced[rows, position + 1]
            following = torch.where(given >= 0, given, following)
            alive &= (following != end) | (given >= 0)
        else:
            alive &= following != end
        written[rows, position + 1] = following
        ids = following
        if position % 16 == 15 and position >= forced.shape[1]:
            stay = alive.nonzero().squeeze(1)
            if len(stay) < count // 20:  # the few that ramble on are not worth the time
                break
            if len(stay) < 0.9 * len(rows):
                teacher.keep(stay, position + 1)
                rows, ids, alive = rows[stay], ids[stay], alive[stay]
    texts = []
    for given_ids, row in zip(asked, written.tolist(), strict=True):
        rest = row[len(given_ids) :]
        texts.append(rest[: rest.index(end)] if end in rest else rest)
    return texts


def write_corpus(work: Path, device: str, rows: int, rounds: int, minutes: float) -> None:
    """corpus.jsonl in `work`: an object with "prompt" and "text" a line, raw, as the teacher wrote them."""
    from concurrent.futures import Future, ThreadPoolExecutor

    source = locate("smollm2")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(source.folder, dtype=dtype)
    model = model.to(device).eval()
    tokenizer = Tokenizer.from_file(str(source.folder / "tokenizer.json"))
    end = tokenizer.token_to_id(END)
    assert end is not None
    torch.manual_seed(SEED)
    asking, teacher = prompts(random.Random(SEED)), Teacher(model, rows, LONGEST)
    sampler = torch.compile(choose, dynamic=True) if device == "cuda" else choose
    started, tokens, texts = time.time(), 0, 0

    def store(batch: list[Any], written: list[list[int]]) -> None:
        for prompt, text in zip(batch, tokenizer.decode_batch(written), strict=True):
            file.write(json.dumps({"prompt": prompt.text, "text": prompt.beginning + text}) + "\n")

    pending: Future[None] | None = None
    with (work / "corpus.jsonl").open("w", encoding="utf-8") as file, ThreadPoolExecutor(1) as pool:
        for number in range(1, rounds + 1):
            batch = [next(asking) for _ in range(rows)]
            asked = [
                f"{USER}system\n{SYSTEM}{END}\n{USER}user\n{p.text}{END}\n{USER}assistant\n{p.beginning}" for p in batch
            ]
            with torch.inference_mode(), sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
                written = answers(teacher, [e.ids for e in tokenizer.encode_batch(asked)], end, sampler)
            if pending is not None:
                pending.result()
            pending = pool.submit(store, batch, written)
            tokens, texts, elapsed = tokens + sum(map(len, written)), texts + rows, time.time() - started
            log(work, f"round {number}: {texts} texts, {tokens / 1e6:.1f} M tokens, {tokens / elapsed:,.0f} a second")
            if elapsed > 60 * minutes:
                break
        if pending is not None:
            pending.result()


def log(work: Path, line: str) -> None:
    """To the terminal and to train.log."""
    line = f"{time.strftime('%H:%M:%S')} {line}"
    print(line, flush=True)
    with (work / "train.log").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
