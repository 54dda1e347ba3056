"""Stacked experts that are trained as one weight."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit.api.end_to_end import files
from fewbit.models.load import load_model
from fewbit.models.loading import Loading
from fewbit.models.source import locate
from fewbit.nn.tuned import TunedLinear
from fewbit.nn.tuned_experts import TunedExperts
from fewbit.pipeline import tuning
from fewbit.plans.plan import Plan, Rule
from tests import architectures

IDS = torch.arange(48, dtype=torch.int64).view(2, 24) % 40


def trained(packed: Path) -> tuple[tuning.Student, torch.Tensor, dict[str, torch.Tensor]]:
    """The student after a step, its logits, and the tensors of the file."""
    source = locate(packed)
    model = load_model(source, Loading("cpu").exact(), for_text=True)
    student = tuning.Student.of(model, files(source, trust_remote_code=False), codes=True)
    optimizer = torch.optim.SGD(student.parameters, lr=30.0)
    logits: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    logits.square().mean().backward()
    optimizer.step()
    return student, logits.detach(), dict(student.changes(files(source, trust_remote_code=False)))


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "llama4_text", "gpt_oss"])
def test_a_step_is_that_of_each_expert_alone(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = architectures.save(tmp_path / "model", kind)
    plan = Plan("plan", "compressed-tensors", (Rule("*", "int3-g16-sym", "rtn"),))
    fewbit.quantize(model, tmp_path / "out", plan=plan, progress=False)
    student, logits, tensors = trained(tmp_path / "out")
    assert any(isinstance(module, TunedExperts) for module in student.model.modules())
    assert student.moved
    nothing: Any = lambda *given: None  # noqa: E731
    monkeypatch.setattr(tuning, "replace_experts", nothing)
    apart, expected, alone = trained(tmp_path / "out")
    assert not any(isinstance(module, TunedExperts) for module in apart.model.modules())
    assert torch.allclose(logits, expected, atol=1e-5)
    assert student.moved == pytest.approx(apart.moved, rel=0.02)
    assert tensors.keys() == alone.keys()
    same = [float((tensors[name] == value).double().mean()) for name, value in alone.items()]
    assert min(same) > 0.97
    assert sum(same) / len(same) > 0.999


@pytest.mark.parametrize(
    ("kind", "scheme", "format"),
    [("jetmoe", "int3-g16-sym", "compressed-tensors"), ("qwen3_moe", "nf4-b64", "bnb")],
)
def test_experts_computed_one_by_one_decode_their_own(kind: str, scheme: str, format: str, tmp_path: Path) -> None:
    """Blocks of nf4 go on over rows of 32 columns: down cannot be trained as one weight there, gate and up could."""
    model = architectures.save(tmp_path / "model", kind)
    fewbit.quantize(model, tmp_path / "out", plan=Plan("plan", format, (Rule("*", scheme, "rtn"),)), progress=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*multiplied one expert at a time")
        student, _, tensors = trained(tmp_path / "out")
    assert tensors
    assert any(isinstance(module, TunedLinear) for module in student.model.modules())
    assert not any(isinstance(module, TunedExperts) for module in student.model.modules())
