"""PEFT, transformers and trl do with a packed model what they do with the same model unpacked, or say why not."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import get_peft_model
from peft.tuners.lora import config as lora
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.integrations import peft as integration

import fewbit
from fewbit.api import quantize
from fewbit.errors import PlanError
from fewbit.nn.layers import QLinear
from tests import models
from tests.unit.test_lora import IDS, packed

SPECS = ["llm.int8", "nf4", "int4-g32-sym", "int4-g32", "q4_k"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning"),  # ShadowPEFT's own
]

_LINEARS: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
# What PEFT's configs need beyond linears to target. None: it needs what these tests do not have, and reads no weight.
NEEDS: dict[str, dict[str, Any] | None] = {
    "ADALORA": {**_LINEARS, "total_step": 10},
    "ADAMSS": None,  # scikit-learn
    "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 1},
    "C3A": {**_LINEARS, "block_size": 32},
    "CARTRIDGE": None,
    "CPT": None,
    "IA3": {**_LINEARS, "feedforward_modules": []},
    "LN_TUNING": {},
    "MULTITASK_PROMPT_TUNING": None,
    "POLY": None,
    "PREFIX_TUNING": None,
    "PROMPT_TUNING": None,
    "P_TUNING": None,
    "SHADOW": {},
    "TRAINABLE_TOKENS": {"token_indices": [3, 4]},
    "VBLORA": {**_LINEARS, "vector_length": 32, "num_vectors": 8},
    "XLORA": None,
}
REFUSED = {"GLORA"}  # PEFT's own sentence: it takes nothing but nn.Linear itself
TUNERS = [member.value for member in peft.PeftType if NEEDS.get(member.value, _LINEARS) is not None]


def config(kind: str, **changes: Any) -> Any:
    known: Any = peft.PEFT_TYPE_TO_CONFIG_MAPPING
    return known[kind](task_type="CAUSAL_LM", **{**(NEEDS.get(kind, _LINEARS) or {}), **changes})


def trained(model: Any, kind: str, **changes: Any) -> tuple[Any, Tensor, dict[str, Tensor]]:
    """The model with an adapter that does something, its logits, and the gradients of the adapter."""
    torch.manual_seed(0)
    adapted = get_peft_model(model, config(kind, **changes))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape))
    torch.manual_seed(2)  # some variants of LoRA draw noise
    out: Any = adapted(input_ids=IDS, labels=IDS)
    out.loss.backward()
    return adapted, out.logits.detach(), {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", TUNERS)
def test_every_tuner_reads_the_values(kind: str, spec: str) -> None:
    model, twin = packed(spec)
    if kind in REFUSED:
        with pytest.raises(ValueError, match=r"is not a plain torch\.nn\.Linear"):
            trained(model, kind)
        return
    adapted, logits, gradients = trained(model, kind)
    _, wanted, right = trained(twin, kind)
    assert (logits - wanted).norm() <= 1e-5 * wanted.norm()
    assert gradients.keys() == right.keys()
    apart = sum(float((gradients[name] - grad).norm() ** 2) for name, grad in right.items()) ** 0.5
    assert apart <= 1e-4 * sum(float(grad.norm() ** 2) for grad in right.values()) ** 0.5
    _refuses_or_keeps(adapted, logits)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "miss bat": ("MISS", {"init_weights": "bat"}),
    "miss mini": ("MISS", {"init_weights": "mini"}),
    "miss random": ("MISS", {"init_weights": False}),
    "mica": ("LORA", {"init_lora_weights": "mica"}),
    "alora": ("LORA", {"alora_invocation_tokens": [3]}),
    "velora": ("LORA", {"velora_config": lora.VeloraConfig()}),
    "monteclora": ("LORA", {"monteclora_config": lora.MontecloraConfig()}),
    "bd-lora": (
        "LORA",
        {"use_bdlora": lora.BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2)},
    ),
    "dora": ("LORA", {"use_dora": True}),
    "bias": ("LORA", {"lora_bias": True}),
    "parameters": ("LORA", {"target_modules": [], "target_parameters": ["q_proj.weight"]}),
    "rows": ("LORA", {"trainable_token_indices": [3, 4]}),
    "saved head": ("LORA", {"modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_tuners_read_the_values(variant: str, spec: str) -> None:
    kind, changes = VARIANTS[variant]
    model, twin = packed(spec)
    adapted, logits, _ = trained(model, kind, **changes)
    expected = trained(twin, kind, **changes)[1]
    assert (logits - expected).norm() <= 1e-5 * expected.norm()
    _refuses_or_keeps(adapted, logits)


@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "lora_ga"])
def test_an_init_that_changes_weights_is_refused(init: str) -> None:
    with pytest.raises(PlanError, match=f"init_lora_weights='{init}' changes the weights"):
        trained(packed("nf4")[0], "LORA", init_lora_weights=init)


def test_a_variant_that_changes_weights_is_refused() -> None:
    with pytest.raises(PlanError, match="q_proj is packed, and cannot be changed"):
        trained(packed("nf4")[0], "LORA", kasa_config=lora.KasaConfig())


@pytest.mark.parametrize("spec", SPECS)
def test_packed_weights_cannot_be_trained(spec: str) -> None:
    model = packed(spec)[0]
    said = "packed weights cannot be trained"
    with pytest.raises(PlanError, match=said) as raised:
        get_peft_model(copy.deepcopy(model), config("LORA", modules_to_save=["o_proj"]))
    assert "`modules_to_save`" in raised.value.hint
    with pytest.raises(PlanError, match=said):
        model.requires_grad_(True)
    layer = model.model.layers[0].self_attn.q_proj
    with pytest.raises(PlanError, match=said):
        layer.held.requires_grad = True
    layer.requires_grad_(False)
    layer.held.requires_grad = False
    assert not layer.held.requires_grad


def _refuses_or_keeps(adapted: Any, logits: Tensor) -> None:
    """Merging is refused before a weight changes; it may work where no packed weight is merged into."""
    layers = [module for module in adapted.modules() if isinstance(module, QLinear)]
    assert layers
    before = [[part.clone() for part in layer.prepared] for layer in layers]
    with suppress(PlanError, AttributeError, NotImplementedError, ValueError):
        adapted.merge_adapter()
    for layer, parts in zip(layers, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(layer.prepared, parts, strict=True))


def test_a_weight_reads_as_numbers() -> None:
    model, twin = packed("nf4")
    weight, right = model.lm_head.weight, twin.lm_head.weight
    assert weight is right or torch.equal(weight, right)
    q, wanted = model.model.layers[0].self_attn.q_proj.weight, twin.model.layers[0].self_attn.q_proj.weight
    assert isinstance(q, nn.Parameter)
    assert (q.shape, q.dtype, q.numel()) == (wanted.shape, wanted.dtype, wanted.numel())
    assert torch.equal(q.data.clone(), wanted)
    assert torch.equal(q[3:5] * 2, wanted[3:5] * 2)
    assert type(q[3:5] * 2) is type(q[3:5].clone()) is Tensor
    assert q[3:5].clone().zero_().sum() == 0
    assert torch.equal(copy.deepcopy(q[3:5]), wanted[3:5])
    assert q.T[2].numpy().tolist() == wanted.T[2].tolist()
    assert torch.equal(nn.functional.linear(torch.eye(256), q), wanted.T)


def _data(layer: Any) -> None:
    layer.weight.data = torch.zeros(256, 256)


def _item(layer: Any) -> None:
    layer.weight[0, 0] = 1


def _replace(layer: Any) -> None:
    layer.weight = nn.Parameter(torch.zeros(256, 256))


WRITES: dict[str, Callable[[Any], object]] = {
    "data": _data,
    "item": _item,
    "replace": _replace,
    "add_": lambda layer: layer.weight.data.add_(1),
    "copy_": lambda layer: layer.weight.copy_(torch.zeros(256, 256)),
    "row": lambda layer: layer.weight[0].fill_(1),
    "item of a row": lambda layer: layer.weight[0].__setitem__(0, 1),
    "slice of data": lambda layer: layer.weight.data[:2].copy_(torch.zeros(2, 256)),
    "data of a slice": lambda layer: layer.weight[:2].data.zero_(),
    "transpose": lambda layer: layer.weight.T.mul_(2),
    "view": lambda layer: layer.weight.view(-1).add_(1),
    "chunk": lambda layer: layer.weight.chunk(2)[1].zero_(),
    "detached": lambda layer: layer.weight.detach()[1].zero_(),
    "out": lambda layer: torch.zeros(256, out=layer.weight[0]),
    "index_put_": lambda layer: layer.weight[0].index_put_((torch.tensor([1]),), torch.ones(1)),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_packed_weight_cannot_be_written(write: str) -> None:
    layer = packed("int4-g32")[0].model.layers[0].self_attn.q_proj
    before = layer.held.clone()
    with pytest.raises(PlanError, match="q_proj is packed, and cannot be changed"):
        WRITES[write](layer)
    assert torch.equal(layer.held, before)


@pytest.mark.parametrize("spec", SPECS)
def test_packed_models_count_weights(spec: str) -> None:
    model, twin = packed(spec)
    assert model.num_parameters() == twin.num_parameters()
    assert sum(p.numel() for p in copy.deepcopy(model).parameters()) == twin.num_parameters()
    held = sum(p.nbytes for p in model.parameters())
    assert model.get_memory_footprint(return_buffers=False) == pytest.approx(held)
    assert sum(p.numel() * p.element_size() for p in model.parameters()) == pytest.approx(held)
    assert get_peft_model(model, config("LORA")).get_nb_trainable_parameters() == (
        get_peft_model(twin, config("LORA")).get_nb_trainable_parameters()
    )


@pytest.mark.parametrize("plan", ["nf4", "int8", "rtn-4bit"])
def test_no_flag_asks_for_bitsandbytes(plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = models.save(tmp_path / "plain", "llama")
    quantize.quantize(plain, tmp_path / "packed", plan=plan)
    model = fewbit.load(tmp_path / "packed", device="cpu")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # whoever imports it now gets an ImportError
    assert model.num_parameters() == AutoModelForCausalLM.from_pretrained(plain).num_parameters()
    assert model.to("cpu") is model
    prepare: Any = peft.prepare_model_for_kbit_training
    prepared = prepare(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.model.gradient_checkpointing
    adapted = get_peft_model(prepared, config("LORA"))
    arguments = TrainingArguments(str(tmp_path / "out"), max_steps=1, report_to="none", disable_tqdm=True, use_cpu=True)
    Trainer(adapted, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in IDS]).train()


def test_initializing_leaves_packed_weights() -> None:
    model = packed("nf4")[0]
    layer = model.model.layers[0].self_attn.q_proj
    before = layer.held.clone()
    model._init_weights(layer)  # as transformers does where a checkpoint lacks a tensor
    assert torch.equal(layer.held, before)


@pytest.mark.parametrize("plan", ["q4_0", "rtn-4bit"])
def test_add_adapter_saves_the_adapter(plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers 5.24 wants PEFT 0.22, which is not published; 5.17 takes 0.20. What is tested is the same in both.
    monkeypatch.setattr(integration, "check_peft_version", lambda **_: None)
    plain = models.save(tmp_path / "plain", "llama", dtype="float32")
    file = {"gguf_file": "model.gguf"} if plan == "q4_0" else {}
    packed_model = tmp_path / "packed"
    quantize.quantize(plain, packed_model / "model.gguf" if file else packed_model, plan=plan)
    model: Any = AutoModelForCausalLM.from_pretrained(packed_model, **file)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    wanted = models.logits(model, IDS)
    model.save_pretrained(tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()} - {"generation_config.json", "README.md"}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    again: Any = AutoModelForCausalLM.from_pretrained(packed_model, **file)
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(models.logits(again, IDS), wanted)
