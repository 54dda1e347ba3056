"""GGUF files in transformers: packed, through its own `from_pretrained`, and with the same logits as the original."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2.exceptions import SecurityError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerFast

import fewbit as package
from fewbit.errors import FormatError, PlanError
from fewbit.formats.containers.gguf import GgufFile, GgufWriter
from fewbit.models import smollm2
from fewbit.models.gguf.names import architecture
from fewbit.models.gguf.tokenizer import to_tokenizer
from fewbit.nn.layers import QEmbedding, QLinear
from fewbit.system import native
from tests import gguf_files, models
from tests.e2e.conftest import Fewbit
from tests.gguf_files import AWKWARD

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [1.0 + 0.5 * i for i in range(8)],
    "short_factor": [1.0 + 0.25 * i for i in range(8)],
    "factor": 2.0,
    "original_max_position_embeddings": 64,
}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in (*gguf_files.FAMILIES, *gguf_files.SAME)),
    ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
    ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    ("gemma2", {"final_logit_softcapping": None, "attn_logit_softcapping": 20.0}),
    ("gemma3", {"num_hidden_layers": 7, "layer_types": None, "tie_word_embeddings": True}),
    ("gpt2", {"n_inner": 128}),
    ("exaone4", {"num_hidden_layers": 64, "sliding_window": 16, "layer_types": None}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": False}),
    ("olmo", {"clip_qkv": None, "tie_word_embeddings": True}),
    ("mpt", {"attn_config": None, "tie_word_embeddings": False}),
    ("glm4", {"attention_bias": False, "tie_word_embeddings": True}),
    ("granite_swa", {"layer_rope_theta": [5e5, 0, 5e5, 0]}),
    ("jamba", {"num_local_experts": 1, "num_experts": 1, "num_experts_per_tok": 1}),
    (
        "ministral3",
        {"rope_parameters": {**gguf_files.TYPES["ministral3"]["rope_parameters"], "llama_4_scaling_beta": 0.0}},
    ),
]


@pytest.mark.parametrize(("family", "changes"), CASES, ids=lambda case: case if isinstance(case, str) else None)
@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_a_file_of_any_architecture_gives_the_original_logits(
    family: str, changes: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    folder = gguf_files.save(tmp_path / "m", family, **changes)
    path = gguf_files.written(folder, tmp_path / "m.gguf", kind)
    original = models.original(folder)
    if kind == "f16":
        with torch.no_grad():
            for name, parameter in original.named_parameters():
                if parameter.dim() > 1 and not re.search(
                    r"((?<!input_)gate|(?<!modality_)router|router\.proj|wg|conv1d|conv\.conv)\.weight|bias|A_log", name
                ):
                    parameter.copy_(parameter.half())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ids = gguf_files.ids()
    logits, want = models.logits(loaded, ids), models.logits(original, ids)
    if family == "youtu":  # transformers sets the row of the padding token to 0; a file has that of the tokenizer
        rows = torch.tensor([loaded.config.pad_token_id])
        logits, want = (each.index_fill(-1, rows, 0.0) for each in (logits, want))
    if family in ("gpt_oss", "falcon-first"):  # experts or key-value heads lie otherwise, so sums have another order
        assert float((logits - want).norm() / want.norm()) < 1e-6
    elif architecture(original.config).negative_exp:  # log(exp(x)) is not x for 0.2 % of float32 numbers
        assert float((logits - want).norm() / want.norm()) < 1e-5
    else:
        assert torch.equal(logits, want)
    assert type(loaded) is type(original)
    for key in (
        "rope_parameters",
        "layer_types",
        "head_dim",
        "rms_norm_eps",
        "sliding_window",
        "query_pre_attn_scalar",
    ):
        wanted, got = (each.config.to_dict().get(key) for each in (original, loaded))
        if wanted is not None and key != "rope_parameters":
            assert got == wanted
    assert path.is_file()


@pytest.mark.parametrize(
    ("kind", "cls"),
    [
        ("exaone", "LlamaForCausalLM"),
        ("internlm3", "LlamaForCausalLM"),
        ("iquestcoder", "LlamaForCausalLM"),
        ("glm4_moe_lite", "DeepseekV3ForCausalLM"),
        ("solar_open", "Glm4MoeForCausalLM"),
        ("gemma4_unified_text", "Gemma4ForCausalLM"),
    ],
)
def test_a_file_is_read_as_a_type_that_computes_the_same(kind: str, cls: str, tmp_path: Path) -> None:
    folder = gguf_files.save(tmp_path / "m", kind)
    path = gguf_files.written(folder, tmp_path / "m.gguf")
    loaded, ids = package.load(path, dtype=torch.float32), gguf_files.ids()
    assert type(loaded).__name__ == cls
    assert torch.equal(models.logits(loaded, ids), models.logits(models.original(folder), ids))


def test_a_model_without_unpacked_weights_has_a_dtype(tmp_path: Path) -> None:
    """That of the embeddings' rows: the norms of OLMo 1 have no weights."""
    path = gguf_files.written(gguf_files.save(tmp_path / "m", "olmo"), tmp_path / "m.gguf", "q8_0")
    loaded = package.load(path, dtype=torch.bfloat16)
    assert not any(parameter.is_floating_point() for parameter in loaded.parameters())
    assert loaded.dtype == torch.bfloat16
    assert loaded.generate(gguf_files.ids()[:1, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)
    assert package.load(path, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "phi3"])
