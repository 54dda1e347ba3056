"""Every type of causal LM: quantized and loaded, it is the model with those weights; or an error says why not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fewbit
from fewbit.errors import FewbitError, PlanError
from fewbit.nn.fused import packed_linears
from tests import architectures, models

PLANS = ("gptq-4bit", "nf4", "int8", "awq-4bit")
# What people run and no other test covers: experts, hybrids, latent attention; and experts or tensors of a form that
# few types have (Inkling, JetMoe, LongCat, Sarvam). Always tested.
POPULAR = (
    "deepseek_v3",
    "falcon_h1",
    "glm4_moe",
    "gpt_oss",
    "granitemoehybrid",
    "inkling_text",
    "jetmoe",
    "lfm2",
    "longcat_flash",
    "mamba2",
    "mixtral",
    "nemotron_h",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
    "sarvam_moe",
)
# Others run by the first plan on one day of ten.
TODAY = architectures.today(architectures.TYPES)


def is_quick(kind: str, plan: str) -> bool:
    return (plan in PLANS[:2] and kind in POPULAR) or (plan == PLANS[0] and kind in TODAY)


@pytest.mark.filterwarnings("default")  # models warn about their own tiny configs
@pytest.mark.parametrize(("kind", "plan"), architectures.cases(architectures.TYPES, PLANS, is_quick))
def test_every_type_is_served_or_says_why_not(kind: str, plan: str, tmp_path: Path) -> None:
    if kind in architectures.NOT_BUILT:
        with pytest.raises(Exception, match=architectures.NOT_BUILT[kind]):
            architectures.save(tmp_path, kind)
        return
    folder = architectures.save(tmp_path / "model", kind)
    calibration = fewbit.Calibration([models.sentences(60)], samples=4, length=32)

    def quantize() -> None:
        fewbit.quantize(folder, tmp_path / "out", plan=plan, calibration=calibration, device="cpu")

    if reason := architectures.refusal(kind, plan):
        with pytest.raises(FewbitError, match=reason):
            quantize()
        return
    quantize()
    model = fewbit.load(tmp_path / "out", dtype=torch.float32, kernel="reference")
    expected = models.original(folder)
    packed = packed_linears(model)
    assert packed
    for name, module in packed.items():
        architectures.put(expected, name, module.qtensor().dequantize())
    if plan.startswith("awq"):  # it scales norms and biases too
        known, given = expected.state_dict(), model.state_dict()
        expected.load_state_dict({n: t for n, t in given.items() if n in known and t.is_floating_point()}, strict=False)
        for name, module in packed.items():
            architectures.put(expected, name, module.qtensor().dequantize())
    ids = torch.randint(3, models.VOCAB, (1, 24), generator=torch.Generator().manual_seed(1))
    wanted = architectures.logits(expected, ids)
    assert (architectures.logits(model, ids) - wanted).norm() <= 1e-4 * wanted.norm()


@pytest.mark.parametrize("plan", ["gptq-4bit", "nf4"])
def test_a_model_that_changes_its_weights_is_refused_at_once(plan: str, tmp_path: Path) -> None:
    folder = architectures.save(tmp_path / "model", "rwkv")
    with pytest.raises(PlanError, match=architectures.REFUSED["rwkv"]):
        fewbit.preview(folder, plan=plan)
