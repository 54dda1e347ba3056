"""Mixtures of experts in GGUF files: one tensor holds the experts of a layer, and so does an importance matrix."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from fewbit.api import generate, quantize, tune
from fewbit.errors import FormatError, PlanError
from fewbit.formats.containers import imatrix
from fewbit.formats.containers.gguf import GgufFile, GgufWriter
from fewbit.models.outline import Outline
from fewbit.models.source import locate
from fewbit.nn.experts import ExpertSlice
from fewbit.pipeline import write_gguf
from fewbit.pipeline.settled import Settled
from fewbit.plans.plan import Plan, Rule, find
from fewbit.texts.calibration import Calibration
from tests import gguf_files, models

EXPERTS = "blk.1.ffn_up_exps.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 256 columns, so that K-quants fit."""
    place = tmp_path_factory.mktemp("experts")
    return gguf_files.save(place / "m", "qwen3_moe", hidden_size=256, moe_intermediate_size=256)


@pytest.fixture(scope="module")
def wanted(folder: Path) -> Calibration:
    text = folder.parent / "text.txt"
    text.write_text(models.sentences(100), encoding="utf-8")
    return Calibration(text=str(text), samples=4, length=32)


@pytest.fixture(scope="module")
def matrix(folder: Path, wanted: Calibration) -> Path:
    path = folder.parent / "imatrix.gguf"
    quantize.imatrix(folder, path, calibration=wanted)
    return path


def test_an_importance_matrix_has_a_row_for_each_expert(matrix: Path) -> None:
    file = GgufFile(matrix)
    sums, counts = file.get(f"{EXPERTS}.in_sum2"), file.get(f"{EXPERTS}.counts")
    assert (tuple(sums.shape), tuple(counts.shape)) == ((4, 256), (4, 1))
    assert int(counts.sum()) == 4 * 32 * 2  # each token reaches two of the four experts
    read = imatrix.read(matrix)[EXPERTS]
    assert len(read.mean_square) == 4 * 256
    torch.testing.assert_close(read.mean_square.view(4, 256), sums / counts)


@pytest.mark.parametrize("suffix", [".gguf", ".dat"])
def test_a_matrix_has_rows_of_unreached_experts(folder: Path, suffix: str, tmp_path: Path) -> None:
    path, text = tmp_path / f"i{suffix}", folder.parent / "text.txt"
    text.write_text(models.sentences(100), encoding="utf-8")
    few = Calibration(text=str(text), samples=1, length=2)  # two tokens reach at most three of the four experts
    done = quantize.imatrix(folder, path, calibration=few)
    assert "More samples help" in done.notes[-1]
    rows = imatrix.read(path)[EXPERTS].mean_square.view(4, 256)
    unreached = (rows == 1).all(1)
    assert 1 <= int(unreached.sum()) <= 2
    quantize.quantize(folder, tmp_path / "out.gguf", plan="q4_k_m", imatrix=path)


def test_each_expert_has_its_own_importances(folder: Path, matrix: Path, tmp_path: Path) -> None:
    found = imatrix.read(matrix)
    squares = found[EXPERTS].mean_square.clone()
    squares[2 * 256 : 3 * 256] = torch.linspace(0.01, 100, 256)  # of the third expert
    found[EXPERTS] = imatrix.Importance(squares.view(4, 256), (8,) * 4)  # a power of two, so that sums are exact
    imatrix.write(tmp_path / "other.gguf", found, chunks=1, length=32, text="")
    kept = []
    for name, path in (("a.gguf", matrix), ("b.gguf", tmp_path / "other.gguf")):
        quantize.quantize(folder, tmp_path / name, plan="q4_k_m", imatrix=path)
        kept.append(GgufFile(tmp_path / name).get(EXPERTS).clone())
    assert [torch.equal(a, b) for a, b in zip(*kept, strict=True)] == [True, True, False, True]


def test_a_matrix_of_other_experts_is_refused(folder: Path, matrix: Path, tmp_path: Path) -> None:
    found = imatrix.read(matrix)
    found[EXPERTS] = imatrix.Importance(torch.ones(3, 256), (1, 1, 1))
    imatrix.write(tmp_path / "other.gguf", found, chunks=1, length=32, text="")
    with pytest.raises(FormatError, match="768 importances, but the weight has 256 columns for each of 4 experts"):
        quantize.quantize(folder, tmp_path / "out.gguf", plan="q4_k_m", imatrix=tmp_path / "other.gguf")


@pytest.fixture(scope="module")
def file(folder: Path, wanted: Calibration) -> Path:
    path = folder.parent / "out.gguf"
    quantize.quantize(
        folder, path, plan=find("q4_k_m").changed(method="gptq", options={"target": "0"}), calibration=wanted
    )
    return path


