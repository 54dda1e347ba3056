"""`quantize` with high effort: blocks and then the model are tuned, it resumes, and nothing becomes worse."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.activations import SiLUActivation

import fewbit
from fewbit.api import effort
from fewbit.errors import FormatError, PlanError
from fewbit.formats.containers.gguf import GgufFile
from fewbit.pipeline import block_tuning
from fewbit.pipeline.capture import Inputs, original_of
from fewbit.pipeline.optimization import Optimization
from fewbit.pipeline.original import is_held_out
from fewbit.pipeline.progress import Step
from fewbit.plans.plan import Plan, Rule
from fewbit.system import ranks
from tests import models
from tests.e2e.test_few_experts import save as save_experts

CALIBRATION: dict[str, Any] = {"samples": 24, "length": 32}
CT = "compressed-tensors"
END_TO_END = effort.end_to_end_phase  # the fixture below replaces it


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer steps."""
    wanted = Optimization(steps=30, learning_rate=4e-3, batch=128)
    quick = Optimization(steps=12, learning_rate=4e-3, batch=128)
    longer = Optimization(steps=60, learning_rate=2e-3, batch=256, codes=True)
    phases = {"high": effort.EndToEnd(quick, written=4), "best": effort.EndToEnd(longer, written=4)}
    monkeypatch.setattr(effort, "end_to_end_phase", lambda level, device: phases[level])
    monkeypatch.setattr(block_tuning.BlockTuning, "wanted", wanted)
    monkeypatch.setattr(effort, "BlockTuning", lambda seed: block_tuning.BlockTuning(wanted, seed))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(tmp_path_factory.mktemp("effort") / "model", "llama", intermediate_size=128)


def plan(scheme: str, method: str, format: str) -> Plan:
    return Plan(f"{scheme} by {method}", format, (Rule("*", scheme, method),))


def quantized(model: Path, out: Path, text: Path, wanted: Plan, level: str = "high", **given: Any) -> Any:
    calibration = fewbit.Calibration(text=str(text), **CALIBRATION)
    given = {"progress": False, **given}
    return fewbit.quantize(model, out, plan=wanted, calibration=calibration, effort=level, **given)


def divergence(packed: Path, model: Path, text: Path) -> float:
    kl = fewbit.evaluate(packed, reference=model, text=str(text), length=32, samples=16, progress=False).quality.kl
    assert kl is not None
    return kl.mean.value


CASES = [
    ("int3-g32-sym", "gptq", "gptq"),
    ("int3-g32-sym", "rtn", CT),
    ("int2-g32", "awq+gptq", CT),
    ("nf4-b64", "rtn", "bnb"),
]


@pytest.mark.parametrize(("scheme", "method", "format"), CASES)
def test_a_folder_is_tuned(model: Path, text: Path, tmp_path: Path, scheme: str, method: str, format: str) -> None:
    wanted, seen = plan(scheme, method, format), list[Step]()
    quantized(model, tmp_path / "fast", text, wanted, "fast")
    done = quantized(model, tmp_path / "high", text, wanted, progress=seen.append)
    record = json.loads((tmp_path / "high" / "fewbit.json").read_text(encoding="utf-8"))
    assert [step.gain for step in seen] == [done.tensors[0].gain, done.tensors[-1].gain]
    assert all(0 < each.gain < 1 for each in done.tensors)
    assert all((each.moved is None) == (scheme == "nf4-b64") for each in done.tensors)
    assert [each["gain"] for each in record["tensors"]] == [each.gain for each in done.tensors]
    assert record["effort"] == "high"
    if scheme != "nf4-b64":  # whose few scales may be as good as they get after the blocks
        assert record["tuned"]["after"] < record["tuned"]["before"]
        assert "Tuned by fewbit" in (tmp_path / "high" / "README.md").read_text(encoding="utf-8")
    was, now = (models.tensors_of(tmp_path / name) for name in ("fast", "high"))
    assert {n: (t.shape, t.dtype) for n, t in was.items()} == {n: (t.shape, t.dtype) for n, t in now.items()}
    assert divergence(tmp_path / "high", model, text) < divergence(tmp_path / "fast", model, text)


