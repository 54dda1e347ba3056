"""What a user has is never lost, and what a file holds is never left out."""

from __future__ import annotations

import json
import os
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import fewbit
from fewbit.api import evaluate, generate, quantize
from fewbit.errors import NumericsError, OutputError, PlanError
from fewbit.models.plugin.quantizer import serving
from fewbit.models.skeleton import Skeleton
from fewbit.models.source import locate
from fewbit.pipeline import run
from fewbit.pipeline.capture import Inputs
from fewbit.pipeline.settled import Settled
from fewbit.plans.plan import find
from fewbit.schemes.base import parse
from fewbit.system import locks, publish
from fewbit.texts import calibration
from tests import architectures, models


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return models.save(tmp_path / "model", "llama")


def rewritten(folder: Path, change: dict[str, torch.Tensor | None]) -> Path:
    """The folder's tensors with some replaced, added or (None) left out."""
    tensors = {**models.tensors_of(folder), **{k: v for k, v in change.items() if v is not None}}
    for name in [name for name, value in change.items() if value is None]:
        tensors.pop(name, None)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_model_that_came_as_a_pickle_is_not_overwritten(model: Path) -> None:
    torch.save(models.tensors_of(model), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(PlanError, match="which would be lost"):
        quantize.quantize(model, model, plan="rtn-4bit", overwrite=True)
    assert (model / "pytorch_model.bin").is_file()


def test_a_file_in_place_of_a_parent_is_not_an_output(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PlanError, match="out cannot be created: Not a directory"):
        quantize.quantize(model, tmp_path / "file" / "out", plan="rtn-4bit")


def test_an_old_output_comes_back_if_the_new_one_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").touch()
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="no"), publish.published(out, overwrite=True):
        pass
    assert (out / "config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_old_output_comes_back_after_a_kill_in_between(tmp_path: Path) -> None:
    old = tmp_path / ".out.fewbit-00" / "old"
    old.mkdir(parents=True)
    (old / "precious").touch()
    with pytest.raises(RuntimeError), publish.published(tmp_path / "out", overwrite=True):
        raise RuntimeError
    assert (tmp_path / "out" / "precious").exists()


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, PlanError])
def test_an_empty_folder_is_filled_or_stays(error: type[BaseException] | None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir(mode=0o700)
    publish.check_output(out, overwrite=False)
    files = [] if error else ["config.json"]
    with pytest.raises(error) if error else nullcontext(), publish.published(out) as made:
        (made / "config.json").touch()
        if error is not None:
            raise error("no")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == files
    assert out.stat().st_mode & 0o777 == 0o700


def test_what_came_into_an_empty_folder_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    publish.check_output(out, overwrite=False)
    with pytest.raises(PlanError, match="created by another program meanwhile"), publish.published(out):
        (out / "config.json").touch()
    assert [path.name for path in out.iterdir()] == ["config.json"]


def test_an_empty_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="is a folder, not a file"):
        publish.check_output(tmp_path, overwrite=False, file=True)


