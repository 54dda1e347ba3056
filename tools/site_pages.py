"""Pages of the site that are made from other files; mkdocs calls this module as a hook (mkdocs.yml).

- docs/reference.md becomes one page for each section, under reference/. Links to its sections follow.
- benchmarks/results/*.md, CHANGELOG.md, CONTRIBUTING.md and the model card of tiny are pages too.
- `site_charts` draws charts from the tables of all pages that ask for them.
- examples.md has the scripts of examples/scripts.
- reference/command-line.md is made from the command line, reference/api.md from `fewbit.__all__`, the chart of
  howto/choose.md from the measured priors.
- Links between files of the repository become links between pages. What is no page is named, and not linked.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import posixpath
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import site_charts
from check_docs import FENCE, HAS_SCHEME
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = "docs/reference.md"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(\s*<?([^)\s>]+)>?\s*\)")
OTHERS = {
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
    "src/fewbit/data/tiny/README.md": "project/tiny-card.md",
}
SCRIPTS, EXAMPLES = "examples/scripts", "examples.md"
ALL_OPTIONS, API = "reference/command-line.md", "reference/api.md"
CHART = "![KL divergence against bits per quantized weight, for each plan](../images/plans.svg)"
# Titles in the navigation that tell a page of the reference from a page of another part.
TITLES = {"Several GPUs": "Several GPUs: details", "Plans": "Preset plans", "Python": "Python: overview"}
# What the reference says only here, because these pages are made with the site.
MORE = {
    "Commands": f"All options are on one page, to search: [all options]({posixpath.basename(ALL_OPTIONS)}).",
    "Several GPUs": "The commands: [use several GPUs](howto/several-gpus.md). This page says how the work is split.",
    "Plans": "To write a plan of your own: [write a plan](howto/plans.md).",
    "Python": f"All verbs, settings, results and errors are on one page: [Python API]({posixpath.basename(API)}).",
}


class Section(NamedTuple):
    """A part of docs/reference.md that is a page of its own; `anchors` are those of the headings in it."""

    page: str
    title: str
    text: str
    anchors: tuple[str, ...]


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and Markdown's toc make it."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower())


@cache
def sections() -> tuple[Section, ...]:
    """The parts of docs/reference.md: commands by headings of level 3, everything else by those of level 2."""
    parts: list[tuple[int, str, list[str]]] = []
    fence, commands = "", False
    for line in (ROOT / REFERENCE).read_text(encoding="utf-8").splitlines():
        if mark := re.match(r"```+|~~~+", line):
            fence = "" if fence == mark[0] else fence or mark[0]
        heading = None if fence else re.match(r"(##+) (.*)", line)
        if heading and heading[1] == "##":
            commands = heading[2] == "Commands"
        if heading and (heading[1] == "##" or (heading[1] == "###" and commands)):
            parts.append((len(heading[1]), heading[2], []))
        elif parts:
            parts[-1][2].append(line)
    made = []
    for level, title, lines in parts:
        text = "\n".join(lines).strip()
        found = [title, *re.findall(r"^#{3,} (.*)$", FENCE.sub("", text), re.MULTILINE)]
        raised = _outside_fences(text, lambda piece, n=level - 1: re.sub(rf"^#{{{n}}}(#+ )", r"\1", piece, flags=re.M))
        page = "reference/index.md" if title == "Commands" else f"reference/{slug(title)}.md"
        made.append(Section(page, title.replace("`", ""), f"# {title}\n\n{raised}\n", tuple(map(slug, found))))
    return tuple(made)


def _outside_fences(text: str, change: Any) -> str:
    """`text` with `change` applied to what is not in a fenced block."""
    pieces, end = [], 0
    for fence in FENCE.finditer(text):
        pieces += [change(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*pieces, change(text[end:])])


@cache
def places() -> dict[str, str]:
    """The page of each Markdown file of the repository that is one, by its path from the root."""
    own = {
        f"docs/{file.relative_to(ROOT / 'docs').as_posix()}" for file in (ROOT / "docs").rglob("*") if file.is_file()
    }
    found = {path: path.removeprefix("docs/") for path in own if path != REFERENCE}
    found |= {path: f"benchmarks/{Path(path).name}" for path in results()}
    found |= {"benchmarks/results": "benchmarks/index.md", SCRIPTS: EXAMPLES}
    found |= {f"docs/{posixpath.basename(page)}": page for page in (ALL_OPTIONS, API)}
    return found | OTHERS


@cache
def results() -> tuple[str, ...]:
    """Files of benchmarks/results, newest month first, then by name."""
    names = sorted(file.name for file in (ROOT / "benchmarks" / "results").glob("*.md"))
    return tuple(f"benchmarks/results/{name}" for name in sorted(names, key=lambda name: name[:7], reverse=True))


def target(link: str, source: str) -> str | None:
    """Where a link of the file `source` leads in the site, from its root; None if that is no page."""
    path, _, anchor = link.partition("#")
    file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path)) if path else source
    if file == REFERENCE:
        if not anchor:
            return "reference/index.md"
        for section in sections():
            if anchor in section.anchors:
                return section.page + ("" if anchor == section.anchors[0] else f"#{anchor}")
        raise SystemExit(f"{source}: {link}: docs/reference.md has no such heading")
    page = places().get(file)
    return page and page + (f"#{anchor}" if anchor else "")


def relinked(text: str, source: str, page: str) -> str:
    """The Markdown of `page`, which was made from the file `source`, with links to pages."""

    def change(match: re.Match[str]) -> str:
        bang, words, link = match.groups()
        if HAS_SCHEME.match(link) or bang:
            return match[0]
        found = target(link, source)
        if found is None:
            where = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
            return words if where in words else f"{words} (`{where}`)"
        at, hash, anchor = found.partition("#")
        return f"[{words}]({posixpath.relpath(at, posixpath.dirname(page) or '.')}{hash}{anchor})"

    def outside(piece: str) -> str:
        spans = re.split(r"(`[^`\n]*`(?!\]))", piece)
        return "".join(span if i % 2 else LINK.sub(change, span) for i, span in enumerate(spans))

    return _outside_fences(text, lambda piece: LINK.sub(change, piece) if "`" not in piece else outside(piece))


@cache
def generated() -> tuple[tuple[str, str, str], ...]:
    """Page, the file that its links are relative to, and Markdown."""
    return tuple(_generated())


def _generated() -> Iterator[tuple[str, str, str]]:
    for section in sections():
        title, _, rest = section.text.partition("\n")
        yield section.page, REFERENCE, f"{title}\n\n{MORE.get(section.title, '')}\n{rest}"
    yield ALL_OPTIONS, REFERENCE, command_line()
    yield API, REFERENCE, api()
    yield EXAMPLES, "docs/index.md", examples()
    yield "benchmarks/index.md", "benchmarks/results/index.md", benchmarks()
    for path in [*results(), *OTHERS]:
        text = re.sub(r"\A---\n.*?\n---\n", "", (ROOT / path).read_text(encoding="utf-8"), flags=re.DOTALL)
        yield places()[path], path, text


def examples() -> str:
    """The scripts, each with the first paragraph of its docstring."""
    lines = ["# Examples", "", "Scripts of at most 40 lines, to copy and change. A test runs each of them."]
    lines += ["The notebook `examples/quantization_guide.ipynb` goes through the methods one after the other.", ""]
    for path in sorted((ROOT / SCRIPTS).glob("*.py")):
        text = path.read_text(encoding="utf-8")
        said, _, code = text.removeprefix('"""').partition('"""')
        lines += [f"## {path.name}", "", said.strip(), "", "```python", code.strip(), "```", ""]
    return "\n".join(lines)


def benchmarks() -> str:
    """The list of the results, each with its title and where it was measured."""
    lines = ["# Benchmarks", "", "Measured results. Each page names the machine and the command.", ""]
    for path in results():
        title, _, rest = (ROOT / path).read_text(encoding="utf-8").removeprefix("# ").partition("\n")
        first = re.match(r"\s*((?:[^#|`\n].*\n)+)", rest)
        where = "" if first is None else re.split(r"(?<=[.:])\s", " ".join(first[1].split()))[0].rstrip(".:") + "."
        lines.append(f"- [{title}]({Path(path).name}). {where}")
    return "\n".join([*lines, ""])


def command_line() -> str:
    """All commands with their arguments and options, from the command line itself."""
    import typer.main

    from fewbit.cli.app import app

    lines = [
        "# All options",
        "",
        "What `fewbit COMMAND --help` prints, on one page, to search. Each command has a page that says more. "
        "`quantize` also takes the [options of methods](reference.md#methods), such as `--target`.",
    ]
    command: Any = typer.main.get_command(app)
    for name, child in sorted(command.commands.items()):
        if child.hidden:
            continue
        lines += ["", f"## fewbit {name}", "", " ".join((child.help or "").split()), ""]
        if more := next((s.anchors[0] for s in sections() if f"fewbit-{name}" in s.anchors[0]), None):
            lines += [f"More: [fewbit {name}](reference.md#{more})", ""]
        lines += ["| option | |", "|---|---|"]
        for param in child.params:
            if getattr(param, "hidden", False):
                continue
            names = (
                [param.name.upper()] if param.param_type_name == "argument" else [*param.opts, *param.secondary_opts]
            )
            lines.append(f"| {', '.join(f'`{n}`' for n in names)} | {_help(param)} |")
    return "\n".join([*lines, ""])


def _help(param: Any) -> str:
    """An option's help with its default, as a cell of a table."""
    help = " ".join((param.help or "").split()).replace("|", "\\|").replace("<", "&lt;")
    if param.param_type_name == "argument" or param.default is None or "efault" in help:
        return help
    default = ("on" if param.default else "off") if isinstance(param.default, bool) else param.default
    return f"{help} Default: {default}." if isinstance(default, (str, int, float)) else help


