"""Training steps that a GPU replays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fewbit
from fewbit.api.end_to_end import files
from fewbit.models.decoding.generate import written
from fewbit.models.load import load_model
from fewbit.models.loading import Loading
from fewbit.models.skeleton import load_tokenizer
from fewbit.models.source import locate
from fewbit.pipeline.job import windows
from fewbit.pipeline.optimization import Optimization
from fewbit.pipeline.training_step import TrainingStep
from fewbit.pipeline.tuning import Original, Student, Windows, _sum

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("codes", [False, True])
def test_a_replay_has_the_gradients_of_a_normal_step(codes: bool, tmp_path: Path) -> None:
    fewbit.quantize("tiny", tmp_path / "out", plan="rtn-4bit", progress=False)
    source = locate(tmp_path / "out")
    model = load_model(source, Loading("cuda"), for_text=True)
    original = load_model(locate("tiny"), Loading("cuda"), for_text=True).requires_grad_(False)
    student = Student.of(model, files(source, trust_remote_code=False), codes=codes)
    trained = [*student._of_weights, *(gain.parameter for gain in student.gains.values())]

    def loss(tokens: torch.Tensor, target: torch.Tensor | None) -> torch.Tensor:
        with torch.no_grad():
            logits = original(input_ids=tokens, use_cache=False).logits
        return _sum(model, tokens, logits) / tokens.numel()

    def normal(tokens: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
        value = loss(tokens, None)  # a loss that lives on would keep the stream of its backward pass
        return value.detach(), torch.autograd.grad(value, trained, allow_unused=True)

    step = TrainingStep(loss, trained, torch.device("cuda"))
    student._push()
    for seed in range(4):
        tokens = torch.randint(0, 4096, (4, 64), generator=torch.Generator().manual_seed(seed), dtype=torch.int64)
        for parameter in trained:
            parameter.grad = None
        found = step(tokens, None)
        expected, gradients = normal(tokens.cuda())
        assert torch.allclose(found.float(), expected.float(), rtol=1e-3)
        for parameter, gradient in zip(trained, gradients, strict=True):
            if gradient is None:
                assert parameter.grad is None
            else:
                assert parameter.grad is not None
                assert (parameter.grad - gradient).norm() <= 2e-2 * gradient.norm() + 1e-6
    assert step.graph.recorded is not None


def test_training_by_replays_lowers_the_loss(tmp_path: Path) -> None:
    fewbit.quantize("tiny", tmp_path / "out", plan="rtn-4bit", progress=False)
    source = locate(tmp_path / "out")
    model = load_model(source, Loading("cuda"), for_text=True)
    student = Student.of(model, files(source, trust_remote_code=False), codes=True)
    text = fewbit.Calibration(samples=24, length=128)
    tokens, _ = windows(text, locate("tiny"), load_tokenizer(locate("tiny")))
    original = Original(lambda: load_model(locate("tiny"), Loading("cuda"), for_text=True), tokens, tmp_path)
    wanted = Optimization(steps=60, batch=1024, codes=True)
    done = student.train(original, Windows.of(tokens, "text", 0), wanted, lambda *a: None, None)
    assert done.after < 0.9 * done.before


def test_texts_by_replays_are_as_likely_as_on_a_cpu() -> None:
    tokenizer = load_tokenizer(locate("tiny"))
    on_cpu = load_model(locate("tiny"), Loading("cpu"), for_text=True)
    surprise = []
    for device in ("cpu", "cuda"):
        model = load_model(locate("tiny"), Loading(device), for_text=True)
        texts = written(model, tokenizer, 24, 96, 0)
        assert texts.shape == (24, 96)
        assert not torch.isin(
            texts[:, 1:], torch.tensor(model.generation_config.eos_token_id, dtype=torch.int64, device="cpu")
        ).any()
        with torch.no_grad():
            surprise.append(float(on_cpu(input_ids=texts, labels=texts).loss))
    assert abs(surprise[1] - surprise[0]) < 0.1 * surprise[0]
