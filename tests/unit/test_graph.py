"""What a recording that fails leaves behind, on a stand-in for PyTorch's CUDA graphs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fewbit.models.decoding.graph import Graph


class Cuda:
    """PyTorch's state: the current GPU and stream, and whether the random generator counts as recording."""

    def __init__(self) -> None:
        self.stream, self.drawing = SimpleNamespace(device="cpu", name="default"), False
        self.current = torch.device("cuda", 0)
        self.replayed_on: list[torch.device] = []

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device
        yield
        self.current = before

    def recording(self) -> Any:
        return SimpleNamespace(replay=lambda: self.replayed_on.append(self.current))

    @contextmanager
    def graph(self, graph: Any, **_: Any) -> Iterator[None]:
        before, self.stream, self.drawing = self.stream, SimpleNamespace(device="cpu", name="side"), True
        yield  # an exception skips the rest, as the end of a recording that failed raises
        self.stream, self.drawing = before, False

    def set_stream(self, stream: Any) -> None:
        self.stream = stream


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    made = Cuda()
    monkeypatch.setattr(torch.cuda, "graph", made.graph)
    monkeypatch.setattr(torch.cuda, "set_stream", made.set_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: made.stream)
    monkeypatch.setattr(torch.cuda, "device", made.device)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device="cpu", name="side"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", made.recording)
    return made


@pytest.mark.parametrize(
    ("error", "reason"),
    [(RuntimeError("operation not permitted"), "operation not permitted"), (AssertionError(), "AssertionError")],
)
def test_a_failed_recording_leaves_pytorch_as_it_was(error: Exception, reason: str, cuda: Cuda) -> None:
    def step() -> str:
        if cuda.drawing:
            raise error
        return "done"

    graph = Graph(step, torch.device("cuda"), first=0)
    with pytest.warns(UserWarning, match=f"cannot be recorded as a CUDA graph: {reason}"):
        assert graph() == "done"
    assert cuda.stream.name == "default"
    assert not cuda.drawing
    assert cuda.current == torch.device("cuda", 0)
    assert gc.isenabled()
    assert graph() == "done"


def test_a_recording_is_replayed_on_its_own_gpu(cuda: Cuda) -> None:
    calls: list[tuple[bool, torch.device]] = []
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    graph = Graph(lambda: calls.append((cuda.drawing, cuda.current)), second, first=1)
    for _ in range(4):
        graph()
    assert calls == [(False, first), (True, second)]
    assert cuda.replayed_on == [second] * 3
    assert cuda.current == first
