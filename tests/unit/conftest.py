"""Fixtures of several modules: the CPU library with each set of instructions, and what is printed on stderr."""

from __future__ import annotations

import ctypes
import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from fewbit.report import text as report_text
from fewbit.system import native


@pytest.fixture
def library() -> ctypes.CDLL:
    found = native.library()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(params=["scalar", "avx2", "avxvnni", "avx512", "avx512vbmi", "neon", "neondot"])
def instructions(library: ctypes.CDLL, request: pytest.FixtureRequest) -> Iterator[str]:
    if library.fewbit_force(request.param.encode()):
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    library.fewbit_force(None)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is printed on stderr, which is no terminal."""
    buffer = io.StringIO()
    monkeypatch.setattr(report_text, "err", Console(file=buffer, width=160, highlight=False))
    return buffer
