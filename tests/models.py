"""Tiny random models of many architectures, with a small real tokenizer, made by the tests that need them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as token_models
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from fewbit.names import ADAPTER, ADAPTER_WEIGHTS

VOCAB = 288  # 256 bytes, three special tokens, and merges
CONTEXT = 128
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
_WORDS = """
the a model weight of group and scale in column row is to small few bits code grid error sum block that each nearest
value with without input output square mean rounded stored read written half double first last
"""

# What each family's config is called with, besides what all share. The value of "kind" is the name of its classes.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"kind": "Llama", "num_key_value_heads": 2, "tie_word_embeddings": True, "dtype": "bfloat16"},
    "mistral": {"kind": "Mistral", "num_key_value_heads": 2, "sliding_window": 16},
    "qwen2": {"kind": "Qwen2", "num_key_value_heads": 2, "dtype": "bfloat16"},
    "qwen3": {"kind": "Qwen3", "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
    "gemma": {"kind": "Gemma", "num_key_value_heads": 1, "head_dim": 32},
    "gemma2": {"kind": "Gemma2", "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16},
    "gemma3": {
        "kind": "Gemma3",
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {"kind": "Phi3", "num_key_value_heads": 2},
    "gpt2": {"kind": "GPT2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT},
    "gpt2-bare": {"kind": "GPT2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT},
    "opt": {"kind": "OPT", "ffn_dim": 96, "word_embed_proj_dim": 64},
    "opt-350m": {"kind": "OPT", "ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "gpt-neox": {"kind": "GPTNeoX"},
}
# Architectures whose blocks are called or answer in a way of their own, for tests of exactly that.
UNLIKE: dict[str, dict[str, Any]] = {
    "bloom": {"kind": "Bloom", "n_layer": 2, "n_head": 4},  # a mask of rows for each head of each sequence
    "openai-gpt": {"kind": "OpenAIGPT", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT},  # lists
    "gemma3n": {  # hidden states [inputs, sequences, tokens, width], keys and values shared among blocks
        "kind": "Gemma3nText",
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
}


def sentences(count: int, seed: int = 0) -> str:
    """Text of `count` sentences of words that the tokenizer knows."""
    generator = torch.Generator().manual_seed(seed)
    known, lines = _WORDS.split(), []
    for _ in range(count):
        length = int(torch.randint(5, 14, (1,), generator=generator))
        words = [known[int(i)] for i in torch.randint(len(known), (length,), generator=generator)]
        lines.append(" ".join(words).capitalize() + ".")
    return "\n".join(lines)


def tokenizer(chat: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on a few sentences."""
    make: Any = PreTrainedTokenizerFast  # whose constructor is not typed
    made = make(tokenizer_object=Tokenizer.from_str(_trained()), bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    assert isinstance(made, PreTrainedTokenizerFast)
    made.model_max_length = CONTEXT
    made.chat_template = chat
    return made


@cache
def _trained() -> str:
    made = Tokenizer(token_models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([sentences(200)], trainer)
    return str(made.to_str())


def build(family: str, **changes: Any) -> Any:
    """A random model of that family in evaluation mode: norms, biases and all else are drawn anew, none is 0 or 1."""
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
        "dtype": "float32",
        **(FAMILIES | UNLIKE)[family],
        **changes,
    }
    kind = str(settings.pop("kind"))
    if kind in ("GPT2", "OpenAIGPT"):  # these are properties there
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            del settings[name]
        del settings["max_position_embeddings"]
        settings["tie_word_embeddings"] = kind == "GPT2"
    if kind == "OPT":
        del settings["intermediate_size"]
        settings["tie_word_embeddings"] = True
    name = {"Gemma3": "Gemma3Text"}.get(kind, kind)
    config = getattr(transformers, f"{name}Config")(**settings)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, settings["dtype"]))
    generator = torch.Generator().manual_seed(len(family))
    with torch.no_grad():
        for label, weight in model.named_parameters():
            fresh = torch.randn(weight.shape, generator=generator)
            if weight.dim() > 1:
                # Heavier tails than a normal's, and columns of unlike size, so that grids and orders matter.
                fresh = fresh * fresh.abs() / weight.shape[-1] ** 0.5
                fresh = fresh * torch.linspace(0.5, 1.5, weight.shape[-1])
            else:
                fresh = 0.1 * fresh + (1.0 if label.endswith("weight") and "Gemma" not in kind else 0.0)
            weight.copy_(fresh)
    return model.eval()


def save(folder: Path, family: str, *, chat: str | None = None, **changes: Any) -> Path:
    """The model and tokenizer of a family in the Hugging Face layout."""
    folder.mkdir(parents=True, exist_ok=True)
    build(family, **changes).save_pretrained(folder)
    tokenizer(chat).save_pretrained(folder)
    (folder / "LICENSE").write_text("Made for a test.\n", encoding="utf-8")
    if family == "gpt2-bare":
        tensors, plain = load_file(folder / "model.safetensors"), {}
        for name, tensor in tensors.items():
            plain[name.removeprefix("transformer.")] = tensor
        for block in range(2):  # masks, which the published files carry
            plain[f"h.{block}.attn.bias"] = torch.ones(CONTEXT, CONTEXT).tril()[None, None]
        save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def original(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a folder as transformers alone gives it, through the class that config.json names."""
    named = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    return getattr(transformers, named).from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)


def linear_weight(module: nn.Module) -> Tensor:
    """The weight [N, K] of a linear; GPT-2's Conv1D keeps it transposed."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if type(module).__name__ == "Conv1D" else weight


def with_weights(model: Any, weights: Mapping[str, Tensor]) -> Any:
    """`model` with the weights [N, K] of the named modules replaced."""
    with torch.no_grad():
        for name, weight in weights.items():
            linear_weight(model.get_submodule(name)).copy_(weight)
    return model


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        out = model(input_ids=ids, use_cache=False).logits
    assert isinstance(out, Tensor)
    return out


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def quantization_of(folder: Path) -> dict[str, Any]:
    """The quantization_config in config.json."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    return found


def empty_adapter(folder: Path) -> Path:
    """A folder with the files of an adapter, which hold nothing."""
    folder.mkdir(exist_ok=True)
    for name in (ADAPTER, ADAPTER_WEIGHTS):
        (folder / name).touch()
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """A JSON object in a file with keys replaced."""
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def greedy(model: Any, ids: Tensor, new: int = 24) -> list[list[int]]:
    """The tokens of each text and of `new` more, each the likeliest one."""
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None)
    return [[int(token) for token in row] for row in out]
