"""All that a GGUF file of a model needs besides its weights: what `formats.gguf.GgufWriter` is given first.

    head = gguf_header.of(source)                             # a located model; PlanError where no file can hold it
    entries = head.entries({"model.norm.weight": ("f32", (64,)), ...})     # transformers' names: type, shape [N, K]
    with GgufWriter(path, head.metadata | {"general.file_type": 15}, entries) as writer:
        for name, tensor in head.extra.items():
            writer.add(name, tensor)                          # rotary factors, no weights
        route = head.routes["model.layers.0.self_attn.q_proj.weight"]
        writer.add(route.name, blocks if route.rows is None else blocks[route.rows])     # uint8 [N, bytes of a row]
        writer.add(norm.name, norm.to_file(tensor).float())   # vectors are float32 in every file

A linear's weight is [N, K] here as everywhere in fewbit: `Route.transposed` concerns only tensors as Conv1D has them.
Of tied embeddings only `token_embd.weight` is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig

from fewbit.errors import FormatError
from fewbit.formats.containers.gguf import Entry
from fewbit.models.gguf import config as gguf_config
from fewbit.models.gguf import names, tokenizer_check
from fewbit.models.gguf import tokenizer as gguf_tokenizer
from fewbit.models.gguf.names import Route
from fewbit.models.skeleton import load_tokenizer
from fewbit.models.source import Source


@dataclass(frozen=True)
class Header:
    """`metadata`: keys and values. `routes`: transformers' name -> where the tensor goes. `extra`: more tensors, by
    their names in the file."""

    metadata: dict[str, Any]
    routes: dict[str, Route]
    extra: dict[str, Tensor]

    def entries(self, weights: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[Entry]:
        """The tensors of the file, in llama.cpp's order: transformers' name -> type and shape as the file has it."""
        found = [Entry(name, "f32", tuple(tensor.shape)) for name, tensor in self.extra.items()]
        return found + [Entry(self.routes[name].name, kind, shape) for name, (kind, shape) in weights.items()]


def of(source: Source, *, trust_remote_code: bool = False) -> Header:
    """The header for a located model with its tokenizer; PlanError where a GGUF file cannot hold them."""
    try:
        config: Any = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a config can be wrong in as many ways as models read it
        raise FormatError(f"{source.folder / 'config.json'}: {str(error).splitlines()[0][:300]}") from None
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else []
    name = Path(source.name).name or source.name
    metadata = gguf_config.to_metadata(config, name) | gguf_tokenizer.to_metadata(tokenizer, config.vocab_size, ends)
    tokenizer_check.check(tokenizer, metadata)
    return Header(metadata, names.routes(config), gguf_config.extra_tensors(config))
