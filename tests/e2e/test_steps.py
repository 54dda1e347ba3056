"""A single token of one text skips the decoder's own code between its blocks, and nothing else changes."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache

import fewbit as fb
from fewbit.errors import KernelError
from fewbit.kernels.cpu.block import Chain
from fewbit.models.decoding.caches import CACHE, reserved
from fewbit.models.decoding.stand_in import PLACE
from fewbit.models.decoding.steps import Steps
from fewbit.system import native
from tests import architectures, models
from tests.e2e.test_compiled_blocks import ids_of, quantized

pytestmark = [
    pytest.mark.skipif(isinstance(native.available(), str), reason="needs the compiled CPU library"),
    pytest.mark.usefixtures("rounded_activations"),
]

TAKEN = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "smollm3", "olmo2", "granite_swa")
OTHERS = ("gpt2", "qwen3_moe", "bloom")  # learned positions, experts, blocks that are not recognized


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
    assert set(steps_of(model).equal.values()) == {True}  # type: ignore[union-attr]
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
    assert set(steps_of(model).equal.values()) == {False}  # type: ignore[union-attr]


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


@pytest.mark.parametrize(
    "name", ["model", "model.layers.1", "model.layers.0.mlp.down_proj", "model.norm", "model.rotary_emb"]
)
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


def doubled(module: nn.Module) -> nn.Module:
    made = copy.deepcopy(module)
    for name, weight in made.named_parameters(recurse=False):
        made.register_parameter(name, nn.Parameter(weight.clone() * 2, requires_grad=False))
    return made


class Steered(nn.Module):
    """A block whose output is moved, as libraries for control vectors make them."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.attention_type = block, getattr(block, "attention_type", None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.block(*args, **kwargs) + 1


def replace_norm(model: Any) -> None:
    model.model.norm = doubled(model.model.norm)


def replace_embedding(model: Any) -> None:
    model.model.embed_tokens = doubled(model.model.embed_tokens)


def wrap_a_block(model: Any) -> None:
    model.model.layers[1] = Steered(model.model.layers[1])


def swap_blocks(model: Any) -> None:
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


def replace_a_norm_of_a_block(model: Any) -> None:
    block = model.model.layers[0]
    block.input_layernorm = doubled(block.input_layernorm)


def attach_an_adapter(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT uses an old name of transformers
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False))
    adapted.eval()


CHANGES = (
    replace_norm,
    replace_embedding,
    wrap_a_block,
    swap_blocks,
    replace_a_norm_of_a_block,
    attach_an_adapter,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_within_a_text_counts_at_once(
    change: Callable[[Any], None], llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for takes in (Steps._takes, lambda *_: False):
        monkeypatch.setattr(Steps, "_takes", takes)
        model, cache = warm(llama)
        torch.manual_seed(0)  # of the adapter
        unchanged = stepwise(model, cache, torch.tensor([[8]]))
        cache.crop(-1)
        change(model)
        found.append(stepwise(model, cache, torch.tensor([[8]])))
        assert not torch.equal(unchanged, found[-1])
    assert torch.equal(*found)


def test_hidden_states_in_the_middle_of_a_text(llama: Path) -> None:
    model, cache = warm(llama)
    model.config.output_hidden_states = True
    with torch.inference_mode():
        out = model(input_ids=torch.tensor([[8]]), **{CACHE: cache}, use_cache=True)
    assert len(out.hidden_states) == 3


@pytest.mark.parametrize(
    "more",
    [
        {"attention_mask": torch.tensor([[0] * 4 + [1] * 8])},
        {"attention_mask": torch.ones(1, 11)},
        {"output_hidden_states": True},
    ],
    ids=["padded", "short mask", "hidden states"],
)
def test_what_it_does_not_know_runs_the_own_code(more: dict[str, Any], llama: Path, chained: list[int]) -> None:
    model, cache = warm(llama)
    with torch.inference_mode():
        model(input_ids=torch.tensor([[8]]), **{CACHE: cache}, use_cache=True, **more)
    assert len(chained) == 3


WINDOWED = ("mistral", "gemma2", "gemma3", "granite_swa", "cohere2", "starcoder2", "ministral", "exaone4")


@pytest.mark.parametrize("kind", WINDOWED)
def test_a_window_that_is_full_gives_the_same(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = quantized(tmp_path, saved(tmp_path / "model", kind))
    model = fb.load(folder, dtype=torch.float32, device="cpu")
    window = model.config.sliding_window
    assert window < 20
    caches: list[Callable[[], Any]] = [lambda: DynamicCache(config=model.config), DynamicCache]
    caches.append(lambda: reserved(model, 60))
    takes = Steps._takes
    for make in caches:
        found = []
        for own in (takes, lambda *_: False):
            monkeypatch.setattr(Steps, "_takes", own)
            cache, ids = make(), ids_of(1, window + 20)
            out = [stepwise(model, cache, ids[:, :8])[:, -1:]]
            out += [stepwise(model, cache, ids[:, i : i + 1]) for i in range(8, window + 20)]
            found.append(torch.cat(out, dim=1))
        assert torch.equal(*found)


@pytest.mark.parametrize("wrong", [torch.ones(1, 1, 1), torch.ones(1, 1, 64, dtype=torch.bfloat16)])
def test_embeddings_of_another_kind_are_not_taken(wrong: Tensor, llama: Path, chained: list[int]) -> None:
    model, cache = warm(llama)
    with torch.inference_mode(), contextlib.suppress(RuntimeError, KernelError):
        model(inputs_embeds=wrong, **{CACHE: cache}, use_cache=True)
    assert len(chained) == 3


def test_an_error_leaves_later_steps_as_they_were(llama: Path, chained: list[int]) -> None:
    model, cache = warm(llama)
    with pytest.raises(IndexError):
        stepwise(model, cache, torch.tensor([[10**6]]))
    before = len(chained)
    stepwise(model, cache, torch.tensor([[8]]))
    assert len(chained) == before + 1


def test_ctrl_c_leaves_the_modules_as_they_were(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = warm(llama)

    def interrupted(self: Any, *_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Steps, "_hidden", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stepwise(model, cache, torch.tensor([[8]]))
    stepwise(model, cache, torch.tensor([[8]]))
    assert not [name for name, part in model.named_modules() if PLACE in vars(part)]


def test_a_fused_model_takes_steps_too(llama: Path, chained: list[int]) -> None:
    plain, fused = (fb.load(llama, dtype=torch.float32, device="cpu", fuse=each) for each in (None, 48))
    wanted = logits(plain)
    assert torch.equal(wanted.argmax(-1), logits(fused).argmax(-1))
    assert len(chained) == 10