@pytest.mark.parametrize(("scheme", "method"), [("q3_k", "gptq"), ("q2_k", "imatrix")])
def test_a_gguf_file_is_tuned(text: Path, tmp_path: Path, scheme: str, method: str) -> None:
    shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
    model, given = models.save(tmp_path / "model", "llama", **shape), dict[str, Any]()
    if method == "imatrix":
        given["imatrix"] = tmp_path / "matrix.gguf"
        calibration = fewbit.Calibration(text=str(text), **CALIBRATION)
        fewbit.imatrix(model, given["imatrix"], calibration=calibration, progress=False)
    wanted = plan(scheme, method, "gguf")
    quantized(model, tmp_path / "fast.gguf", text, wanted, "fast", **given)
    done = quantized(model, tmp_path / "high.gguf", text, wanted, **given)
    # In the first block, whose input has no error, GPTQ's codes and scales may be as good as they get.
    own = [each for each in done.tensors if each.module.startswith("model.layers.1")]
    assert all(each.gain > 0 for each in own)
    assert method == "gptq" or all(each.moved > 0 for each in own)  # GPTQ's codes are near the best ones
    assert all(each.gain is each.moved is None for each in done.tensors if not each.module.startswith("model.layers"))
    record = json.loads(GgufFile(tmp_path / "high.gguf").metadata["fewbit.record"])
    assert record["tuned"]["after"] < record["tuned"]["before"]
    assert record["effort"] == "high"
    assert divergence(tmp_path / "high.gguf", model, text) < divergence(tmp_path / "fast.gguf", model, text)


def test_the_best_effort_trains_codes_on_more_text(model: Path, text: Path, tmp_path: Path) -> None:
    wanted = plan("int2-g32-sym", "gptq", "gptq")
    quantized(model, tmp_path / "fast", text, wanted, "fast")
    done = quantized(model, tmp_path / "best", text, wanted, "best")
    record = json.loads((tmp_path / "best" / "fewbit.json").read_text(encoding="utf-8"))
    assert record["effort"] == "best"
    assert record["tuned"]["codes"]
    assert record["tuned"]["moved"] > 0
    assert record["tuned"]["text"]["written"] == 4 * CALIBRATION["samples"]
    assert record["tuned"]["after"] < record["tuned"]["before"]
    assert all(each.gain > 0 for each in done.tensors)
    assert divergence(tmp_path / "best", model, text) < divergence(tmp_path / "fast", model, text)


def test_experts_are_tuned(text: Path, tmp_path: Path) -> None:
    model = save_experts(tmp_path / "model", "qwen3_moe", {})
    done = quantized(model, tmp_path / "high", text, plan("int3-g16-sym", "gptq", CT))
    own = [each for each in done.tensors if ".experts." in each.module]
    assert own
    assert any(each.moved > 0 for each in own)
    assert all(each.gain > 0 for each in done.tensors)


