"""`tools/outputs_digest.py` on every plan: the same command writes the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import outputs_digest
import pytest

pytestmark = pytest.mark.slow


@pytest.mark.timeout(3600)
def test_every_plan_writes_the_same_bytes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs with caches of their own agree, and no two plans write the same tensors."""
    found = []
    for run in ("first", "second"):
        monkeypatch.setenv("FEWBIT_CACHE", str(tmp_path / run))
        found.append(outputs_digest.digests(outputs_digest.every()))
    first, second = found
    assert first == second
    tensors = [parts["tensors"] for parts in first.values()]
    assert len(set(tensors)) == len(tensors), json.dumps(first, indent=1)
