"""GPTQ checkpoints as others write them, made here bit by bit from the format's description, load as what they mean."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import fewbit
from fewbit.nn.layers import QLinear
from tests import models
from tests.packed_models import preferred


@dataclass(frozen=True)
class Layout:
    """What a writer may choose."""

    family: str = "mistral"
    bits: int = 4
    group: int = 32  # -1: the whole row
    sym: bool = True
    desc_act: bool = False
    v2: bool = False
    g_idx: bool = True
    sharded: bool = False
    bare: bool = False  # names without the base model's prefix
    zero_biases: bool = False  # tensors of noughts for linears that have no bias, as early writers left
    skip: str = "-"  # modules whose name ends so stay as they are
    head: int = 0  # the bits of the output head, 0: it stays as it is
    tied: bool = False  # what config.json says of the head
    auto_round: bool = False  # with AutoRound's config


LAYOUTS = {
    "v1 symmetric": Layout(),
    "v1 asymmetric": Layout(sym=False),
    "v2 symmetric": Layout(v2=True),
    "v2 asymmetric": Layout(v2=True, sym=False),
    "act-order": Layout(desc_act=True),
    "act-order, v2, asymmetric": Layout(desc_act=True, v2=True, sym=False),
    "act-order without order": Layout(desc_act=True, g_idx=False),
    "whole rows": Layout(group=-1),
    "whole rows, act-order, asymmetric": Layout(group=-1, desc_act=True, sym=False),
    "no g_idx": Layout(g_idx=False),
    "shards": Layout(sharded=True, desc_act=True),
    "no prefix": Layout(bare=True, sharded=True),
    "Conv1D, no prefix": Layout(family="gpt2-bare", desc_act=True),
    "biases": Layout(family="qwen2", sym=False),
    "biases of nought": Layout(zero_biases=True),
    "fused": Layout(family="phi3", desc_act=True),
    "some left out": Layout(skip="down_proj"),
    "head too": Layout(head=4),
    "head too, called tied": Layout(head=4, tied=True),
    "head in 8 bits": Layout(head=8),
    "head in 8 bits, AutoRound": Layout(head=8, auto_round=True),
    "head in 8 bits, AutoRound, called tied": Layout(head=8, auto_round=True, tied=True),
    "2 bits": Layout(bits=2, sym=False),
    "3 bits": Layout(bits=3),
    "3 bits, asymmetric, act-order": Layout(bits=3, sym=False, desc_act=True),
    "8 bits": Layout(bits=8),
    "8 bits, asymmetric, v2": Layout(bits=8, sym=False, v2=True),
}


def stream(values: Tensor, bits: int) -> Tensor:
    """Rows of values as rows of int32 words: a little-endian stream of `bits` bits each."""
    ones = np.unpackbits(values.numpy().astype("<u1")[..., None], axis=-1, bitorder="little")[..., :bits]
    packed = np.packbits(ones.reshape(values.shape[0], -1), axis=-1, bitorder="little")
    return torch.from_numpy(packed.view("<i4").astype(np.int32))


def quantized(w: Tensor, layout: Layout, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Some weight of this shape [N, K]: its tensors on disk, and the weight that they mean."""
    (n, k), bits = w.shape, layout.bits
    groups = 1 if layout.group == -1 else k // layout.group
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (n, k), generator=generator)
    scale = (0.01 + 0.02 * torch.rand(groups, n, generator=generator)).half() * (8 / 2**bits)
    scale = scale.half()
    zero = torch.full((groups, n), 2 ** (bits - 1))
    if not layout.sym:  # every value that can be stored, nought too
        zero = torch.randint(2**bits, (groups, n), generator=generator)
    group_of = torch.arange(k) * groups // k
    if layout.desc_act and layout.g_idx:
        group_of = group_of[torch.randperm(k, generator=generator)]
    stored_zero = zero if layout.v2 else (zero - 1) % 2**bits
    tensors = {
        "qweight": stream(codes, bits).T.contiguous(),
        "qzeros": stream(stored_zero, bits),
        "scales": scale,
        "g_idx": group_of.int(),
    }
    if not layout.g_idx:
        del tensors["g_idx"]
    meant = (codes - zero.T[:, group_of]) * scale.T[:, group_of].float()
    return tensors, meant


