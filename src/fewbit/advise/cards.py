"""Which GPU cards hold so many bytes: a small table (cards.json), with sources, of what they let a program have."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Card:
    """`memory`: bytes that one program can have, a CUDA context taken off. `source`: where the size stands."""

    name: str
    memory: int
    source: str


@cache
def cards() -> tuple[Card, ...]:
    """All cards of the table, the smallest first."""
    data = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    taken = data["context_bytes"]
    found = [Card(c["name"], (c["mib"] << 20) - taken, data["sources"][c["source"]]) for c in data["cards"]]
    return tuple(sorted(found, key=lambda card: card.memory))


def smallest(nbytes: int) -> str | None:
    """Name of the smallest card that holds so many bytes; None where none of the table does."""
    return next((card.name for card in cards() if card.memory >= nbytes), None)