def test_experts_are_packed_and_multiplied_at_once(file: Path) -> None:
    entries = GgufFile(file).entries
    assert (entries[EXPERTS].type, entries[EXPERTS].shape) == ("q4_k", (4, 256, 256))
    assert entries["blk.0.ffn_gate_inp.weight"].type == "f32"
    loaded = generate.load(file, dtype=torch.float32)
    assert isinstance(loaded.get_submodule("model.layers.1.mlp.experts.3.up_proj"), ExpertSlice)
    ids = gguf_files.ids()
    packed, plain = models.logits(loaded, ids), models.logits(loaded.dequantize(torch.float32), ids)
    torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-4)
    assert tuple(loaded.get_parameter("model.layers.1.mlp.experts.gate_up_proj").shape) == (4, 512, 256)
    own = GgufConfig(dequantize=True)
    whole = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=own, dtype=torch.float32
    )
    assert torch.equal(models.logits(whole.eval(), ids), plain)


def test_a_file_is_quantized_again(file: Path, tmp_path: Path) -> None:
    quantize.quantize(file, tmp_path / "again.gguf", plan=find("q8_0").changed(method="rtn"))
    before, after = (
        generate.load(path, dtype=torch.float32).dequantize(torch.float32).state_dict()
        for path in (file, tmp_path / "again.gguf")
    )
    assert before.keys() == after.keys()
    for name, weight in before.items():  # logits may differ by far more, where another expert gets a token
        assert (after[name] - weight).norm() <= 5e-3 * weight.norm(), name


def test_norms_of_heads_by_the_number_of_experts(tmp_path: Path) -> None:
    """llama.cpp runs Llama 4 with 128 experts without these norms, and with them if it has another number."""
    large: dict[str, Any] = {"num_local_experts": 128, "use_qk_norm": False}
    folder = gguf_files.save(tmp_path / "m", "llama4_text", **large)
    wanted = models.logits(models.original(folder), gguf_files.ids())
    loaded = generate.load(gguf_files.written(folder, tmp_path / "m.gguf"), dtype=torch.float32)
    torch.testing.assert_close(models.logits(loaded, gguf_files.ids()), wanted)
    assert (loaded.config.use_qk_norm, loaded.config.moe_layers) == (False, [1, 3])
    for changes in ({"num_local_experts": 128}, {"use_qk_norm": False}):
        with pytest.raises(PlanError, match=r"with use_qk_norm = False if it has 128 experts"):
            gguf_files.header_of(gguf_files.save(tmp_path / "other", "llama4_text", **changes))
    with pytest.raises(
        PlanError, match=r"with experts in one layer of 2\nUse another format: a plan such as w4a16 .*to=compressed"
    ):
        gguf_files.header_of(gguf_files.save(tmp_path / "moved", "llama4_text", moe_layers=[0, 2]))


def test_experts_of_a_layer_have_one_type(folder: Path, tmp_path: Path) -> None:
    rules = (Rule("*.experts.2.up_proj", "q8_0", "rtn"), Rule("*", "q4_0", "rtn"))
    with pytest.raises(PlanError, match=r"experts\.0\.up_proj\.weight gets q4_0, .*experts\.2\.up_proj\.weight q8_0"):
        quantize.quantize(folder, tmp_path / "out.gguf", plan=Plan("mine", "gguf", rules))
    assert not list(tmp_path.iterdir())


def test_experts_that_no_one_type_holds_are_not_converted(folder: Path) -> None:
    """A conversion chooses the types itself, so its error does not speak of rules."""
    rules = (Rule("*.experts.2.up_proj", "q8_0", "rtn"), Rule("*", "q4_0", "rtn"))
    settled = Settled.of(Outline(locate(folder)), Plan("mine", "gguf", rules))
    with pytest.raises(PlanError, match=r"experts\.0\.up_proj\.weight becomes q4_0, .*experts\.2") as refused:
        write_gguf.planned(replace(settled, exact=True))
    assert "`requantize=True` with a plan for GGUF" in str(refused.value.hint)


def test_a_tensor_of_fewer_experts_is_refused(file: Path, tmp_path: Path) -> None:
    whole, out = GgufFile(file), tmp_path / "few.gguf"
    entries = [e if e.name != EXPERTS else e._replace(shape=(3, 256, 256)) for e in whole.entries.values()]
    with GgufWriter(out, whole.metadata, entries) as writer:
        for entry in entries:
            tensor = whole.get(entry.name)
            writer.add(entry.name, tensor[:3] if entry.name == EXPERTS else tensor)
    with pytest.raises(FormatError, match=r"ffn_up_exps\.weight has shape \[3, 256, 256\]"):
        generate.load(out)
    with pytest.raises(FormatError, match=r"ffn_up_exps\.weight has shape \[3, 256, 256\], not .* 4 experts"):
        quantize.quantize(out, tmp_path / "out.gguf", plan="q8_0")


def test_experts_of_a_file_are_not_trained(file: Path, folder: Path, tmp_path: Path, wanted: Calibration) -> None:
    with pytest.raises(PlanError, match="such as those of experts, cannot be trained yet"):
        tune.tune(file, tmp_path / "tuned.gguf", reference=folder, calibration=wanted)
