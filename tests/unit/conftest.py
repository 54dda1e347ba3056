"""Fixtures of several modules: the CPU library, with each set of instructions that this machine has."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest

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
