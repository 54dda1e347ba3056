"""Everything that a model's GGUF file contains besides its weights. `GgufWriter` needs it first.

    head = header.of(config, tokenizer, "org/model", folder)  # PlanError if no GGUF file can store them
    with GgufWriter(path, head.metadata | {"general.file_type": 15}, entries) as writer:     # of each tensor
        for name, tensor in head.extra.items():
            writer.add(name, tensor)                          # such as rotary factors
        route = head.routes["model.layers.0.self_attn.q_proj.weight"]
        writer.add(route.name, blocks if route.rows is None else blocks[route.rows])     # uint8 [N, bytes of a row]
        writer.add(norm.name, norm.to_file(tensor).float())   # vectors are always float32

A linear's weight is [N, K], as everywhere in fewbit. `Route.transposed` only concerns tensors in Conv1D's layout. Of
tied embeddings, only `token_embd.weight` is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import PlanError
from fewbit.formats.containers.gguf import Entry
from fewbit.models.gguf import config as gguf_config
from fewbit.models.gguf import kinds, names, positions, tokenizer_check, tokenizer_source
from fewbit.models.gguf import tokenizer as gguf_tokenizer
from fewbit.models.gguf.names import Route


@dataclass(frozen=True)
class Header:
    """metadata: keys and values. routes: transformers' name -> `Route` of the tensor. extra: name in the file -> tensor
    that is not a weight. notes: what llama.cpp does in another way than transformers."""

    metadata: dict[str, Any]
    routes: dict[str, Route]
    extra: dict[str, Tensor]
    notes: tuple[str, ...] = ()

    @property
    def extra_entries(self) -> list[Entry]:
        """The tensors that are not weights."""
        types = {torch.float32: "f32", torch.float16: "f16"}
        return [Entry(name, types[tensor.dtype], tuple(tensor.shape)) for name, tensor in self.extra.items()]


def extra_tensors(config: Any) -> dict[str, Tensor]:
    """Tensors of the file that are not weights of the model, float32 or float16."""
    return {**positions.extra_tensors(config), **kinds.extra_tensors(config, names.architecture(config))}


OTHER = "Use another format: a plan such as w4a16 or gptq-4bit, or, to convert, `to=compressed-tensors`."


@contextmanager
def advised() -> Iterator[None]:
    """Errors for what a GGUF file cannot express name other formats, unless they have a hint of their own."""
    try:
        yield
    except PlanError as error:
        raise error if error.hint else PlanError(error.message, OTHER) from error.__cause__


@advised()
def of(config: Any, tokenizer: Any, name: str, folder: Path) -> Header:
    """The header for a config and a tokenizer of transformers. PlanError if a GGUF file cannot store them.

    folder: where the tokenizer's files are.
    """
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else []
    tokenizer, restored = tokenizer_source.as_stored(tokenizer, folder)
    metadata = gguf_tokenizer.to_metadata(tokenizer, config.vocab_size, ends)
    named = tokenizer_source.named(tokenizer, Path(name).name or name)
    metadata = gguf_config.to_metadata(config, named) | metadata
    different = tokenizer_check.check(tokenizer, metadata)
    differs = names.architecture(config).differs
    notes = tuple(note for note in (restored, different, differs) if note)
    return Header(metadata, names.routes(config), extra_tensors(config), notes)
