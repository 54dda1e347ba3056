"""Every architecture: quantized, loaded by transformers' own `from_pretrained`, it is the model with those weights."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import fewbit
from fewbit.api import quantize
from fewbit.nn.layers import QLinear
from fewbit.report.results import Quantized
from fewbit.schemes.base import parse
from fewbit.stats import Need, Stats
from fewbit.texts import calibration as texts_calibration
from fewbit.texts import sources, windows
from tests import models

SAMPLES, LENGTH = 8, 48
QUANTIZED = (".qweight", ".qzeros", ".scales", ".g_idx")


class Pair:
    """A tiny model's folder, and the folder of its quantized self."""

    def __init__(self, folder: Path, out: Path, done: Quantized) -> None:
        self.folder, self.out, self.done = folder, out, done

    def load(self, **options: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.out, dtype=torch.float32, **options).eval()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Callable[[str], Pair]:
    """The pair of each family, quantized once by GPTQ."""

    @functools.cache
    def make(family: str) -> Pair:
        root = tmp_path_factory.mktemp(family)
        folder = models.save(root / "original", family)
        wanted = texts_calibration.Calibration(str(text), SAMPLES, LENGTH)
        return Pair(folder, root / "out", quantize.quantize(folder, root / "out", calibration=wanted))

    return make


@pytest.fixture(params=models.FAMILIES)
def pair(request: pytest.FixtureRequest, pairs: Callable[[str], Pair]) -> Pair:
    return pairs(request.param)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, models.VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))


def quantized_in(model: nn.Module) -> dict[str, QLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QLinear)}


def linears_in_blocks(model: Any) -> dict[str, Tensor]:
    """Weights [N, K] of everything linear but the head and OPT's projections around the blocks."""
    return {
        name: models.linear_weight(module)
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and any(part.isdigit() for part in name.split("."))
    }


def distance(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def rounded_to_nearest(w: Tensor, group: int, bits: int = 4) -> Tensor:
    """The baseline by its definition: absmax / (2^(b-1) - 0.5), fp16 scale, full signed range, ties to even."""
    grouped = w.float().reshape(w.shape[0], -1, group)
    half = 2 ** (bits - 1)
    scale = (grouped.abs().amax(-1, keepdim=True) / (half - 0.5)).half().float()
    rounded: Tensor = (grouped / scale).round().clamp(-half, half - 1) * scale
    return rounded.reshape(w.shape)


def test_the_loaded_model_has_the_dequantized_weights(pair: Pair, ids: Tensor) -> None:
    original, model = models.original(pair.folder), pair.load()
    weights = {name: layer.qtensor().dequantize() for name, layer in quantized_in(model).items()}
    assert weights.keys() == linears_in_blocks(original).keys()
    assert all(0.01 < distance(weights[name], w) < 0.5 for name, w in linears_in_blocks(original).items())
    expected = models.logits(models.with_weights(original, weights), ids)
    assert distance(models.logits(model, ids), expected) < 1e-5
    assert distance(models.logits(fewbit.load(pair.out, dtype=torch.float32, kernel="reference"), ids), expected) < 1e-5


def test_no_weight_is_kept_twice_and_ties_stay(pair: Pair) -> None:
    original, model = models.original(pair.folder), pair.load()
    tied = original.get_input_embeddings().weight is original.get_output_embeddings().weight
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied
    for layer in quantized_in(model).values():
        parameters = {name: p for name, p in layer.named_parameters() if name != "bias"}
        assert list(parameters) == ["weight"]
        assert not parameters["weight"].dtype.is_floating_point
        assert not parameters["weight"].requires_grad
    assert not any(p.is_meta for p in [*model.parameters(), *model.buffers()])


def test_what_is_not_quantized_is_byte_for_byte_the_original(pair: Pair, tmp_path: Path) -> None:
    """Under the names that transformers itself writes, which other readers know."""
    AutoModelForCausalLM.from_pretrained(pair.folder, dtype="auto").save_pretrained(tmp_path)
    before, after = models.tensors_of(tmp_path), models.tensors_of(pair.out)
    quantized = {name.rpartition(".")[0] + ".weight" for name in after if name.endswith(QUANTIZED)}
    plain = {name for name in after if not name.endswith(QUANTIZED)}
    assert plain | quantized == before.keys()
    for name in plain:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name]), name


