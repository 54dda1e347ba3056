"""Types that llama.cpp has, and fewbit writes no GGUF files of: what docs/gguf.md says of each is so."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, DbrxConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fewbit.models.gguf.architectures import MISSING, REFUSED
from tests import architectures, models

# Parameters or buffers without a name in fewbit's rows, and what the page calls them
_NAMELESS = {
    "deepseek_v4": (("attn_hc.fn", "compressor.kv_proj", "tid2eid"), "hyper-connections, compressed keys and experts"),
}
_ASSISTANTS = {"gemma4_assistant", "gemma4_unified_assistant"}


@pytest.mark.parametrize("kind", _NAMELESS)
def test_a_model_has_what_fewbit_has_no_names_for(kind: str) -> None:
    names, words = _NAMELESS[kind]
    config = architectures.small(CONFIG_MAPPING[kind], architectures.SIZES, architectures.MORE)
    found = list(AutoModelForCausalLM.from_config(config).state_dict())
    assert all(any(name in each for each in found) for name in names)
    assert words in MISSING[kind]


def test_transformers_ignores_the_base_of_dbrx() -> None:
    """llama.cpp's converter writes `rope_theta` of `attn_config` as `dbrx.rope.freq_base`."""
    ids, found = torch.arange(3, 12)[None], []
    for base in (100.0, 500000.0):
        config = DbrxConfig(
            d_model=64,
            n_heads=4,
            n_layers=2,
            vocab_size=models.VOCAB,
            attn_config={"clip_qkv": 8, "kv_n_heads": 2, "rope_theta": base},
            ffn_config={"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        found.append(models.logits(model, ids))
    assert torch.equal(*found)
    assert "transformers ignores" in REFUSED["dbrx"]


def test_each_type_is_here() -> None:
    assert MISSING.keys() == {*_NAMELESS, *_ASSISTANTS}