def api() -> str:
    """Public names, verbs first, for mkdocstrings, with the fields of each class and the values of named defaults."""
    import fewbit

    verbs = [name for name in fewbit.__all__ if name[0].islower()]
    errors = [name for name in fewbit.__all__ if name in vars(fewbit) and name[0].isupper()]
    settings = ["Calibration", "Sampling", "Tuning", "Optimization", "Budget", "Plan"]
    results = [name for name in fewbit.__all__ if name not in {*verbs, *errors, *settings}]
    lines = [
        "# Python API",
        "",
        "What arguments and results have in common, with an example: [Python](reference.md#python).",
    ]
    for title, names in {"Verbs": verbs, "Settings": settings, "Results": results, "Errors": errors}.items():
        lines += ["", f"## {title}", ""]
        for name in names:
            lines += [f"::: fewbit.{name}", "", *_details(getattr(fewbit, name))]
    lines += ["", "## Parts of results", "", "Types of fields above. They are not names of `fewbit`.", ""]
    for part in _parts([getattr(fewbit, name) for name in [*settings, *results]]):
        said = " ".join((inspect.getdoc(part) or "").partition("\n\n")[0].split())
        lines += [f"### {part.__name__}", "", said, "", *_details(part)]
    return "\n".join([*lines, ""])


