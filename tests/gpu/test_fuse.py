"""On a GPU a fused model's step is one CUDA graph, and writes the text that it wrote before."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

import fewbit
from fewbit.api import quantize
from fewbit.api.chat import conversation
from fewbit.models.decoding import loop
from fewbit.models.decoding.decode import Decoder
from fewbit.models.decoding.graph import Compiled
from fewbit.models.decoding.loop import Step
from fewbit.models.decoding.sampling import Sampling
from fewbit.models.loading import Loading
from fewbit.plans.plan import find
from tests import models

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
LENGTH = 48
OVERRIDDEN = ("phi3",)  # which prepares its inputs itself, so that transformers' loop writes its texts


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("scheme", ["int4-g32-sym", "int4-g32"])
def test_the_text_is_the_same_token_for_token(family: str, scheme: str, tmp_path: Path) -> None:
    ids = torch.randint(3, models.VOCAB, (2, 9), generator=torch.Generator().manual_seed(1)).cuda()
    quantize.quantize(
        models.save(tmp_path / "original", family), tmp_path / "out", plan=find("rtn-4bit").changed(scheme=scheme)
    )
    plain = fewbit.load(tmp_path / "out", dtype=torch.float32, device="cuda")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "not fused")
        fused = fewbit.load(tmp_path / "out", dtype=torch.float32, device="cuda", fuse=LENGTH)
    decoder: Decoder = fused.generate.__self__
    for prompt in (ids, ids.flip(1), ids[:1]):
        assert models.greedy(fused, prompt) == models.greedy(plain, prompt)
        if decoder.static and family not in OVERRIDDEN:
            assert step_of(decoder).greedy.recorded is not None  # not given up
        elif decoder.static:
            assert decoder.graph is not None
            assert decoder.graph.graph is not None
            assert decoder.graph.graph.recorded is not None
    assert decoder.static is not False or "opt" in family  # whose code takes no mask but its own in some versions


class Heard(BaseStreamer):
    """What a streamer was given."""

    def __init__(self) -> None:
        self.values: list[list[Any]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.values.append(value.tolist())

    def end(self) -> None:
        self.ended = True


def step_of(decoder: Decoder) -> Step:
    assert decoder.loop is not None
    assert decoder.loop.step is not None
    return decoder.loop.step


def pair(root: Path, **options: Any) -> tuple[Any, Any]:
    """A model in float32, and the same fused."""
    plan = find("rtn-4bit").changed(scheme="int4-g32")
    quantize.quantize(models.save(root / "original", "llama"), root / "out", plan=plan)
    plain = fewbit.load(root / "out", dtype=torch.float32, device="cuda")
    return plain, fewbit.load(root / "out", dtype=torch.float32, device="cuda", **options)


def prompts() -> tuple[Tensor, Tensor]:
    """Three, of which two are padded on the left; and their mask."""
    ids = torch.randint(3, models.VOCAB, (3, 9), generator=torch.Generator().manual_seed(1)).cuda()
    return ids, torch.tensor([[0] * 4 + [1] * 5, [1] * 9, [0] + [1] * 8], device="cuda")


def test_rows_end_and_are_streamed_from_the_graph(tmp_path: Path) -> None:
    plain, fused = pair(tmp_path, fuse=LENGTH)
    ids, mask = prompts()
    given: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False, "pad_token_id": 2}
    free = plain.generate(ids, **given, eos_token_id=None)[:, 9:].tolist()
    # The first text records the graph, the others replay it with other ends.
    for ends in (None, free[1][4], [free[1][4], free[0][11]], [free[2][6], free[0][11]], [row[0] for row in free]):
        expected = plain.generate(ids, **given, eos_token_id=ends)
        assert fused.generate(ids, **given, eos_token_id=ends).tolist() == expected.tolist()
    assert step_of(fused.generate.__self__).greedy.recorded is not None
    one = {**given, "attention_mask": mask[1:2]}
    for ends in (None, free[1][4], free[1][4]):
        heard = Heard(), Heard()
        for model, streamer in zip((plain, fused), heard, strict=True):
            model.generate(ids[1:2], **one, eos_token_id=ends, streamer=streamer)
        assert heard[0].values == heard[1].values
        assert heard[1].ended


def test_masks_are_made_again_while_the_graph_is_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "ROWS", 5)
    plain, fused = pair(tmp_path, fuse=33)  # not one token more fits
    ids, mask = prompts()
    given: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    for _ in range(2):
        expected = plain.generate(ids, attention_mask=mask, **given)
        assert fused.generate(ids, attention_mask=mask, **given).tolist() == expected.tolist()


def test_sampled_texts_are_the_same_with_the_same_seed(tmp_path: Path) -> None:
    plain, fused = pair(tmp_path, fuse=LENGTH)
    ids, mask = prompts()
    for options in ({"temperature": 0.7}, {"temperature": 3.0, "top_k": 5}, {"top_p": 0.8, "top_k": 0}):
        texts = []
        for model in (plain, fused):
            torch.manual_seed(7)
            given = {"max_new_tokens": 24, "do_sample": True, "eos_token_id": None, **options}
            texts.append(model.generate(ids, attention_mask=mask, **given).tolist())
        assert texts[0] == texts[1]
    step = step_of(fused.generate.__self__)
    assert step.logits.recorded is not None
    assert step.greedy.recorded is None


@pytest.mark.filterwarnings("default")  # the compiler recommends TensorFloat32
def test_a_compiled_step_writes_the_same_text(tmp_path: Path) -> None:
    plain, fused = pair(tmp_path, fuse=LENGTH, compile=True)
    ids, mask = prompts()
    given: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    for _ in range(2):
        expected = plain.generate(ids, attention_mask=mask, **given)
        assert fused.generate(ids, attention_mask=mask, **given).tolist() == expected.tolist()
    step = step_of(fused.generate.__self__)
    assert step.greedy.recorded is not None
    assert isinstance(step.forward, Compiled)
    assert step.forward.quick not in (None, step.forward.forward)  # compiled, not given up


@pytest.mark.filterwarnings("default")  # the compiler recommends TensorFloat32
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_compile_leaves_a_step_that_our_operations_serve(family: str, tmp_path: Path) -> None:
    """In bfloat16, Llama's blocks have no other operations, and it generates as without the option; Phi-3's have."""
    quantize.quantize(models.save(tmp_path / "original", family), tmp_path / "out", plan=find("rtn-4bit"))
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda", "fuse": LENGTH}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model: Any = fewbit.load(tmp_path / "out", compile=True, **options)
    said = [str(each.message) for each in told if "not compiled: fewbit's own operations" in str(each.message)]
    ours = [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert model.generate.__self__.compile == (family == "phi3")
    if family == "phi3":
        assert not said
        assert not ours  # the compiler gets the model's own code
        return
    assert len(said) == 1
    ids, _ = prompts()
    plain: Any = fewbit.load(tmp_path / "out", **options)
    assert ours == [name for name, module in plain.named_modules() if "forward" in vars(module)]
    assert models.greedy(model, ids) == models.greedy(plain, ids)
    assert not isinstance(step_of(model.generate.__self__).forward, Compiled)


def test_a_step_that_waits_for_the_gpu_is_said_and_run(tmp_path: Path) -> None:
    ids = torch.randint(3, models.VOCAB, (1, 9), generator=torch.Generator().manual_seed(1)).cuda()
    quantize.quantize(models.save(tmp_path / "original", "llama"), tmp_path / "out", plan=find("int8"))
    plain = fewbit.load(tmp_path / "out", dtype=torch.float16, device="cuda", kernel="llm_int8")
    expected = models.greedy(plain, ids)
    fused = fewbit.load(tmp_path / "out", dtype=torch.float16, device="cuda", kernel="llm_int8", fuse=LENGTH)
    with pytest.warns(UserWarning, match="cannot be recorded as a CUDA graph"):
        got = models.greedy(fused, ids)
    assert got == expected
    assert models.greedy(fused, ids) == expected  # and without a word the second time
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.randn(2, device="cuda").isfinite().all()  # the random generator does not count as recording


def test_a_conversation_replays_the_graph_on_what_it_kept(tmp_path: Path) -> None:
    """In float32, fused by itself. The second turn reads only what is new, and the third needs a larger cache."""
    quantize.quantize("tiny", tmp_path / "out", plan=find("rtn-4bit"))
    loading = Loading("cuda", "float32")
    plain, fused = (conversation(tmp_path / "out", replace(loading, fuse=fuse)) for fuse in (False, None))
    decoder = fused.model.generate.__self__
    decoder.room = 64
    for message in ("Hello there", "And then?", "Tell me more about it."):
        given: dict[str, Any] = {"max_new_tokens": 16, "sampling": Sampling(), "tell": lambda text: None}
        assert fused.answer(message, **given).text == plain.answer(message, **given).text
        assert step_of(decoder).greedy.recorded is not None
        assert fused.prompt == plain.prompt or decoder.room == 128
    assert decoder.room == 128
