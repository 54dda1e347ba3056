"""Decoder blocks in the CPU library give what their own code gives, and only recognized ones are replaced."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import fewbit as fb
from fewbit.api import quantize
from fewbit.kernels.cpu.block import HALVES, IN_ORDER, NEIGHBORS, Norm, Wiring
from fewbit.models import blocks
from fewbit.models.decoding import block_parts, caches, compiled_blocks, steps
from fewbit.models.decoding.caches import CACHE
from fewbit.models.decoding.stand_in import PLACE
from fewbit.plans.plan import Plan, Rule, find
from fewbit.system import native
from tests import architectures, gguf_files, models

pytestmark = [
    pytest.mark.skipif(isinstance(native.available(), str), reason="needs the compiled CPU library"),
    pytest.mark.usefixtures("rounded_activations"),
]

RECOGNIZED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3")
OTHERS = (
    *("exaone4", "glm4", "granite", "ernie4_5", "olmo2", "smollm3", "lfm2", "vaultgemma", "hunyuan_v1_dense", "arcee"),
    *("starcoder2", "stablelm", "nemotron", "olmo", "jais2"),  # layer norms
    *("gpt2", "opt", "biogpt", "xglm", "gpt_bigcode"),  # no rotary positions
    *("phi", "cohere", "cohere2", "falcon", "gpt_neox"),  # attention and MLP side by side
    *("persimmon", "granite_swa"),  # q, k and v by heads; sinks
)
FIRST_HALF = ("mixtral", "qwen3_moe", "glm4_moe", "granitemoeshared", "gpt_oss", "phimoe", "cohere2_moe")  # experts
LENGTH = 48


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "not fused")  # Phi-3's q, k and v are one linear
        return fb.load(folder, dtype=dtype, fuse=LENGTH)


def load_unfused(folder: Path) -> Any:
    return fb.load(folder, dtype=torch.float32)


def quantized(root: Path, source: Path, scheme: str = "int4-g32") -> Path:
    quantize.quantize(source, root / "out", plan=find("rtn-4bit").changed(scheme=scheme, format="gptq"), device="cpu")
    return root / "out"


def replaced(model: Any) -> list[str]:
    """The blocks that the library computes, after one step."""
    outputs(model, ids_of(1), (1,))
    return compiled_blocks.computed(model)


def replacements(model: Any) -> list[Any]:
    """The objects that compute these blocks."""
    replaced(model)
    hooks = next(hook.__self__ for hook in model._forward_pre_hooks.values())
    return list(hooks.found.values())


@contextmanager
def own_code(model: Any) -> Iterator[None]:
    """Inside this context, the blocks run their own code."""
    compiled_blocks.remove(model)
    yield
    compiled_blocks.use(model)


@torch.inference_mode()
def outputs(model: Any, ids: Tensor, parts: tuple[int, ...], mask: Tensor | None = None) -> list[Tensor]:
    """The first output of the model, for a text in parts of so many tokens, with a reserved cache."""
    cache, found, start = caches.reserved(model, LENGTH), [], 0
    for size in parts:
        given = {} if mask is None else {"attention_mask": mask[:, : start + size]}
        out = model(input_ids=ids[:, start : start + size], **{CACHE: cache}, use_cache=True, **given)
        found.append(out[0].float())
        start += size
    return found


def apart(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).norm() / y.norm()) for x, y in zip(a, b, strict=True))


def from_own_code(model: Any, parts: tuple[int, ...]) -> float:
    """How far the outputs are from those of the blocks' own code: the middle one of three texts.

    Processors differ in the last bit of a float. Where that rounds an activation the other way, a text is some percent
    apart in a model this small.
    """
    found = list[float]()
    for seed in (1, 2, 3):
        ids = ids_of(1, sum(parts) + 4, seed=seed)
        ours = outputs(model, ids, parts)
        with own_code(model):
            found.append(apart(ours, outputs(model, ids, parts)))
    return sorted(found)[1]


def ids_of(rows: int, tokens: int = 20, seed: int = 1) -> Tensor:
    return torch.randint(3, models.VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", RECOGNIZED)
def test_dense_blocks_are_replaced_and_give_the_same(family: str, tmp_path: Path) -> None:
    model = load(quantized(tmp_path, models.save(tmp_path / "model", family)))
    assert replaced(model) == list(blocks.find_blocks(model))
    assert from_own_code(model, (9, 1, 1, 4, 1)) < 0.01


def test_norms_with_large_weights_are_recognized(tmp_path: Path) -> None:
    """Gemma multiplies by one more than the weight, which the rounding of bfloat16 hides if weights are large."""
    path = models.save(tmp_path / "model", "gemma3") / "model.safetensors"
    tensors = load_file(path)
    large = {name: torch.full_like(t, 15) for name, t in tensors.items() if name.endswith("layernorm.weight")}
    save_file({**tensors, **large}, path, metadata={"format": "pt"})
    model = load(quantized(tmp_path, path.parent), torch.bfloat16)
    assert replaced(model) == list(blocks.find_blocks(model))


@pytest.mark.parametrize("kind", OTHERS)
def test_other_wirings_are_found_too(kind: str, tmp_path: Path) -> None:
    model = load(quantized(tmp_path, architectures.save(tmp_path / "model", kind)))
    assert replaced(model) == list(blocks.find_blocks(model))
    assert from_own_code(model, (9, 1, 1)) < 0.01


@pytest.mark.parametrize("kind", FIRST_HALF)
def test_the_first_half_is_replaced_where_the_second_differs(kind: str, tmp_path: Path) -> None:
    model = load(quantized(tmp_path, architectures.save(tmp_path / "model", kind)))
    assert replaced(model) == list(blocks.find_blocks(model))
    assert any(each.rest is not None for each in replacements(model))
    assert from_own_code(model, (9, 1, 1)) < 0.01


@pytest.mark.parametrize("kind", ["bloom", "gptj", "nanochat", "diffllama"])
def test_other_blocks_keep_their_code(kind: str, tmp_path: Path) -> None:
    assert replaced(load_unfused(quantized(tmp_path, architectures.save(tmp_path / "model", kind)))) == []


def test_positions_beyond_the_original_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ministral 3 scales q from the end of the original context on, which no token before it shows."""
    config = architectures.config("ministral3")
    config.rope_parameters = {**config.rope_parameters, "original_max_position_embeddings": 16}
    monkeypatch.setattr(architectures, "config", lambda kind: config)
    model = load_unfused(quantized(tmp_path, architectures.save(tmp_path / "model", "ministral3")))
    ids = ids_of(1, 30)
    ours = outputs(model, ids, (14, 1, 1, 1, 1, 12))
    assert [each.before for each in replacements(model)] == [16, 16]
    with own_code(model):
        assert apart(ours, outputs(model, ids, (14, 1, 1, 1, 1, 12))) < 1e-3


