"""gpt-oss with MXFP4 experts as users have it: loaded packed, computed with, saved again, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import Mxfp4Config

import fewbit
from fewbit.errors import FormatError, PlanError
from fewbit.models import decoded
from fewbit.models.source import locate
from fewbit.nn.experts import ExpertSlice
from fewbit.nn.fused import packed_linears
from fewbit.plans.plan import Plan, Rule
from fewbit.schemes.base import PartSpec
from tests import architectures, models, packed_models

IDS = torch.arange(24)[None] + 3
EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The model with ordinary weights, and with MXFP4 experts of the same values."""
    folder = tmp_path_factory.mktemp("gpt-oss")
    plain = architectures.save(folder / "plain", "gpt_oss")
    return plain, packed_models.pack_gpt_oss(plain, folder / "packed")


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return packed_models.pack_gpt_oss(architectures.save(tmp_path / "plain", "gpt_oss"), tmp_path / "packed")


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert not [n for n in wanted if found[n].dtype != wanted[n].dtype or not torch.equal(found[n], wanted[n])]


def test_experts_stay_packed_and_have_the_same_values(both: tuple[Path, Path]) -> None:
    plain, packed = both
    model = fewbit.load(packed, dtype=torch.float32, device="cpu")
    layers = len(model.model.layers)
    linears = packed_linears(model)
    assert len(linears) == layers * 3 * model.config.num_local_experts
    assert all(isinstance(linear, ExpertSlice) for linear in linears.values())  # stacked for the grouped kernels
    assert {str(linear.codec) for linear in linears.values()} == {"mxfp4"}
    stored = models.tensors_of(packed)
    gate = linears[f"{EXPERTS}.1.gate_proj"].qtensor()
    assert torch.equal(gate.parts["codes"], stored[f"{EXPERTS}.gate_up_proj_blocks"][1, 0::2].flatten(1))
    assert torch.equal(gate.parts["scale"], stored[f"{EXPERTS}.gate_up_proj_scales"][1, 0::2])
    up = linears[f"{EXPERTS}.3.up_proj"].qtensor().dequantize()
    assert torch.equal(up, models.tensors_of(plain)[f"{EXPERTS}.gate_up_proj"][3].T[1::2].float())
    wanted = models.logits(models.original(plain), IDS)
    assert (models.logits(model, IDS) - wanted).norm() < 0.01 * wanted.norm()
    exact = fewbit.load(packed, dtype=torch.float32, device="cpu", kernel="reference")
    assert (models.logits(exact, IDS) - wanted).norm() < 1e-5 * wanted.norm()


def test_saving_writes_the_same_bytes(both: tuple[Path, Path], tmp_path: Path) -> None:
    _, packed = both
    fewbit.load(packed, device="cpu").save_pretrained(tmp_path / "again")
    packed_models.same_files(tmp_path / "again", packed)
    assert fewbit.inspect(tmp_path / "again").schemes == fewbit.inspect(packed).schemes
    with packed_models.preferred("mxfp4"):
        model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
        assert packed_linears(model)
        model.save_pretrained(tmp_path / "third", max_shard_size="100KB")
    assert len(list((tmp_path / "third").glob("*.safetensors"))) > 1
    packed_models.same_files(tmp_path / "third", packed)


def test_transformers_keeps_its_own_loader(both: tuple[Path, Path]) -> None:
    plain, packed = both
    assert not decoded.is_left(locate(packed), "cuda")  # but fewbit.load does not leave them to it, on any device
    theirs = AutoModelForCausalLM.from_pretrained(packed)
    assert not packed_linears(theirs)
    assert torch.equal(theirs.state_dict()[f"{EXPERTS}.down_proj"], models.tensors_of(plain)[f"{EXPERTS}.down_proj"])


def test_a_dequantized_model_has_fused_experts(both: tuple[Path, Path], tmp_path: Path) -> None:
    plain, packed = both
    wanted = models.tensors_of(plain)
    model = fewbit.load(packed, device="cpu").dequantize()
    same(dict(model.state_dict()), wanted)
    model.save_pretrained(tmp_path / "saved")
    same(models.tensors_of(tmp_path / "saved"), wanted)
    with packed_models.preferred("mxfp4"):
        config: Any = Mxfp4Config(dequantize=True)
        same(dict(AutoModelForCausalLM.from_pretrained(packed, quantization_config=config).state_dict()), wanted)


