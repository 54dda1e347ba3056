"""PEFT's LoRA over packed weights is what it is over the same weights unpacked, for every scheme and kernel."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import fewbit
from fewbit.api import quantize
from fewbit.errors import PlanError
from fewbit.models.adapters import lora
from fewbit.models.adapters.lora import QLoraLinear
from fewbit.nn.choose import TOLERANCE
from fewbit.nn.layers import QLinear
from fewbit.schemes.base import QTensor, parse
from tests import models
from tests.contract.cases import EXAMPLES, ordinary, quantized, served, several_groups

pytestmark = [
    # What PEFT itself calls, transformers has given newer names.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]
IDS = torch.randint(3, models.VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))


def packed(spec: str, family: str = "llama", permuted: bool = False) -> tuple[Any, Any]:
    """A tiny model whose blocks hold `spec` by `QLinear`, and its twin with the same values unpacked, in float32."""
    plain = models.build(family, dtype="float32", hidden_size=256, intermediate_size=256).requires_grad_(False)
    twin, scheme = copy.deepcopy(plain), parse(spec)
    for name, module in list(plain.named_modules()):
        if isinstance(module, nn.Linear) and "layers" in name:
            seed = torch.Generator().manual_seed(len(name))
            order = torch.randperm(module.in_features, generator=seed) if permuted else None
            values = module.weight / 2  # so that rounding is amplified less from block to block
            weight = QTensor(scheme, (module.out_features, module.in_features), quantized(scheme, values), order)
            layer = QLinear(module.in_features, module.out_features, module.bias, name).adopt(weight, torch.float32)
            parent, _, leaf = name.rpartition(".")
            setattr(plain.get_submodule(parent), leaf, layer)
            models.with_weights(twin, {name: weight.dequantize()})
    return plain, twin


def fits(spec: str) -> bool:
    return parse(spec).why_not((256, 256)) is None


SPECS = [spec for spec in EXAMPLES if fits(spec)]


def adapted(model: Any, **changes: Any) -> Any:
    """`model` with a LoRA on all linears that already does something, the same for the same shapes."""
    made = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return made


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found
    assert all("lora_" in name for name in found)
    return found


def same(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = TOLERANCE[torch.float32]) -> None:
    assert got.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert (got[name] - grad).norm() <= tolerance * grad.norm(), name


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("permuted", [False, True])
def test_gradients_are_those_of_the_unpacked_model(spec: str, permuted: bool) -> None:
    model, twin = (adapted(m) for m in packed(spec, permuted=permuted))
    assert sum(isinstance(m, QLoraLinear) for m in model.modules()) == 14
    same(gradients(model), gradients(twin))
    assert (models.logits(model, IDS) - models.logits(twin, IDS)).abs().max() < 1e-4


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}], ids=str)
@pytest.mark.filterwarnings("ignore:`lora_bias=True`")
def test_variants_of_lora(changes: dict[str, Any]) -> None:
    model, twin = (adapted(m, **changes) for m in packed(SPECS[0]))
    same(gradients(model), gradients(twin))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    model = adapted(packed(SPECS[0])[0]).train()
    wanted = gradients(model)
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    same(gradients(model), wanted, tolerance=0)  # the same operations, computed again


def wide(spec: str) -> list[tuple[int, int]]:
    return [several_groups(spec, 32)]


@served(wide, specs=[*EXAMPLES, "int4-g32-sym", "int4-g256-sym"])
def test_every_kernel_has_the_gradient_of_the_values(name: str, spec: str, dtype: torch.dtype) -> None:
    scheme, (shape,) = parse(spec), wide(spec)
    weight = QTensor(scheme, shape, quantized(scheme, ordinary(*shape)))
    layer = QLinear(shape[1], shape[0], None).adopt(weight, dtype, name)
    for strided in (False, True):
        x = torch.randn(4, shape[1], 6, generator=torch.Generator().manual_seed(1)).to(dtype).transpose(1, 2)
        x = (x if strided else x.contiguous()).requires_grad_()
        seed = torch.randn(shape[0], 4, 6, generator=torch.Generator().manual_seed(2)).to(dtype).permute(1, 2, 0)
        y = checkpoint(layer, x, use_reentrant=False) if strided else layer(x)
        y.backward(seed)
        exact = seed.float() @ weight.dequantize()
        assert x.grad is not None
        assert x.grad.dtype == dtype
        assert (x.grad.float() - exact).norm() <= TOLERANCE[dtype] * exact.norm()


def test_autocast_is_obeyed_as_by_any_linear() -> None:
    weight = QTensor(parse("int4-g32"), (32, 96), quantized(parse("int4-g32"), ordinary(32, 96)))
    layer, plain = QLinear(96, 32, None).adopt(weight, torch.bfloat16), nn.Linear(96, 32, bias=False)
    plain.weight.data = weight.dequantize()
    x = torch.randn(5, 96).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, other = layer(x), plain(x)
    assert y.dtype == other.dtype == torch.bfloat16
    assert layer.dtype == torch.bfloat16  # not prepared anew for each call
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert (x.grad - torch.ones(5, 32) @ weight.dequantize()).norm() <= 1e-2 * x.grad.norm()


def test_what_would_change_the_weights_is_refused() -> None:
    model = packed(SPECS[0])[0]
    for init in ("pissa", "olora"):
        with pytest.raises(PlanError, match=init):
            get_peft_model(copy.deepcopy(model), LoraConfig(target_modules="all-linear", init_lora_weights=init))
    with pytest.raises(PlanError) as refusal:
        adapted(model).merge_and_unload()
    assert "fewbit merge" in refusal.value.hint


def test_an_adapter_may_be_added_switched_and_taken_off() -> None:
    model = adapted(packed(SPECS[0])[0]).eval()
    with_it = models.logits(model, IDS)
    with model.disable_adapter():
        without = models.logits(model, IDS)
    assert not torch.equal(with_it, without)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("second")
    assert torch.equal(models.logits(model, IDS), without)  # it does nothing yet
    assert torch.equal(models.logits(model.unload(), IDS), without)


# --- from files ---


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("lora")
    model = models.save(place / "model", "llama", dtype="float32")
    quantize.quantize(model, place / "quantized", plan="rtn-4bit")
    return model, place / "quantized"


FRESH = """
import sys, torch, fewbit
from peft import PeftModel
from transformers import AutoModelForCausalLM
ids, wanted = torch.load(sys.argv[3])
for model in (fewbit.load(sys.argv[1]), AutoModelForCausalLM.from_pretrained(sys.argv[1])):
    with torch.inference_mode():
        assert not torch.equal(model(ids).logits, wanted)
        assert torch.equal(PeftModel.from_pretrained(model, sys.argv[2]).eval()(ids).logits, wanted)
