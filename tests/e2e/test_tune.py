"""`fewbit tune`: the loss falls, codes, names and config stay, and nothing that is not better is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fewbit as package
from fewbit.errors import NotBetter, PlanError
from fewbit.formats.containers.gguf import GgufFile
from fewbit.models.source import locate
from fewbit.pipeline import descent, tuning
from fewbit.plans.plan import Plan, Rule
from tests import models, packed_models
from tests.e2e.conftest import Fewbit

CALIBRATION = {"samples": 20, "length": 32}
QUICK = package.Optimization(steps=12, learning_rate=4e-3, batch=128)
CT = "compressed-tensors"


def plan(scheme: str, format: str) -> Plan:
    return Plan(f"{scheme} in {format}", format, (Rule("*", scheme, "rtn"),))


def quantized(model: Path, out: Path, scheme: str, format: str) -> Path:
    package.quantize(model, out, plan=plan(scheme, format), progress=False)
    return out


def tuned(packed: Path, out: Path, model: Path, text: Path, **changes: Any) -> Any:
    given: dict[str, Any] = {
        "calibration": package.Calibration(text=str(text), **CALIBRATION),
        "optimization": QUICK,
        "progress": False,
        **changes,
    }
    return package.tune(packed, out, reference=model, **given)


def divergence(packed: Path, model: Path, text: Path) -> float:
    kl = package.evaluate(packed, reference=model, text=str(text), length=32, samples=8, progress=False).quality.kl
    assert kl is not None
    return kl.mean.value


def same_bytes(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"intermediate_size": 128, "attention_bias": True, "tie_word_embeddings": False}
    return models.save(tmp_path_factory.mktemp("tune") / "model", "llama", chat=models.CHAT, **shape)


FOLDERS = [
    ("int3-g32-sym", "gptq"),
    ("int3-g32", "gptq"),
    ("int4-g32", "awq"),
    ("int3-g32-sym", CT),
    ("int4-g32-sym-bf16", CT),
    ("nf4-b64", "bnb"),
    ("nf4-b64-dq", "bnb"),
    ("llm.int8", "bnb"),
    ("fp8-row", CT),
    ("nvfp4", CT),
    ("mxfp4", CT),
]


@pytest.mark.parametrize(("scheme", "format"), FOLDERS)
def test_a_folder_keeps_all_but_its_floats(model: Path, text: Path, tmp_path: Path, scheme: str, format: str) -> None:
    packed = quantized(model, tmp_path / "packed", scheme, format)
    rate = 3e-4 if "8" in scheme else 4e-3  # with 8 bits the scales are nearly right
    given = package.Optimization(steps=12, learning_rate=rate, batch=128)
    done = tuned(packed, tmp_path / "out", model, text, optimization=given)
    assert done.after < done.before
    assert done.gains == 5 + 8  # norms, and the biases of attention
    assert done.weights == (0 if scheme == "mxfp4" else 14)
    assert any("powers of two" in note for note in done.notes) == (scheme == "mxfp4")
    was, now = models.tensors_of(packed), models.tensors_of(tmp_path / "out")
    assert list(was) == list(now)
    assert {n: (t.shape, t.dtype) for n, t in was.items()} == {n: (t.shape, t.dtype) for n, t in now.items()}
    changed = {name for name in was if not same_bytes(was[name], now[name])}
    assert changed
    floats = {name for name in was if was[name].is_floating_point() and "lm_head" not in name and "embed" not in name}
    assert changed <= floats | {name for name in was if "quant_state" in name}  # JSON with the offset of scales
    configs = [(folder / "config.json").read_bytes() for folder in (packed, tmp_path / "out")]
    assert configs[0] == configs[1]
    assert divergence(tmp_path / "out", model, text) < divergence(packed, model, text)


@pytest.mark.parametrize("mixture", ["q4_k", "q2_k", "q3_k", "q4_1", "iq4_xs"])
def test_a_gguf_file_keeps_all_but_its_scales(text: Path, tmp_path: Path, mixture: str) -> None:
    model = models.save(
        tmp_path / "model", "llama", hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4
    )
    packed = quantized(model, tmp_path / "packed.gguf", mixture, "gguf")
    done = tuned(packed, tmp_path / "out.gguf", model, text)
    assert done.after < done.before
    was, now = GgufFile(packed), GgufFile(tmp_path / "out.gguf")
    assert list(was.entries.values()) == list(now.entries.values())
    keys = [{k: str(v) for k, v in each.metadata.items() if k != "fewbit.record"} for each in (was, now)]
    assert keys[0] == keys[1]
    changed = {name for name in was.entries if not torch.equal(was.get(name), now.get(name))}
    assert {"blk.0.attn_q.weight", "output_norm.weight", "token_embd.weight"} <= changed
    assert json.loads(now.metadata["fewbit.record"])["tuned"]["after"] == done.after
    assert divergence(tmp_path / "out.gguf", model, text) < divergence(packed, model, text)


MOVING = package.Optimization(steps=60, learning_rate=2e-3, batch=256, codes=True)  # few steps, so large ones


@pytest.mark.parametrize(("scheme", "format"), [("int2-g32-sym", "gptq"), ("int2-g32", CT), ("nf4-b64", "bnb")])
def test_codes_of_a_folder_are_trained(model: Path, text: Path, tmp_path: Path, scheme: str, format: str) -> None:
    packed = quantized(model, tmp_path / "packed", scheme, format)
    done = tuned(packed, tmp_path / "out", model, text, optimization=MOVING)
    assert done.after < done.before
    assert (done.moved is None) == (scheme == "nf4-b64")
    assert done.moved is None or 0 < done.moved < 0.5
    was, now = models.tensors_of(packed), models.tensors_of(tmp_path / "out")
    assert {n: (t.shape, t.dtype) for n, t in was.items()} == {n: (t.shape, t.dtype) for n, t in now.items()}
    moved = {name.rpartition(".")[2] for name in was if not same_bytes(was[name], now[name])}
    assert bool(moved & {"qweight", "weight_packed"}) == (scheme != "nf4-b64")
    assert divergence(tmp_path / "out", model, text) < divergence(packed, model, text)
    tuning_of = json.loads((tmp_path / "out" / "fewbit.json").read_text(encoding="utf-8"))["tuned"]
    assert tuning_of["codes"]
    assert tuning_of["moved"] == done.moved


@pytest.mark.parametrize("mixture", ["q3_k", "q2_k"])
def test_codes_of_a_gguf_file_are_trained(text: Path, tmp_path: Path, mixture: str) -> None:
    model = models.save(tmp_path / "model", "llama", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    packed = quantized(model, tmp_path / "packed.gguf", mixture, "gguf")
    done = tuned(packed, tmp_path / "out.gguf", model, text, optimization=MOVING)
    assert done.moved
    assert done.after < done.before
    assert divergence(tmp_path / "out.gguf", model, text) < divergence(packed, model, text)


def test_codes_stay_where_memory_is_short(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = quantized(model, tmp_path / "packed", "int3-g32-sym", "gptq")
    monkeypatch.setattr(tuning, "free_memory", lambda device: 1000)
    done = tuned(packed, tmp_path / "out", model, text, optimization=MOVING)
    assert done.moved is None
    assert any("codes stay: training them takes 1.77 MB of memory, and 1 kB are free" in note for note in done.notes)


def test_the_result_is_the_same_each_time(model: Path, text: Path, tmp_path: Path) -> None:
    packed = quantized(model, tmp_path / "packed", "int3-g32-sym", "gptq")
    first, second = (tuned(packed, tmp_path / name, model, text) for name in ("one", "two"))
    assert first.after == second.after
    one, two = models.tensors_of(tmp_path / "one"), models.tensors_of(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_memory_is_saved_without_another_result(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = quantized(model, tmp_path / "packed", "int3-g32-sym", "gptq")
    expected = tuned(packed, tmp_path / "one", model, text)
    calls = list[Any]()

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return checkpoint(*args, **kwargs)

    monkeypatch.setattr(tuning, "checkpoint", counted)
    monkeypatch.setattr(tuning, "_KEPT", 0.0)  # blocks are computed again in the backward pass
    monkeypatch.setattr(tuning, "_CACHED", 0)  # the original computes its logits for each pass
    found = tuned(packed, tmp_path / "two", model, text)
    assert calls
    assert found.after == expected.after
    one, two = models.tensors_of(tmp_path / "one"), models.tensors_of(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_original_can_write_the_text_itself(fewbit: Fewbit, model: Path, text: Path, tmp_path: Path) -> None:
    packed = quantized(model, tmp_path / "packed", "int3-g32-sym", "gptq")
    own = package.Calibration(text="self", **CALIBRATION)
    done = tuned(packed, tmp_path / "out", model, text, calibration=own)
    assert done.after < done.before
    assert done.text == f"texts written by {model}"
    assert (done.tokens, done.held_out_tokens) == (18 * 32, 2 * 32)
    again = tuned(packed, tmp_path / "again", model, text, calibration=own)
    assert again.after == done.after
    digests = [package.inspect(tmp_path / name).made["tuned"]["text"]["digest"] for name in ("out", "again")]
    assert digests[0] == digests[1]
    flags = ("--calibration", "self", "--samples", 2, "--length", 16, "--steps", 1, "--seed", 1, "--json")
    answer = fewbit("tune", packed, "--reference", model, "-o", tmp_path / "third", *flags)
    assert answer.json["text"] == done.text if answer.code == 0 else answer.code == 7


def test_the_record_and_the_card_say_it(fewbit: Fewbit, model: Path, text: Path, tmp_path: Path) -> None:
    packed, out = quantized(model, tmp_path / "packed", "int3-g32-sym", "gptq"), tmp_path / "out"
    flags = ("--calibration", text, "--samples", 20, "--length", 32, "--steps", 12, "--learning-rate", 4e-3)
    answer = fewbit("tune", packed, "--reference", model, "-o", out, *flags, "--batch", 128, "--json")
    assert answer.code == 0, answer.err
    assert "held-out KL" in answer.err
    record = json.loads((out / "fewbit.json").read_text(encoding="utf-8"))
    assert record["tuned"]["after"] == answer.json["after"] < record["tuned"]["before"]
    assert record["tuned"]["text"]["samples"] == 20
    assert record["plan"] == json.loads((packed / "fewbit.json").read_text(encoding="utf-8"))["plan"]
    for shown in (fewbit("inspect", out).out, (out / "README.md").read_text(encoding="utf-8")):
        assert f"{record['tuned']['before']:.4g} before, {record['tuned']['after']:.4g} after" in " ".join(
            shown.split()
        )
    printed = fewbit("tune", packed, "--reference", model, "-o", tmp_path / "again", *flags, "--batch", 128)
    assert "KL divergence, before" in printed.out


def test_a_file_of_another_tool_gets_a_record(model: Path, text: Path, tmp_path: Path) -> None:
    packed = quantized(model, tmp_path / "packed", "int3-g32-sym", "gptq")
    (packed / "fewbit.json").unlink()
    (packed / "README.md").write_text("# Mine\n", encoding="utf-8")
    config = json.loads((packed / "config.json").read_text(encoding="utf-8"))
    quantization = config.pop("quantization_config")
    (packed / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (packed / "quantize_config.json").write_text(json.dumps(quantization), encoding="utf-8")
    tensors = load_file(packed / "model.safetensors")
    tensors |= {name: t.float() for name, t in tensors.items() if name.endswith(".scales")}  # a wider type
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    done = tuned(packed, out, model, text)
    assert done.after < done.before
    now = load_file(out / "model.safetensors")
    assert {name: t.dtype for name, t in tensors.items()} == {name: t.dtype for name, t in now.items()}
    assert (out / "quantize_config.json").read_bytes() == (packed / "quantize_config.json").read_bytes()
    assert (out / "README-original.md").read_text(encoding="utf-8") == "# Mine\n"
    assert "Tuned by fewbit" in (out / "README.md").read_text(encoding="utf-8")
    assert package.inspect(out).made["tuned"]["weights"] == 14


def test_shards_keep_their_names(model: Path, text: Path, tmp_path: Path) -> None:
    packed = quantized(model, tmp_path / "packed", "int3-g32-sym", "gptq")
    tensors = load_file(packed / "model.safetensors")
    (packed / "model.safetensors").unlink()
    place: Mapping[str, str] = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in set(place.values()):
        save_file({n: t for n, t in tensors.items() if place[n] == file}, packed / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": place}
    (packed / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    tuned(packed, tmp_path / "out", model, text)
    for file in set(place.values()):
        assert list(load_file(tmp_path / "out" / file)) == list(load_file(packed / file))
    assert len(locate(tmp_path / "out").files) == 2


def test_experts_are_tuned(text: Path, tmp_path: Path) -> None:
    from tests import architectures

    model = architectures.save(tmp_path / "model", "qwen3_moe")
    packed = quantized(model, tmp_path / "packed", "int3-g32-sym", CT)
    done = tuned(packed, tmp_path / "out", model, text)
    assert done.after < done.before
    was, now = models.tensors_of(packed), models.tensors_of(tmp_path / "out")
    assert any(".experts." in name and not torch.equal(was[name], now[name]) for name in was)


def test_nothing_is_written_that_is_not_better(
    fewbit: Fewbit, model: Path, text: Path, tmp_path: Path, own_cache: Path
) -> None:
    packed, out = quantized(model, tmp_path / "packed", "int8-g32-sym", "gptq"), tmp_path / "out"
    given = package.Optimization(steps=3, learning_rate=10.0, batch=32)
    with pytest.raises(NotBetter, match="did not lower the KL divergence"):
        tuned(packed, out, model, text, optimization=given)
    assert not out.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["packed"]
    assert not [p for p in (own_cache / "tuning").rglob("*") if p.is_file() and p.name != ".lock"]
    flags = ("--steps", 3, "--learning-rate", 10, "--calibration", text, "--samples", 20, "--length", 32)
    assert fewbit("tune", packed, "--reference", model, "-o", out, *flags).code == NotBetter.exit_code


def test_an_interrupted_run_resumes(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = quantized(model, tmp_path / "packed", "int3-g32-sym", "gptq")
    expected = tuned(packed, tmp_path / "whole", model, text)
    advance, steps = descent._State.advance, list[int]()

    def stopped(self: Any) -> None:
        steps.append(self.step)
        if len(steps) == 8:
            raise KeyboardInterrupt
        advance(self)

    monkeypatch.setattr(descent, "_PAUSE", 0.0)
    monkeypatch.setattr(descent._State, "advance", stopped)
    with pytest.raises(KeyboardInterrupt):
        tuned(packed, tmp_path / "out", model, text)
    assert not (tmp_path / "out").exists()
    steps.clear()
    steps.extend(range(8))
    done = tuned(packed, tmp_path / "out", model, text)
    assert steps[8] == 7  # a measurement, and so a saved state, after each step
    assert done.after == expected.after


def test_requests_that_cannot_be_met_are_errors(model: Path, text: Path, tmp_path: Path) -> None:
    packed = quantized(model, tmp_path / "packed", "int3-g32-sym", "gptq")
    out = tmp_path / "out"
    with pytest.raises(PlanError, match="not quantized"):
        tuned(model, out, shutil.copytree(model, tmp_path / "copy"), text)
    with pytest.raises(PlanError, match="is the quantized model itself"):
        tuned(packed, out, packed, text)
    with pytest.raises(PlanError, match="would be a GGUF file"):
        tuned(packed, tmp_path / "out.gguf", model, text)
    with pytest.raises(PlanError, match=r"packed is an input of this command, which would be lost"):
        tuned(packed, packed, model, text, overwrite=True)
    short = tmp_path / "short.txt"
    short.write_text("The grid of a row, read and written. " * 2, encoding="utf-8")
    with pytest.raises(PlanError, match="needs one to train on"):
        tuned(packed, out, model, short)
    with pytest.raises(PlanError, match="vocabulary"):
        tuned(packed, out, models.save(tmp_path / "other", "llama", vocab_size=models.VOCAB + 8), text)
    assert not out.exists()


@pytest.mark.parametrize("layout", packed_models.LAYOUTS)
def test_files_of_other_tools_are_tuned(model: Path, text: Path, tmp_path: Path, layout: str) -> None:
    plain = shutil.copytree(model, tmp_path / "plain")
    packed, out = packed_models.pack(plain, tmp_path / "packed", layout), tmp_path / "out"
    rate = 1e-3 if "fp8" in layout or "int8" in layout else 4e-3
    given = package.Optimization(steps=12, learning_rate=rate, batch=128)
    if packed_models.LAYOUTS[layout][2].startswith("FP8, block"):
        with pytest.raises(PlanError, match="as floats only"):
            tuned(packed, out, model, text, optimization=given)
        return
    done = tuned(packed, out, model, text, optimization=given)
    assert done.after < done.before
    assert done.weights == (0 if layout == "ct-mxfp4" else 14)
    was, now = models.tensors_of(packed), models.tensors_of(out)
    assert {n: (t.shape, t.dtype) for n, t in was.items()} == {n: (t.shape, t.dtype) for n, t in now.items()}
    changed = {name for name in was if not same_bytes(was[name], now[name])}
    norms = {name for name in was if "norm" in name or "bias" in name}
    assert changed & norms
    assert all("scale" in name for name in changed - norms)


def test_act_order_of_gptq_is_kept(model: Path, text: Path, tmp_path: Path) -> None:
    packed = quantized(model, tmp_path / "packed", "int3-g32-sym", "gptq")
    tensors = load_file(packed / "model.safetensors")
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0)).int() // 32
    for name in tensors:
        if name.endswith("down_proj.g_idx"):
            tensors[name] = order.clone()
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    done = tuned(packed, tmp_path / "out", model, text)
    assert done.after < done.before
    now = load_file(tmp_path / "out" / "model.safetensors")
    changed = {name.rpartition(".")[2] for name in tensors if not torch.equal(tensors[name], now[name])}
    assert changed == {"scales", "weight", "bias"}
