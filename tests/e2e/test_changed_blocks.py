"""A block that somebody changes in any way computes what its own code computes, not what it was before."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fewbit as fb
from fewbit.models.decoding import compiled_blocks, decode
from fewbit.models.decoding.known import Known
from fewbit.plans.plan import find
from fewbit.system import native
from tests import architectures, models
from tests.e2e.test_compiled_blocks import apart, ids_of, load_unfused, outputs, own_code, replaced, replacements

pytestmark = [
    pytest.mark.skipif(isinstance(native.available(), str), reason="needs the compiled CPU library"),
    pytest.mark.usefixtures("rounded_activations"),
]
PARTS = (9, 1, 1, 4, 1)
PLANS = {
    "out": find("rtn-4bit").changed(scheme="int4-g32", format="gptq"),
    "out.gguf": find("q4_0").changed(method="rtn"),  # its embedding is packed, too
}


def write_to_data(block: Any) -> None:
    block.input_layernorm.weight.data.mul_(torch.linspace(0, 4, len(block.input_layernorm.weight)))


def assign_data(block: Any) -> None:
    weight = block.input_layernorm.weight
    weight.data = weight.data * torch.linspace(0, 4, len(weight))


def write_in_inference_mode(block: Any) -> None:
    with torch.inference_mode():
        weight = block.input_layernorm.weight
        weight.mul_(torch.linspace(0, 4, len(weight)))


def replace_a_weight(block: Any) -> None:
    weight = block.input_layernorm.weight
    block.input_layernorm.weight = nn.Parameter(weight * torch.linspace(0, 4, len(weight)))


def give_a_bias(block: Any) -> None:
    block.mlp.down_proj.bias = nn.Parameter(torch.linspace(-4, 4, block.mlp.down_proj.out_features))


def change_epsilon(block: Any) -> None:
    block.post_attention_layernorm.variance_epsilon = 100.0


def change_scale(block: Any) -> None:
    block.self_attn.scaling = 20.0


CHANGES = (
    *(write_to_data, assign_data, write_in_inference_mode, replace_a_weight),
    *(give_a_bias, change_epsilon, change_scale),
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda each: each.__name__)
def test_a_changed_block_runs_as_it_is(change: Callable[[Any], None], llama: Path) -> None:
    model, ids = load_unfused(llama), ids_of(1)
    assert replaced(model)
    before = outputs(model, ids, PARTS)
    for block in model.model.layers:
        change(block)
    ours = outputs(model, ids, PARTS)
    with own_code(model):
        theirs = outputs(model, ids, PARTS)
    assert apart(ours, theirs) < 1e-5
    assert apart(ours, before) > 0.05


def test_a_patched_class_is_noticed(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = load_unfused(llama), ids_of(1)
    assert replaced(model)
    kind = type(model.model.layers[0].mlp)
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: -2 * own(self, x))
    ours = outputs(model, ids, PARTS)
    with own_code(model):
        assert apart(ours, outputs(model, ids, PARTS)) < 1e-5


def test_dropout_counts_while_a_model_trains(tmp_path: Path) -> None:
    source = models.save(tmp_path / "model", "llama", attention_dropout=0.5)
    fb.quantize(source, tmp_path / "out", plan=PLANS["out"])
    model, ids = load_unfused(tmp_path / "out"), ids_of(1)
    assert replaced(model)
    model.train()
    assert apart(outputs(model, ids, PARTS)[1:], outputs(model, ids, PARTS)[1:]) > 0.01
    model.eval()
    assert apart(outputs(model, ids, PARTS), outputs(model, ids, PARTS)) == 0
    for block in model.model.layers:
        block.self_attn.train()
    assert apart(outputs(model, ids, PARTS)[1:], outputs(model, ids, PARTS)[1:]) > 0.01


def test_a_replaced_function_is_noticed(tmp_path: Path) -> None:
    """Gemma's activation is a function in an attribute of a module."""
    fb.quantize(models.save(tmp_path / "model", "gemma3"), tmp_path / "out", plan=PLANS["out"])
    model, ids = load_unfused(tmp_path / "out"), ids_of(1)
    assert replaced(model)
    before = outputs(model, ids, PARTS)
    for block in model.model.layers:
        block.mlp.act_fn.act = torch.relu
    ours = outputs(model, ids, PARTS)
    with own_code(model):
        assert apart(ours, outputs(model, ids, PARTS)) < 1e-5
    assert apart(ours, before) > 0.01


@pytest.mark.parametrize("name", PLANS)
def test_shared_memory_is_read_where_it_is(name: str, tmp_path: Path) -> None:
    """`share_memory` moves weights, and frees the memory where they were."""
    fb.quantize(models.save(tmp_path / "model", "llama"), tmp_path / name, plan=PLANS[name])
    model, texts = fb.load(tmp_path / name, dtype=torch.float32), [ids_of(1, seed=seed) for seed in (1, 2, 3)]
    compiled = replacements(model)
    before = [outputs(model, ids, PARTS) for ids in texts]
    model.share_memory()
    gc.collect()
    assert compiled
    assert not any(each.same() for each in compiled)
    found = [apart(outputs(model, ids, PARTS), own) for ids, own in zip(texts, before, strict=True)]
    assert sorted(found)[1] < 0.01  # as `from_own_code`


def test_an_embedding_in_shared_memory_is_read_there(tmp_path: Path) -> None:
    """A step decodes rows of a packed embedding without its module."""
    fb.quantize(models.save(tmp_path / "model", "llama"), tmp_path / "out.gguf", plan=PLANS["out.gguf"])
    model, ids = fb.load(tmp_path / "out.gguf", dtype=torch.float32), ids_of(1)
    replaced(model)
    hooks = next(hook.__self__ for hook in model._forward_pre_hooks.values())
    row = hooks.steps.outside._row
    before = outputs(model, ids, PARTS)
    assert not row.moved()
    model.get_input_embeddings().share_memory()
    assert row.moved()
    assert apart(outputs(model, ids, PARTS), before) == 0


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "granite_swa", "qwen3_moe"])
def test_steps_change_nothing_in_a_block(kind: str, tmp_path: Path) -> None:
    save = models.save if kind in models.FAMILIES else architectures.save
    fb.quantize(save(tmp_path / "model", kind), tmp_path / "out", plan=PLANS["out"])
    model = load_unfused(tmp_path / "out")
    outputs(model, ids_of(1), PARTS)
    assert compiled_blocks.computed(model)
    assert all(each.same() for each in replacements(model))


@pytest.mark.parametrize("buffer", [False, True])
def test_a_number_in_a_tensor_is_compared_too(buffer: bool) -> None:
    module, scale = nn.Module(), torch.tensor(2.0)
    module.register_buffer("scale", scale) if buffer else module.register_parameter("scale", nn.Parameter(scale))
    known = Known([module])
    assert known.same()
    scale.fill_(3)
    assert not known.same()


def test_a_module_with_the_id_of_another_is_another() -> None:
    """A fused model makes a new cache, and records a new graph, for other modules."""
    model = nn.Sequential(nn.ReLU())
    for _ in range(20):
        before = decode._wiring(model)
        del model._modules["0"]
        model._modules["0"] = nn.ReLU()
        assert decode._wiring(model) != before
