"""Code in docs runs as it stands."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from fewbit import registry
from fewbit.errors import PlanError
from fewbit.plans.plan import PRESETS, Plan
from fewbit.schemes.base import parse
from tests.docs_pages import blocks

ROOT = Path(__file__).resolve().parents[2]


def code(page: str, language: str) -> list[str]:
    """The blocks of a language in a page that are to run, or are shown, in order."""
    return [block.text for block in blocks(ROOT / page) if block.language == language and block.how is None]


def test_the_toy_scheme_works_from_top_to_bottom(tmp_path: Path) -> None:
    script = tmp_path / "toy.py"
    script.write_text("\n".join(code("docs/toy-scheme.md", "python")), encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2176 bytes; rtn")


@pytest.mark.skipif(os.name == "nt", reason="the page has commands for a Unix shell")
def test_the_session_of_serving_runs(tmp_path: Path) -> None:
    """All commands of the page, in order, in one shell. Each line of an output that the page shows is printed."""
    pytest.importorskip("fastapi")
    pytest.importorskip("openai")
    if shutil.which("curl") is None:
        pytest.skip("the page calls curl")
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    # A server that is left behind by a failure would keep the pipe open.
    commands = ["trap 'kill $(jobs -p) 2>/dev/null || true' EXIT", *code("docs/howto/serve.md", "sh")]
    done = subprocess.run(
        ["bash", "-e", "-c", "\n".join(commands).replace("8000", port)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "TRANSFORMERS_VERBOSITY": "error"},
    )
    assert done.returncode == 0, done.stderr
    assert '"error"' not in done.stdout, done.stdout
    for line in "".join(code("docs/howto/serve.md", "text")).splitlines():
        assert line in done.stdout, done.stdout


_NO_SCHEMES = ("int44-g128", "int9-row", "int4-g8", "int4-g1025", "int4", "nf4-b48", "fp8-b64", "mixture:q4", "q4_9")


def test_the_schema_of_plans_is_up_to_date_and_holds() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    from plan_schema import FILE, schema

    assert json.loads(FILE.read_text(encoding="utf-8")) == schema(), "run python tools/plan_schema.py"
    for plan in PRESETS.values():
        jsonschema.validate(json.loads(json.dumps(plan.to_json())), schema())
    good = {
        "$schema": "plan.schema.json",
        "name": "a",
        "format": "gptq",
        "rules": [{"match": "*", "scheme": "int4-g64"}],
    }
    jsonschema.validate(good, schema())
    for spec in (
        "int4-g16",
        "int8-g1024-sym-bf16",
        "int2-g100",
        "int3-row",
        "fp4-b4096-dq",
        "nf4",
        "llm.int8-t0",
        None,
    ):
        wanted = {**good, "rules": [{"match": "*", "scheme": spec}]}
        jsonschema.validate(wanted, schema())
        Plan.from_json(wanted)
    for value in (0.05, "0.05", 1):
        jsonschema.validate({**good, "rules": [{"match": "*", "scheme": None, "options": {"damp": value}}]}, schema())
    assert Plan.from_json(good).rules[0].scheme == "int4-g64"
    rule = {"match": "*", "scheme": None}
    for wrong in (
        {**good, "format": "gtpq"},
        {**good, "rules": [{**rule, "method": "gtpq"}]},
        {**good, "rules": [{**rule, "options": {"dampp": 1}}]},
        {**good, "rules": [{**rule, "method": "gptq", "options": {"damp": "much"}}]},
        {**good, "rules": [{**rule, "method": "gptq", "options": {"act_order": 3}}]},
        {**good, "rule": []},
        *({**good, "rules": [{"match": "*", "scheme": spec}]} for spec in _NO_SCHEMES),
        {"name": "a", "format": "gptq"},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema())
        with pytest.raises(PlanError):
            Plan.from_json(wrong)


def test_the_table_of_conversions_is_up_to_date() -> None:
    from conversions_table import PAGE, table

    assert table() in PAGE.read_text(encoding="utf-8"), "run python tools/conversions_table.py"


def test_the_table_of_formats_is_up_to_date() -> None:
    from formats_table import PAGE, table

    assert table() in PAGE.read_text(encoding="utf-8"), "run python tools/formats_table.py"
    reference = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    for name, format in registry.entries("formats").items():
        assert re.search(rf"^\| {name} \| .* \| {re.escape(format.readers)}, fewbit \|$", reference, re.MULTILINE), name


def test_the_table_of_kernels_is_up_to_date() -> None:
    from kernels_table import PAGE, table

    assert table() in PAGE.read_text(encoding="utf-8"), "run python tools/kernels_table.py"


def test_the_table_of_cards_is_up_to_date() -> None:
    from cards_table import PAGE, table

    assert table() in PAGE.read_text(encoding="utf-8"), "run python tools/cards_table.py"


@pytest.mark.parametrize(
    ("name", "spec", "kind"),
    [
        ("gptq", "int4-g128-sym", ""),
        ("gptq", "int3-g64", ""),
        ("awq", "int4-g64", ""),
        ("bnb", "nf4-b64-dq", "NF4, FP4"),
        ("bnb", "llm.int8", "LLM.int8()"),
    ],
)
def test_the_drawn_layouts_are_those_of_the_files(name: str, spec: str, kind: str) -> None:
    """Names, types and shapes of the tensors, with N, K, g, b and B of one weight."""
    reference = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    text = reference.partition(f"\n### {name}\n")[2].partition("```\n")[2].partition("```")[0]
    if kind:
        text = re.split(r"^(?=\S)", text[text.index(kind) :], flags=re.MULTILINE)[1]
    scheme = parse(spec)
    group = scheme.group
    numbers = {"N": 256, "K": 512, "g": group, "B": group, "b": int(spec[3]) if spec.startswith("int") else None}
    drawn = {}
    for line in re.findall(r"P\.(\S+) +(\w+) +\[(.*?)\]", text):
        sizes = re.sub(r"(?<=\w) (?=\w)", "*", line[2]).replace("/", "//")
        drawn[line[0]] = (eval(f"({sizes},)" if sizes else "()", numbers), line[1])
    stored = registry.entries("formats")[name]().specs((256, 512), scheme)
    found = {part: (spec.shape, str(spec.dtype).removeprefix("torch.")) for part, spec in stored.items()}
    if name == "bnb" and "dq" in spec:
        found = {part: entry for part, entry in found.items() if "quant_state" not in part}
        assert found["weight.absmax"] == ((2048,), "uint8")
        found["weight.absmax"] = ((2048,), "float32")
    assert drawn == found


def test_the_page_of_models_is_up_to_date() -> None:
    """Its types are those of the pinned version of transformers."""
    from models_table import PAGE, page

    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if f"transformers=={transformers.__version__}" not in pinned:
        pytest.skip("another version of transformers has other types")
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tools/models_table.py"


def test_the_page_of_gguf_architectures_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from gguf_table import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page(), "run python tools/gguf_table.py"


# Entries of `rope_parameters`
_OF_ROPE = {"rope_type", "mscale", "mscale_all_dim", "truncate"}


def test_conditions_name_entries_that_a_config_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each condition of the page of GGUF architectures is one that a model of the type can break."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from gguf_table import conditions

    from fewbit.models.gguf.architectures import TYPES

    wrong = []
    for kind, rows in TYPES.items():
        config = transformers.AutoConfig.for_model(kind)
        of_rope = _OF_ROPE if hasattr(config, "rope_parameters") else set()
        said = {name for row in rows for each in conditions(row) for name in re.findall(r"`([a-z_]+)`", each)}
        wrong += [f"{kind}: {name}" for name in sorted(said - of_rope) if not hasattr(config, name)]
    assert not wrong
