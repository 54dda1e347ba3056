"""On an NVIDIA GPU: quantize there, load there, move between devices, multiply by PyTorch's 4-bit kernel."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbit
from fewbit.api import chat, generate, quantize, serve
from fewbit.kernels.reference import Reference
from fewbit.kernels.torch_int4 import TorchInt4
from fewbit.methods.base import Method
from fewbit.methods.gptq import GPTQ
from fewbit.models.adapters.tuning import Tuning
from fewbit.models.decoding.choosing import Choosing
from fewbit.models.decoding.continuous import News
from fewbit.models.load import load_model
from fewbit.models.loading import Loading
from fewbit.models.skeleton import load_tokenizer
from fewbit.models.source import Source, locate
from fewbit.nn.choose import TOLERANCE
from fewbit.nn.fused import Slice
from fewbit.nn.layers import QLinear
from fewbit.schemes.base import parse
from fewbit.serving.settings import Serving
from fewbit.stats import Need, Stats
from fewbit.texts import calibration
from tests import models

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt-350m"])
def test_quantized_and_loaded_there(family: str, tmp_path: Path) -> None:
    folder = models.save(tmp_path / "model", family)
    text = tmp_path / "text.txt"
    text.write_text(models.sentences(200), encoding="utf-8")
    few = calibration.Calibration(str(text), samples=4, length=32)
    quantize.quantize(folder, tmp_path / "out", calibration=few, device="cuda")
    ids = torch.arange(24).reshape(1, -1) + 3
    there = generate.load(tmp_path / "out", device="cuda", dtype=torch.float32)
    here = generate.load(tmp_path / "out", device="cpu", dtype=torch.float32)
    torch.testing.assert_close(models.logits(there, ids.cuda()).cpu(), models.logits(here, ids), rtol=1e-4, atol=1e-4)
    moved = here.to("cuda")
    assert torch.equal(models.logits(moved, ids.cuda()), models.logits(there, ids.cuda()))


def test_the_gpu_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`chat` and `serve` use it, and `generate` fuses there. In float32 they write what a CPU writes."""
    folder = tmp_path / "out"
    quantize.quantize("tiny", folder, plan="rtn-4bit", device="cuda")
    source = locate(folder)
    ids = load_tokenizer(source)("Once upon a time")["input_ids"]
    here = generate.load(folder, dtype="float32", device="cpu")
    expected = here.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()

    assert chat.conversation(folder, Loading()).model.device.type == "cuda"
    assert served(folder, ids, "float32") == expected
    assert len(served(folder, ids, "bfloat16")) == 12
    found = list[int | bool | None]()

    def load(source: Source, loading: Loading, **kwargs: Any) -> Any:
        found.append(loading.fuse)
        return load_model(source, loading, **kwargs)

    monkeypatch.setattr(generate, "load_model", load)
    for fuse in (None, False):
        assert generate.generate(folder, "Once upon a time", max_new_tokens=12, fuse=fuse).tokens == 12
    assert found == [len(ids) + 12, False]


def served(folder: Path, ids: list[int], dtype: str) -> list[int]:
    """Twelve greedy tokens of a server's engine, which runs on the GPU, with fused linears."""
    opened = serve.service(folder, Loading(dtype=dtype), Serving())
    try:
        model = opened.engine._manager.model
        assert model.device.type == "cuda"
        assert any(isinstance(module, Slice) for module in model.modules())
        answers = queue.SimpleQueue[News]()
        opened.engine.submit(ids, 12, Choosing(), answers.put)
        while not (news := answers.get(timeout=60)).finished:
            pass
        assert news.error is None
        return list(news.tokens)
    finally:
        opened.engine.stop()


@pytest.mark.parametrize("rows", [1, 2, 17, 64])
@pytest.mark.parametrize("spec", ["int4-g32-sym", "int4-g128-sym"])
def test_the_kernel_agrees_and_restores(spec: str, rows: int) -> None:
    scheme, shape = parse(spec), (256, 512)
    weight = Method().quantize(torch.randn(shape), scheme, None).weight.map(lambda t: t.cuda())
    assert TorchInt4().why_not(scheme, shape, torch.device("cuda"), torch.bfloat16) is None
    prepared = TorchInt4().prepare(scheme, weight.parts, shape)
    x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
    exact = x.float() @ weight.dequantize().T
    got = TorchInt4().linear(x, scheme, prepared, shape)
    assert (got.float() - exact).norm() / exact.norm() <= TOLERANCE[torch.bfloat16]
    restored = TorchInt4().restore(scheme, prepared, shape)
    assert all(torch.equal(restored[name], part) for name, part in weight.parts.items())


