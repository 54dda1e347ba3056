"""transformers' continuous batching over packed weights, with activations rounded as on any CPU."""

from __future__ import annotations

from pathlib import Path

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
NEW = 32
# Attention sums in another order where it meets many requests at once, and can choose another of two equally likely
# tokens. With a rule of rounding that depended on the number of rows, logits moved by 0.05.
TIE = 0.005


def test_a_request_is_answered_as_if_it_were_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEWBIT_ACTIVATIONS")
    fewbit.quantize("tiny", tmp_path / "packed", plan=find("w4a16").changed(method="rtn"))
    model = fewbit.load(tmp_path / "packed", dtype=torch.float32, device="cpu")
    used = {layer.kernel.name for layer in model.modules() if isinstance(layer, QLinear) and layer.kernel}
    if used != {"cpu"}:
        pytest.skip(f"the CPU library is not used, but {used}")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "packed")
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    answers = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=0, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=256),
        warmup=False,
    )
    written = [answer.generated_tokens for answer in answers.values()]
    assert len(written) == len(prompts)
    for prompt, tokens in zip(prompts, written, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert len(tokens) > 1
        assert (chosen >= logits.amax(1) - TIE).all(), tokenizer.decode(tokens)
