"""llama.cpp reads the files that fewbit writes: the same tokens for awkward text, the same logits.

`make interop` builds llama-cpp-python, which compiles llama.cpp and takes some minutes once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unicodedata import category, is_normalized

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import fewbit
from fewbit.errors import PlanError
from fewbit.formats.containers.gguf import Entry, GgufWriter
from fewbit.models import smollm2
from fewbit.models.source import locate
from fewbit.plans.plan import find
from tests import gguf_files, models
from tests.gguf_files import AWKWARD
from tests.interop.llama_cpp import computed, opened

pytest.importorskip("llama_cpp", reason="make interop installs llama-cpp-python")

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]


def tokens(llama: Any, text: str) -> list[int]:
    return list(llama.tokenize(text.encode(), add_bos=True, special=True))


def vocabulary(folder: Path, path: Path) -> Path:
    """A file with the tokenizer of a folder and no weights but an embedding's."""
    head = gguf_files.header_of(folder)
    rows = head.metadata[f"{head.metadata['general.architecture']}.vocab_size"]
    with GgufWriter(path, head.metadata, [Entry("token_embd.weight", "f32", (rows, 32))]) as writer:
        writer.add("token_embd.weight", torch.zeros(rows, 32))
    return path


@pytest.mark.parametrize(
    "kind", ["tiny", "smollm2", "gpt2", "llama-bpe", "qwen2", "tekken", "gpt-4o", "sentencepiece", "gemma"]
)
def test_it_reads_text_as_the_original_tokenizer_does(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if kind == "smollm2":
        request.getfixturevalue("demo")
    folder = locate(kind).folder if kind in ("tiny", "smollm2") else gguf_files.with_tokenizer(tmp_path / "m", kind)
    llama = opened(vocabulary(folder, tmp_path / "v.gguf"), vocab_only=True)
    original = AutoTokenizer.from_pretrained(folder)
    for text in AWKWARD:
        if kind in ("tekken", "gpt-4o") and any(category(each).startswith("M") for each in text):
            continue  # llama.cpp's own patterns for these leave combining marks out, whoever wrote the file
        if kind == "qwen2" and not is_normalized("NFC", text):
            continue  # nor does it normalize
        assert tokens(llama, text) == original(text)["input_ids"], repr(text)


# Without a latent of queries, as llama.cpp takes any model of so many layers
LITE = {"num_hidden_layers": 26, "hidden_size": 32, "q_lora_rank": None, "first_k_dense_replace": 25}
# The last two layers use keys and values of others
SHARED = {
    "num_hidden_layers": 22,
    "num_kv_shared_layers": 2,
    "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 12,
}
CASES: list[tuple[str, dict[str, Any]]] = [(family, {}) for family in gguf_files.KINDS]
CASES += [("deepseek_v2", LITE), ("gemma3n_text", SHARED)]
CASES += [(kind, {"num_kv_shared_layers": 1}) for kind in ("gemma4_text-wide", "gemma4_unified_text")]
CASES += [("granite_swa", {"layer_rope_theta": [5e5, 0, 5e5, 0]})]  # the base of rope_parameters is another


class TableGELU(torch.nn.Module):
    """GELU as a table of 16-bit numbers, which is llama.cpp's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x.abs() < 10, values, x.relu())


def kept(x: torch.Tensor) -> torch.Tensor:
    """The largest twentieth of Gemma 3n's gates, with the deviation of llama.cpp: it divides by one less."""
    return (x - x.mean(-1, keepdim=True) - 1.6448536 * x.std(-1, keepdim=True)).relu()


def as_there(original: Any) -> Any:
    """A Gemma 3n with what llama.cpp computes otherwise; any other model unchanged.

    Sparse gates make single roundings larger, so they are those of llama.cpp, too.
    """
    for module in list(original.modules()):
        if hasattr(module, "_gaussian_topk"):
            module._gaussian_topk, module.act_fn = kept, TableGELU()
        elif hasattr(module, "per_layer_input_gate") and hasattr(module, "altup"):
            module.act_fn = TableGELU()
    return original


@pytest.mark.parametrize(("family", "changes"), CASES, ids=lambda case: case if isinstance(case, str) else None)
def test_it_computes_what_the_original_does(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    folder = gguf_files.save(tmp_path / "m", family, **changes)
    path = gguf_files.written(folder, tmp_path / "m.gguf")
    ids = gguf_files.ids(length=14)[0]  # within all windows: llama.cpp leaves Mistral's and Phi's out
    got = computed(path, ids)
    original = as_there(models.original(folder))
    want = models.logits(original, ids[None])[0]
    gelu = any("GELU" in type(module).__name__.upper() for module in original.modules())  # a table of 16-bit numbers
    assert float((got - want).norm() / want.norm()) < (1e-3 if gelu else 1e-5)
    assert torch.equal(got.argmax(1), want.argmax(1))


# Types with sliding windows whose masks are the same beyond the window, which llama.cpp leaves out of Mistral and Phi
WINDOWS = (
    *("afmoe", "cohere2", "cohere2_moe", "exaone_moe", "gemma2", "gemma3", "gpt_oss", "granite_swa", "granitemoe_swa"),
    *("laguna", "mellum", "mimo_v2_flash", "olmo3"),
)


@pytest.mark.parametrize("family", WINDOWS)
def test_texts_longer_than_the_window(family: str, tmp_path: Path) -> None:
    folder = gguf_files.save(tmp_path / "m", family)
    got, want = both(folder, gguf_files.written(folder, tmp_path / "m.gguf"), gguf_files.ids(length=40)[0])
    original = models.original(folder)
    assert original.config.sliding_window == 16
    gelu = any("GELU" in type(module).__name__.upper() for module in original.modules())
    assert float(((got - want).norm(dim=1) / want.norm(dim=1)).max()) < (1e-3 if gelu else 1e-5)
    # The test could tell a window that is one token longer
    original.config.sliding_window = 17
    for module in original.modules():
        if getattr(module, "sliding_window", None) == 16:
            module.sliding_window = 17
    other = models.logits(original, gguf_files.ids(length=40)[:1])[0]
    assert torch.equal(other[:16], want[:16])
    assert float(((other - want).norm(dim=1) / want.norm(dim=1)).max()) > 1e-2


def test_the_padding_token_of_youtu_has_another_embedding(tmp_path: Path) -> None:
    """As docs/gguf.md says. Its head is the embedding, so only the logit of this token differs."""
    folder = gguf_files.save(tmp_path / "m", "youtu", pad_token_id=2)
    out = tmp_path / "m.gguf"
    fewbit.quantize(folder, out, plan=find("q8_0").changed(method="rtn"))
    own, pad = fewbit.load(out, dtype=torch.float32), 2
    ids = gguf_files.ids(length=14)[0]  # none is the padding token
    got, want = both(folder, out, ids)
    wanted = models.logits(own, ids[None])[0]
    assert not want[:, pad].any()
    assert float(got[:, pad].abs().min()) > 0
    for column in (pad, slice(None)):  # llama.cpp rounds activations to 8 bits
        assert float((wanted - got)[:, column].norm() / got[:, column].norm()) < 0.05
    others = torch.arange(got.shape[1]) != pad
    assert float((want - got)[:, others].norm() / got[:, others].norm()) < 0.05


def both(folder: Path, path: Path, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits [tokens, vocabulary] of llama.cpp for a file, and of transformers for its model's folder."""
    return computed(path, ids), models.logits(models.original(folder), ids[None])[0]


def test_a_file_of_others_gives_the_same_logits_in_both(tmp_path: Path) -> None:
    try:
        path = smollm2.gguf_file()
    except PlanError as error:
        pytest.skip(str(error))
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    llama = opened(path, n_ctx=64, logits_all=True)
    for text in AWKWARD:
        assert tokens(llama, text) == tokenizer(text)["input_ids"], repr(text)
    ids = tokenizer("The capital of France is Paris, and that of Italy is")["input_ids"]
    llama.eval(ids)
    got = torch.from_numpy(np.array(llama.scores[: len(ids)]))
    want = models.logits(fewbit.load(path), torch.tensor([ids]))[0]
    distance = torch.nn.functional.kl_div(
        got.log_softmax(1), want.log_softmax(1), log_target=True, reduction="batchmean"
    )
    assert float(distance) < 0.01  # 0.0048, as llama.cpp rounds activations to 8 bits
    assert torch.equal(got.argmax(1), want.argmax(1))
