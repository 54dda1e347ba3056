"""Documentation in step with the code: fails, one line a fault, where the two say different things.

It checks that docs/reference.md names every command and every registry entry, and says which schemes no format stores;
that CHANGELOG.md has a section for the current version or [Unreleased]; that every relative link points at a file
that exists; and that the outputs of the notebooks are up to date.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# [text](target) and [label]: target; a title after the target is allowed, an angle-bracketed target too.
INLINE_LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?(?:\s+[\"'(][^)]*)?\s*\)")
LABEL_LINK = re.compile(r"^\s{0,3}\[[^\]]+\]:\s*<?(\S+?)>?(?:\s|$)", re.MULTILINE)
FENCE = re.compile(r"^(`{3,}|~{3,}).*?^\1[`~]*\s*$", re.MULTILINE | re.DOTALL)
CODE_SPAN = re.compile(r"`[^`\n]*`")
HAS_SCHEME = re.compile(r"^[a-z][a-z0-9+.-]*:", re.IGNORECASE)


def main() -> int:
    """Print every fault; 1 if there was one."""
    faults = [
        *commands_in_reference(),
        *entries_in_reference(),
        *unstored_in_reference(),
        *changelog_has_section(),
        *links_lead_somewhere(),
        *notebooks_were_run(),
    ]
    for fault in faults:
        print(fault, file=sys.stderr)
    print(f"docs: {len(faults)} fault{'s' * (len(faults) != 1)}" if faults else "docs: in step with the code")
    return 1 if faults else 0


def commands_in_reference() -> Iterator[str]:
    """docs/reference.md mentions `fewbit NAME` for each command of the command line that is not hidden."""
    import typer.main

    from fewbit.cli.app import app

    text = read("docs/reference.md")
    if text is None:
        yield "docs/reference.md: missing"
        return
    for name in command_names(typer.main.get_command(app)):
        if not mentions(text, f"fewbit {name}"):
            yield f"docs/reference.md: does not mention the command `fewbit {name}`"


def command_names(command: Any, prefix: str = "") -> Iterator[str]:
    """The full names of the visible commands at or below `command`, those in groups included."""
    for name, child in sorted(getattr(command, "commands", {}).items()):
        if child.hidden:
            continue
        if getattr(child, "commands", None):
            yield from command_names(child, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}"


def entries_in_reference() -> Iterator[str]:
    """docs/reference.md mentions each registered scheme, method, format and kernel."""
    from fewbit import registry

    text = read("docs/reference.md")
    if text is None:
        yield "docs/reference.md: missing"
        return
    for family in registry.FAMILIES:
        for name in registry.entries(family):
            if not mentions(text, name):
                yield f"docs/reference.md: does not mention {name!r} of {family}"


def unstored_in_reference() -> Iterator[str]:
    """docs/reference.md says of exactly those schemes that no format stores them: "No format stores `int5` yet"."""
    from fewbit.plans.catalogue import catalogue

    rows = catalogue()["schemes"]
    wanted = {spec.partition("-")[0] for row in rows for spec, names in (row.formats or {}).items() if not names}
    sentence = re.search(r"No format stores (.*?) yet", read("docs/reference.md") or "", re.DOTALL)
    found = set(re.findall(r"`([^`]+)`", sentence[1])) if sentence else set()
    if found != wanted:
        yield f"docs/reference.md: no format stores {sorted(wanted)}, but the sentence has {sorted(found)}"


def changelog_has_section() -> Iterator[str]:
    """CHANGELOG.md has a heading [Unreleased] or one for the version of fewbit."""
    from fewbit import __version__ as version

    text = read("CHANGELOG.md")
    if text is None:
        yield "CHANGELOG.md: missing"
    elif not re.search(rf"^## \[(Unreleased|{re.escape(version)})\]", text, re.MULTILINE):
        yield f"CHANGELOG.md: has neither a section [Unreleased] nor [{version}]"


def links_lead_somewhere() -> Iterator[str]:
    """Relative links in *.md and docs/**/*.md point at files that exist; what stands in code is no link."""
    for page in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]):
        text = CODE_SPAN.sub("", FENCE.sub("", page.read_text(encoding="utf-8")))
        for target in [*INLINE_LINK.findall(text), *LABEL_LINK.findall(text)]:
            path = target.split("#")[0].split("?")[0]
            if not path or HAS_SCHEME.match(target) or target.startswith("//"):
                continue
            if not (page.parent / path).exists():
                yield f"{page.relative_to(ROOT)}: links to {target}, which does not exist"


def notebooks_were_run() -> Iterator[str]:
    """The outputs of each notebook in examples/ come from its cells as they are, and from this fewbit."""
    from run_notebooks import outdated

    for file in sorted(ROOT.glob("examples/*.ipynb")):
        if fault := outdated(file):
            yield f"{file.relative_to(ROOT)}: {fault}: run make notebook"


def mentions(text: str, words: str) -> bool:
    """True where `words` stands in `text` not as a part of a longer name; any white space may separate them."""
    pattern = r"\s+".join(re.escape(word) for word in words.split())
    return re.search(rf"(?<![\w.-]){pattern}(?![\w-])", text) is not None


def read(name: str) -> str | None:
    path = ROOT / name
    return path.read_text(encoding="utf-8") if path.is_file() else None


if __name__ == "__main__":
    sys.exit(main())
