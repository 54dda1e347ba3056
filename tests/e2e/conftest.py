"""Running the command line in this process, a tab of a browser, a text to calibrate on, and a server."""

from __future__ import annotations

import json
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fewbit.api import quantize
from fewbit.cli import app
from fewbit.plans.plan import find
from tests import models
from tests.browser import Tab, chromium
from tests.served import Served, demo, served


@dataclass(frozen=True)
class Answer:
    """What a command printed and ended with."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Fewbit = Callable[..., Answer]


@pytest.fixture(scope="module")
def rounded_activations() -> Iterator[None]:
    """The library computes whole blocks with rounded activations only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FEWBIT_ACTIVATIONS", raising=False)
        yield


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with chromium(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture
def fewbit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fewbit:
    """`fewbit("inspect", folder)` is what the command line answers to that."""

    def run(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["fewbit", *map(str, arguments)])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # `main` sets another
        monkeypatch.setenv("COLUMNS", "200")
        handlers = {each: signal.getsignal(each) for each in signal.valid_signals()}
        capsys.readouterr()
        try:
            app.main()
            code: Any = 0
        except SystemExit as end:
            code = end.code
        finally:  # those of `main` would turn a signal into the failure of a later test
            for each, handler in handlers.items():
                if signal.getsignal(each) != handler:
                    signal.signal(each, handler)
        printed = capsys.readouterr()
        return Answer(code or 0, printed.out, printed.err)

    return run


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread: None) -> None:
    """All modules of this folder have small models."""


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model to read, or to copy and to break."""
    return models.save(tmp_path_factory.mktemp("sound") / "model", "llama", dtype="float32")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed model that the library for CPUs computes in whole blocks."""
    root = tmp_path_factory.mktemp("llama")
    plan = find("rtn-4bit").changed(scheme="int4-g32", format="gptq")
    quantize.quantize(models.save(root / "model", "llama"), root / "out", plan=plan, device="cpu")
    return root / "out"


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with some thousands of the tiny tokenizer's tokens."""
    path = tmp_path_factory.mktemp("text") / "sentences.txt"
    path.write_text(models.sentences(150), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in four bits, whose answers end only at their maximum of tokens."""
    return demo(tmp_path_factory.mktemp("served") / "tiny-4bit")


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, quantized: Path) -> Iterator[Served]:
    """A server of it, on a port of its own. A file with EXACT = True compares its answers with other computations."""
    with served(quantized, exact=getattr(request.module, "EXACT", False)) as made:
        yield made


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[Any]:
    """OpenAI's own client, connected to the server."""
    with server.client() as made:
        yield made
