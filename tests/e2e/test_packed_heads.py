"""An output head that is quantized, in a folder: beside an embedding that is not, whatever config.json says of ties."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import fewbit
from fewbit.nn.layers import QLinear
from tests import models, packed_models

IDS = torch.arange(3, 27)[None]


def compressed_tensors(folder: Path, layout: str, *, tied: bool) -> Any:
    """A model whose blocks are in 4 bits and whose head has another layout, as llm-compressor writes it.

    Returns it with the weights that it means.
    """
    models.save(folder / "plain", "llama", tie_word_embeddings=tied, dtype="float32")
    floats = models.tensors_of(folder / "plain")
    model = models.original(folder / "plain")
    stored, meant = dict[str, Tensor](), dict[str, Tensor]()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            packer, _, _ = packed_models.LAYOUTS[layout if name == "lm_head" else "ct-int4"]
            parts, meant[name] = packer(module.weight)
            stored |= {f"{name}.{part}": each.contiguous() for part, each in parts.items()}
            floats.pop(f"{name}.weight", None)
    _, blocks, _ = packed_models.LAYOUTS["ct-int4"]
    _, head, _ = packed_models.LAYOUTS[layout]
    groups = {
        "group_0": {**blocks["config_groups"]["group_0"], "format": "pack-quantized"},
        "group_1": {**head["config_groups"]["group_0"], "targets": ["re:.*lm_head"]},
    }
    config = {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": []}
    packed_models.written(folder / "plain", folder / "packed", floats, floats | stored, config)
    untied = models.build("llama", tie_word_embeddings=False, dtype="float32")
    untied.model.load_state_dict(model.model.state_dict())
    return models.with_weights(untied, meant)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", ["ct-int4", "ct-fp8"])
def test_it_is_read_packed_whatever_the_config_ties(layout: str, tied: bool, tmp_path: Path) -> None:
    wanted = models.logits(compressed_tensors(tmp_path, layout, tied=tied), IDS)
    for load in (fewbit.load, AutoModelForCausalLM.from_pretrained):
        model: Any = load(tmp_path / "packed", dtype=torch.float32)
        assert isinstance(model.lm_head, QLinear)
        assert isinstance(model.model.embed_tokens, torch.nn.Embedding)
        got = models.logits(model, IDS)
        assert float((got - wanted).norm() / wanted.norm()) < 1e-5
        assert torch.equal(model.generate(IDS, max_new_tokens=1, do_sample=False)[0, -1], wanted[0, -1].argmax())
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(models.logits(fewbit.load(tmp_path / "again", dtype=torch.float32), IDS), got)
    assert not fewbit.load(tmp_path / "again").config.tie_word_embeddings


def test_it_is_decoded_beside_the_embedding(tmp_path: Path) -> None:
    wanted = models.logits(compressed_tensors(tmp_path, "ct-fp8", tied=True), IDS)
    fewbit.convert(tmp_path / "packed", tmp_path / "dense", to="dense")
    got = models.logits(models.original(tmp_path / "dense"), IDS)
    assert float((got - wanted).norm() / wanted.norm()) < 1e-5
