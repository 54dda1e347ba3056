"""All modules of this folder have small tensors."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="module")
def _one_thread(one_thread: None) -> None:
    """PyTorch uses one thread."""