def test_every_side_file_is_there(pair: Pair) -> None:
    before = {file.name for file in pair.folder.iterdir() if file.suffix != ".safetensors"}
    after = {file.name for file in pair.out.iterdir()}
    assert before | {"model.safetensors", "fewbit.json", "README.md"} == after
    for name in before - {"config.json"}:
        assert (pair.out / name).read_bytes() == (pair.folder / name).read_bytes()
    config = json.loads((pair.out / "config.json").read_text(encoding="utf-8"))
    assert config.pop("quantization_config")["quant_method"] == "gptq"
    assert config == json.loads((pair.folder / "config.json").read_text(encoding="utf-8"))
    words = "the first grid"
    assert AutoTokenizer.from_pretrained(pair.out)(words) == AutoTokenizer.from_pretrained(pair.folder)(words)


def test_saved_again_it_is_the_same(pair: Pair, ids: Tensor, tmp_path: Path) -> None:
    model = pair.load()
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(models.logits(model, ids), models.logits(again.eval(), ids))
    before, after = models.tensors_of(pair.out), models.tensors_of(tmp_path / "again")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype or not name.endswith(QUANTIZED)
        assert torch.equal(tensor.to(after[name].dtype), after[name]), name


def test_the_last_block_was_shown_what_really_enters_it(pair: Pair, text: Path) -> None:
    """The error in the report weighs with the inputs: it must be that under inputs from whole forward passes."""
    tokens = windows.encode(sources.load_text(str(text)), AutoTokenizer.from_pretrained(pair.folder))
    tokens = windows.sample(tokens, SAMPLES, LENGTH, 0)
    model, loaded = models.original(pair.folder), quantized_in(pair.load())
    last = max((name for name in loaded), key=lambda n: int(next(p for p in n.split(".") if p.isdigit())))
    number = next(part for part in last.split(".") if part.isdigit())
    chosen = {name: layer.qtensor().dequantize() for name, layer in loaded.items()}
    block = {name: q for name, q in chosen.items() if number in name.split(".")}
    models.with_weights(model, {name: q for name, q in chosen.items() if name not in block})
    stats = {name: Stats(q.shape[1], Need.HESSIAN) for name, q in block.items()}

    norms: list[Tensor] = []  # of the hidden state that enters the block: what a token counts

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        norms.append((args[0] if args else kwargs["hidden_states"]).norm(dim=-1))

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: stats[name].add(args[0], norms[-1])

    entered = last[: last.index(f".{number}.") + len(number) + 1]
    model.get_submodule(entered).register_forward_pre_hook(enter, with_kwargs=True)

    for name in block:
        model.get_submodule(name).register_forward_pre_hook(watch(name))
    models.logits(model, tokens)
    reported = {tensor.module: tensor.error for tensor in pair.done.tensors}
    assert reported.keys() == chosen.keys()
    for name, q in block.items():
        w, hessian = models.linear_weight(model.get_submodule(name)), stats[name].hessian
        lost = ((w - q) @ hessian * (w - q)).sum() / (w @ hessian * w).sum()
        assert reported[name] == pytest.approx(float(lost), rel=1e-3), name


@pytest.mark.parametrize("family", ["llama", "gpt2-bare", "opt-350m", "gemma3"])
def test_round_to_nearest_is_its_definition_over_the_whole_model(family: str, ids: Tensor, tmp_path: Path) -> None:
    folder = models.save(tmp_path / "original", family)
    done = fewbit.quantize(folder, tmp_path / "out", plan="rtn-4bit")
    original = models.original(folder)
    (scheme,) = {tensor.scheme for tensor in done.tensors}
    group = parse(scheme).group
    assert scheme == f"int4-g{group}-sym"
    weights = {name: rounded_to_nearest(w, group) for name, w in linears_in_blocks(original).items()}
    expected = models.logits(models.with_weights(original, weights), ids)
    assert distance(models.logits(fewbit.load(tmp_path / "out", dtype=torch.float32), ids), expected) < 1e-5