def _details(item: Any) -> list[str]:
    """For a dataclass a table of its fields; for a function the values of the defaults that its signature names."""
    if is_dataclass(item):
        rows = [(f"`{f.name}`", _cell(f.type), _cell(_default(f)), f.metadata.get("help", "")) for f in _fields(item)]
        head = ("field", "type", "default", "meaning")
        used = [i for i in range(4) if any(row[i] for row in rows)]
        table = [head, ("---",) * 4, *rows]
        return [*(f"| {' | '.join(line[i] for i in used)} |" for line in table), ""]
    if not inspect.isfunction(item):
        return []
    item = inspect.unwrap(item)
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(item))).body
    assert isinstance(tree, ast.FunctionDef)
    defaults = [node for node in [*tree.args.defaults, *tree.args.kw_defaults] if isinstance(node, ast.Name)]
    named = {node.id: item.__globals__[node.id] for node in defaults}
    return (
        ["Default values: " + ", ".join(f"`{name}` is `{value}`" for name, value in named.items()) + ".", ""]
        if named
        else []
    )


def _fields(item: Any) -> list[Any]:
    return [field for field in fields(item) if not field.name.startswith("_")]


def _default(field: Any) -> str:
    if field.default is not MISSING:
        return str(field.default) if isinstance(field.default, str) and field.default else repr(field.default)
    return "" if field.default_factory is MISSING else repr(field.default_factory())


