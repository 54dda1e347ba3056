"""What is measured of a loaded model: its bytes, and how fast it reads and writes."""

from __future__ import annotations

import gc
import mmap
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbit.measure import intervals, memory, quality, speed
from fewbit.measure.comparison import Timing


class Counting(nn.Module):
    """A model of five words that counts what it is asked, and always says the next word."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
        self.tied = self.weight
        self.register_buffer("kept_1", torch.zeros(5, dtype=torch.float16))
        self.register_buffer("kept_2", torch.zeros(1, dtype=torch.float32))
        frequencies = torch.zeros(2)
        self.register_buffer("inv_freq", frequencies, persistent=False)
        self.register_buffer("shared", frequencies)
        self.asked: list[tuple[list[int], int | None]] = []

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        self.asked.append((input_ids[0].tolist(), past_key_values))
        logits = nn.functional.one_hot((input_ids + 1) % 5, 5).float() * 4
        return SimpleNamespace(logits=logits, past_key_values=(past_key_values or 0) + input_ids.shape[1])


def test_bytes_at_rest_count_each_tensor_once() -> None:
    found = memory.at_rest(Counting())
    assert (found.parameters, found.whole) == (6, 6 + 10 + 4 + 8)
    assert found.buffers == {"scales": 14, "inv_freq": 8}


def test_a_peak_can_be_forgotten() -> None:
    size, slack = 64 << 20, 4 << 20  # the kernel counts pages of each thread in batches
    gc.collect()
    before = memory.now()
    with mmap.mmap(-1, size) as block:  # an allocator might give memory that is resident already
        block.write(bytes([1]) * size)
        assert memory.now().peak >= before.resident + size - slack
    memory.forget_peak()
    if memory.now().peak >= before.resident + size - slack:
        pytest.skip("this system counts peaks from the start of a process on")
    assert memory.now().peak >= memory.now().resident - (1 << 20)


class Clock:
    """A clock that a model's calls move on: reading takes 1 s, writing a token as many as `steps` say in turn."""

    def __init__(self, steps: list[float]) -> None:
        self.now, self.steps, self.asked = 0.0, steps, 0

    def __call__(self) -> float:
        return self.now

    def pass_by(self) -> None:
        self.now += self.steps[self.asked % len(self.steps)]
        self.asked += 1


class Timed(Counting):
    """A model whose calls take made-up times."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.clock.pass_by()
        return super().forward(*args, **kwargs)


def timed(monkeypatch: pytest.MonkeyPatch, *steps: float) -> Timed:
    clock = Clock(list(steps))
    monkeypatch.setattr(speed, "clock", clock)
    return Timed(clock)


IDS = torch.tensor([[0, 1, 2]])


def test_prefill_reads_the_prompt_and_decode_writes_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = timed(monkeypatch, 0.125)
    assert speed.prefill(model, IDS) == [3 / 0.125] * speed.FEWEST  # steady: no more than an interval needs
    assert len(model.asked) == 1 + speed.FEWEST
    model.asked.clear()
    assert speed.decode(model, IDS, new_tokens=2) == [8] * speed.FEWEST
    assert model.asked[:5] == [([0, 1, 2], None), ([3], 3), ([0, 1, 2], None), ([3], 3), ([4], 4)]
    assert (len(model.asked) - 2) % 3 == 0


def test_runs_repeat_until_they_are_tight(monkeypatch: pytest.MonkeyPatch) -> None:
    noisy = [0.01, *(0.01 * factor for factor in (1, 4, 1, 2, 1, 3)), *[0.01] * 60]
    rates = speed.prefill(timed(monkeypatch, *noisy), IDS)
    assert speed.FEWEST < len(rates) < speed.MOST
    assert intervals.spread(rates) <= intervals.TIGHT < intervals.spread(rates[:-1])


def test_runs_that_never_agree_end_at_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(speed.prefill(timed(monkeypatch, 0.01, 0.02, 0.04), IDS)) == speed.MOST
    slow = speed.prefill(timed(monkeypatch, 1.0, 2.0), IDS)
    assert len(slow) == speed.FEWEST  # each takes longer than there is time for more
    assert Timing.of(slow).noisy


def test_decode_hands_on_the_cache_by_its_newer_name() -> None:
    class Newer(Counting):
        def forward(self, input_ids: Tensor, cache: Any = None, use_cache: bool = False) -> Any:
            said = super().forward(input_ids, cache, use_cache)
            return SimpleNamespace(logits=said.logits, cache=said.past_key_values)

    model = Newer()
    speed.decode(model, torch.tensor([[0, 1, 2]]), new_tokens=2)
    assert model.asked[2:5] == [([0, 1, 2], None), ([3], 3), ([4], 4)]


def test_recorded_logits_are_as_good_as_the_model_they_are_of() -> None:
    class Noisy(Counting):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            said = super().forward(*args, **kwargs)
            return SimpleNamespace(logits=said.logits + torch.linspace(0, 1, 5))

    windows = torch.arange(64).remainder(5).view(2, 32)
    original = Counting()
    recorded = quality.Recorded(torch.stack([quality.logits_of(original, tokens) for tokens in windows]))
    assert quality.measure(Noisy(), recorded, windows) == quality.measure(Noisy(), original, windows)
    same = quality.measure(original, recorded, windows)
    assert same.kl is not None
    assert same.kl.mean.value == 0


def test_a_gpu_that_was_not_used_yet_has_no_peak_to_forget(monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", forgotten.append)
    for used, expected in ((False, []), (True, [0, 1])):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda used=used: used)
        memory.forget_peak()
        assert forgotten == expected
