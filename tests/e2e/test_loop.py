"""The loop that writes tokens in a static cache writes what transformers' loop writes, with every way to stop.

Here, on a CPU, its steps are run one by one; tests/gpu/test_fuse.py has them recorded as a graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    LlamaForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from fewbit.errors import PlanError
from fewbit.models.decoding import decode, loop
from fewbit.models.decoding import generate as generating
from fewbit.models.decoding.generate import continue_text
from fewbit.models.decoding.graph import Compiled, check_compile
from fewbit.models.decoding.sampling import Sampling
from tests import architectures, models

LENGTH, NEW = 48, 24
OVERRIDDEN = ("phi3",)  # which prepares its inputs itself
PADDED = torch.tensor([[0] * 4 + [1] * 5, [1] * 9, [0] + [1] * 8])


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, models.VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))


class Heard(BaseStreamer):
    """What a streamer was given."""

    def __init__(self) -> None:
        self.values: list[list[Any]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        assert value.device.type == "cpu"
        self.values.append(value.tolist())

    def end(self) -> None:
        self.ended += 1


def pair(family: str, length: int = LENGTH) -> tuple[Any, Any]:
    """A model, and the same with a static cache as on a GPU."""
    plain, looped = (models.build(family, dtype="float32") for _ in range(2))
    decode.within(looped, length)
    looped.generate.__self__.static = True
    return plain, looped


def written(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> list[list[int]]:
    given = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2, "max_new_tokens": NEW, **options}
    given = {key: value for key, value in given.items() if value is not None or key == "eos_token_id"}
    torch.manual_seed(7)
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **given)
    return [[int(token) for token in row] for row in out]


def steps(model: Any) -> int:
    """How many steps our loop has made for the last text."""
    made = model.generate.__self__.loop
    return int(made.step.at) if made is not None and made.step is not None else 0


@pytest.mark.parametrize("family", models.FAMILIES)
def test_greedy_texts_of_one_and_of_three_that_are_padded(family: str, ids: Tensor) -> None:
    plain, looped = pair(family)
    # Twice: the step is used again; then for another batch, whose cache is another.
    for prompt, mask in ((ids[:1], None), (ids[:1].flip(1), None), (ids, PADDED), (ids, None), (ids[:2], PADDED[:2])):
        assert written(looped, prompt, mask) == written(plain, prompt, mask)
        assert steps(looped) == (0 if family in OVERRIDDEN else NEW)


def test_a_cache_as_long_as_the_masks_that_are_made_at_once(ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "ROWS", LENGTH)
    plain, looped = pair("llama")
    assert written(looped, ids) == written(plain, ids)
    assert steps(looped) == NEW


class Traced:
    """A graph as on a GPU, of operators in place of launches: what Python decided in one step holds in all others."""

    made = 0

    def __init__(self, function: Callable[[], Any], device: torch.device, *, first: int) -> None:
        self.function, self.left = function, first
        self.traced: Any = None

    def __call__(self) -> Any:
        if self.left:
            self.left -= 1
            return self.function()
        if self.traced is None:
            Traced.made += 1
            out: list[Any] = []  # tracing runs the step once

            def traced() -> Any:
                out.append(self.function())
                return out[0]

            self.traced = make_fx(traced)()
            return out[0]
        return self.traced()


@pytest.mark.parametrize("family", [family for family in models.FAMILIES if family not in OVERRIDDEN])
def test_nothing_of_a_step_is_decided_in_python(family: str, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "Graph", Traced)
    monkeypatch.setattr(loop, "ROWS", 7)
    plain, looped = pair(family)
    before, end = Traced.made, written(plain, ids, PADDED)[1][15]
    for mask, ends in ((PADDED, None), (PADDED, end), (PADDED.flip(0), [end, 5])):
        assert written(looped, ids, mask, eos_token_id=ends) == written(plain, ids, mask, eos_token_id=ends)
    sampled = written(looped, ids, PADDED, do_sample=True)
    assert sampled == written(plain, ids, PADDED, do_sample=True)
    assert Traced.made == before + 2  # greedy and sampled, each once


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
def test_texts_longer_than_the_masks_that_are_made_at_once(
    family: str, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "ROWS", 5)
    plain, looped = pair(family, 9 + NEW)  # not one token more fits
    for mask in (PADDED, None):
        assert written(looped, ids, mask) == written(plain, ids, mask)
        assert steps(looped) == NEW


def test_rows_end_where_they_end(ids: Tensor) -> None:
    plain, looped = pair("llama")
    free = [row[9:] for row in written(plain, ids, PADDED)]
    early, late = free[1][4], free[0][11]
    every = [row[0] for row in free]
    for ends in (early, [early, late], [late, early, free[2][6]], every, 287, [100000, early]):
        for pad in (2, None):
            expected = written(plain, ids, PADDED, eos_token_id=ends, pad_token_id=pad)
            assert written(looped, ids, PADDED, eos_token_id=ends, pad_token_id=pad) == expected
            assert len(expected[0]) - 9 <= steps(looped) <= min(len(expected[0]) - 9 + loop.AHEAD, NEW)
    lengths = {len(written(looped, ids[i : i + 1], PADDED[i : i + 1], eos_token_id=[early, late])[0]) for i in range(3)}
    assert min(lengths) < 9 + NEW  # else nothing was cut


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_lengths_are_kept_however_they_are_asked_for(ids: Tensor) -> None:
    plain, looped = pair("llama")
    asked: tuple[dict[str, Any], ...] = (
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
        {"max_new_tokens": None, "max_length": 20},
        {"max_new_tokens": None},  # 20 more
        {"max_new_tokens": None, "generation_config": GenerationConfig(max_new_tokens=7, pad_token_id=2)},
        {"num_return_sequences": 2, "do_sample": True},
        {"use_cache": True, "repetition_penalty": 1.0},
    )
    for options in asked:
        expected = written(plain, ids, **options)
        assert written(looped, ids, **options) == expected
        assert steps(looped) == len(expected[0]) - 9


def test_sampled_texts_are_the_same_with_the_same_seed(ids: Tensor) -> None:
    plain, looped = pair("llama")
    texts = set()
    for options in (
        {},
        {"temperature": 0.7},
        {"temperature": 3.0, "top_k": 5},
        {"top_p": 0.8, "top_k": 0},
        {"temperature": 2.0, "min_p": 0.1},
    ):
        got = written(looped, ids, PADDED, do_sample=True, **options)
        assert got == written(plain, ids, PADDED, do_sample=True, **options)
        assert steps(looped) == NEW
        texts.add(str(got))
    assert len(texts) == 5
    end = written(plain, ids[:1], do_sample=True)[0][15]
    got = written(looped, ids[:1], do_sample=True, eos_token_id=end)
    assert got == written(plain, ids[:1], do_sample=True, eos_token_id=end)
    assert len(got[0]) <= 16


class Words:
    """As much of a tokenizer as generating a text needs."""

    pad_token_id = 2

    def decode(self, ids: Tensor, **_: Any) -> str:
        return " ".join(str(int(token)) for token in ids)


@pytest.mark.parametrize(
    ("sampling", "warpers"),
    [
        (Sampling(1.5, top_k=7), [TemperatureLogitsWarper(1.5), TopKLogitsWarper(7)]),
        (Sampling(0.8, top_k=0, top_p=0.6), [TemperatureLogitsWarper(0.8), TopPLogitsWarper(0.6)]),
        (Sampling(1.2, 20, 0.5), [TemperatureLogitsWarper(1.2), TopKLogitsWarper(20), TopPLogitsWarper(0.5)]),
        (Sampling(1.5, top_k=0, top_p=1.0), [TemperatureLogitsWarper(1.5)]),
        (Sampling(1.5, top_p=0.9), [TemperatureLogitsWarper(1.5), TopKLogitsWarper(50), TopPLogitsWarper(0.9)]),
    ],
    ids=["top-k", "top-p", "both", "temperature", "default-top-k"],
)
def test_both_loops_sample_from_the_same_distribution(
    sampling: Sampling, warpers: list[Any], ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that transformers' own logits processors make of the model's logits."""
    drawn: list[Tensor] = []
    draw = torch.multinomial

    def recorded(probabilities: Tensor, **options: Any) -> Tensor:
        drawn.append(probabilities.clone())
        return draw(probabilities, **options)

    monkeypatch.setattr(torch, "multinomial", recorded)
    with torch.inference_mode():
        plain, looped = pair("llama")
        for model in (plain, looped):
            model.lm_head.weight.mul_(8)  # or all tokens would be about equally likely
        logits = plain(ids[:1]).logits[:, -1]
        wanted = LogitsProcessorList(warpers)(ids, logits).softmax(-1)  # type: ignore[arg-type]
    texts = []
    for model in (plain, looped):
        drawn.clear()
        texts.append(continue_text(model, Words(), ids[:1], max_new_tokens=NEW, sampling=sampling).text)
        assert len(drawn) == NEW
        torch.testing.assert_close(drawn[0], wanted)
        assert torch.equal(drawn[0] > 0, wanted > 0)
    assert texts[0] == texts[1]
    assert steps(looped) == NEW


