"""transformers' continuous batching over packed weights, with activations rounded as on any CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

import fewbit
from fewbit.nn.layers import QLinear
from fewbit.plans.plan import find

PROMPTS = (
    *("The little", "Once upon a time there was a girl who", "Tom", "What is", "A", "The dog ran to the"),
    "He said that the most important thing in the world is to",
)


def test_a_token_has_its_own_products_in_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are not compared: attention adds in another order in a batch, and another token can be chosen."""
    monkeypatch.delenv("FEWBIT_ACTIVATIONS")
    fewbit.quantize("tiny", tmp_path / "packed", plan=find("w4a16").changed(method="rtn"))
    model = fewbit.load(tmp_path / "packed", dtype=torch.float32, device="cpu")
    layers = [layer for layer in model.modules() if isinstance(layer, QLinear) and layer.kernel]
    used = {layer.kernel.name for layer in layers if layer.kernel}
    if used != {"cpu"}:
        pytest.skip(f"the CPU library is not used, but {used}")
    counts: set[int] = set()

    def compare(layer: Any, args: tuple[torch.Tensor, ...], together: torch.Tensor) -> None:
        x, y = args[0].flatten(0, -2), together.flatten(0, -2)
        counts.add(len(x))
        for row in (0, len(x) // 2, len(x) - 1):
            assert torch.equal(layer.forward(x[row : row + 1]), y[row : row + 1]), (row, len(x))

    for layer in layers:
        layer.register_forward_hook(compare)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "packed")
    answers = model.generate_batch(
        [tokenizer(text).input_ids for text in PROMPTS],
        generation_config=GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=256),
        warmup=False,
    )
    assert [len(answer.generated_tokens) for answer in answers.values()] == [8] * len(PROMPTS)
    assert len(counts) > 1
    assert min(counts) > 1
