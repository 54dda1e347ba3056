"""Write docs/plan.schema.json, the JSON schema of plan files, from the registry: `python tools/plan_schema.py`."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from fewbit import registry
from fewbit.formats.base import storing
from fewbit.plans.mixtures import MIXTURES, PREFIX
from fewbit.schemes.base import parse

FILE = Path(__file__).resolve().parent.parent / "docs" / "plan.schema.json"


def schema() -> dict[str, Any]:
    """The schema (draft 2020-12). Schemes are suggestions: most have parameters, such as a group size."""
    schemes = sorted(
        {spec for scheme in registry.entries("schemes").values() for spec in scheme.examples if storing(parse(spec))}
    )
    formats = sorted(name for name, format in registry.entries("formats").items() if not format.read_only)
    methods = registry.entries("methods")
    options = sorted({field.name for method in methods.values() for field in fields(method) if field.init})
    names = "|".join(sorted(methods))
    rule = {
        "type": "object",
        "required": ["match", "scheme"],
        "additionalProperties": False,
        "properties": {
            "match": {"type": "string", "description": "Glob over the names of modules, such as *.mlp.*"},
            "scheme": {
                "description": "What the numbers mean; null: stay in 16 bits.",
                "anyOf": [
                    {"enum": [*schemes, *(PREFIX + name for name in MIXTURES)]},
                    {"type": ["string", "null"]},
                ],
            },
            "method": {
                "description": "How codes are chosen. Default: rtn.",
                "type": "string",
                "pattern": rf"^({names})(\+({names}))*$",
                "examples": [*sorted(methods), "awq+gptq"],
            },
            "options": {
                "description": "Options of the method.",
                "type": "object",
                "additionalProperties": False,
                "properties": {name: {"type": ["string", "number", "boolean"]} for name in options},
            },
        },
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A plan of fewbit",
        "type": "object",
        "required": ["name", "format", "rules"],
        "additionalProperties": False,
        "properties": {
            "$schema": {"type": "string"},
            "name": {"type": "string"},
            "format": {"enum": formats},
            "rules": {"type": "array", "items": rule, "description": "The first rule that matches a module applies."},
            "adapt": {
                "type": "boolean",
                "description": "Take the largest group that divides every tensor. Default: false.",
            },
            "activations": {
                "enum": ["dynamic", None],
                "description": "dynamic: a server rounds activations too. Default: null.",
            },
        },
    }


def main() -> None:
    FILE.write_text(json.dumps(schema(), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
