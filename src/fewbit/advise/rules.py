"""The rules of recommendations: rules.json. They are read before anything heavy is imported."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from fewbit import registry


@cache
def rules() -> dict[str, Any]:
    """rules.json: purposes and targets."""
    return dict(json.loads((Path(__file__).parent / "rules.json").read_text(encoding="utf-8")))


def check(purpose: str, target: str | None) -> None:
    """PlanError for a purpose or a target that there is not."""
    if purpose not in rules()["purposes"]:
        raise registry.unknown("purpose", purpose, rules()["purposes"])
    if target is not None and target not in rules()["targets"]:
        raise registry.unknown("target", target, rules()["targets"])