@pytest.mark.parametrize("plan", ["rtn-4bit", "q4_0"])
def test_what_has_no_place_is_named(plan: str, model: Path, tmp_path: Path) -> None:
    lost = {"mtp.fc.weight": torch.rand(4, 4), "model.layers.9.mlp.up_proj.weight": torch.rand(4, 4)}
    rewritten(model, {**lost})
    for name in ("draft/model.safetensors", "image_processor.json", "1_Pooling/config.json"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("{}", encoding="utf-8")
    out = tmp_path / ("out.gguf" if plan == "q4_0" else "out")
    done = quantize.quantize(model, out, plan=plan)
    said = " ".join(done.notes)
    assert "2 tensors of 128 bytes (model.layers.9.mlp.up_proj.weight, mtp.fc.weight)" in said
    assert "draft/" in said
    if plan == "q4_0":
        assert "left out: 2 tensors" in said
        assert "image_processor.json" in said
        assert "1_Pooling/config.json" in said
    else:
        assert "carried over as is: 2 tensors" in said
        assert (out / "image_processor.json").exists()
        assert (out / "1_Pooling" / "config.json").exists()
        assert not (out / "draft").exists()
        assert json.loads((out / "fewbit.json").read_text(encoding="utf-8"))["notes"] == done.notes
        found = models.tensors_of(out)
        assert all(torch.equal(found[name], tensor) for name, tensor in lost.items())


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe"])
def test_a_layer_for_multi_token_prediction_is_carried_over(kind: str, tmp_path: Path) -> None:
    folder = architectures.save(tmp_path / "model", kind)
    layers = models.tensors_of(folder)
    extra = {n.replace("layers.1.", "layers.2."): t.bfloat16() for n, t in layers.items() if "layers.1." in n}
    extra["model.layers.2.eh_proj.weight"] = torch.rand(8, 16).bfloat16()
    assert any("experts.3" in name for name in extra)
    rewritten(folder, {**extra})
    done = quantize.quantize(folder, tmp_path / "out", plan="nf4", device="cpu")
    assert f"carried over as is: {len(extra)} tensors" in " ".join(done.notes)
    found = models.tensors_of(tmp_path / "out")
    assert all(found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in extra.items())
    fewbit.load(tmp_path / "out")


def test_readers_are_told_what_is_carried_over(model: Path, tmp_path: Path) -> None:
    carried = ("mtp.fc", "proj")  # the second is how names of quantized linears end
    beside = "model.layers.0.mlp.up_proj.g_idx"
    rewritten(model, {**{f"{name}.weight": torch.ones(4, 4) for name in carried}, beside: torch.ones(4)})
    done = quantize.quantize(model, tmp_path / "gptq", plan="rtn-4bit")
    assert any(f"left out: 1 tensor of 16 bytes ({beside})" in note for note in done.notes)
    config = models.quantization_of(tmp_path / "gptq")
    assert r"-:^mtp\.fc$" in config["dynamic"]
    assert "-:^proj$" not in config["dynamic"]
    rules = [{"match": "mtp.*", "scheme": None}, {"match": "*", "scheme": "nf4-b64", "method": "rtn"}]
    for plan in ("nf4", {"name": "mine", "format": "bnb", "rules": rules}):
        shown = quantize.preview(model, plan=plan)
        assert ("mtp.fc.weight", "copied, not part of the model (float32)", 64) in shown.tensors


def test_a_pickle_keeps_its_subfolders(model: Path, tmp_path: Path) -> None:
    torch.save(models.tensors_of(model), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}", encoding="utf-8")
    done = quantize.quantize(model, tmp_path / "out", plan="rtn-4bit")
    assert (tmp_path / "out" / "additional_chat_templates" / "tools.jinja").exists()
    assert not any("left out" in note for note in done.notes)
    models.edit_json(model / "config.json", note="edited")
    assert locate(model).config["note"] == "edited"


def test_the_model_card_of_the_original_is_kept(model: Path, tmp_path: Path) -> None:
    (model / "README.md").write_text("---\nlicense: mit\n---\n# Gr\u00fc\u00dfe", encoding="utf-8")
    quantize.quantize(model, tmp_path / "out", plan="rtn-4bit")
    kept = (tmp_path / "out" / "README-original.md").read_bytes()
    assert kept == (model / "README.md").read_bytes()
    assert "[README-original.md](README-original.md)" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "README-original.md" in json.loads((tmp_path / "out" / "fewbit.json").read_text(encoding="utf-8"))["files"]
    quantize.quantize(model, tmp_path / "out", plan="nf4", overwrite=True)
    done = quantize.quantize(model, tmp_path / "out.gguf", plan="q8_0")
    assert any(f"left out: README.md of {model}" in note for note in done.notes)
    (model / "README.md").unlink()
    quantize.quantize(model, tmp_path / "out", plan="rtn-4bit", overwrite=True)
    assert not (tmp_path / "out" / "README-original.md").exists()
    assert "README-original.md" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_a_folder_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    theirs = locks.hold(tmp_path / ".out.fewbit-00")
    assert theirs is not None
    (tmp_path / ".out.fewbit-01").mkdir()  # of a process that was killed
    with publish.published(tmp_path / "out") as folder:
        (folder / "file").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.fewbit-00", "out"]
    theirs.remove()


def test_an_output_head_that_differs_from_its_tie_is_kept(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "model", "llama", tie_word_embeddings=True)
    embedding = models.tensors_of(folder)["model.embed_tokens.weight"]
    rewritten(folder, {"lm_head.weight": embedding.flip(0).contiguous()})
    quantize.quantize(folder, tmp_path / "out", plan="rtn-4bit")
    assert torch.equal(models.tensors_of(tmp_path / "out")["lm_head.weight"], embedding.flip(0))
    loaded = generate.load(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(loaded.lm_head.weight.to(embedding.dtype), embedding.flip(0))


def test_a_tie_may_be_stored_under_its_other_name(tmp_path: Path) -> None:
    folder = models.save(tmp_path / "model", "llama", tie_word_embeddings=True)
    embedding = models.tensors_of(folder)["model.embed_tokens.weight"]
    rewritten(folder, {"lm_head.weight": embedding.clone(), "model.embed_tokens.weight": None})
    quantize.quantize(
        folder, tmp_path / "out", plan="gptq-4bit", calibration=calibration.Calibration(samples=2, length=32)
    )
    loaded = generate.load(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(loaded.model.embed_tokens.weight.to(embedding.dtype), embedding)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_bias_that_only_the_file_has_is_added(model: Path, tmp_path: Path) -> None:
    quantize.quantize(model, tmp_path / "out", plan="rtn-4bit")
    name = "model.layers.0.mlp.up_proj"
    bias = torch.full((generate.load(model).get_submodule(name).out_features,), 5.0)
    rewritten(tmp_path / "out", {f"{name}.bias": bias})
    layer = generate.load(tmp_path / "out", dtype=torch.float32).get_submodule(name)
    still = layer(torch.zeros(1, layer.in_features))
    assert torch.equal(still, torch.full_like(still, 5.0))


def test_another_config_is_another_run(model: Path) -> None:
    def fingerprint() -> str:
        skeleton = Skeleton(locate(model), torch.float32, torch.device("cpu"))
        return run.fingerprint(Settled.of(skeleton, find("rtn-4bit")), Inputs(), {})

    before = fingerprint()
    assert fingerprint() == before
    models.edit_json(model / "config.json", rms_norm_eps=0.5)
    assert fingerprint() != before


def test_logits_that_are_no_numbers_are_an_error(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(models.sentences(50), encoding="utf-8")
    norm = models.tensors_of(model)["model.norm.weight"]
    rewritten(model, {"model.norm.weight": torch.full_like(norm, torch.nan)})
    with pytest.raises(NumericsError, match="window 1"):
        evaluate.evaluate(model, text=str(text), length=32, samples=1)


def test_what_the_text_could_not_give_is_noted(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(models.sentences(40), encoding="utf-8")
    done = quantize.quantize(
        model, tmp_path / "out", calibration=calibration.Calibration(str(text), samples=4000, length=32)
    )
    assert any("not 4000" in note for note in done.notes)


def test_an_output_can_be_read_by_others(model: Path, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        quantize.quantize(model, tmp_path / "out", plan="rtn-4bit")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o644}


DOWN = "model.layers.0.mlp.down_proj"


def scaled(folder: Path, factor: float) -> Path:
    w = models.tensors_of(folder)[f"{DOWN}.weight"]
    return rewritten(folder, {f"{DOWN}.weight": w * factor})


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A model in float32, wide enough for the blocks of every plan."""
    return models.save(
        tmp_path / "plain", "llama", dtype="float32", num_hidden_layers=1, hidden_size=256, intermediate_size=256
    )


@pytest.mark.parametrize("plan", ["rtn-4bit", "int8", "q8_0", "q4_k_m"])
def test_weights_too_small_for_their_scales_are_noted(plan: str, plain: Path, tmp_path: Path) -> None:
    single = find(plan).format == "gguf"
    out = tmp_path / ("out.gguf" if single else "out")
    done = quantize.quantize(scaled(plain, 1e-12), out, plan=plan)
    (note,) = [note for note in done.notes if "became 0" in note]
    (report,) = [tensor for tensor in done.tensors if tensor.vanished]
    groups = 256 * parse(report.scheme).groups(256)
    assert report.module == DOWN
    assert report.vanished == groups
    assert note.startswith(f"{groups} groups of weights became 0, in 1 of ")
    assert report.scheme in note
    if not single:
        assert note in json.loads((out / publish.RECORD).read_text(encoding="utf-8"))["notes"]


def test_what_a_scheme_can_hold_is_not_noted(plain: Path, tmp_path: Path) -> None:
    done = quantize.quantize(scaled(plain, 1e-12), tmp_path / "out", plan="nf4")  # whose scales are float32
    assert not [note for note in done.notes if "became 0" in note]


@pytest.mark.parametrize(("width", "noted"), [("load_in_8bit", True), ("load_in_4bit", False)])
def test_a_config_object_notes_them_too(width: str, noted: bool, plain: Path) -> None:
    config = BitsAndBytesConfig(**{width: True})
    with warnings.catch_warnings(record=True) as caught, serving():
        warnings.simplefilter("always")
        AutoModelForCausalLM.from_pretrained(scaled(plain, 1e-12), quantization_config=config)
    said = [str(warning.message) for warning in caught if "became 0" in str(warning.message)]
    sentence = "256 groups of weights became 0, in 1 of 7 tensors: they are too small for the scales of llm.int8. "
    assert said == ([f"BitsAndBytesConfig: {sentence}{DOWN} has most of them (256)"] if noted else [])


@pytest.mark.parametrize("plan", ["rtn-4bit", "int8", "q8_0"])
def test_weights_too_large_for_their_scales_are_refused(plan: str, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / ("out.gguf" if find(plan).format == "gguf" else "out")
    with pytest.raises(NumericsError, match=f"{DOWN}: a weight is beyond the range of .*65504"):
        quantize.quantize(scaled(plain, 1e8), out, plan=plan)
    assert not out.exists()
