"""A measurement is of the weights: no kernel rounds activations in it, though one may in generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit.models.load import load_model
from fewbit.models.loading import Loading
from fewbit.models.source import locate
from fewbit.nn.layers import QLinear
from fewbit.system import native
from tests import architectures, models

pytestmark = pytest.mark.skipif(isinstance(native.available(), str), reason="needs the CPU library, which rounds")


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A mixture of experts, of which most get few of the tokens, and its quantized self."""
    monkeypatch.delenv("FEWBIT_ACTIVATIONS")  # which all other tests set
    folder = architectures.save(tmp_path / "original", "qwen3_moe")
    fewbit.quantize(folder, tmp_path / "out", plan="rtn-4bit", device="cpu")
    return folder, tmp_path / "out"


def rounding(model: torch.nn.Module) -> set[bool]:
    return {m.kernel.activations != "exact" for m in model.modules() if isinstance(m, QLinear) and m.kernel is not None}


def test_only_exact_loading_excludes_rounding(folders: tuple[Path, Path]) -> None:
    source = locate(folders[1])
    assert rounding(load_model(source, Loading("cpu"))) == {True}
    assert rounding(load_model(source, Loading("cpu").exact())) == {False}
    assert rounding(load_model(source, Loading("cpu"))) == {True}


def test_few_tokens_of_an_expert_are_not_rounded(folders: tuple[Path, Path]) -> None:
    original, out = folders
    given: dict[str, Any] = {
        "reference": original,
        "text": [models.sentences(60)],
        "length": 16,
        "samples": 4,
        "device": "cpu",
    }
    kl = [fewbit.evaluate(out, **given, kernel=kernel).quality.kl for kernel in (None, "reference")]
    assert kl[0] is not None
    assert kl[1] is not None
    assert kl[0].mean.value == pytest.approx(kl[1].mean.value, rel=1e-4)
