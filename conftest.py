"""Which files hold tests: all of src is searched for doctests, except modules that need Triton where it is missing."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

_ROOT = Path(__file__).parent
# Not --doctest-ignore-import-errors: with it, a test file that cannot be imported counts as skipped.
collect_ignore = (
    []
    if find_spec("triton") is not None
    else [str(p) for p in (_ROOT / "src").rglob("*.py") if "import triton\n" in p.read_text(encoding="utf-8")]
)
