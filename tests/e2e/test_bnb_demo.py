"""LLM.int8() on the demo model: as far from the original as bitsandbytes is; nearer with exact activations; and what
the rule for outliers is there for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from fewbit.nn.layers import QLinear
from fewbit.schemes.base import QTensor, parse
from fewbit.texts import sources, windows
from tests import models

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
TOKENS = 384


def divergence(wanted: Tensor, found: Tensor) -> float:
    """Mean KL divergence over the positions."""
    p, q = wanted.float().log_softmax(-1), found.float().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module")
def ids(demo: Path) -> Tensor:
    text = sources.load_text("pydoc", "evaluation")
    return windows.windows(windows.encode(text, AutoTokenizer.from_pretrained(demo)), TOKENS, 1)


@pytest.fixture(scope="module")
def wanted(demo: Path, ids: Tensor) -> Tensor:
    return models.logits(models.original(demo), ids)


@pytest.fixture(scope="module")
def unplanted(demo: Path, ids: Tensor, wanted: Tensor) -> float:
    """The divergence of LLM.int8() as it is."""
    return divergence(wanted, models.logits(quantized(models.original(demo), "llm.int8", "llm_int8"), ids))


def quantized(model: Any, spec: str, kernel: str) -> Any:
    """The model, its blocks' linears quantized in place."""
    for name, linear in list(model.model.named_modules()):
        if isinstance(linear, nn.Linear):
            if isinstance(linear, QLinear):
                parts = linear.qtensor().parts
            else:
                codes, grids = parse(spec).nearest(linear.weight)
                parts = parse(spec).pack(codes, grids)
            made = QLinear(linear.in_features, linear.out_features, linear.bias, name)
            made.adopt(QTensor(parse(spec), (linear.out_features, linear.in_features), parts), torch.float32, kernel)
            model.model.set_submodule(name, made)
    return model


def plant(model: Any, channel: int, factor: float) -> None:
    """Make one channel that attention and MLP read larger, without changing what the model computes."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            norm.weight[channel] *= factor
            for linear in readers:
                linear.weight[:, channel] /= factor


def test_as_far_as_theirs_and_nearer_with_exact_activations(
    demo: Path, ids: Tensor, wanted: Tensor, unplanted: float
) -> None:
    config = BitsAndBytesConfig(load_in_8bit=True)
    peer = AutoModelForCausalLM.from_pretrained(demo, quantization_config=config, dtype=torch.float32)
    theirs = divergence(wanted, models.logits(peer, ids))
    exact = divergence(wanted, models.logits(quantized(models.original(demo), "llm.int8", "reference"), ids))
    print(f"bitsandbytes {theirs:.5f}, llm_int8 {unplanted:.5f}, exact activations {exact:.5f}")
    assert unplanted == pytest.approx(theirs, rel=0.05)
    assert exact <= 5e-3


def test_outlier_columns_are_what_the_threshold_is_for(
    demo: Path, ids: Tensor, wanted: Tensor, unplanted: float
) -> None:
    model = models.original(demo)
    plant(model, 100, 28.0)
    assert divergence(wanted, models.logits(model, ids)) < 1e-5
    with_rule = divergence(wanted, models.logits(quantized(model, "llm.int8", "llm_int8"), ids))
    without = divergence(wanted, models.logits(quantized(model, "llm.int8-t0", "llm_int8"), ids))
    print(f"unplanted {unplanted:.5f}, planted with the rule {with_rule:.5f}, without {without:.5f}")
    assert with_rule <= 1.5 * unplanted
    assert without >= 5 * unplanted