def write(folder: Path, layout: Layout) -> dict[str, Tensor]:
    """A model of that family in that layout; returns the weights [N, K] that its linears have."""
    models.save(folder, layout.family)
    model = models.original(folder)
    models.edit_json(folder / "config.json", tie_word_embeddings=layout.tied or model.config.tie_word_embeddings)
    meant: dict[str, Tensor] = {}
    tensors = load_file(folder / "model.safetensors")
    prefix = "transformer." if layout.family == "gpt2-bare" else ""
    for seed, (name, module) in enumerate(model.named_modules()):
        inside = any(part.isdigit() for part in name.split("."))
        linear = type(module).__name__ in ("Linear", "Conv1D") and (inside or layout.head > 0)
        if not linear or name.endswith(layout.skip):
            continue
        own = layout if inside else replace(layout, bits=layout.head)
        parts, meant[name] = quantized(models.linear_weight(module), own, seed)
        key = name.removeprefix(prefix)
        del tensors[f"{key}.weight"]
        tensors |= {f"{key}.{suffix}": part for suffix, part in parts.items()}
        if layout.zero_biases:
            tensors[f"{key}.bias"] = torch.zeros(meant[name].shape[0], dtype=torch.float16)
    if layout.bare:
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    if layout.sharded:
        where = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(sorted(tensors))}
        for file in set(where.values()):
            save_file({n: t for n, t in tensors.items() if where[n] == file}, folder / file, {"format": "pt"})
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": where}), encoding="utf-8"
        )
    else:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": layout.bits,
        "group_size": layout.group,
        "damp_percent": 0.1,
        "desc_act": layout.desc_act,
        "static_groups": False,
        "sym": layout.sym,
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": "model",
    }
    if layout.head:  # as gptqmodel names it
        said = {"bits": layout.head, "group_size": layout.group, "sym": layout.sym, "desc_act": False}
        config |= {"lm_head": True, "dynamic": {"lm_head": said}}
    if layout.auto_round:
        config = {key: config[key] for key in ("bits", "group_size", "sym")}
        config |= {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
        config["extra_config"] = {"lm_head": said}
    if layout.v2:
        config["checkpoint_format"] = "gptq_v2"
    models.edit_json(folder / "config.json", quantization_config=config)
    return meant


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_foreign_checkpoint_means_what_it_says(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    meant = write(tmp_path / "theirs", layout)
    models.save(tmp_path / "plain", layout.family)
    ids = torch.randint(3, models.VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
    expected = models.logits(models.with_weights(models.original(tmp_path / "plain"), meant), ids)

    with preferred("auto-round"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32).eval()
    layers = {key: module for key, module in model.named_modules() if isinstance(module, QLinear)}
    assert layers.keys() == meant.keys()
    for key, layer in layers.items():
        assert torch.equal(layer.qtensor().dequantize(), meant[key]), key
    got = models.logits(model, ids)
    assert float((got - expected).norm() / expected.norm()) < 1e-5

    model.save_pretrained(tmp_path / "again")
    again = models.logits(fewbit.load(tmp_path / "again", dtype=torch.float32), ids)
    assert torch.equal(again, got)

    found = fewbit.inspect(tmp_path / "theirs")
    assert sum(found.schemes.values()) == len(meant)
    assert found.quantized_parameters == sum(w.numel() for w in meant.values())


def test_a_group_of_uneven_size_is_refused(tmp_path: Path) -> None:
    write(tmp_path, Layout(desc_act=True))
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.g_idx"
    tensors[name][int((tensors[name] == 0).nonzero()[0])] = 1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(fewbit.FormatError, match=name):
        fewbit.load(tmp_path)
