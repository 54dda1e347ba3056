"""transformers' continuous batching over packed weights, with activations rounded as on any CPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

import fewbit
from fewbit.errors import KernelError
from fewbit.kernels.cpu.block import Block, Slots
from fewbit.models.decoding import compiled_blocks
from fewbit.nn.layers import QLinear
from fewbit.plans.plan import find
from tests import models

PROMPTS = (
    *("The little", "Once upon a time there was a girl who", "Tom", "What is", "A", "The dog ran to the"),
    "He said that the most important thing in the world is to",
)


def test_a_token_has_its_own_products_in_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are not compared: attention adds in another order in a batch, and another token can be chosen."""
    monkeypatch.delenv("FEWBIT_ACTIVATIONS")
    fewbit.quantize("tiny", tmp_path / "packed", plan=find("w4a16").changed(method="rtn"))
    model = fewbit.load(tmp_path / "packed", dtype=torch.float32, device="cpu")
    compiled_blocks.remove(model)  # they do not call the layers
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


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "tiny"
    fewbit.quantize("tiny", folder, plan=find("w4a16").changed(method="rtn"), device="cpu")
    return folder


def answers(model: Any, prompts: list[list[int]], *, at_once: int = 256) -> list[tuple[list[int], list[float]]]:
    """The tokens of each answer and their log probabilities. at_once: tokens of a step."""
    done = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=16, max_batch_tokens=at_once, return_logprobs=True
        ),
        warmup=False,
    )
    found = {tuple(each.prompt_ids): (each.generated_tokens, each.logprobs) for each in done.values()}
    return [found[tuple(prompt)] for prompt in prompts]


@pytest.mark.skipif(
    importlib.util.find_spec("transformers.generation.continuous_batching.cache_allocators") is None,
    reason="this version of transformers has other pages, so blocks run their own code",
)
def test_blocks_in_the_library_read_pages(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer is the same, whatever the other texts of a step are, and however a prompt is cut.

    Blocks give the same bits; the head, which is not packed, adds in another order.
    """
    monkeypatch.delenv("FEWBIT_ACTIVATIONS")
    model = fewbit.load(packed, dtype=torch.float32, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(packed)
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    sizes, before = list[int](), Block._in_pages

    def noted(self: Block, call: Any, pages: Any) -> None:
        sizes.append(call.tokens)
        before(self, call, pages)

    monkeypatch.setattr(Block, "_in_pages", noted)
    together = answers(model, prompts)
    layers = model.config.num_hidden_layers
    assert sizes == [size for size in (sum(map(len, prompts)), *[len(prompts)] * 11) for _ in range(layers)]
    alone = [answers(model, [prompt])[0] for prompt in prompts]
    cut = answers(model, prompts, at_once=9)
    for (tokens, logprobs), *others in zip(together, alone, cut, strict=True):
        for same_tokens, same_logprobs in others:
            assert same_tokens == tokens
            assert same_logprobs == pytest.approx(logprobs, abs=2e-5)
    compiled_blocks.remove(model)
    for (_, ours), (_, theirs) in zip(together, answers(model, prompts), strict=True):
        assert ours[0] == pytest.approx(theirs[0], abs=0.1)  # later tokens may follow from others


def test_blocks_with_windows_keep_their_code_in_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEWBIT_ACTIVATIONS")
    fewbit.quantize(models.save(tmp_path / "model", "gemma3"), tmp_path / "out", plan="rtn-4bit", device="cpu")
    model = fewbit.load(tmp_path / "out", dtype=torch.float32, device="cpu")
    prompts = [[5, 6, 7, 8], [9, 10, 11]]
    ours = answers(model, prompts)
    compiled_blocks.remove(model)
    assert ours == answers(model, prompts)


@pytest.mark.parametrize("which", ["write", "read", "begin", "count"])
@pytest.mark.parametrize("wrong", [-1, 9])
def test_slots_that_are_not_there_are_refused(which: str, wrong: int) -> None:
    given = {"write": [2], "read": [0, 1, 2], "begin": [0], "count": [3]}
    slots: dict[str, Any] = {name: torch.tensor(values) for name, values in given.items()}
    assert Slots(**slots).last == 2
    slots[which] = torch.tensor([wrong, *given[which][1:]])
    if wrong == 9 and which in ("write", "read"):  # whether a slot exists is known with the cache
        assert Slots(**slots).last == 9
    else:
        with pytest.raises(KernelError, match="not there"):
            Slots(**slots)