def test_quantized_weights_stay_packed(family: str, tmp_path: Path) -> None:
    folder = gguf_files.save(tmp_path / "m", family, tie_word_embeddings=True)
    path = gguf_files.written(folder, tmp_path / "m.gguf", "q8_0")
    file, loaded = GgufFile(path), package.load(path)
    packed = [m for m in loaded.modules() if isinstance(m, (QLinear, QEmbedding))]
    matrices = [entry for entry in file.entries.values() if entry.type == "q8_0"]
    assert len(packed) == len(matrices) + 1  # the head is the embedding
    assert loaded.lm_head.held is loaded.get_input_embeddings().held
    assert sum(p.numel() * p.element_size() for p in loaded.parameters()) == file.nbytes
    ids = gguf_files.ids()
    plain = package.load(path).dequantize(torch.float32)
    assert not any(isinstance(m, (QLinear, QEmbedding)) for m in plain.modules())
    torch.testing.assert_close(models.logits(loaded, ids), models.logits(plain, ids), rtol=1e-4, atol=1e-4)
    distance = models.logits(plain, ids) - models.logits(models.original(folder), ids)
    assert 0 < float(distance.norm() / models.logits(plain, ids).norm()) < 0.1
    embedding = loaded.get_input_embeddings().half()
    assert (embedding(ids).dtype, embedding.held.dtype) == (torch.float16, torch.uint8)


@pytest.mark.parametrize("kind", ["gpt2", "llama-bpe", "qwen2", "tekken", "gpt-4o", "sentencepiece", "gemma"])
def test_the_tokenizer_is_the_original_one(kind: str, tmp_path: Path) -> None:
    folder = gguf_files.with_tokenizer(tmp_path / "m", kind, chat_template=models.CHAT)
    gguf_files.written(folder, tmp_path / "m.gguf")
    original: Any = AutoTokenizer.from_pretrained(folder)
    found: Any = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in AWKWARD:
        ids = original(text)["input_ids"]
        assert found(text)["input_ids"] == ids
        assert found.decode(ids, skip_special_tokens=True) == original.decode(ids, skip_special_tokens=True)
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "chat_template", "model_max_length"):
        if name != "model_max_length":
            assert getattr(found, name) == getattr(original, name)
    assert found.model_max_length == models.CONTEXT


@pytest.mark.parametrize("kind", [AutoTokenizer, PreTrainedTokenizerFast], ids=lambda kind: kind.__name__)
def test_arguments_of_a_tokenizer_are_honoured(kind: Any, small: Path) -> None:
    found = kind.from_pretrained(
        small.parent, gguf_file="m.gguf", padding_side="left", eos_token="<pad>", model_max_length=7, use_fast=True
    )
    assert type(found) is PreTrainedTokenizerFast
    assert (found.padding_side, found.eos_token, found.model_max_length) == ("left", "<pad>", 7)
    plain = kind.from_pretrained(small.parent, gguf_file="m.gguf")
    assert (plain.padding_side, plain.eos_token, plain.model_max_length) == ("right", "</s>", models.CONTEXT)
    suffixed = kind.from_pretrained(small.parent, gguf_file="m.gguf", add_eos_token=True, add_bos_token=True)
    assert suffixed("the")["input_ids"] == [0, *plain("the", add_special_tokens=False)["input_ids"], 1]


