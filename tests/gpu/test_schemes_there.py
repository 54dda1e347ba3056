"""On an NVIDIA GPU: every scheme and kernel, configs of bitsandbytes', the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fewbit import prefer
from fewbit.api import evaluate, generate, quantize
from fewbit.methods.base import Method
from fewbit.nn.choose import TOLERANCE
from fewbit.nn.layers import QLinear
from fewbit.schemes.base import parse
from fewbit.texts import calibration
from tests import models
from tests.contract.cases import KERNELS, SPECS, ordinary, several_groups

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
CUDA = torch.device("cuda")


@pytest.mark.parametrize("spec", SPECS)
def test_the_values_there_are_those_here(spec: str) -> None:
    shape = several_groups(spec)
    weight = Method().quantize(ordinary(*shape), parse(spec), None).weight
    here, there = weight.dequantize(), weight.map(lambda t: t.cuda()).dequantize().cpu()
    torch.testing.assert_close(there, here, rtol=1e-6, atol=0)


@pytest.mark.parametrize("spec", SPECS)
def test_rounding_there_is_as_good_as_here(spec: str) -> None:
    shape, scheme = several_groups(spec), parse(spec)
    w = ordinary(*shape)
    here, there = (Method().quantize(w.to(device), scheme, None).weight.dequantize().cpu() for device in ("cpu", CUDA))
    assert float((there - w).norm()) == pytest.approx(float((here - w).norm()), rel=1e-2)
    # A mean is summed in another order there: a last bit of a scale may differ, and with it a tie.
    assert float(((there - here).abs() > 1e-4 * here.abs()).float().mean()) < 0.02


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_that_serves_there_agrees(name: str, dtype: torch.dtype) -> None:
    kernel, served = KERNELS[name], 0
    if reason := kernel.unavailable():
        pytest.skip(reason)
    for spec in SPECS:
        scheme, shape = parse(spec), several_groups(spec, 64)
        if kernel.why_not(scheme, shape, CUDA, dtype) is not None:
            continue
        served += 1
        weight = Method().quantize(ordinary(*shape), scheme, None).weight.map(lambda t: t.cuda())
        prepared = kernel.prepare(scheme, weight.parts, shape)
        for rows in (1, 2, 15, 64, 300):
            x = torch.randn(rows, shape[1], device="cuda").to(dtype)
            exact = kernel.rounded(x, scheme).double() @ weight.dequantize(torch.float64).T
            got = kernel.linear(x, scheme, prepared, shape).double()
            assert float((got - exact).norm() / exact.norm()) <= TOLERANCE[dtype], (spec, rows)
        restored = kernel.restore(scheme, prepared, shape)
        assert all(torch.equal(restored[part], tensor) for part, tensor in weight.parts.items()), spec
    if not served:
        pytest.skip(f"{name} multiplies no weight by such activations")
    assert served == len(SPECS) or name != "reference"


@pytest.mark.parametrize(
    "asked",
    [
        {"load_in_8bit": True},
        {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": torch.bfloat16,
            "bnb_4bit_use_double_quant": True,
        },
    ],
    ids=["int8", "nf4"],
)
def test_a_config_of_bitsandbytes_quantizes_on_load(asked: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    prefer("bitsandbytes")
    folder = models.save(tmp_path / "model", "llama")
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**asked), device_map="auto", dtype=torch.bfloat16
    )
    assert model.device.type == "cuda"
    assert any(isinstance(module, QLinear) for module in model.modules())
    model.save_pretrained(tmp_path / "out")
    ids = torch.arange(24).reshape(1, -1) + 3
    there = models.logits(model, ids.cuda()).float().cpu()
    here = models.logits(generate.load(tmp_path / "out", device="cpu", dtype=torch.float32), ids)
    assert float((there - here).norm() / here.norm()) < 3e-2
    model.generate(ids.cuda(), max_new_tokens=4, do_sample=False)


def test_the_embedded_model_there(tmp_path: Path) -> None:
    quantize.quantize("tiny", tmp_path / "out", calibration=calibration.Calibration(samples=32), device="cuda")
    done = evaluate.evaluate(tmp_path / "out", reference="tiny", samples=16, device="cuda")
    assert done.quality.kl is not None
    assert done.quality.kl.mean.value < 0.05
