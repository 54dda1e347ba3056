"""`fewbit run -- transformers serve` answers with packed models, which transformers alone does not load."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import fewbit
from tests.limits import HANG

for package in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(package)
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(os.name == "nt", reason="ends the server by a signal"),
]
PROMPT = "What is a garden?"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("serve") / "packed"
    fewbit.quantize("tiny", place, plan="rtn-4bit")
    return place


@pytest.fixture(scope="module")
def server(packed: Path) -> Iterator[str]:
    """The address of a server that has begun to answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ("transformers", "serve", str(packed), "--port", str(port), "--device", "cpu", "--dtype", "float32")
    process = subprocess.Popen(
        [sys.executable, "-m", "fewbit", "run", "--", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    address, deadline = f"http://localhost:{port}", time.monotonic() + HANG
    try:
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=HANG)
                break
            except urllib.error.URLError:
                assert process.poll() is None, process.stdout and process.stdout.read().decode(errors="replace")
                assert time.monotonic() < deadline
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.communicate(timeout=HANG)


def answered(address: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": "Bearer none"},
    )
    with urllib.request.urlopen(request, timeout=HANG) as response:
        return json.load(response)


def written(packed: Path, messages: Any) -> str:
    """What the model writes in this process."""
    tokenizer: Any = AutoTokenizer.from_pretrained(packed)
    model: Any = AutoModelForCausalLM.from_pretrained(packed, dtype="float32")
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    return str(tokenizer.decode(made, skip_special_tokens=True))


def test_a_packed_model_answers_as_it_does_here(server: str, packed: Path) -> None:
    body = {"model": str(packed), "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 12}
    answer = answered(server, {**body, "temperature": 0, "stream": False})
    (choice,) = answer["choices"]
    assert choice["message"]["content"].strip() == written(packed, body["messages"]).strip()
    assert answer["usage"]["completion_tokens"] == 12