"""


def test_an_adapter_is_the_same_in_a_fresh_process(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model = adapted(fewbit.load(folders[1])).eval()
    model.save_pretrained(tmp_path / "adapter")
    torch.save((IDS, models.logits(model, IDS)), tmp_path / "wanted")
    arguments = [folders[1], tmp_path / "adapter", tmp_path / "wanted"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FRESH, *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr


def test_an_adapter_fits_the_packed_and_the_plain_model(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for one, other in (folders, folders[::-1]):
        adapted(fewbit.load(one)).save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(fewbit.load(other), tmp_path / "adapter")
        wanted = adapted(fewbit.load(other))
        assert torch.equal(models.logits(loaded.eval(), IDS), models.logits(wanted.eval(), IDS))


def test_pefts_own_way_to_train_packed_models(folders: tuple[Path, Path], tmp_path: Path) -> None:
    prepare: Any = prepare_model_for_kbit_training  # which is not typed
    model = prepare(
        AutoModelForCausalLM.from_pretrained(folders[1]), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    assert model.model.gradient_checkpointing
    assert model.model.layers[0].gradient_checkpointing
    model = adapted(model)
    before = model(input_ids=IDS, labels=IDS).loss.item()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=10, learning_rate=1e-2, report_to="none", disable_tqdm=True, use_cpu=True
    )
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in IDS])
    trainer.train()
    assert model(input_ids=IDS, labels=IDS).loss.item() < 0.8 * before
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").exists()


def test_a_second_registration_changes_nothing() -> None:
    def replaced() -> list[Any]:
        prepare = [vars(module)["prepare_model_for_kbit_training"] for module in (peft, peft.utils, peft.utils.other)]
        return [LoraConfig.__post_init__, *prepare]

    before = replaced()
    lora.register()
    assert replaced() == before


def test_training_packed_weights_without_an_adapter_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adapters"):
        Trainer(fewbit.load(folders[1]), TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True))