def test_layers_may_keep_ordinary_experts(packed: Path, tmp_path: Path) -> None:
    kept, changes = models.tensors_of(packed.with_name("plain")), dict[str, Tensor | None]()
    for leaf in ("gate_up_proj", "down_proj"):
        name = f"{EXPERTS}.{leaf}"
        changes |= {f"{name}_blocks": None, f"{name}_scales": None, name: kept[name]}
    packed_models.edit(packed, changes)
    model = fewbit.load(packed, device="cpu")
    assert not [name for name in packed_linears(model) if name.startswith(EXPERTS)]
    assert packed_linears(model)
    model.save_pretrained(tmp_path / "again")
    packed_models.same_files(tmp_path / "again", packed)


def test_inspect_counts_what_is_stored(both: tuple[Path, Path]) -> None:
    plain, packed = both
    found, whole = fewbit.inspect(packed), fewbit.inspect(plain)
    stored = models.tensors_of(packed)
    layers = sum(name.endswith("down_proj_blocks") for name in stored)
    assert (found.format, found.schemes) == ("mxfp4", {"mxfp4": 2 * layers})
    assert found.parameters == whole.parameters
    assert found.bits_per_weight_quantized == 4.25
    assert found.weights_bytes == found.file_bytes == sum(tensor.nbytes for tensor in stored.values())


DOWN = f"{EXPERTS}.down_proj"
BAD: dict[str, tuple[str, Callable[[Tensor], Tensor | None], str]] = {
    "NaN": ("_scales", lambda stored: torch.full_like(stored, 255), r"_scales has NaN"),
    "no scales": ("_scales", lambda stored: None, r"_scales is missing; .*_blocks needs it"),
    "no blocks": ("_blocks", lambda stored: None, r"_blocks is missing; .*_scales needs it"),
    "dtype": ("_blocks", lambda stored: stored.to(torch.int8), r"_blocks is int8"),
    "groups": ("_scales", lambda stored: stored[..., :-1], r"_scales is uint8"),
    "both": ("", lambda stored: torch.zeros(4, 64, 96), r" and .*down_proj_blocks hold the same weights"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_broken_file_is_named(case: str, packed: Path, tmp_path: Path) -> None:
    part, change, words = BAD[case]
    stored = models.tensors_of(packed)[f"{DOWN}{part or '_blocks'}"]
    packed_models.edit(packed, {f"{DOWN}{part}": change(stored)})
    with pytest.raises(FormatError, match=f"{DOWN}{words}"):
        fewbit.load(packed, device="cpu")
    with pytest.raises(FormatError, match=DOWN):
        fewbit.quantize(packed, tmp_path / "out", plan="nf4")
    if case != "NaN":  # headers do not say this
        with pytest.raises(FormatError, match=f"{DOWN}{words}"):
            fewbit.inspect(packed)


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["experts", "rows", "groups"])
def test_another_shape_than_the_models_is_named(axis: int, packed: Path) -> None:
    stored = models.tensors_of(packed)
    fewer = {f"{DOWN}{end}": stored[f"{DOWN}{end}"].narrow(axis, 0, 1) for end in ("_blocks", "_scales")}
    packed_models.edit(packed, dict(fewer))
    with pytest.raises(FormatError, match=f"{DOWN}_blocks and .*_scales hold weights of shape .*config.json requires"):
        fewbit.load(packed, device="cpu")


def test_experts_that_the_model_lacks_are_named(packed: Path) -> None:
    stored = models.tensors_of(packed)
    other = {f"model.layers.9.mlp.experts.down_proj{end}": stored[f"{DOWN}{end}"] for end in ("_blocks", "_scales")}
    packed_models.edit(packed, dict(other))
    with pytest.raises(FormatError, match=r"layers\.9\.mlp\.experts\.down_proj, which the model does not have"):
        fewbit.load(packed, device="cpu")


def test_other_weights_than_experts_are_decoded() -> None:
    specs = {f"model.layers.0.mlp.shared{end}": PartSpec((4, 64, 3, 16), torch.uint8) for end in ("_blocks", "_scales")}
    config = {"quant_method": "mxfp4"}
    assert decoded.layout_of(config, specs) is decoded.LAYOUTS["mxfp4"]
    assert (
        decoded.layout_of(config, {name.replace("shared", "experts.down_proj"): s for name, s in specs.items()}) is None
    )


def test_no_plan_writes_it(both: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="hold the fused experts of gpt-oss"):
        fewbit.quantize(both[0], tmp_path / "out", plan=Plan("p", "mxfp4", (Rule("*", "mxfp4"),)))
    assert not (tmp_path / "out").exists()
