"""From a model to one GGUF file on the command line: what is in it, and what is refused before any work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from fewbit.api import generate, quantize
from fewbit.api.adapters import _recorded_base
from fewbit.formats.containers import imatrix
from fewbit.formats.containers.gguf import GgufFile
from fewbit.formats.containers.imatrix import Importance
from fewbit.models.describe import describe
from fewbit.models.source import locate
from fewbit.pipeline import write_gguf
from fewbit.pipeline.progress import Step
from fewbit.plans import mixtures
from fewbit.plans.plan import Plan, Rule, find
from fewbit.schemes.base import parse
from fewbit.texts.calibration import Calibration
from tests import architectures, gguf_files, models
from tests.e2e.conftest import Answer, Fewbit

# Widths that blocks of 256 divide, and some that only those of 32 do.
SHAPE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 288, "num_hidden_layers": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings and head are two tensors."""
    return models.save(tmp_path_factory.mktemp("gguf") / "model", "llama", **SHAPE, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def wanted(text: Path) -> Calibration:
    return Calibration(str(text), samples=4, length=64)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "outputs").mkdir()
    return tmp_path / "outputs" / "out.gguf"


def check(answer: Answer, code: int, *words: str) -> None:
    assert answer.code == code, answer.err
    assert "Traceback" not in answer.err
    for word in words:
        assert word in answer.err, answer.err


def types(path: Path) -> dict[str, str]:
    return {name: entry.type for name, entry in GgufFile(path).entries.items()}


def test_a_file_of_a_mixture(model: Path, place: Path, wanted: Calibration) -> None:
    done = quantize.quantize(model, place, plan="q4_k_m", calibration=wanted)
    assert [path.name for path in place.parent.iterdir()] == ["out.gguf"]
    file = GgufFile(place)
    assert file.nbytes == done.output_bytes
    assert file.metadata["general.file_type"] == 15
    assert file.metadata["general.quantization_version"] == 2
    record = json.loads(file.metadata["fewbit.record"])
    assert record["plan"]["name"] == "q4_k_m"
    assert describe(locate(place)).made == record
    assert record["origin"] == str(model)
    base = _recorded_base(locate(place))
    assert base is not None
    assert base.folder == model
    found = types(place)
    assert found["output.weight"] == "q6_k"
    assert found["token_embd.weight"] == "q4_k"
    assert found["blk.0.attn_v.weight"] == "q4_k"
    assert found["blk.2.attn_v.weight"] == "q6_k"
    assert found["blk.0.ffn_down.weight"] == "q5_0"  # 288 columns
    assert found["blk.2.ffn_down.weight"] == "q8_0"
    assert all(found[name] == "f32" for name in found if len(file.entries[name].shape) == 1)
    outside = [name for name in found if not name.startswith("blk.")]
    assert list(found)[: len(outside)] == ["output.weight", "output_norm.weight", "token_embd.weight"]
    assert {t.module for t in done.tensors} >= {"lm_head", "model.embed_tokens"}
    assert done.share <= 1
    assert done.sample


