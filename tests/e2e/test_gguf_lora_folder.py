"""A LoRA in a GGUF file as a folder for PEFT: `convert --to peft`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import fewbit
from fewbit.errors import PlanError
from fewbit.formats.containers.gguf import GgufFile
from fewbit.formats.containers.safetensors import read_file
from fewbit.models.adapters.attach import quiet
from fewbit.names import ADAPTER, ADAPTER_WEIGHTS
from tests import gguf_files, models
from tests.e2e.conftest import Fewbit
from tests.e2e.test_bad_input import check
from tests.e2e.test_gguf_adapters import IDS, UNUSED, drawn, unpacked

OTHER = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"k_proj": 20}, "use_rslora": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_files.save(tmp_path_factory.mktemp("lora-folder") / "model", "llama")


@pytest.fixture(scope="module")
def file(model: Path) -> Path:
    adapter = drawn(model, model.parent / "adapter", **OTHER)
    fewbit.convert(adapter, out := model.parent / "lora.gguf", to="gguf", base=model)
    return out


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", OTHER),
        ("llama", {}),
        ("gpt2", {}),
        ("phi", {"target_modules": r".*(embed_tokens|lm_head)"}),
        ("mixtral", {"target_modules": r".*experts\.[02]\.w\d"}),
        ("sarvam_moe", {"target_modules": r".*(v|q)_proj"}),
    ],
)
def test_a_folder_of_a_file_is_the_adapter(
    family: str, settings: dict[str, Any], tmp_path: Path, fewbit: Fewbit
) -> None:
    base, out = gguf_files.save(tmp_path / "m", family), tmp_path / "back"
    adapter, lora = drawn(base, tmp_path / "adapter", **settings), tmp_path / "lora.gguf"
    assert fewbit("convert", adapter, "-o", lora, "--to", "gguf", "--base", base).code == 0
    answer = fewbit("convert", lora, "-o", out, "--to", "peft", "--base", base, "--json")
    assert answer.code == 0, answer.err
    assert answer.json["to"] == "peft"
    assert answer.json["output_bytes"] == sum(each.nbytes for each in read_file(out / ADAPTER_WEIGHTS)[0].values())
    assert json.loads((out / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"] == str(base)
    ids = IDS[:, :12]
    with quiet():
        wanted, found = (
            models.logits(PeftModel.from_pretrained(unpacked(base), str(each)), ids) for each in (adapter, out)
        )
    plain = models.logits(unpacked(base), ids)
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, plain, atol=1e-2)
    again = tmp_path / "again.gguf"
    assert fewbit("convert", out, "-o", again, "--to", "gguf").code == 0  # its base is what it names
    one, two = GgufFile(again), GgufFile(lora)
    assert one.entries == two.entries or family in ("mixtral", "sarvam_moe")  # zeros have a rank, too


@pytest.mark.parametrize(
    ("family", "changes", "settings"),
    [
        ("llama", {"hidden_size": 128}, {}),  # rows in another order
        ("qwen3_next", {"linear_value_head_dim": 32}, {"target_modules": r".*in_proj_qkvz"}),  # pieces
        ("sarvam_moe", {"num_key_value_heads": 1}, {"target_modules": r".*q_proj"}),  # parts of one matrix
        ("qwen3_5_text", {"linear_value_head_dim": 32}, {"target_modules": r".*linear_attn\.out_proj"}),  # columns
    ],
)
def test_an_adapter_of_other_sizes_is_refused(
    family: str, changes: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    base, other = gguf_files.save(tmp_path / "m", family), gguf_files.save(tmp_path / "other", family, **changes)
    fewbit.convert(drawn(base, tmp_path / "adapter", **settings), tmp_path / "l.gguf", to="gguf", base=base)
    with pytest.raises(PlanError, match=r"an adapter for another model: blk\.\d+\..* has size \d+ there, and \d+ here"):
        fewbit.load(other, adapter=tmp_path / "l.gguf")


def test_what_cannot_be_a_folder(model: Path, file: Path, tmp_path: Path, fewbit: Fewbit) -> None:
    out, wide = tmp_path / "out", models.save(tmp_path / "wide", "llama", hidden_size=128)
    packed = gguf_files.written(model, tmp_path / "m.gguf")

    def refused(of: Path, code: int, *words: str, flags: tuple[Any, ...] = ("--base", model)) -> None:
        check(fewbit("convert", of, "-o", out, "--to", "peft", *flags), code, *words)

    refused(file, 2, "does not name its model", "--base", flags=())
    refused(file, 2, "an adapter for another model", flags=("--base", wide))
    refused(model, 2, "is no GGUF file with a LoRA")
    refused(packed, 2, "is no GGUF file with a LoRA")
    refused(packed, 2, "is no GGUF file with a LoRA", flags=("--dry-run",))
    refused(packed, 2, "is no GGUF file with a LoRA", flags=("--samples", 2))
    refused(tmp_path / "none.gguf", 2, "none.gguf: no such file")
    for to, name in (("gguf", "out.gguf"), ("dense", "dense")):
        for flags in ((), ("--base", model), ("--dry-run",)):
            done = fewbit("convert", file, "-o", tmp_path / name, "--to", to, *flags)
            check(done, 2, "a LoRA in a GGUF file is converted with --to peft")
    refused(file, 2, "a preview shows the tensors of a model", flags=("--dry-run",))
    for flag, value in UNUSED:
        refused(file, 2, flag, "no effect on an adapter", flags=("--base", model, flag, *value))
    assert not out.exists()
    assert fewbit("convert", file, "-o", out, "--to", "peft", "--base", model).code == 0
    refused(file, 2, "exists", "--overwrite")
    assert fewbit("convert", file, "-o", out, "--to", "peft", "--base", packed, "--overwrite").code == 0
    named = json.loads((out / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    assert named == str(packed)
