"""Where a GPU's memory is too small for a calibration batch it is halved, and what has been done is kept."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fewbit
from fewbit.errors import KernelError
from fewbit.formats.containers.safetensors import read_file
from fewbit.models.skeleton import BlockCall
from fewbit.pipeline import blocks
from fewbit.plans.plan import find
from fewbit.texts.calibration import Calibration
from tests import models

LENGTH, SAMPLES = 64, 12  # all at once, where memory suffices


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(tmp_path_factory.mktemp("short") / "model", "llama", num_hidden_layers=3)


@pytest.fixture
def wanted(text: Path) -> Calibration:
    return Calibration(str(text), samples=SAMPLES, length=LENGTH, seed=1)


def room_for(patch: pytest.MonkeyPatch, windows: int, after: int = 0) -> list[int]:
    """From the call after `after` on, a block has memory for no more windows at once; how many each call had."""
    calls: list[int] = []
    run = BlockCall.run

    def limited(self: BlockCall, block: nn.Module, hidden: Tensor) -> Tensor:
        calls.append(len(hidden))
        if len(calls) > after and len(hidden) > windows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return run(self, block, hidden)

    patch.setattr(BlockCall, "run", limited)
    return calls


def codes(folder: Path) -> dict[str, Tensor]:
    tensors = [read_file(file)[0] for file in folder.glob("*.safetensors")]
    return {name: t for each in tensors for name, t in each.items() if "qweight" in name}


@pytest.mark.parametrize("name", ["gptq-4bit", "awq-4bit"])
def test_the_batch_is_halved_and_it_is_said(
    name: str, model: Path, wanted: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A target runs each block more often.
    plan = find(name).changed(options={"target": "0"}) if name == "gptq-4bit" else find(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fewbit.quantize(model, tmp_path / "plain", plan=plan, calibration=wanted)
    calls = room_for(monkeypatch, 10, after=2)  # it falls short in the second block
    with pytest.warns(UserWarning, match="out of memory with 12 calibration windows in a batch: continuing with 8"):
        fewbit.quantize(model, tmp_path / "halved", plan=plan, calibration=wanted)
    assert calls.count(8) >= 4
    expected, got = codes(tmp_path / "plain"), codes(tmp_path / "halved")
    assert got.keys() == expected.keys()
    for key, codes_of in expected.items():  # sums in another order
        pairs = [t.view(torch.uint8) for t in (got[key].contiguous(), codes_of.contiguous())]
        assert (pairs[0] != pairs[1]).float().mean() < 0.05, key


def test_one_window_that_is_too_much_is_an_error_in_a_sentence(
    model: Path, wanted: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room_for(monkeypatch, 0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(KernelError, match="out of memory: CUDA") as e:
            fewbit.quantize(model, tmp_path / "out", plan=find("gptq-4bit"), calibration=wanted)
    assert [str(one.message).rpartition(" ")[2] for one in said] == ["8", "4", "2", "1"]
    assert "`length`" in e.value.hint
    assert not list(tmp_path.iterdir())


def test_without_calibration_there_is_no_talk_of_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(blocks, "_quantize_block", full)
    with pytest.raises(KernelError, match="out of memory") as e:
        fewbit.quantize(model, tmp_path / "out", plan="rtn-4bit")
    assert e.value.hint == "Give `device=cpu`."
