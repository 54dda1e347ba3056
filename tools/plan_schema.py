"""Write docs/plan.schema.json, the JSON schema of plan files, from the registry: `python tools/plan_schema.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fewbit import registry
from fewbit.formats.base import storing
from fewbit.methods.base import options as method_options
from fewbit.plans.mixtures import MIXTURES, PREFIX
from fewbit.schemes.base import parse

# Schemes with parameters. A test compares these with what `parse` takes.
_SPECS = (
    r"int[2-8]-(g(1[6-9]|[2-9]\d|[1-9]\d\d|10[01]\d|102[0-4])|row)(-sym)?(-bf16)?",
    r"(nf4|fp4)(-b(32|64|128|256|512|1024|2048|4096))?(-dq)?",
    r"llm\.int8-t\d+(\.\d+)?(e-?\d+)?",
)
FILE = Path(__file__).resolve().parent.parent / "docs" / "plan.schema.json"


def schema() -> dict[str, Any]:
    """The schema (draft 2020-12). Schemes: examples, which editors suggest, and patterns."""
    schemes = sorted(
        {spec for scheme in registry.entries("schemes").values() for spec in scheme.examples if storing(parse(spec))}
    )
    formats = sorted(name for name, format in registry.entries("formats").items() if not format.read_only)
    methods = registry.entries("methods")
    options = {each.name: _value(each.type) for each in method_options()}
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
                    {"enum": [None, *schemes, *(PREFIX + name for name in MIXTURES)]},
                    {"type": "string", "pattern": f"^({'|'.join(_SPECS)})$"},
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
                "properties": dict(sorted(options.items())),
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


def _value(kind: type) -> dict[str, Any]:
    """What an option of a method may be: a value of its type, or that as text."""
    if kind is bool:
        return {"enum": [True, False, "true", "false"]}
    json_type, pattern = {int: ("integer", r"^\d+$"), float: ("number", r"^[\d.]+(e-?\d+)?$")}[kind]
    return {"anyOf": [{"type": json_type}, {"type": "string", "pattern": pattern}]}


def main() -> None:
    FILE.write_text(json.dumps(schema(), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