def _cell(text: object) -> str:
    escaped = str(text).replace("|", "\\|")
    return f"`{escaped}`" if escaped else ""


def _parts(items: list[Any]) -> list[Any]:
    """The dataclasses that are types of fields of `items`, and of their own fields, in this order."""
    found: list[Any] = []
    queue = list(items)
    while queue:
        item = queue.pop(0)
        for field in _fields(item) if is_dataclass(item) else ():
            for name in re.findall(r"\b[A-Z]\w+", str(field.type)):
                part = _named(sys.modules[item.__module__], name)
                if is_dataclass(part) and part not in [*items, *found]:
                    found.append(part)
                    queue.append(part)
    return found


def _named(module: Any, name: str) -> Any:
    """What a module calls `name`, also if it imports it for its annotations only. None if nothing."""
    if name in vars(module):
        return vars(module)[name]
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.ImportFrom) and node.module and name in [each.name for each in node.names]:
            return getattr(importlib.import_module(node.module), name)
    return None


def chart() -> str:
    """KL divergence against the bits of the quantized weights, of every plan, from the priors that come with fewbit."""
    import json

    import fewbit
    from fewbit.report.charts.axis import Measure
    from fewbit.report.charts.scatter import Point, scatter

    priors = json.loads((ROOT / "src/fewbit/advise/priors.json").read_text(encoding="utf-8"))["plans"]
    bits = {row.plan: row.bits for row in fewbit.estimate("tiny").plans}
    x = Measure("bits per quantized weight", lambda value: f"{value:.3g}")
    y = Measure("KL divergence", lambda value: f"{value:.2g}", log=True)
    points = [Point(plan, bits[plan], found["kl"], *found["interval"]) for plan, found in priors.items()]
    title = "KL divergence against bits per weight, all plans on tiny"
    return scatter(points, x, y, name="plans", title=title, width=860, height=680)


# --- what mkdocs calls ----------------------------------------------------------------------------------------------


def on_config(config: MkDocsConfig) -> None:
    """Fill the parts of the navigation whose pages are found."""
    for entry in config.nav or []:
        if "Reference" in entry:
            pages = [{TITLES.get(section.title, section.title): section.page} for section in sections()]
            commands = [page for page in pages if re.match(r"(Commands|fewbit |A file of|Shell)", next(iter(page)))]
            rest = [page for page in pages if page not in commands]
            commands.insert(1, {"All options": ALL_OPTIONS})
            at = next(i for i, page in enumerate(rest) if TITLES["Python"] in page)
            rest.insert(at + 1, {"Python: all names": API})
            entry["Reference"] = [{"Commands": commands}, *rest]
        if "Benchmarks" in entry:
            entry["Benchmarks"] = ["benchmarks/index.md", *(places()[path] for path in results())]


def main() -> None:
    """Write docs/images/plans.svg, which GitHub shows; the site draws it into the page."""
    from fewbit.report.charts.svg import standalone

    (ROOT / "docs" / "images" / "plans.svg").write_text(standalone(chart()), encoding="utf-8")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace docs/reference.md by its sections, and add what is made from other files."""
    for path in ("reference.md", "images/plans.svg", "images/compare-tiny.svg"):
        if (old := files.get_file_from_path(path)) is not None:
            files.remove(old)
    for page, _, text in generated():
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "charts.css", content=site_charts.style()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of the repository become links of the site."""
    sources = {made: source for made, source, _ in generated()}
    at = page.file.src_uri
    if CHART in markdown:
        markdown = markdown.replace(CHART, site_charts.figure(chart()))
    return relinked(site_charts.with_charts(markdown), sources.get(at, f"docs/{at}"), at)


def on_post_build(config: MkDocsConfig) -> None:
    """Leave out what needs the address of the site if nobody gave it."""
    if not config.site_url:
        for name in ("sitemap.xml", "sitemap.xml.gz", "404.html"):
            (Path(config.site_dir) / name).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
