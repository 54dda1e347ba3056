"""The code of README and of the site's pages runs, and prints what they show."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import docs_pages
from tests.docs_pages import ROOT, Block, blocks, pages, unlike

# tests/unit/test_docs.py runs these in processes of their own: one has a server, one registers a scheme.
ELSEWHERE = ("docs/howto/serve.md", "docs/toy-scheme.md")
CODE = [page for page in pages() if any(block.language in ("sh", "python", "json") for block in blocks(page))]


@pytest.mark.parametrize("page", CODE, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    if page.relative_to(ROOT).as_posix() in ELSEWHERE:
        pytest.skip("tests/unit/test_docs.py runs it")
    for package in ("peft",):
        if package in page.read_text(encoding="utf-8"):
            pytest.importorskip(package)
    error = docs_pages.checked(page, tmp_path)
    assert not error, error


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_block_is_run_or_says_why_not(page: Path) -> None:
    """A block whose language is none of those that are run, and an indented one, have no command in them."""
    for block in blocks(page):
        if block.language not in ("sh", "python", "json", "text"):
            assert not docs_pages.COMMAND.search(block.text), f"line {block.line}: name its language"
        assert block.how is None or block.language in ("sh", "python"), f"line {block.line}"
    text = docs_pages.BLOCK.sub("", page.read_text(encoding="utf-8"))
    assert "```" not in text
    assert not docs_pages.INDENTED.search(text), "indented code: put it between fences, with its language"


def test_a_page_that_is_wrong_fails(tmp_path: Path) -> None:
    page = ROOT / "docs" / "wrong.md"  # is not written: only its name is needed
    session = docs_pages.Session(tmp_path)
    with pytest.raises(RuntimeError, match="exit code 2"):
        session.run(Block(1, "sh", "fewbit inspect missing\n", None, None))
    with pytest.raises(RuntimeError, match="false"):
        session.run(Block(1, "sh", "false | false\n", None, None))
    with pytest.raises(Exception, match="No such option"):
        docs_pages.parse("fewbit inspect tiny --no-such-option\n")
    assert session.run(Block(1, "python", "print(1)\n", None, None)) == "1\n"
    assert not page.exists()


def test_numbers_may_differ_a_little_and_words_not() -> None:
    printed = "out  1,000 MB\nKL divergence  0.0295 (1 of 2)\nlast line here\n"
    assert unlike("out 1,050 MB\n...\nlast line ...", printed) is None
    assert unlike("KL divergence 0.0300 (1 of 2)", printed) is None
    assert unlike("KL divergence 0.0500 (1 of 2)", printed) is not None
    assert unlike("last line here\nout 1,000 MB", printed) == "out 1,000 MB"  # the order counts
    assert unlike("out 1,000 kB", printed) is not None
