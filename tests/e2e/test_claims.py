"""Two processes do not make one output: the second verb ends with an error before any work."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fewbit
from fewbit.errors import PlanError
from fewbit.models.source import locate
from fewbit.names import ADAPTER, ADAPTER_WEIGHTS
from fewbit.system import publish

VERBS: dict[str, Callable[[Path, Path], Any]] = {
    "quantize": lambda out, other: fewbit.quantize("tiny", out / "model", plan="rtn-4bit"),
    "quantize to a file": lambda out, other: fewbit.quantize("tiny", out / "model.gguf", plan="q4_0"),
    "convert": lambda out, other: fewbit.convert("tiny", out / "model.gguf", to="gguf"),
    "tune": lambda out, other: fewbit.tune("tiny", out / "model", reference=other),
    "merge": lambda out, other: fewbit.merge("tiny", other, out / "model"),
    "finetune": lambda out, other: fewbit.finetune("tiny", out / "model", data="pydoc"),
    "imatrix": lambda out, other: fewbit.imatrix("tiny", out / "model.gguf"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_an_output_that_another_makes_is_refused(verb: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(locate("tiny").folder, other)
    for name in (ADAPTER, ADAPTER_WEIGHTS):  # it is looked at after the output
        (other / name).touch()
    with (
        publish.claimed(tmp_path / "model"),
        publish.claimed(tmp_path / "model.gguf"),
        pytest.raises(PlanError, match=r"another process is making .*\nWait until it has ended, or give another `out`"),
    ):
        VERBS[verb](tmp_path, other)
    assert [each.name for each in tmp_path.iterdir()] == ["other"]


def test_a_claim_ends_with_its_verb(tmp_path: Path) -> None:
    out = tmp_path / "model"
    for _ in range(2):
        with publish.claims():
            publish.check_output(out, overwrite=False)
            publish.check_output(out, overwrite=False)
            with publish.claims():
                publish.check_output(out, overwrite=False)
            with pytest.raises(PlanError, match="another process"), publish.claimed(out):
                pass
        with publish.claimed(out):
            pass
    with pytest.raises(ZeroDivisionError):
        _fail(out)
    with publish.claimed(out):
        pass


def test_an_output_that_another_tries_to_make_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`check_output` makes and removes a folder there, which another process of the same launch may see."""
    out, listed = tmp_path / "model", Path.iterdir
    out.mkdir()

    def removed(path: Path) -> Iterator[Path]:
        out.rmdir()
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", removed)
    publish.check_free(out, overwrite=False)
    assert not out.exists()


def _fail(out: Path) -> None:
    with publish.claims():
        publish.check_output(out, overwrite=False)
        raise ZeroDivisionError
