"""Models that are loaded and run in several threads at once give what they give one after another."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.quantizers import auto

import fewbit as fb
from fewbit.api import quantize
from fewbit.models.building import empty_parameters
from fewbit.models.decoding.generate import continue_text
from fewbit.models.decoding.sampling import Sampling
from fewbit.models.plugin.quantizer import FewbitQuantizer, serving
from fewbit.nn.fused import packed_linears
from fewbit.plans.plan import find
from tests import models

ROUNDS, LENGTH = 12, 24
PROMPTS = tuple(
    torch.randint(3, models.VOCAB, (1, 5 + i), generator=torch.Generator().manual_seed(i)) for i in range(2)
)


@pytest.fixture(autouse=True)
def switching() -> Iterator[None]:
    """Threads take turns as often as Python can, so that a race shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two packed models of other families and formats, and one that is not packed."""
    root = tmp_path_factory.mktemp("threads")
    made = {"plain": models.save(root / "plain", "qwen2", dtype="float32")}
    for family, format in (("llama", "awq"), ("qwen3", "gptq")):
        folder = models.save(root / f"{family}-original", family)
        made[family] = root / family
        quantize.quantize(folder, made[family], plan=find("rtn-4bit").changed(scheme="int4-g32", format=format))
    return made


def loaded(folders: dict[str, Path], name: str) -> Any:
    kind = name.removeprefix("fused ")
    if kind == "plain":
        return models.original(folders[kind])
    return fb.load(folders[kind], dtype="float32", device="cpu", fuse=LENGTH if kind != name else None)


def text(model: Any, ids: torch.Tensor) -> list[int]:
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None)
    return [int(token) for token in out[0]]


def together(works: Sequence[Callable[[], Any]], rounds: int = ROUNDS) -> list[list[Any]]:
    """The results of each work, done `rounds` times in a thread of its own."""
    with ThreadPoolExecutor(len(works)) as threads:
        running = [threads.submit(lambda each: [each() for _ in range(rounds)], work) for work in works]
        return [one.result() for one in running]


@pytest.mark.parametrize(
    "names",
    [
        ("fused llama", "plain"),
        ("fused llama", "fused qwen3"),
        ("llama", "qwen3"),
        ("fused llama", "fused llama"),  # the same model
    ],
    ids=" and ".join,
)
def test_the_texts_are_those_of_one_thread(names: tuple[str, str], folders: dict[str, Path]) -> None:
    by_name = {name: loaded(folders, name) for name in names}
    works = [partial(text, by_name[name], ids) for name, ids in zip(names, PROMPTS, strict=True)]
    expected = [work() for work in works]
    assert together(works) == [[one] * ROUNDS for one in expected]


def test_a_forward_beside_generate_is_undisturbed(folders: dict[str, Path]) -> None:
    model = loaded(folders, "fused llama")
    works: list[Callable[[], Any]] = [
        lambda: text(model, PROMPTS[0]),
        lambda: models.logits(model, PROMPTS[1]).tolist(),
        lambda: models.logits(model, PROMPTS[0]).tolist(),
    ]
    expected = [work() for work in works]
    assert together(works) == [[one] * ROUNDS for one in expected]


def test_seeds_hold_in_threads(folders: dict[str, Path]) -> None:
    tokenizer = models.tokenizer()
    by_name = {name: loaded(folders, name) for name in ("llama", "qwen3")}

    def sampled(name: str, seed: int | None) -> str:
        sampling = Sampling() if seed is None else Sampling(temperature=1.0, seed=seed)
        return str(continue_text(by_name[name], tokenizer, PROMPTS[0], max_new_tokens=8, sampling=sampling))

    works = [partial(sampled, name, seed) for name, seed in (("llama", 1), ("qwen3", 2), ("llama", None))]
    expected = [work() for work in works]
    assert together(works) == [[one] * ROUNDS for one in expected]


def test_loads_in_threads_keep_their_kernel_and_dtype(folders: dict[str, Path]) -> None:
    def load(name: str, kernel: str | None, dtype: str) -> tuple[set[str], set[torch.dtype]]:
        model = fb.load(folders[name], kernel=kernel, dtype=dtype, device="cpu")
        kernels = {layer.kernel.name for layer in packed_linears(model).values() if layer.kernel is not None}
        return kernels, {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}

    works = [
        partial(load, "llama", "reference", "bfloat16"),
        partial(load, "qwen3", None, "float32"),
        partial(load, "qwen3", "reference", "float16"),
    ]
    expected = [work() for work in works]
    assert together(works, 3) == [[one] * 3 for one in expected]
    assert torch.get_default_dtype() == torch.float32


def test_quantizing_beside_a_load_leaves_it_its_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    plan = find("rtn-4bit").changed(scheme="int4-g32")

    def made() -> bytes:
        out = Path(tempfile.mkdtemp(dir=tmp_path)) / "out"
        quantize.quantize(folders["plain"], out, plan=plan)
        return (out / "model.safetensors").read_bytes()

    def read() -> Any:
        return models.logits(loaded(folders, "plain"), PROMPTS[0]).tolist()

    expected = [made(), read()]
    assert together([made, read], 3) == [[one] * 3 for one in expected]


def test_only_this_threads_parameters_are_empty() -> None:
    with ThreadPoolExecutor(1) as other, empty_parameters():
        assert nn.Linear(2, 2).weight.is_meta
        assert not other.submit(nn.Linear, 2, 2).result().weight.is_meta
    assert not nn.Linear(2, 2).weight.is_meta


def test_serving_ends_in_its_own_thread_only(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(Exception):
        pass

    def another(*_: Any, **__: Any) -> None:
        raise Elsewhere

    for method in ("awq", "gptq"):  # as if their own back ends were installed
        monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, method, another)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(folders["llama"]).hf_quantizer

    first, second = serving("reference"), serving()
    with ThreadPoolExecutor(1) as other:
        with first:
            with pytest.raises(Elsewhere):
                other.submit(load).result()
            other.submit(second.__enter__).result()
            quantizer = load()
            assert isinstance(quantizer, FewbitQuantizer)
            assert quantizer.kernel == "reference"
        with pytest.raises(Elsewhere):
            load()
        assert other.submit(load).result().kernel is None
        other.submit(second.__exit__, None, None, None).result()
        with pytest.raises(Elsewhere):
            other.submit(load).result()