def test_a_block_that_does_not_improve_stays(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scramble(objective: Any, *others: Any) -> None:
        with torch.no_grad():
            for parameter in objective.parameters:
                parameter.add_(0.5)

    monkeypatch.setattr(block_tuning, "descend", scramble)
    monkeypatch.setattr(effort.Finish, "run", lambda *arguments: [])
    wanted = plan("int3-g32-sym", "gptq", "gptq")
    quantized(model, tmp_path / "fast", text, wanted, "fast")
    done = quantized(model, tmp_path / "high", text, wanted)
    assert all(each.gain == 0 and each.moved is None for each in done.tensors)
    assert all("its codes and scales stay" in each.notes[-1] for each in done.tensors)
    was, now = (models.tensors_of(tmp_path / name) for name in ("fast", "high"))
    assert all(torch.equal(tensor, now[name]) for name, tensor in was.items())


def test_the_model_stays_if_it_does_not_improve(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worse = effort.EndToEnd(Optimization(steps=1, learning_rate=10.0, batch=128), written=4)
    monkeypatch.setattr(effort, "end_to_end_phase", lambda level, device: worse)
    wanted = plan("int3-g32-sym", "gptq", "gptq")
    done = quantized(model, tmp_path / "high", text, wanted)
    assert any("it was undone" in note for note in done.notes)
    record = json.loads((tmp_path / "high" / "fewbit.json").read_text(encoding="utf-8"))
    assert "tuned" not in record
    assert any("it was undone" in note for note in record["notes"])
    monkeypatch.setattr(effort.Finish, "run", lambda *arguments: [])
    quantized(model, tmp_path / "blocks", text, wanted)
    was, now = (models.tensors_of(tmp_path / name) for name in ("blocks", "high"))
    assert all(torch.equal(tensor, now[name]) for name, tensor in was.items())


def test_an_interrupted_run_resumes(model: Path, text: Path, tmp_path: Path) -> None:
    wanted = plan("int3-g32-sym", "gptq", "gptq")

    def stop(step: Step) -> None:
        if step.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantized(model, tmp_path / "resumed", text, wanted, progress=stop)
    seen: list[Step] = []
    quantized(model, tmp_path / "resumed", text, wanted, progress=seen.append)
    assert [step.resumed for step in seen] == [True, False]
    quantized(model, tmp_path / "whole", text, wanted)
    was, now = (models.tensors_of(tmp_path / name) for name in ("resumed", "whole"))
    assert all(torch.equal(tensor, now[name]) for name, tensor in was.items())


def test_fast_blocks_are_not_taken_for_tuned_ones(model: Path, text: Path, tmp_path: Path) -> None:
    def stop(step: Step) -> None:
        raise KeyboardInterrupt

    wanted, seen = plan("int3-g32-sym", "gptq", "gptq"), list[Step]()
    with pytest.raises(KeyboardInterrupt):
        quantized(model, tmp_path / "out", text, wanted, "fast", progress=stop)
    quantized(model, tmp_path / "out", text, wanted, progress=seen.append)
    assert not any(step.resumed for step in seen)


def test_a_module_without_gradients_is_named(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("no gradient is known for this")
        return nn.functional.silu(x)

    monkeypatch.setattr(SiLUActivation, "forward", forward)
    done = quantized(model, tmp_path / "out", text, plan("int3-g32-sym", "gptq", "gptq"))
    notes: Sequence[str] = [note for each in done.tensors for note in each.notes]
    assert any("not tuned: no gradient is known for this" in note for note in notes)
    assert any("end to end: no gradient is known for this" in note for note in done.notes)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FormatError("model could not be loaded: 'metadata'"), "model could not be loaded: 'metadata'"),
        (KeyError("metadata"), "KeyError: 'metadata'"),
        (AttributeError("no attribute 'states'"), "AttributeError: no attribute 'states'"),
    ],
)
def test_an_original_that_no_longer_runs_is_named(
    error: Exception, said: str, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*given: Any, **named: Any) -> Any:
        raise error

    monkeypatch.setattr(effort, "load_model", load)
    done = quantized(model, tmp_path / "out", text, plan("int3-g32-sym", "gptq", "gptq"))
    assert f"the model was not tuned end to end: {said}" in done.notes
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("count", [2, 7, 24, 200])
def test_both_phases_hold_out_the_same_windows(count: int) -> None:
    tokens = torch.arange(count * 256).view(count, 256)
    split = effort._split(tokens, {"text": "any", "seed": 3})
    original = original_of(Inputs(tokens), [torch.zeros(1)] * count)
    compared = tokens[:: -(-count // original.total)]
    held = [bool(is_held_out(number, original.total)) for number in range(original.total)]
    assert torch.equal(split.tokens[split.held.start :], compared[torch.tensor(held)])
    assert torch.equal(split.tokens.sort(0).values, tokens)
    assert 1 <= split.held_out <= max(1, count // 7)


@pytest.mark.parametrize(
    ("level", "device", "expected"),
    [
        ("high", "cuda", (1000, 4096, 1e-3, 16)),
        ("best", "cuda", (3000, 4096, 1e-3, 32)),
        ("high", "cpu", (300, 1024, 2e-3, 4)),
        ("best", "cpu", (1000, 1024, 1e-3, 4)),
    ],
)
def test_the_end_to_end_phase_of_each_effort(level: str, device: str, expected: tuple[float, ...]) -> None:
    """As docs/reference.md says: steps, tokens in a step, learning rate, written windows for each of calibration."""
    how = END_TO_END(level, torch.device(device))
    assert (how.wanted.steps, how.wanted.batch, how.wanted.learning_rate, how.written) == expected
    assert how.wanted.codes


def test_wrong_efforts(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = plan("int3-g32-sym", "gptq", "gptq")
    with pytest.raises(PlanError, match="fast, high or best"):
        quantized(model, tmp_path / "out", text, wanted, "better")
    monkeypatch.setattr(ranks, "size", lambda: 2)
    with pytest.raises(PlanError, match="one process"):
        effort.block_tuning("high", 0)
