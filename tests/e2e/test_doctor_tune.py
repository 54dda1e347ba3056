"""`fewbit doctor --tune` without a GPU, and with stand-ins for a GPU and its clock."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fewbit.advise import doctor
from fewbit.cli import inspect
from fewbit.errors import PlanError
from fewbit.kernels.nvidia import Nvidia, in_cuda, ops, sizes, tuning
from fewbit.kernels.nvidia.in_cuda import Sizes
from tests.e2e.conftest import Fewbit

OTHER = Sizes(8, 1, 24, 1, 1, 2)


def time(scheme: str, n: int, m: int, of: Sizes | None) -> float:
    """Everything takes as long, but one choice for up to 512 rows."""
    return 50.0 if m == 512 and of == OTHER else 100.0


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that can be tuned, and one that is too old."""
    tune = tuning.tune
    names = {0: "NVIDIA Test", 1: "NVIDIA Old"}

    def timed(device: torch.device, tell: Callable[[int, int], None]) -> tuning.Measured:
        return tune(device, tell, time)

    def card(device: torch.device) -> sizes.Card:
        return sizes.Card(names[device.index], "9.0", 13000, "2.11.0", "0")

    monkeypatch.setattr(inspect, "without_gpu", lambda: False)
    monkeypatch.setattr(Nvidia, "unavailable", lambda self: None)
    monkeypatch.setattr(doctor, "_cards", lambda: {name: torch.device("cuda", i) for i, name in names.items()})
    monkeypatch.setattr(tuning, "why_not", lambda device: "it is too old" if device.index else None)
    monkeypatch.setattr(tuning, "tune", timed)
    monkeypatch.setattr(sizes, "card", card)
    for name, value in (("hopper", True), ("unusable", None), ("_multiprocessors", 132), ("_shared_room", 227 << 10)):
        monkeypatch.setattr(in_cuda, name, lambda device, value=value: value)
    sizes.tuned.cache_clear()
    ops.choose_again()


def test_without_a_gpu_it_is_an_error(fewbit: Fewbit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "without_gpu", lambda: True)
    answer = fewbit("doctor", "--tune")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == "error: --tune needs an NVIDIA GPU\n  Leave out --tune.\n"
    answer = fewbit("doctor", "tiny", "--tune")
    assert answer.code == 2
    assert "--tune measures GPUs, and takes no MODEL" in answer.err
    # Where only PyTorch can tell.
    monkeypatch.setattr(inspect, "without_gpu", lambda: False)
    monkeypatch.setattr(Nvidia, "unavailable", lambda self: "PyTorch finds no NVIDIA GPU with a working driver")
    answer = fewbit("doctor", "--tune")
    assert (answer.code, answer.out) == (2, "")
    assert "--tune needs an NVIDIA GPU: PyTorch finds no NVIDIA GPU" in answer.err
    with pytest.raises(PlanError):
        doctor.tune(lambda done, total: None)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.filterwarnings("default")  # a note says what is left out
def test_it_shows_the_times_before_and_after(fewbit: Fewbit) -> None:
    shown = fewbit("doctor", "--tune")
    assert shown.code == 0
    assert "note: NVIDIA Old is not tuned: it is too old\n" in shown.err
    assert "4 of 44 ranges of rows now use other sizes" in shown.out
    lines = [line.split() for line in shown.out.splitlines() if line.startswith("int4-g128")]
    shapes = [[str(n), "x", str(tuning.K)] for n in tuning.N]
    assert lines == [["int4-g128", *shape, "512", "100.0", "50.0"] for shape in shapes]  # others did not change
    (card,) = fewbit("doctor", "--tune", "--json").json["cards"]
    assert (card["card"], card["changed"], card["rows"]) == ("NVIDIA Test", 4, list(tuning.ROWS))
    assert card["path"] in "".join(shown.out.split())
    assert fewbit("doctor", "--json").json["tuned"].keys() == {"NVIDIA Test"}
    assert "tuned on 20" in fewbit("doctor").out
    (kept,) = (each for each in fewbit("cache", "--json").json["entries"] if each["kind"] == "kernels")
    assert kept["holds"] == "the fastest sizes of GPU kernels on this card"


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.filterwarnings("default")  # a note says what is left out
def test_a_machine_with_old_cards_alone_is_an_error(fewbit: Fewbit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "why_not", lambda device: "it is too old")
    answer = fewbit("doctor", "--tune")
    assert (answer.code, answer.out) == (5, "")
    assert "no GPU of this machine can be tuned" in answer.err