def test_a_streamer_is_given_every_token_once(ids: Tensor) -> None:
    plain, looped = pair("llama")
    free = written(plain, ids[:1])[0]
    for rows, ends, new in ((1, None, NEW), (1, free[14], NEW), (1, free[9], NEW), (1, None, 1), (3, None, 5)):
        heard = [Heard(), Heard()]
        options: dict[str, Any] = {"eos_token_id": ends, "max_new_tokens": new}
        expected, got = (
            written(model, ids[:rows], streamer=one, **options)
            for model, one in zip((plain, looped), heard, strict=True)
        )
        assert got == expected
        assert steps(looped) > 0
        assert heard[1].values == heard[0].values
        assert heard[0].ended == heard[1].ended == 1


def test_what_the_loop_does_not_know_is_left_to_transformers(ids: Tensor) -> None:
    class Never(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
            return torch.zeros(len(input_ids), dtype=torch.bool)

    plain, looped = pair("llama")
    asked: tuple[dict[str, Any], ...] = (
        {"repetition_penalty": 1.5},
        {"bad_words_ids": [[5]]},
        {"min_new_tokens": 4, "eos_token_id": 5},
        {"stopping_criteria": StoppingCriteriaList([Never()])},
        {"max_time": 1000.0},
        {"do_sample": True, "typical_p": 0.5},
        {"num_beams": 2},
        {"synced_gpus": False, "tokenizer": models.tokenizer()},
        {"prefill_chunk_size": 4},
        {"stop_strings": "the", "tokenizer": models.tokenizer()},
    )
    for options in asked:
        assert written(looped, ids, **options) == written(plain, ids, **options), options
        assert steps(looped) == 0, options
    with torch.inference_mode():
        done = looped.generate(ids, max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
    assert len(done.logits) == 3
    assert loop.can_serve(looped, {"synced_gpus": False, "penalty_alpha": None})
    for key in ("synced_gpus", "penalty_alpha", "custom_generate", "dola_layers"):  # which need more than is here
        assert not loop.can_serve(looped, {key: "asked for"})
    looped.register_forward_hook(lambda *_: None)
    assert not loop.can_serve(looped, {})


def test_a_streamer_hears_transformers_loop_too(ids: Tensor) -> None:
    _, looped = pair("llama")
    heard = Heard()
    written(looped, ids[:1], streamer=heard, repetition_penalty=1.5)
    assert len(heard.values) == 1 + NEW
    with pytest.raises(PlanError, match="the model was fused for 48"):
        written(looped, ids, max_new_tokens=40)


@pytest.mark.parametrize("name", loop._OWN)
def test_a_model_with_its_own_way_keeps_it(name: str, ids: Tensor) -> None:
    plain, looped = pair("llama")
    method, calls = getattr(GenerationMixin, name), []

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return method(looped, *args, **kwargs)

    if name == "_sample":  # which `generate` takes from the class
        own_class: Any = type("Own", (LlamaForCausalLM,), {name: lambda self, *args, **kwargs: own(*args, **kwargs)})
        looped.__class__ = own_class
    else:
        setattr(looped, name, own)
    assert written(looped, ids) == written(plain, ids)
    assert calls
    assert steps(looped) == 0


def test_a_model_that_asks_for_cache_positions_gets_them(ids: Tensor) -> None:
    seen = []

    class Asking(LlamaForCausalLM):
        _auto_class = "AutoModelForCausalLM"  # as code from a model's folder has it

        def forward(self, *args: Any, cache_position: Any = None, **kwargs: Any) -> Any:
            seen.append(cache_position.tolist())
            return super().forward(*args, **kwargs)

    Asking.__module__ = "transformers_modules.asking"
    plain, looped = pair("llama")
    looped.__class__ = Asking
    assert looped.is_remote_code()
    assert written(looped, ids, PADDED) == written(plain, ids, PADDED)
    assert steps(looped) == NEW
    assert seen == [list(range(9)), *([at] for at in range(9, 8 + NEW))]


def test_other_masks_start_again_with_transformers_loop(ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, looped = pair("llama")
    monkeypatch.setattr(loop.UpcomingInputs, "tables", lambda self: None)
    for _ in range(2):
        heard = [Heard(), Heard()]
        assert written(looped, ids[:1], streamer=heard[0]) == written(plain, ids[:1], streamer=heard[1])
        assert heard[0].values == heard[1].values
        assert looped.generate.__self__.loop.possible is False


def test_a_model_that_cannot_be_compiled_says_so_and_runs(ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(forward: Any, *, dynamic: bool, options: dict[str, Any]) -> Any:
        assert (dynamic, options) == (False, {"emulate_precision_casts": True})

        def quick(**kwargs: Any) -> Any:
            forward(**kwargs)
            raise RuntimeError("no compiler\nand more")

        return quick

    monkeypatch.setattr(torch, "compile", compile)
    plain, looped = pair("llama")
    looped.generate.__self__.compile = True
    with pytest.warns(UserWarning, match="runs without being compiled: no compiler$"):
        got = written(looped, ids, PADDED)
    assert got == written(plain, ids, PADDED)
    assert isinstance(looped.generate.__self__.loop.forward, Compiled)
    assert written(looped, ids, PADDED) == got  # and without a word the second time


def test_compiling_is_refused_where_there_is_nothing_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for fine in ("cuda", "cuda:1", torch.device("cuda", 0), "auto"):
        check_compile(fine, 48)
    for device, fuse, message in (("cuda", None, "without `fuse`"), ("cpu", 48, "needs"), (None, 48, "needs")):
        with pytest.raises(PlanError, match=message):
            check_compile(device, fuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PlanError, match="needs an NVIDIA GPU"):
        check_compile("cuda", 48)


def test_the_greatest_is_the_first_of_them() -> None:
    logits = torch.randint(0, 3, (50, 640), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(loop.greatest(logits), logits.argmax(-1))
    assert torch.equal(loop.greatest(logits[:, :637]), logits[:, :637].argmax(-1))


# Latent attention, sliding windows and chunks, experts, and a short convolution beside keys and values.
STATIC = ("deepseek_v3", "gpt_oss", "llama4_text", "lfm2", "minimax_m2")
# Layers that keep a state, or for which transformers has no static cache.
GROWING = ("deepseek_v4", "qwen3_next", "mamba2")
# Models that make a cache of their own, and one without any.
OWN = ("minimax", "xlstm", "openai-gpt")


def table_pair(kind: str) -> tuple[Any, Any]:
    """Two equal models of a type of the table, the second within a cache of `LENGTH` tokens."""
    plain = AutoModelForCausalLM.from_config(architectures.config(kind), dtype=torch.float32).eval()
    architectures.draw(plain, len(kind))
    looped = copy.deepcopy(plain)
    decode.within(looped, LENGTH)
    return plain, looped


@pytest.mark.parametrize("kind", STATIC)
def test_the_loop_writes_the_same_for_types_of_the_table(kind: str, ids: Tensor) -> None:
    plain, looped = table_pair(kind)
    decoder = looped.generate.__self__
    assert decode.supports_static_cache(looped, decoder.plain)
    decoder.static = True
    for prompt in (ids[:1], ids):
        assert written(looped, prompt) == written(plain, prompt)
        assert steps(looped) == NEW


@pytest.mark.parametrize("kind", GROWING)
def test_what_has_no_static_cache_keeps_a_growing_one(kind: str, ids: Tensor) -> None:
    plain, looped = table_pair(kind)
    with pytest.warns(UserWarning, match="no CUDA graph: this model's layers keep more than keys and values"):
        assert not decode.supports_static_cache(looped, looped.generate.__self__.plain)
    assert written(looped, ids) == written(plain, ids)


@pytest.mark.parametrize("kind", OWN)
def test_a_model_that_takes_no_cache_writes_as_before(kind: str, ids: Tensor) -> None:
    plain, looped = table_pair(kind)
    assert written(looped, ids) == written(plain, ids)
    texts = generating.written(plain, models.tokenizer(), 3, 12, 0)
    assert texts.shape == (3, 12)
    assert not (texts[:, 1:] == plain.generation_config.eos_token_id).any()