def test_its_values_are_those_of_the_model(model: Path, place: Path) -> None:
    done = quantize.quantize(model, place, plan="q8_0")
    loaded, original = generate.load(place, dtype=torch.float32), models.original(model)
    weights = {t.module: loaded.get_submodule(t.module).qtensor().dequantize() for t in done.tensors}
    for name, weight in weights.items():
        wanted = models.linear_weight(original.get_submodule(name))
        assert float((weight - wanted).norm() / wanted.norm()) < 0.02, name
    ids = torch.arange(40)[None]
    wanted = models.logits(models.with_weights(original, weights), ids)
    torch.testing.assert_close(models.logits(loaded, ids), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq+imatrix"])
def test_methods_compose(method: str, model: Path, place: Path, wanted: Calibration) -> None:
    done = quantize.quantize(model, place, plan=find("q3_k_m").changed(method=method), calibration=wanted)
    methods = {t.module: t.method for t in done.tensors}
    assert methods["model.layers.0.mlp.up_proj"] == method
    assert methods["lm_head"] == ("rtn" if method == "rtn" else "imatrix")
    assert types(place)["blk.0.ffn_up.weight"] == "q3_k"


def test_rtn_needs_no_text(model: Path, place: Path, fewbit: Fewbit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewbit.texts.sources.load_text", lambda *_: pytest.fail("a text was asked for"))
    answer = fewbit("quantize", model, "-o", place, "--plan", "q4_0", "--method", "rtn")
    assert answer.code == 0, answer.err
    assert types(place)["blk.0.ffn_up.weight"] == "q4_0"


def test_one_scheme_for_all(model: Path, place: Path, fewbit: Fewbit) -> None:
    answer = fewbit("quantize", model, "-o", place, "--plan", "q4_0", "--scheme", "q5_1", "--method", "rtn")
    assert answer.code == 0, answer.err
    file = GgufFile(place)
    assert {entry.type for entry in file.entries.values()} == {"q5_1", "f32"}
    assert file.metadata["general.file_type"] == 9


def test_types_with_a_codebook(model: Path, place: Path, wanted: Calibration) -> None:
    """By all methods in one file; the package gguf reads the same values, and they are near those of the model."""
    linears = {  # module: its name in the file, type, method, and most relative error
        "self_attn.v_proj": ("attn_v", "iq2_xxs", "rtn", 0.45),
        "self_attn.o_proj": ("attn_output", "iq2_xs", "rtn", 0.38),
        "mlp.gate_proj": ("ffn_gate", "iq2_s", "imatrix", 0.38),
        "mlp.up_proj": ("ffn_up", "iq3_xxs", "gptq", 0.36),
        "self_attn.q_proj": ("attn_q", "iq3_s", "rtn", 0.2),
    }
    # A target would choose values for another weight.
    options = {"gptq": {"target": "0"}}
    rules = [Rule(f"*.{m}", scheme, method, options.get(method, {})) for m, (_, scheme, method, _) in linears.items()]
    plan = Plan("codebooks", "gguf", (*rules, Rule("*", "q8_0", "rtn")))
    quantize.quantize(model, place, plan=plan, calibration=wanted)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(place).tensors}
    loaded, original = generate.load(place, dtype=torch.float32), models.original(model)
    for module, (role, scheme, _, most) in linears.items():
        tensor = theirs[f"blk.1.{role}.weight"]
        assert tensor.tensor_type.name.lower() == scheme
        values = loaded.get_submodule(f"model.layers.1.{module}").qtensor().dequantize()
        if role != "attn_q":  # llama.cpp has the rows of q and k in another order
            assert np.array_equal(gguf.dequantize(tensor.data, tensor.tensor_type), values.numpy())
        expected = models.linear_weight(original.get_submodule(f"model.layers.1.{module}"))
        assert float((values - expected).norm() / expected.norm()) < most, module


def test_a_dry_run_tells_every_tensor_and_does_nothing(model: Path, place: Path, fewbit: Fewbit) -> None:
    shown = fewbit("quantize", model, "-o", place, "--plan", "q2_k", "--dry-run", "--json").json
    assert list(place.parent.iterdir()) == []
    quantize.quantize(model, place, plan=find("q2_k").changed(method="rtn"))
    assert shown["output_bytes"] == GgufFile(place).nbytes
    assert {name: what.split(",")[0] for name, what, _ in shown["tensors"]} == types(place)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3"])
def test_families(family: str, tmp_path: Path, wanted: Calibration) -> None:
    changes: dict[str, Any] = {
        "phi3": {},
        "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True},
    }.get(family, {"head_dim": 32})
    # The tokenizer class of qwen2 has a token more.
    folder = models.save(tmp_path / "model", family, vocab_size=models.VOCAB + 32, **changes)
    done = quantize.quantize(folder, tmp_path / "out.gguf", plan="q4_k_m", calibration=wanted)
    assert done.sample is not None
    assert set(types(tmp_path / "out.gguf").values()) <= {"f32", "q5_0", "q8_0", "f16"}


@pytest.mark.parametrize("kind", gguf_files.SAME)
def test_other_types(kind: str, tmp_path: Path) -> None:
    """A file of each type computes what the original does with the same weights."""
    folder = gguf_files.save(tmp_path / "model", kind)
    quantize.quantize(folder, tmp_path / "out.gguf", plan=find("q8_0").changed(method="rtn"))
    loaded = generate.load(tmp_path / "out.gguf", dtype=torch.float32)
    assert "q8_0" in types(tmp_path / "out.gguf").values()
    ids, original = gguf_files.ids(), models.original(folder)
    found = models.logits(loaded, ids)
    kept = {name: value.clone() for name, value in original.state_dict().items()}
    original = architectures.with_values(original, loaded)
    for name, value in original.state_dict().items():  # each weight is in its place
        assert float((value - kept[name]).norm()) <= 0.02 * float(kept[name].norm()), name
    with torch.no_grad():
        for name, table in original.named_modules():
            if isinstance(table, torch.nn.Embedding):
                embedded = loaded.get_submodule(name)(torch.arange(table.num_embeddings))
                table.weight.copy_(embedded / getattr(table, "embed_scale", 1.0))  # Gemma's scale what they look up
    same = models.logits(original, ids)
    assert float((found - same).norm() / same.norm()) < 1e-4
    # Random linear attention, and gates that are cut off, enlarge the last digits
    if not any(hasattr(original.config, key) for key in ("linear_num_key_heads", "activation_sparsity_pattern")):
        torch.testing.assert_close(found, same, rtol=1e-4, atol=1e-4)
    loaded.save_pretrained(tmp_path / "saved")
    before, after = GgufFile(tmp_path / "out.gguf"), GgufFile(tmp_path / "saved" / "model.gguf")
    assert before.entries == after.entries
    assert all(torch.equal(before.get(name), after.get(name)) for name in before.entries)


def test_what_no_block_divides_is_16_bits(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "model", "llama", intermediate_size=80)
    done = quantize.quantize(folder, tmp_path / "out.gguf", plan=find("q4_0").changed(method="rtn"))
    assert types(tmp_path / "out.gguf")["blk.0.ffn_down.weight"] == "f16"
    assert any("mlp.down_proj" in note for note in done.notes)


# --- importances ---


@pytest.fixture(scope="module")
def matrix(model: Path, wanted: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("matrix") / "imatrix.gguf"
    done = quantize.imatrix(model, path, calibration=wanted)
    assert (done.entries, done.tokens) == (21, 256)
    return path


def test_readers_of_one_tensor_share_one_importance(matrix: Path) -> None:
    found = imatrix.read(matrix)
    assert torch.equal(found["blk.1.attn_q.weight"].mean_square, found["blk.1.attn_v.weight"].mean_square)
    assert torch.equal(found["blk.1.ffn_gate.weight"].mean_square, found["blk.1.ffn_up.weight"].mean_square)
    assert not torch.equal(found["blk.1.attn_q.weight"].mean_square, found["blk.1.ffn_up.weight"].mean_square)
    assert found["blk.2.ffn_down.weight"].rows == 256


def test_a_matrix_in_place_of_calibration(
    model: Path, matrix: Path, place: Path, fewbit: Fewbit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewbit.texts.sources.load_text", lambda *_: pytest.fail("a text was asked for"))
    answer = fewbit("quantize", model, "-o", place, "--plan", "q4_0", "--imatrix", matrix)
    assert answer.code == 0, answer.err
    weighed = GgufFile(place).get("blk.1.ffn_up.weight").clone()
    other = matrix.with_name("other.dat")
    found = imatrix.read(matrix)
    flat = {name: Importance(torch.ones_like(each.mean_square), 1) for name, each in found.items()}
    imatrix.write(other, flat, chunks=1, length=512, text="")
    answer = fewbit("quantize", model, "-o", place, "--plan", "q4_0", "--imatrix", other, "--overwrite")
    assert answer.code == 0, answer.err
    assert not torch.equal(weighed, GgufFile(place).get("blk.1.ffn_up.weight"))


def test_what_a_matrix_lacks_is_named(model: Path, matrix: Path, place: Path, tmp_path: Path) -> None:
    part = tmp_path / "part.gguf"
    found = imatrix.read(matrix)
    del found["blk.1.attn_k.weight"]
    imatrix.write(part, found, chunks=1, length=512, text="")
    done = quantize.quantize(model, place, plan="q4_0", imatrix=part)
    assert any("no importances of blk.1.attn_k.weight" in note for note in done.notes)


def test_the_command(model: Path, text: Path, tmp_path: Path, fewbit: Fewbit) -> None:
    answer = fewbit(
        "imatrix", model, "-o", tmp_path / "m.dat", "--calibration", text, "--samples", 2, "--length", 32, "--json"
    )
    assert answer.json["tokens"] == 64
    assert len(imatrix.read(tmp_path / "m.dat")) == 21
    check(fewbit("imatrix", model, "-o", tmp_path / "m.dat"), 2, "exists")
    check(fewbit("imatrix", model, "-o", tmp_path / "m.bin"), 2, "a .gguf or .dat file")
    check(fewbit("imatrix", tmp_path / "nothing", "-o", tmp_path / "n.dat"), 2, "no such folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.dat"]


# --- refusals ---


def test_names_of_outputs(model: Path, tmp_path: Path, fewbit: Fewbit) -> None:
    check(fewbit("quantize", model, "-o", tmp_path / "out", "--plan", "q4_k_m"), 2, "one .gguf file", "ends in .gguf")
    check(fewbit("quantize", model, "-o", tmp_path / "o.bin", "--plan", "q4_k_m"), 2, "one .gguf file")
    check(fewbit("quantize", model, "-o", tmp_path / "o.gguf"), 2, "gptq-4bit makes a folder", "--plan q4_k_m")
    (tmp_path / "folder.gguf").mkdir()
    check(fewbit("quantize", model, "-o", tmp_path / "folder.gguf", "--plan", "q4_k_m", "--overwrite"), 2, "not a file")
    (tmp_path / "mine.gguf").write_text("mine", encoding="utf-8")
    check(fewbit("quantize", model, "-o", tmp_path / "mine.gguf", "--plan", "q4_k_m"), 2, "exists")
    assert (tmp_path / "mine.gguf").read_text(encoding="utf-8") == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.gguf", "mine.gguf"]


@pytest.mark.parametrize("family", ["opt", "opt-350m"])
def test_a_model_that_gguf_has_no_name_for(family: str, tmp_path: Path, fewbit: Fewbit) -> None:
    folder = models.save(tmp_path / "model", family)
    check(fewbit("quantize", folder, "-o", tmp_path / "out.gguf", "--plan", "q4_k_m"), 2, "no GGUF file can be made")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_importances_that_do_not_serve(
    model: Path, matrix: Path, place: Path, tmp_path: Path, fewbit: Fewbit, own_cache: Path
) -> None:
    def refused(code: int, path: Path, *words: str, method: str = "imatrix") -> None:
        flags = ("--plan", "q4_k_m", "--imatrix", path, "--method", method)
        check(fewbit("quantize", model, "-o", place, *flags), code, *words)
        check(fewbit("quantize", model, "-o", place, *flags, "--dry-run"), code, *words)
        assert list(place.parent.iterdir()) == []
        assert not list(own_cache.glob("runs/*"))

    refused(2, matrix, "method gptq needs whole inputs", method="gptq")
    refused(2, matrix, "method rtn needs no importances", method="rtn")
    refused(2, tmp_path / "none.gguf", "there is no such file")
    found = imatrix.read(matrix)
    foreign = tmp_path / "foreign.gguf"
    imatrix.write(foreign, {f"x.{name}": each for name, each in found.items()}, chunks=1, length=8, text="")
    refused(3, foreign, "none of this model", "blk.0.attn_q.weight")
    found["blk.0.ffn_up.weight"] = Importance(torch.ones(5), 1)
    foreign.unlink()
    imatrix.write(foreign, found, chunks=1, length=8, text="")
    refused(3, foreign, "blk.0.ffn_up.weight has 5 importances, but the weight has 256 columns")
    foreign.write_bytes(matrix.read_bytes()[:-40])
    refused(3, foreign, "blk.2.ffn_up.weight")


def test_a_failing_run_keeps_what_was_there(
    model: Path, place: Path, fewbit: Fewbit, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.write_text("GGUF of mine", encoding="utf-8")
    write = write_gguf.write

    def write_badly(path: Path, *rest: object) -> int:
        written = write(path, *rest)  # type: ignore[arg-type]
        entry = GgufFile(path).entries["output_norm.weight"]
        raw = path.read_bytes()
        at = raw.find(GgufFile(path).get(entry.name).numpy().tobytes())
        path.write_bytes(raw[:at] + np.full(entry.shape, np.nan, np.float32).tobytes() + raw[at + 4 * entry.shape[0] :])
        return written

    monkeypatch.setattr(write_gguf, "write", write_badly)
    answer = fewbit("quantize", model, "-o", place, "--plan", "q4_0", "--method", "rtn", "--overwrite")
    check(answer, 3, "failed its own check", "not finite")
    assert place.read_text(encoding="utf-8") == "GGUF of mine"
    assert [path.name for path in place.parent.iterdir()] == [place.name]


def test_a_killed_run_goes_on(model: Path, place: Path, wanted: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    resumed = []
    with monkeypatch.context() as patch:
        patch.setattr(write_gguf, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quantize.quantize(model, place, plan="q4_k_m", calibration=wanted)
    assert list(place.parent.iterdir()) == []
    quantize.quantize(
        model, place, plan="q4_k_m", calibration=wanted, progress=lambda step: resumed.append(step.resumed)
    )
    assert resumed == [True] * 5  # three blocks, embeddings, head
    again = place.with_name("again.gguf")
    shutil.move(place, again)
    quantize.quantize(model, place, plan="q4_k_m", calibration=wanted)
    first, second = GgufFile(again), GgufFile(place)
    assert all(torch.equal(first.get(name), second.get(name)) for name in first.entries)


def test_every_mixture_has_schemes_that_can_be_written() -> None:
    for name, mixture in mixtures.MIXTURES.items():
        assert str(parse(mixture.base)) == mixture.base, name


def test_progress_counts_blocks_apart(model: Path, tmp_path: Path, wanted: Calibration) -> None:
    """The embeddings and the head are no blocks, and an importance matrix has no errors."""
    steps, measured = list[Step](), list[Step]()
    quantize.quantize(model, tmp_path / "m.gguf", plan="q4_0", calibration=wanted, progress=steps.append)
    counted = [("block", 1, 3), ("block", 2, 3), ("block", 3, 3)]
    outside = [("embeddings and head", 1, 2), ("embeddings and head", 2, 2)]
    assert [(step.what, step.done, step.total) for step in steps] == [*counted, *outside]
    quantize.imatrix(model, tmp_path / "i.gguf", calibration=wanted, progress=measured.append)
    assert [(step.what, step.done, step.total) for step in measured] == counted
    assert {step.error for step in measured} == {None}