def test_a_pattern_without_a_name_is_refused(tmp_path: Path) -> None:
    folder = gguf_files.with_tokenizer(tmp_path / "m", "gpt2")
    made = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    made["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    (folder / "tokenizer.json").write_text(json.dumps(made), encoding="utf-8")
    with pytest.raises(PlanError, match="no name for"):
        gguf_files.header_of(folder)


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("llama", {"hidden_act": "gelu"}, "with silu in its MLP"),
        ("gemma2", {"query_pre_attn_scalar": 99}, "this model needs 99"),
        ("gemma2", {"tie_word_embeddings": False}, "tied to the embedding"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "another scale"),
        ("opt", {}, "type 'opt'"),
        ("olmo2", {"attention_bias": True}, "with attention_bias = False; this model has True"),
        ("olmo2", {"tie_word_embeddings": True}, "that of this model is tied"),
        ("olmo2", {"head_dim": 8}, "heads as wide as the model"),
        ("olmoe", {"num_key_value_heads": 2}, "2 for 4"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob = True"),
        ("smollm3", {"no_rope_layer_interval": 2}, "only if one layer in 4 has no RoPE"),
        ("exaone4", {"sliding_window": 16}, "sliding windows if it has 64 layers"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    family: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match=said):
        gguf_files.header_of(gguf_files.save(tmp_path / "m", family, **changes))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of q8_0, with a chat template."""
    place = tmp_path_factory.mktemp("small")
    folder = gguf_files.save(place / "m", "llama", chat=models.CHAT)
    return gguf_files.written(folder, place / "m.gguf", "q8_0")


def test_the_command_line_takes_a_file(fewbit: Fewbit, small: Path, text: Path) -> None:
    inspected = fewbit("inspect", small, "--json").json
    assert (inspected["format"], inspected["schemes"]) == ("gguf", {"q8_0": 15})
    assert inspected["file_bytes"] == GgufFile(small).nbytes
    assert fewbit("generate", small, "the model", "--max-new-tokens", 3).code == 0
    assert fewbit("generate", small, "the model", "--chat", "--max-new-tokens", 3).code == 0
    answer = fewbit("evaluate", small, "--reference", small.parent / "m", "--text", text, "--length", 32, "--json")
    assert 0 < answer.json["kl"]["mean"] < 0.01


def test_a_damaged_file_is_one_sentence(fewbit: Fewbit, small: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(small.read_bytes()[:-100])
    for verb in (("inspect",), ("generate",), ("evaluate",)):
        answer = fewbit(*verb, tmp_path / "bad.gguf", *(("hello",) if verb == ("generate",) else ()))
        assert answer.code == 3
        assert "bad.gguf" in answer.err
        assert "would end at byte" in answer.err


def changed(path: Path, to: Path, keys: dict[str, Any], *, drop: str = "", only: int | None = None) -> Path:
    """The file with other keys, without the tensor `drop`."""
    file = GgufFile(path)
    entries = [entry for entry in file.entries.values() if entry.name != drop][:only]
    with GgufWriter(to, file.metadata | keys, entries) as writer:
        for entry in entries:
            writer.add(entry.name, file.get(entry.name))
    return to


@pytest.mark.parametrize(
    ("keys", "drop", "said"),
    [
        ({"general.architecture": "rwkv7"}, "", "architecture 'rwkv7'"),
        ({"general.architecture": ["llama"]}, "", "is not one that fewbit loads"),
        ({"llama.block_count": 1 << 30}, "", "it has 2 blocks"),
        ({"llama.embedding_length": 128}, "", "of width 64"),
        ({"llama.attention.head_count": 1 << 30}, "", "rows|heads"),
        ({"llama.attention.head_count_kv": 3}, "", "heads"),
        ({"llama.attention.key_length": 8}, "", "llama cannot have|rows"),
        ({"llama.feed_forward_length": 1 << 30}, "", "ffn_gate.weight has shape"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "", "not a finite number"),
        ({"llama.context_length": -1}, "", "not an integer above 0"),
        ({"llama.rope.scaling.type": "new"}, "", "'new' is unknown"),
        ({}, "blk.1.ffn_up.weight", "the tensor blk.1.ffn_up.weight is missing"),
        ({}, "token_embd.weight", "no matrix token_embd.weight"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "", "the merge"),
        ({"tokenizer.ggml.model": "new"}, "", "tokenizer is 'new'"),
        ({"tokenizer.ggml.pre": "new"}, "", "split by 'new'"),
        ({"tokenizer.ggml.tokens": 5}, "", "not a list of strings"),
        ({"tokenizer.ggml.token_type": [1, 2]}, "", "one for each token"),
        ({"tokenizer.ggml.eos_token_id": 1 << 20}, "", "eos_token_id is 1048576"),
    ],
)
def test_keys_that_contradict_the_tensors_are_refused(
    keys: dict[str, Any], drop: str, said: str, small: Path, tmp_path: Path
) -> None:
    path = changed(small, tmp_path / "bad.gguf", keys, drop=drop)
    with pytest.raises(FormatError, match=said):
        package.generate(path, "hello", max_new_tokens=1)


def test_a_number_of_blocks_takes_no_memory(small: Path, tmp_path: Path) -> None:
    path = changed(small, tmp_path / "bad.gguf", {"llama.block_count": 1 << 27})  # a list of so many is 1 GiB
    tracemalloc.start()
    with pytest.raises(FormatError, match="it has 2 blocks"):
        package.load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


def test_a_chat_template_is_rendered_in_a_sandbox(small: Path, tmp_path: Path) -> None:
    attack = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ messages.append(1) }}"
    path = changed(small, tmp_path / "bad.gguf", {"tokenizer.chat_template": attack})
    with pytest.raises(SecurityError):
        to_tokenizer(GgufFile(path)).apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)


@pytest.mark.parametrize("first", ["AutoTokenizer", "AutoConfig", "AutoModelForCausalLM"])
def test_whatever_is_imported_first_goes_through_fewbit(first: str, small: Path) -> None:
    script = (
        f"import fewbit, sys, transformers; from transformers import {first}\n"
        f"found = {first}.from_pretrained({str(small.parent)!r}, gguf_file='m.gguf')\n"
        "assert 'gguf' not in sys.modules, 'the package gguf was imported'\n"
        "assert 'transformers.integrations.gguf.reader' not in sys.modules or 'Model' in sys.argv[1]\n"
        "print(type(found).__name__)"
    )
    run = subprocess.run([sys.executable, "-c", script, first], capture_output=True, text=True, encoding="utf-8")
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().endswith(
        {"AutoTokenizer": "Backend", "AutoConfig": "LlamaConfig"}.get(first, "ForCausalLM")
    )


def test_saving_writes_a_file_again(small: Path, tmp_path: Path) -> None:
    loaded = package.load(small)
    with torch.no_grad():
        loaded.model.norm.weight.mul_(2)
    loaded.save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["README.md", "model.gguf"]
    before, after = GgufFile(small), GgufFile(tmp_path / "saved" / "model.gguf")
    assert list(after.entries.values()) == list(before.entries.values())
    assert after.metadata.keys() == before.metadata.keys()
    for name in before.entries:
        factor = 2 if name == "output_norm.weight" else 1
        assert torch.equal(after.get(name), before.get(name) * factor)
    again = package.load(tmp_path / "saved")  # a folder with one such file and no config
    assert torch.equal(models.logits(again, gguf_files.ids()), models.logits(loaded, gguf_files.ids()))
    plain = loaded.dequantize(torch.float32)
    plain.save_pretrained(tmp_path / "plain")
    assert (tmp_path / "plain" / "model.safetensors").is_file()
    same = models.original(tmp_path / "plain")
    assert torch.equal(models.logits(same, gguf_files.ids()), models.logits(plain, gguf_files.ids()))


def test_a_folder_with_one_file_needs_no_name_of_it(small: Path, tmp_path: Path) -> None:
    package.load(small).save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(models.logits(loaded, gguf_files.ids()), models.logits(package.load(small), gguf_files.ids()))
    direct = type(loaded).from_pretrained(tmp_path, subfolder="saved")
    assert torch.equal(models.logits(direct, gguf_files.ids()), models.logits(loaded, gguf_files.ids()))
    named = AutoTokenizer.from_pretrained(tmp_path / "saved", gguf_file="model.gguf")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("the")["input_ids"] == named("the")["input_ids"]
    (tmp_path / "saved" / "other.gguf").write_bytes((tmp_path / "saved" / "model.gguf").read_bytes())
    for kind in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):
        with pytest.raises(FormatError, match=r"gguf_file=.model\.gguf."):
            kind.from_pretrained(tmp_path / "saved")


def test_a_folder_with_a_config_is_read_by_that(small: Path, tmp_path: Path) -> None:
    folder = gguf_files.save(tmp_path / "m", "llama", dtype="float32", hidden_size=32, intermediate_size=64)
    (folder / "model.gguf").write_bytes(small.read_bytes())
    assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == 32


def test_a_model_can_be_copied_and_unpacked_while_it_is_loaded(small: Path, tmp_path: Path) -> None:
    loaded, ids = package.load(small), gguf_files.ids()
    copied = copy.deepcopy(loaded)
    assert torch.equal(models.logits(copied, ids), models.logits(loaded, ids))
    copied.save_pretrained(tmp_path)
    assert (tmp_path / "model.gguf").is_file()
    options: dict[str, Any] = {"gguf_file": "m.gguf", "quantization_config": GgufConfig(dequantize=True)}
    plain = AutoModelForCausalLM.from_pretrained(small.parent, **options)
    assert not any(isinstance(m, (QLinear, QEmbedding)) for m in plain.modules())
    torch.testing.assert_close(models.logits(plain, ids), models.logits(loaded, ids), rtol=1e-4, atol=1e-4)
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(models.logits(models.original(tmp_path / "plain"), ids), models.logits(plain, ids))


def test_a_folder_of_several_files_asks_for_one(small: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).symlink_to(small)
    with pytest.raises(FormatError, match="several GGUF files"):
        package.load(tmp_path)


def test_an_adapter_is_trained_on_a_file(fewbit: Fewbit, small: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    out = tmp_path / "adapter"
    options = ("--steps", 4, "--rank", 2, "--length", 32, "--learning-rate", 0.01, "--json")
    trained = fewbit("finetune", small, "--data", text, "-o", out, *options)
    assert trained.code == 0, trained.err
    assert trained.json["held_out_after"] < trained.json["held_out_before"]
    assert fewbit("generate", small, "the", "--adapter", out, "--max-new-tokens", 2).code == 0
    merged = fewbit("merge", small, out, "-o", tmp_path / "merged", "--text", text, "--length", 32, "--json")
    assert merged.code == 0, merged.err


def test_the_demo_file_loads_fast_and_stays_as_small(tmp_path: Path) -> None:
    try:
        path = smollm2.gguf_file()
    except PlanError as error:
        pytest.skip(str(error))
    small = gguf_files.written(gguf_files.save(tmp_path / "m", "llama"), tmp_path / "m.gguf", "q8_0")
    script = (Path(__file__).parent / "resident.py").read_text(encoding="utf-8")
    command = [sys.executable, "-c", script, str(small), str(path)]
    # With Python's own allocator, memory that was freed counts as long as one object in its arena lives.
    env = os.environ | {"PYTHONMALLOC": "malloc", "FEWBIT_ACTIVATIONS": "rounded"}
    run = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=env)
    assert run.returncode == 0, run.stderr
    measured = json.loads(run.stdout)
    assert measured["seconds"] < measured["drawn"]
    if not isinstance(native.library(), str):  # without it, a weight is decoded to be multiplied
        # Measured: 24 MB (tokenizer, copies of q and k, keys and values, code of libraries).
        assert measured["peak"] < path.stat().st_size + (36 << 20)
    assert measured["resident"] < 1.15 * path.stat().st_size
