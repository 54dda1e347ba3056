"""A single token of one text skips the decoder's own code between its blocks, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import fewbit as fb
from fewbit.kernels.cpu.block import Chain
from fewbit.models.decoding.caches import CACHE
from fewbit.models.decoding.steps import Steps
from fewbit.system import native
from tests import architectures, models
from tests.e2e.test_compiled_blocks import ids_of, quantized

pytestmark = pytest.mark.skipif(isinstance(native.available(), str), reason="needs the compiled CPU library")

TAKEN = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "smollm3", "olmo2", "granite_swa")
OTHERS = ("gpt2", "qwen3_moe", "bloom")  # learned positions, experts, blocks that are not recognized


@pytest.fixture(autouse=True, scope="module")
def rounded_activations() -> Iterator[None]:
    """The library computes whole blocks with rounded activations only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FEWBIT_ACTIVATIONS", raising=False)
        yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("llama")
    return quantized(root, models.save(root / "model", "llama"))


@pytest.fixture
def chained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets an item for each step that runs all blocks at once."""
    run, steps = Chain.run, list[int]()

    def counted(self: Chain) -> Tensor:
        steps.append(len(self.blocks))
        return run(self)

    monkeypatch.setattr(Chain, "run", counted)
    return steps


def saved(folder: Path, kind: str) -> Path:
    known = kind in models.FAMILIES
    return models.save(folder, kind) if known else architectures.save(folder, kind)


def steps_of(model: Any) -> Steps | None:
    hooks = next(hook.__self__ for hook in model._forward_pre_hooks.values())
    found: Steps | None = hooks.steps
    return found


def logits(model: Any, new: int = 6) -> Tensor:
    """Of greedy tokens after a prompt of 20, [new, words]."""
    options: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True, "eos_token_id": None}
    done = model.generate(
        ids_of(1), attention_mask=torch.ones(1, 20), max_new_tokens=new, do_sample=False, pad_token_id=0, **options
    )
    return torch.cat(done.logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", TAKEN)
def test_a_step_gives_the_same_bits(
    kind: str, dtype: torch.dtype, tmp_path: Path, chained: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fb.load(quantized(tmp_path, saved(tmp_path / "model", kind)), dtype=dtype, device="cpu")
    chained.clear()  # `quantize` tries what it made
    ours = logits(model)
    assert len(chained) == 5  # the first token comes from the prompt
    assert steps_of(model).tested  # type: ignore[union-attr]
    monkeypatch.setattr(Steps, "_takes", lambda *_: False)
    assert torch.equal(ours, logits(model))
    assert len(chained) == 5


@pytest.mark.parametrize("kind", OTHERS)
def test_other_decoders_run_their_own_code(kind: str, tmp_path: Path, chained: list[int]) -> None:
    model = fb.load(quantized(tmp_path, saved(tmp_path / "model", kind)), dtype=torch.float32, device="cpu")
    chained.clear()
    logits(model)
    assert not chained


def test_a_wrong_part_is_noticed(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison sees a decoder that does more than its parts."""
    model = fb.load(llama, dtype=torch.float32, device="cpu")
    plain = type(model.model).forward

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = plain(self, *args, **kwargs)
        out.last_hidden_state = out.last_hidden_state * 2
        return out

    monkeypatch.setattr(type(model.model), "forward", doubled)
    logits(model)
    assert steps_of(model).tested is False  # type: ignore[union-attr]


def stepwise(model: Any, cache: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=ids, **{CACHE: cache}, use_cache=True).logits
    return found


def warm(folder: Path) -> tuple[Any, Any]:
    """A model after some single tokens, and their cache."""
    model = fb.load(folder, dtype=torch.float32, device="cpu")
    cache = DynamicCache(config=model.config)
    stepwise(model, cache, ids_of(1, 8))
    for token in (5, 6, 7):
        stepwise(model, cache, torch.tensor([[token]]))
    return model, cache


@pytest.mark.parametrize("name", ["model", "model.layers.1", "model.layers.0.mlp.down_proj", "model.norm"])
def test_a_hook_in_the_middle_of_a_text_is_called(name: str, llama: Path, chained: list[int]) -> None:
    model, cache = warm(llama)
    assert len(chained) == 3
    called = list[str]()
    handle = model.get_submodule(name).register_forward_hook(lambda *_: called.append(name))
    stepwise(model, cache, torch.tensor([[8]]))
    assert called
    handle.remove()
    stepwise(model, cache, torch.tensor([[9]]))
    assert len(called) == 1


def test_a_part_that_was_replaced_is_used_in_the_next_text(llama: Path) -> None:
    model, _ = warm(llama)
    before = logits(model)
    model.model.norm = copy.deepcopy(model.model.norm)
    model.model.norm.weight = nn.Parameter(model.model.norm.weight * 2, requires_grad=False)
    assert not torch.equal(before, logits(model))
    model.model.embed_tokens = nn.Embedding(*model.model.embed_tokens.weight.shape)
    assert not torch.equal(before, logits(model))


@pytest.mark.parametrize(
    "more",
    [{"attention_mask": torch.tensor([[0] * 4 + [1] * 8])}, {"output_hidden_states": True}],
    ids=["padded", "hidden states"],
)
def test_what_it_does_not_know_runs_the_own_code(more: dict[str, Any], llama: Path, chained: list[int]) -> None:
    model, cache = warm(llama)
    with torch.inference_mode():
        model(input_ids=torch.tensor([[8]]), **{CACHE: cache}, use_cache=True, **more)
    assert len(chained) == 3


def test_a_window_that_is_full_gives_the_same(tmp_path: Path, chained: list[int], monkeypatch: Any) -> None:
    model = fb.load(quantized(tmp_path, models.save(tmp_path / "model", "gemma3")), dtype=torch.float32, device="cpu")
    assert model.config.sliding_window < 20
    chained.clear()
    ours = logits(model, 24)
    assert len(chained) == 23
    monkeypatch.setattr(Steps, "_takes", lambda *_: False)
    assert torch.equal(ours, logits(model, 24))


def test_a_fused_model_takes_steps_too(llama: Path, chained: list[int]) -> None:
    plain, fused = (fb.load(llama, dtype=torch.float32, device="cpu", fuse=each) for each in (None, 48))
    wanted = logits(plain)
    assert torch.equal(wanted.argmax(-1), logits(fused).argmax(-1))
    assert len(chained) == 10