def test_a_packed_layer_moves_between_devices() -> None:
    scheme = parse("int4-g32-sym")
    weight = Method().quantize(torch.randn(64, 96), scheme, None).weight
    layer = QLinear(96, 64, None).adopt(weight, torch.bfloat16)
    for device in ("cuda", "cpu", "cuda"):
        layer = layer.to(device)
        assert layer.kernel is not None
        assert layer.kernel.name == ("nvidia" if device == "cuda" else "torch_int4")
        parts = layer.qtensor().parts
        assert all(torch.equal(parts[name].cpu(), part) for name, part in weight.parts.items())


def test_gptq_there_is_gptq_here() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 192, generator=generator) @ torch.randn(192, 192, generator=generator)
    w = torch.randn(64, 192, generator=generator)
    errors = []
    for device in ("cpu", "cuda"):
        stats = Stats(192, Need.HESSIAN, device)
        stats.add(x.to(device))
        lost = w.to(device) - GPTQ().quantize(w.to(device), parse("int3-g64"), stats).weight.dequantize()
        errors.append(float(((lost @ stats.hessian) * lost).sum()))
    assert errors[1] == pytest.approx(errors[0], rel=1e-2)  # sums in another order choose a few other codes


def test_the_reference_serves_every_type_there() -> None:
    scheme, shape = parse("int3-g32"), (48, 96)
    weight = Method().quantize(torch.randn(shape), scheme, None).weight.map(lambda t: t.cuda())
    for dtype, tolerance in TOLERANCE.items():
        x = torch.randn(5, 96, device="cuda", dtype=dtype)
        exact = x.double() @ weight.dequantize(torch.float64).T
        got = Reference().linear(x, scheme, Reference().prepare(scheme, weight.parts, shape), shape)
        assert (got.double() - exact).norm() / exact.norm() <= tolerance


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_the_gradient_there_is_that_of_the_values(dtype: torch.dtype) -> None:
    weight = Method().quantize(torch.randn(256, 512), parse("int4-g128-sym"), None).weight.map(lambda t: t.cuda())
    layer = QLinear(512, 256, None).adopt(weight, dtype)
    x = torch.randn(17, 512, device="cuda", dtype=dtype).requires_grad_()
    seed = torch.randn(17, 256, device="cuda", dtype=dtype)
    layer(x).backward(seed)
    exact = seed.float() @ weight.dequantize()
    assert x.grad is not None
    assert (x.grad.float() - exact).norm() <= TOLERANCE[dtype] * exact.norm()


def test_tuned_there(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "model", "llama")
    (tmp_path / "text.txt").write_text(models.sentences(100), encoding="utf-8")
    quantize.quantize(folder, tmp_path / "out", plan="rtn-4bit")
    tuning = Tuning(length=32, batch=8, learning_rate=0.01, steps=20)
    done = fewbit.finetune(
        tmp_path / "out", tmp_path / "adapter", data=str(tmp_path / "text.txt"), tuning=tuning, device="cuda"
    )
    assert done.held_out_before is not None
    assert done.held_out_after is not None
    assert done.held_out_after < 0.9 * done.held_out_before
    assert done.gpu_peak


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tuned_on_the_second_gpu(tmp_path: Path) -> None:
    """One process with several visible GPUs trains on the one that was named, and on no other."""
    folder = models.save(tmp_path / "model", "llama", dtype="float32")
    (tmp_path / "text.txt").write_text(models.sentences(100), encoding="utf-8")
    quantize.quantize(folder, tmp_path / "out", plan="rtn-4bit")
    tuning, found = Tuning(length=32, batch=4, learning_rate=0.01, steps=5), []
    torch.cuda.init()
    for device in ("cuda:0", "cuda:1"):
        torch.cuda.reset_peak_memory_stats(0)
        before = torch.cuda.memory_allocated(0)
        out, data = tmp_path / device.replace(":", "-"), str(tmp_path / "text.txt")
        done = fewbit.finetune(tmp_path / "out", out, data=data, tuning=tuning, device=device)
        found.append((done.loss, done.held_out_after))
        assert (torch.cuda.max_memory_allocated(0) > before) == (device == "cuda:0")
        assert torch.cuda.current_device() == 0  # as before
    assert found[0] == pytest.approx(found[1], rel=1e-4)
