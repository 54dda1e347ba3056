"""How long a test waits for what must come. It ends a hang: no test fails because a machine is slow or busy."""

from __future__ import annotations

HANG = 1800.0  # seconds
