"""Methods of other packages are replaced once, and stay what they were."""

from __future__ import annotations

import inspect
from typing import Any

from fewbit.models.patching import replace


class Theirs:
    number = 1

    def method(self, word: str, times: int = 1) -> str:
        """What theirs says."""
        return f"{self.number} {word * times}"

    @classmethod
    def of_class(cls, word: str) -> str:
        return f"{cls.__name__} {word}"

    @staticmethod
    def static(word: str) -> str:
        return word

    @property
    def shown(self) -> str:
        return f"shown {self.number}"


def bracketed(theirs: Any, *args: Any, **kwargs: Any) -> str:
    return f"[{theirs(*args, **kwargs)}]"


def starred(theirs: Any, *args: Any, **kwargs: Any) -> str:
    return f"*{theirs(*args, **kwargs)}*"


def own(base: type = Theirs) -> Any:
    """A class of which nothing is replaced yet, with the methods of its base."""
    return type("Own", (base,), {})


def test_each_kind_of_method_stays_of_its_kind() -> None:
    cls = own()
    for name in ("method", "of_class", "static", "shown"):
        replace(cls, name, bracketed)
        assert type(inspect.getattr_static(cls, name)) is type(vars(Theirs)[name])
    assert cls().method("a", times=2) == "[1 aa]"
    assert cls.of_class("a") == cls().of_class("a") == "[Own a]"
    assert own(cls).of_class("a") == "[Own a]"
    assert cls.static("a") == cls().static("a") == "[a]"
    assert cls().shown == "[shown 1]"
    assert Theirs().method("a") == "1 a"


def test_a_second_time_changes_nothing() -> None:
    cls = own()
    for name in ("method", "of_class", "static", "shown"):
        for ours in (bracketed, starred, bracketed, starred):
            replace(cls, name, ours)
    assert cls().method("a") == "*[1 a]*"
    assert (cls.of_class("a"), cls.static("a"), cls().shown) == ("*[Own a]*", "*[a]*", "*[shown 1]*")


def test_signature_and_docstring_stay() -> None:
    cls = own()
    replace(cls, "method", bracketed)
    assert inspect.signature(cls.method) == inspect.signature(Theirs.method)
    assert (cls.method.__name__, cls.method.__doc__) == ("method", Theirs.method.__doc__)
