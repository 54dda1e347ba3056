"""`fewbit serve` as a process: it starts, finishes what runs, and says what it needs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import MambaConfig, MambaForCausalLM

from fewbit import serving
from fewbit.errors import PlanError
from tests import models
from tests.e2e.conftest import Fewbit
from tests.limits import HANG

pytest.importorskip("fastapi")


@contextmanager
def started(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of the demo model, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fewbit", "serve", "tiny", "--port", "0", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={**os.environ, **environment},
    )
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if line.startswith("Serving "))
        yield process, line.split("chat at ")[1].split(",")[0]
    finally:
        process.kill()
        process.wait(HANG)
        assert process.stderr is not None
        process.stderr.close()


def asked(address: str, **body: Any) -> Any:
    """The response to a chat, unread."""
    given = json.dumps({"messages": [{"role": "user", "content": "Hello there"}], "temperature": 0} | body)
    headers = {"Content-Type": "application/json", "Authorization": "Bearer hidden"}
    return urllib.request.urlopen(
        urllib.request.Request(f"{address}/v1/chat/completions", given.encode(), headers), timeout=HANG
    )


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
def test_sigterm_finishes_what_runs() -> None:
    with started("--max-num-seqs", "2", FEWBIT_API_KEY="hidden") as (process, address):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}/v1/models")
        refused.value.close()
        assert refused.value.code == 401
        with asked(address, stream=True, max_tokens=40) as stream:
            first = [stream.readline() for _ in range(3)]
            assert all(first[::2])
            process.send_signal(signal.SIGTERM)
            rest = stream.read().decode()
        assert rest.endswith("data: [DONE]\n\n")
        assert '"finish_reason":"length"' in rest
        assert process.wait(HANG) == 0
        with pytest.raises(urllib.error.URLError):
            asked(address)


BROKEN = """
import sys
from fewbit.cli.app import main
from fewbit.models.decoding.continuous import Engine

submit = Engine.submit

def broken(*given, **named):
    raise RuntimeError("the device is gone")

def breaking(self, *given, **named):
    self._manager.model.forward = broken
    return submit(self, *given, **named)

Engine.submit = breaking
sys.argv[1:] = ["serve", "tiny", "--port", "0"]
main()
"""


def test_a_server_that_cannot_compute_ends() -> None:
    """A supervisor starts it again."""
    with subprocess.Popen(
        [sys.executable, "-c", BROKEN], stderr=subprocess.PIPE, text=True, encoding="utf-8"
    ) as process:
        try:
            assert process.stderr is not None
            line = next(line for line in process.stderr if line.startswith("Serving "))
            with pytest.raises(urllib.error.HTTPError) as refused:
                asked(line.split("chat at ")[1].split(",")[0])
            with refused.value:
                assert refused.value.code == 500
                assert "the device is gone" in refused.value.read().decode()
            rest = process.stderr.read()
            assert process.wait(HANG) == 5
        finally:
            process.kill()
    assert "cannot compute any more: the device is gone" in rest
    assert "Start the server again" in rest


def test_a_missing_extra_is_named(fewbit: Fewbit, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("fewbit.serving.")]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(serving, name.rpartition(".")[2], raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    done = fewbit("serve", "tiny")
    assert done.code == 2
    assert "uvicorn" in done.err
    assert "pip install 'fewbit[serve]'" in done.err


def test_an_error_ends_the_engine(fewbit: Fewbit, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> None:
        raise PlanError("no server")

    monkeypatch.setattr("fewbit.serving.run.run", broken)
    before = threading.active_count()
    done = fewbit("serve", "tiny", "--port", "0")
    assert (done.code, "no server" in done.err) == (2, True)
    assert threading.active_count() == before


def test_a_taken_port_is_an_error_before_the_model_is_loaded(fewbit: Fewbit, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = fewbit("serve", "tiny", "--port", taken.getsockname()[1])
    assert done.code == 2
    assert "--port" in done.err
    assert "in use" in done.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--max-num-seqs", "0"), "--max-num-seqs 0"),
        (("--max-body", "much"), "--max-body 'much'"),
        (("--kernel", "nope"), "unknown kernel"),
        (("--max-model-len", "2000000000"), "are free for them"),
        (("--host", "no.such.host.invalid"), "--host no.such.host.invalid"),
    ],
)
def test_bad_flags_are_refused(arguments: tuple[str, ...], words: str, fewbit: Fewbit) -> None:
    done = fewbit("serve", "tiny", "--port", "0", *arguments)
    assert done.code == 2
    assert words in done.err


def test_a_model_that_cannot_be_served_says_why(tmp_path: Path, fewbit: Fewbit) -> None:
    config = MambaConfig(
        vocab_size=models.VOCAB, hidden_size=64, state_size=4, num_hidden_layers=2, dtype="float32", use_mambapy=False
    )
    MambaForCausalLM(config).save_pretrained(tmp_path / "model")
    models.tokenizer().save_pretrained(tmp_path / "model")
    done = fewbit("serve", tmp_path / "model", "--port", "0")
    assert done.code == 2
    assert "cannot be served" in done.err
    assert "fewbit generate" in done.err


def test_who_listens_for_all_is_told(fewbit: Fewbit) -> None:
    done = fewbit("serve", "tiny", "--host", "0.0.0.0", "--port", "0", "--max-model-len", "2000000000")
    assert "everyone who reaches 0.0.0.0" in done.err
