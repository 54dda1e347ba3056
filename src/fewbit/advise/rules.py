"""The rules of recommendations: rules.json. They are read before anything heavy is imported."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from fewbit import registry
from fewbit.errors import PlanError


@cache
def rules() -> dict[str, Any]:
    """rules.json: purposes and targets."""
    return dict(json.loads((Path(__file__).parent / "rules.json").read_text(encoding="utf-8")))


def check(purpose: str, target: str | None) -> None:
    """PlanError for a purpose or a target that there is not."""
    purposes = rules()["purposes"]
    if purpose.lower() not in purposes:
        error = registry.unknown("purpose", purpose, purposes)
        if error.hint.startswith("Known"):  # none is close: say what each is for
            uses = ", ".join(f"{name} ({re.split('[:;]', rule['says'])[0]})" for name, rule in purposes.items())
            error = PlanError(error.message, f"Purposes: {uses}.")
        raise error
    if target is not None and target.lower() not in rules()["targets"]:
        raise registry.unknown("target", target, rules()["targets"])