def test_a_block_that_is_close_is_tested_again(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = compiled_blocks._off, list[float]()

    def once_too_far(*args: Any) -> float:
        calls.append(right(*args))
        return calls[-1] if len(calls) > 4 else max(calls[-1], 1.1)  # the four wirings of the first block

    monkeypatch.setattr(compiled_blocks, "_off", once_too_far)
    model = load_unfused(llama)
    assert replaced(model) == list(blocks.find_blocks(model))
    assert len(calls) > 4


def test_clipped_values_are_not_recognized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = architectures.config("olmo")
    config.clip_qkv = 100.0  # so high that the test of a block does not show it
    monkeypatch.setattr(architectures, "config", lambda kind: config)
    assert replaced(load_unfused(quantized(tmp_path, architectures.save(tmp_path / "model", "olmo")))) == []


@pytest.mark.parametrize(
    ("attention", "dtype", "most"),
    [
        ("sdpa", torch.float32, 0.01),  # a mask of true and false
        ("eager", torch.float32, 0.01),  # a mask of numbers that are added
        ("sdpa", torch.bfloat16, 0.06),
    ],
)
def test_padded_texts_give_the_same(attention: str, dtype: torch.dtype, most: float, llama: Path) -> None:
    ids, mask = ids_of(2), torch.ones(2, 20, dtype=torch.int64)
    mask[1, :4] = 0
    model = load(llama, dtype)
    model.set_attn_implementation(attention)
    ours = outputs(model, ids, (9, 1, 1, 5), mask)
    with own_code(model):
        theirs = outputs(model, ids, (9, 1, 1, 5), mask)
    # The padding itself attends to nothing, and its logits are of no use.
    for row, start in ((0, 0), (1, 4)):
        pairs = [[each[row : row + 1, start if i == 0 else 0 :] for i, each in enumerate(x)] for x in (ours, theirs)]
        assert apart(*pairs) < most


WRONG: dict[str, Callable[[Wiring], Wiring]] = {
    "scale": lambda w: replace(w, scale=w.scale * 1.5),
    "pairs": lambda w: replace(w, pairs=NEIGHBORS),
    "order": lambda w: replace(w, pairs=IN_ORDER),
    "positions": lambda w: replace(w, rotated=0),
    "activation": lambda w: replace(w, activation=1),
    "residual": lambda w: replace(w, residual=0.9),
    "swapped": lambda w: replace(w, qkv=(w.qkv[0],), heads=w.shared, shared=(w.heads + w.shared) // 2),
    "norm": lambda w: replace(w, norms=[Norm(w.norms[0].weight * 1.1, 1e-6), *w.norms[1:]] if w.norms[0] else w.norms),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_wiring_is_not_used(what: str, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = block_parts.wirings

    def wrong(block: Any) -> tuple[list[Wiring], str]:
        return [WRONG[what](next(w for w in right(block)[0] if w.pairs == HALVES))], ""

    model = load_unfused(llama)
    monkeypatch.setattr(compiled_blocks, "wirings", wrong)
    assert replaced(model) == []
    monkeypatch.undo()
    compiled_blocks.use(model)
    assert replaced(model) == list(blocks.find_blocks(model))


def test_a_text_does_not_depend_on_others_or_threads(llama: Path) -> None:
    model = load(llama)
    compiled_blocks.use(model.model)  # without the head, whose weight is not packed
    ids = ids_of(3)
    together = outputs(model.model, ids, (9, 1, 1))[1:]
    cache: Any = caches.reserved(model, LENGTH)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 + before % 2)
        with torch.inference_mode():
            model(input_ids=ids[:, :9], **{CACHE: cache}, use_cache=True)
            for layer in cache.layers:  # the prompt is computed by other code, whose sums depend on the batch
                layer.whole = tuple(each[1:2].contiguous() for each in layer.whole)
            alone = [model.model(ids[1:2, i : i + 1], **{CACHE: cache}, use_cache=True)[0] for i in (9, 10)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a[1:2], b) for a, b in zip(together, alone, strict=True))


def test_instruction_sets_give_the_same_block(llama: Path) -> None:
    model, lib = load(llama), native.library()
    assert not isinstance(lib, str)
    first = outputs(model, ids_of(1), (4, 1))
    assert lib.fewbit_force(b"scalar") == 0
    try:
        assert apart(outputs(model, ids_of(1), (4, 1)), first) < 0.01
    finally:
        lib.fewbit_force(None)


def runs_own_code(model: Any, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a step of the model does not reach the library in the first block."""
    calls: list[Tensor] = []
    own = replacements(model)[0]

    def block(x: Tensor, *args: Any) -> Tensor:
        calls.append(x)
        return x

    monkeypatch.setattr(own, "block", block)
    outputs(model, ids_of(1), (1,))
    monkeypatch.undo()
    return not calls


def test_what_was_changed_runs_its_own_code(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(llama)
    layer = model.model.layers[0]
    assert not runs_own_code(model, monkeypatch)
    handle = layer.mlp.register_forward_hook(lambda *_: None)
    assert runs_own_code(model, monkeypatch)
    handle.remove()
    assert not runs_own_code(model, monkeypatch)
    with torch.no_grad():
        layer.input_layernorm.weight.mul_(2)
    assert runs_own_code(model, monkeypatch)


def test_adapters_run_their_own_code(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(llama)
    assert not runs_own_code(model, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT uses an old name of transformers
        get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj"]))
    assert runs_own_code(model, monkeypatch)


def test_a_window_is_kept(tmp_path: Path) -> None:
    model = load(quantized(tmp_path, models.save(tmp_path / "model", "gemma3")))
    window = model.config.sliding_window
    assert window < 20, "the text must be longer than the window"
    assert from_own_code(model, (20, 1, 1, 1)) < 0.01


def calls_of(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each later call of the first block in the library, with the decoder's own code between blocks."""
    monkeypatch.setattr(steps.Steps, "_takes", lambda *_: False)
    own, calls = replacements(model)[0], list[int]()
    block = own.block

    def counted(x: Tensor, *args: Any) -> Tensor:
        calls.append(x.shape[1])
        y: Tensor = block(x, *args)
        return y

    monkeypatch.setattr(own, "block", counted)
    return calls


def by_transformers(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("by", [load_unfused, by_transformers])
def test_a_model_that_is_not_fused_uses_it_too(
    by: Callable[[Path], Any], llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = by(llama)
    calls = calls_of(model, monkeypatch)
    ids = ids_of(1, 5)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert calls == [5, 1, 1, 1]


def test_a_gguf_file_uses_it_too(tmp_path: Path) -> None:
    quantize.quantize(
        "tiny", tmp_path / "x.gguf", plan=find("rtn-4bit").changed(scheme="q4_k", format="gguf"), device="cpu"
    )
    model = load_unfused(tmp_path / "x.gguf")
    assert replaced(model) == list(blocks.find_blocks(model))


@pytest.mark.parametrize("odd", ["q_proj", "k_proj", "v_proj"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi"])
def test_blocks_are_whole_where_one_of_q_k_v_has_another_scheme(kind: str, odd: str, tmp_path: Path) -> None:
    wanted = Plan("mixed", "gguf", (Rule(f"*.{odd}", "q8_0", "rtn"), Rule("*", "q4_0", "rtn")))
    out = tmp_path / "out.gguf"
    quantize.quantize(gguf_files.save(tmp_path / "original", kind), out, plan=wanted, device="cpu")
    model = load(out)
    assert replaced(model) == list(blocks.find_blocks(model))
    assert from_own_code(model, (9, 1, 1, 4, 1)) < 0.01


@pytest.mark.filterwarnings("ignore:.*past_key_values")
@pytest.mark.parametrize("name", sorted({CACHE, "past_key_values"}))
def test_a_loop_of_ones_own_uses_it_too(name: str, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_unfused(llama)
    calls = calls_of(model, monkeypatch)
    ids = ids_of(1, 8)
    with torch.no_grad():
        first = model(ids[:, :5], use_cache=True)  # the model makes the cache, which the library does not know yet
        model(ids[:, 5:], **{name: getattr(first, CACHE)}, use_cache=True)
    assert calls == [3]


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
def test_beams_give_the_same(options: dict[str, int], llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = load_unfused(llama), ids_of(1, 5)
    calls = calls_of(model, monkeypatch)
    given: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
    given |= {"return_dict_in_generate": True, "output_scores": True, "attention_mask": torch.ones_like(ids)}
    ours = model.generate(ids, **given).sequences_scores
    assert calls
    with own_code(model):
        torch.testing.assert_close(ours, model.generate(ids, **given).sequences_scores, atol=0.01, rtol=0.01)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_finds_its_own_blocks(copied: Callable[[Any], Any], llama: Path) -> None:
    model = load_unfused(llama)
    before = outputs(model, ids_of(1), (4, 1))
    other = copied(model)
    assert compiled_blocks.computed(other) == []
    assert apart(outputs(other, ids_of(1), (4, 1)), before) == 0
    assert {id(each.block) for each in replacements(other)}.isdisjoint(id(each.block) for each in replacements(model))


def test_modules_are_as_before_after_a_call(llama: Path) -> None:
    model = load_unfused(llama)
    names = replaced(model)
    with pytest.raises(IndexError), torch.inference_mode():
        model(torch.tensor([[models.VOCAB + 7]]), **{CACHE: caches.reserved(model, 4)})
    assert names
    assert not any(PLACE in vars(model.get_submodule(name)) for name in names)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_model_can_be_copied_after_ctrl_c(copied: Callable[[Any], Any], llama: Path) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    model = load_unfused(llama)
    before, names = outputs(model, ids_of(1), (4, 1)), replaced(model)
    hook = model.lm_head.register_forward_pre_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        outputs(model, ids_of(1), (4, 1))
    hook.remove()
    other = copied(model)
    assert not any(PLACE in vars(other.get_submodule(name)) for name in names)
    assert apart(outputs(other, ids_of(1), (4, 1)), before) == 0


def test_threads_do_not_disturb_one_another(llama: Path) -> None:
    model = load_unfused(llama)
    replaced(model)
    texts = [ids_of(1)[:, i:] for i in range(6)]
    alone = [outputs(model, ids, (9, *[1] * 5)) for ids in texts]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda ids: outputs(model, ids, (9, *[1] * 5)), texts * 4))
    assert all(apart(a, b) == 0 for a, b in zip(alone * 4, together, strict=True))


def test_training_runs_the_models_own_code(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_unfused(llama)
    calls = calls_of(model, monkeypatch)
    cache: Any = caches.reserved(model, LENGTH)
    model(input_ids=ids_of(1), **{CACHE: cache}, use_cache=True)
    assert not calls
