"""What a decoder has outside of its blocks, for one token: the embedding, the angles of positions, the last norm."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from fewbit.errors import KernelError
from fewbit.kernels.cpu.row import Row
from fewbit.models.decoding.block_parts import child
from fewbit.models.decoding.replacement import Replacement
from fewbit.nn.layers import QEmbedding

# Names of the norm after the last block.
_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "embedding_norm")
Angles = tuple[Tensor, Tensor]


class Outside:
    """The parts of a decoder around `blocks`. KernelError if it has others.

    angles: cosine and sine for each block, float32 [1, 1, rotated], which `turn` fills. Blocks of the same kind share
    them; None for blocks that rotate nothing.
    """

    @torch.inference_mode(False)  # what is made in that mode cannot be written outside of it
    def __init__(self, model: Any, blocks: Sequence[Replacement]) -> None:
        base = model.get_decoder()
        self.embedding, self.norm = model.get_input_embeddings(), child(base, _NORMS)
        self.rotary = child(base, ("rotary_emb",))
        if self.embedding is None or self.norm is None:
            raise KernelError("its parts are others")
        self._row = _row_of(self.embedding)
        self._id, self._position = (torch.zeros(1, 1, dtype=torch.int64, device="cpu") for _ in range(2))
        kinds = _kinds(base, self.rotary, len(blocks))
        self._turned: dict[str | None, tuple[Any, Angles]] = {}  # of each kind: a block, and its angles
        self.angles: list[Angles | None] = []
        for kind, block in zip(kinds, blocks, strict=True):
            if not block.rotated:
                self.angles.append(None)
                continue
            if self.rotary is None:
                raise KernelError("positions are turned elsewhere")
            own = torch.zeros(1, 1, block.rotated, dtype=torch.float32, device="cpu")
            known, angles = self._turned.setdefault(kind, (block, (own, own.clone())))
            if known.rotated != block.rotated:
                raise KernelError("blocks of one kind rotate different numbers of values")
            self.angles.append(angles)

    def embedded(self, token: int) -> Tensor:
        """The embedding of a token [1, 1, width]."""
        row = None if self._row is None or self._row.moved() else self._row
        found: Tensor = self.embedding(self._id.fill_(token)) if row is None else row(token)
        return found

    def turn(self, x: Tensor, position: int) -> None:
        """Fill the angles for a position. x: the first block's input, for its device and dtype."""
        self._position.fill_(position)
        for kind, (block, angles) in self._turned.items():
            given = self.rotary(x, self._position, *(() if kind is None else (kind,)))
            turned = block.turns.of(given, 1, 1, block.rotated)
            if turned is None:
                raise KernelError("positions are turned otherwise than before")
            for own, new in zip(angles, turned, strict=True):
                own.copy_(new)


def _kinds(base: Any, rotary: Any, count: int) -> Sequence[str | None]:
    """The kind of each block that its positions depend on; None if they are the same in all."""
    kinds = getattr(base.config, "layer_types", None)
    if rotary is None or kinds is None or "layer_type" not in signature(rotary.forward).parameters:
        return [None] * count
    return list(kinds)[:count]


def _row_of(embedding: Any) -> Row | None:
    """What decodes a row of a packed embedding, if it gives the same bits."""
    if not isinstance(embedding, QEmbedding) or embedding.codec is None or embedding.held is None or embedding.scale:
        return None
    shape = (embedding.num_embeddings, embedding.embedding_dim)
    try:
        row = Row(embedding.codec, (embedding.held,), shape)
    except (KernelError, AssertionError):  # a format that the library has no layout for
        return None
    some = range(0, shape[0], max(shape[0] // 64, 1))
    wanted = QEmbedding.forward(embedding, torch.tensor(some, dtype=torch.int64, device="cpu"))  # without hooks
    same = all(torch.equal(row(index).to(wanted.dtype), each) for index, each in zip(some, wanted, strict=True))
    return row if same else None
