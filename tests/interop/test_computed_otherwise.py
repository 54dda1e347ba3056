"""Types that llama.cpp computes otherwise than transformers, as fewbit says when it refuses them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer
from transformers.models.dots3_note import modeling_dots3_note
from transformers.models.hy_v4 import modeling_hy_v4

from fewbit.formats.containers.gguf import GgufFile, GgufWriter
from fewbit.models.gguf.architectures import REFUSED
from fewbit.models.gguf.tokenizer import to_metadata
from tests import gguf_files, models
from tests.interop import converter
from tests.interop.llama_cpp import computed

pytest.importorskip("llama_cpp", reason="make interop installs llama-cpp-python")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(not converter.SDIST.exists(), reason="make interop downloads llama.cpp's source"),
    pytest.mark.filterwarnings("ignore"),
]

_LATENT = {"num_key_value_heads": 4, "qk_nope_head_dim": 24, "kv_lora_rank": 32, "q_lora_rank": 32}
_INDEXER = {"index_n_heads": 8, "index_head_dim": 64, "mlp_layer_types": ["dense", "sparse", "sparse"]}
_HY4 = {
    **_LATENT,
    **_INDEXER,
    "num_hidden_layers": 3,
    "head_dim": 8,
    "index_topk": 64,
    "indexer_types": ["full", "shared", "full"],
    "hc_mult": 2,
}
_WINDOW = {
    "num_attention_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 48,
    "head_dim": 24,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
_DOTS3 = {
    **_LATENT,
    **_INDEXER,
    "num_hidden_layers": 3,
    "head_dim": 32,
    "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
    "shared_experts_intermediate_size": 32,
    **{f"swa_{key}": value for key, value in _WINDOW.items()},
    "swa_num_key_value_heads": 2,
}
# Linear attention, and one layer with an indexer of blocks of 4 tokens
_QWEN4: dict[str, Any] = {
    "vocab_size": 292,  # transformers adds a token to such tokenizers
    "num_hidden_layers": 4,
    "head_dim": 32,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 64,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 8,
    "output_gate_type": "sigmoid",
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
# Entries of published config.json files that the converter reads and transformers no longer writes; None: not there
_PUBLISHED: dict[str, dict[str, Any]] = {
    "hy_v4": {"first_k_dense_replace": 1},
    "qwen4_exp_text": {"layer_types": _QWEN4["layer_types"]},
    "dots3_note_text": {
        **{f"swa_{key}": value for key, value in _WINDOW.items()},
        "swa_qk_rope_head_dim": 8,
        "scoring_func": "sigmoid",
        "apply_mla_qkv_lora_rescale": True,
        "sliding_window_size": 16,
        "first_k_dense_replace": 1,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "per_layer_config": None,
        "rope_parameters": None,
        "rope_theta": 80000000.0,
        "swa_rope_theta": 50000.0,
    },
}


def by_neighbours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """RoPE that turns columns 2i and 2i + 1 together."""
    half = cos.shape[-1] // 2
    cos, sin = cos[..., :half].unsqueeze(unsqueeze_dim), sin[..., :half].unsqueeze(unsqueeze_dim)

    def turned(x: Tensor) -> Tensor:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)

    return turned(q), turned(k)


def by_halves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """RoPE that turns columns i and i + half the width together."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    return turned(q), turned(k)


def published(folder: Path) -> None:
    """Name the tensors as in the published model: transformers saves some of them under names that no model has."""
    path = folder / "model.safetensors"
    renamed = {}
    for name, tensor in load_file(path).items():
        name = name.replace("model.hc_pre.hc_head", "model.hc_head")
        name = re.sub(r"hc_pre\.(hc_\w+_layer)\.hc_", r"\1.hc_pre.hc_", name)
        renamed[re.sub(r"(mlp\..*)linear_gate", r"\1gate_proj", name)] = tensor
    save_file(renamed, path, metadata={"format": "pt"})


def there(kind: str, folder: Path, place: Path, ids: Tensor) -> Tensor:
    """llama.cpp's logits for what its converter makes of the model in a folder, which is changed."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    published(folder)
    converter.convert(converter.unpacked(place), folder, place / "theirs.gguf", _PUBLISHED[kind])
    theirs = GgufFile(place / "theirs.gguf")
    keys = theirs.metadata | to_metadata(tokenizer, theirs.entries["token_embd.weight"].shape[0], [])
    with GgufWriter(place / "m.gguf", keys, list(theirs.entries.values())) as writer:
        for name in theirs.entries:
            writer.add(name, theirs.get(name))
    return computed(place / "m.gguf", ids)


def distance(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def test_heads_of_hy_v4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gguf_files.TYPES, "hy_v4", _HY4)
    folder, ids = gguf_files.save(tmp_path / "m", "hy_v4"), gguf_files.ids(length=40)[0]
    original = models.original(folder)
    got, want = there("hy_v4", folder, tmp_path, ids), models.logits(original, ids[None])[0]
    assert distance(got[:1], want[:1]) < 1e-4  # the first position is not turned
    assert distance(got, want) > 0.1
    monkeypatch.setattr(modeling_hy_v4, "apply_rotary_pos_emb", by_neighbours)
    assert distance(got, models.logits(original, ids[None])[0]) < 1e-4
    assert "RoPE turns other columns of a head" in REFUSED["hy_v4"]


@pytest.mark.parametrize("chosen", [6, 64])
def test_indexers_of_dots3_note(chosen: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gguf_files.TYPES, "dots3_note_text", {**_DOTS3, "index_topk": chosen})
    folder, ids = gguf_files.save(tmp_path / "m", "dots3_note_text"), gguf_files.ids(length=40)[0]
    original = models.original(folder)
    got, want = there("dots3_note_text", folder, tmp_path, ids), models.logits(original, ids[None])[0]
    assert distance(got[:6], want[:6]) < 1e-5
    assert (distance(got, want) > 0.1) == (chosen < len(ids))
    module: Any = modeling_dots3_note
    forward, usual = module.Dots3NoteTextIndexer.forward, module.apply_rotary_pos_emb_interleave

    def by_llama_cpp(*args: Any, **kwargs: Any) -> Any:
        module.apply_rotary_pos_emb_interleave = by_halves
        try:
            return forward(*args, **kwargs)
        finally:
            module.apply_rotary_pos_emb_interleave = usual

    monkeypatch.setattr(module.Dots3NoteTextIndexer, "forward", by_llama_cpp)
    assert distance(got, models.logits(original, ids[None])[0]) < 1e-5
    assert "in texts longer than `index_topk`" in REFUSED["dots3_note_text"]


@pytest.mark.parametrize("budget", [8, 64])
def test_indexers_of_qwen4(budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp gives each token as many others as there are in the budget, and 3 more: those after the last whole
    block of 4, and then a part of one more block."""
    monkeypatch.setitem(gguf_files.TYPES, "qwen4_exp_text", {**_QWEN4, "indexer_budget": budget})
    folder, ids = gguf_files.save(tmp_path / "m", "qwen4_exp_text"), gguf_files.ids(length=40)[0]
    want = models.logits(models.original(folder), ids[None])[0]
    got = there("qwen4_exp_text", folder, tmp_path, ids)
    far = ((got - want).norm(dim=1) / want.norm(dim=1)).tolist()
    within = [place for place in range(40) if place < budget + 3 or place % 4 == 2]  # 3 tokens after the last block
    assert max(far[place] for place in within) < 1e-4
    assert (max(far) > 1e-2) == (budget < 40)
    assert "longer than `indexer_budget`" in REFUSED["qwen4_exp_text"]
