"""Scales and shapes that no weight has are errors that name the tensor, before any weight is read."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import fewbit
from fewbit import registry
from fewbit.errors import FormatError
from fewbit.plans.plan import Plan, Rule
from tests import architectures, models, packed_models

CT = "compressed-tensors"
DOWN = "model.layers.1.mlp.down_proj"
Change = Callable[[Tensor], Tensor]


def with_last(value: float) -> Change:
    """The same tensor with `value` as its last entry. FP8 is changed through its bytes."""

    def changed(tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        whole = copy if copy.element_size() > 1 else copy.view(torch.uint8)
        whole.view(-1)[-1] = value
        return copy

    return changed


NAN, ABOVE = "has NaN or Inf", "has numbers that are not above 0"
CASES: dict[str, tuple[str, str, str, Change, str]] = {
    "row of 0": ("fp8-row", CT, "weight_scale", with_last(0), ABOVE),
    "row below 0": ("fp8-row", CT, "weight_scale", with_last(-1), ABOVE),
    "tensor of NaN": ("fp8-tensor", CT, "weight_scale", with_last(torch.nan), NAN),
    "block of Inf": ("fp8-b128", CT, "weight_scale", with_last(torch.inf), NAN),
    "block of 0": ("fp8-b128", "fp8", "weight_scale_inv", with_last(0), ABOVE),
    "E8M0 of 255": ("mxfp4", CT, "weight_scale", with_last(255), r"has NaN or Inf \(the E8M0 code 255\)"),
    "global 0": ("nvfp4", CT, "weight_global_scale", with_last(0), ABOVE),
    "global NaN": ("nvfp4", CT, "weight_global_scale", with_last(torch.nan), NAN),
    "group of NaN": ("nvfp4", CT, "weight_scale", with_last(0x7F), NAN),
    "group below 0": ("nvfp4", CT, "weight_scale", with_last(0x88), "has negative numbers"),
    "integers": ("int4-g32-sym", CT, "weight_scale", with_last(torch.nan), NAN),
    "gptq": ("int4-g32-sym", "gptq", "scales", with_last(torch.inf), NAN),
    "bnb": ("nf4-b64", "bnb", "weight.absmax", with_last(torch.nan), NAN),
    "fewer columns": ("fp8-row", CT, "weight", lambda t: t[:, :-8].contiguous(), "shape"),
    "fewer rows": ("fp8-b128", CT, "weight", lambda t: t[:-8].contiguous(), "shape"),
}


def never(self: Any, tensors: Any, config: Any, module: str) -> Any:
    raise AssertionError(f"{module} was read")


@pytest.mark.parametrize("case", CASES)
def test_it_is_found_before_a_weight_is_read(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, format, part, change, words = CASES[case]
    model = models.save(tmp_path / "model", "llama", intermediate_size=128)
    plan = Plan("p", format, (Rule("*", scheme, "rtn"),))
    fewbit.quantize(model, tmp_path / "broken", plan=plan, progress=False)
    name = f"{DOWN}.{part}"
    packed_models.edit(tmp_path / "broken", {name: change(models.tensors_of(tmp_path / "broken")[name])})
    check_all(tmp_path, format, rf"{name} .*{words}", monkeypatch)


def test_experts_of_gpt_oss_are_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = packed_models.pack_gpt_oss(architectures.save(tmp_path / "plain", "gpt_oss"), tmp_path / "broken")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    packed_models.edit(packed, {name: with_last(255)(models.tensors_of(packed)[name])})
    check_all(tmp_path, "mxfp4", f"{name} has NaN", monkeypatch)


def check_all(tmp_path: Path, format: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, out = tmp_path / "broken", tmp_path / "out"
    monkeypatch.setattr(registry.get("formats", format), "read", never)
    ours = packed_models.preferred(format) if format in ("fp8", "mxfp4") else nullcontext()
    if format != "bnb":  # if bitsandbytes is installed, it loads its files itself
        with ours, pytest.raises(FormatError, match=words):
            AutoModelForCausalLM.from_pretrained(broken)
    with pytest.raises(FormatError, match=words):
        fewbit.load(broken, device="cpu")
    with pytest.raises(FormatError, match=words):
        fewbit.convert(broken, out, to="dense", progress=False)
    with pytest.raises(FormatError, match=words):
        fewbit.quantize(broken, out, plan="nf4", progress=False)
    assert not out.exists()
