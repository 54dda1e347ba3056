"""Use one model in one thread at a time, where its state would otherwise be shared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

# Not an attribute of the model: a model with a lock could not be copied or pickled.
_locks: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_making = Lock()


@contextmanager
def exclusive(model: Any) -> Iterator[None]:
    """Inside this context, no other thread is inside it with the same model."""
    with _making:
        lock = _locks.setdefault(model, RLock())
    with lock:
        yield
