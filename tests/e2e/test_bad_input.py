"""Bad input is refused before any work, in words that name the thing, with the right exit code, and leaves nothing."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fewbit import FormatError, KernelError, PlanError
from fewbit.api import generate, quantize
from fewbit.formats.containers import safetensors
from fewbit.models.separated import UNDECORATED
from fewbit.pipeline import run, write_folder
from fewbit.texts import calibration
from tests import architectures, models
from tests.e2e.conftest import Answer, Fewbit

WEIGHTS = "model.safetensors"
Q_PROJ = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="session")
def sound_gptq(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sound") / "gptq"
    quantize.quantize(sound, out, plan="rtn-4bit")
    return out


@pytest.fixture
def model(sound: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Not more than 4 GB of addresses beyond what the process has: a lie of some bytes must not cost more."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (4 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def gptq(sound_gptq: Path, tmp_path: Path) -> Path:
    """A quantized copy to break."""
    return Path(shutil.copytree(sound_gptq, tmp_path / "gptq"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "outputs").mkdir()
    return tmp_path / "outputs" / "out"


def check(answer: Answer, code: int, *words: str) -> None:
    assert answer.code == code, answer.err
    assert "Traceback" not in answer.err
    assert "error: " in answer.err
    for word in words:
        assert word in answer.err, answer.err


@pytest.fixture
def refused(fewbit: Fewbit, place: Path, own_cache: Path) -> Callable[..., None]:
    """Quantizing ends with this code and these words, no block was begun, and nothing lies where the output would."""

    def run(code: int, words: tuple[str, ...], model: object, *flags: object) -> None:
        answer = fewbit("quantize", model, "-o", place, *flags)
        check(answer, code, *words)
        assert "block 1/" not in answer.err
        assert list(place.parent.iterdir()) == []
        assert not list(own_cache.glob("runs/*"))

    return run


Refused = Callable[..., None]


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def shard(folder: Path) -> dict[str, str]:
    """Turn a folder's one file into two shards with an index; returns the index's map."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    where = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({n: tensors[n] for n in names if where[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}), encoding="utf-8")
    return where


# --- The model's folder ---


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "no where"])
def test_no_such_model(name: str, refused: Refused) -> None:
    refused(2, (name, "no such folder", "smollm2"), name)


def test_no_such_model_on_the_hub(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(2, ("nobody/nothing", "Hub"), "nobody/nothing")


def test_a_file_for_a_model(model: Path, refused: Refused) -> None:
    refused(2, (WEIGHTS, "is a file"), model / WEIGHTS)


def test_a_folder_without_config(model: Path, refused: Refused) -> None:
    (model / "config.json").unlink()
    refused(3, (str(model), "no config.json"), model)


@pytest.mark.parametrize("content", ["{", "[]", "null", '"words"', "", "\0"])
def test_a_config_that_is_no_object(content: str, model: Path, refused: Refused) -> None:
    (model / "config.json").write_text(content, encoding="utf-8")
    refused(3, ("config.json",), model)


def test_a_config_that_is_no_text(model: Path, refused: Refused) -> None:
    (model / "config.json").write_bytes(b"\xff\xfe{")
    refused(3, ("config.json",), model)


@pytest.mark.parametrize("config", [{}, {"model_type": "no-such-thing"}, {"model_type": "vit"}, {"model_type": 7}])
def test_a_config_of_no_causal_model(config: Mapping[str, Any], model: Path, refused: Refused) -> None:
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    refused(3, ("config.json", "no causal LM"), model)


@pytest.mark.parametrize("wrong", [{"hidden_size": "many"}, {"num_attention_heads": 0}, {"vocab_size": -1}], ids=str)
def test_a_config_with_impossible_values(wrong: Mapping[str, Any], model: Path, refused: Refused) -> None:
    models.edit_json(model / "config.json", **wrong)
    refused(3, (str(model / "config.json"),), model)


def test_a_config_without_blocks(model: Path, refused: Refused) -> None:
    models.edit_json(model / "config.json", num_hidden_layers=0)
    refused(2, ("LlamaForCausalLM", "no list of blocks"), model)


def test_a_null_for_a_quantization_config_is_none(model: Path, place: Path, fewbit: Fewbit) -> None:
    models.edit_json(model / "config.json", quantization_config=None)
    assert fewbit("inspect", model).code == 0
    answer = fewbit("quantize", model, "-o", place, "--plan", "rtn-4bit")
    assert (answer.code, answer.err.count("error: ")) == (0, 0), answer.err


def test_no_weights(model: Path, refused: Refused) -> None:
    (model / WEIGHTS).unlink()
    refused(3, (str(model), "no weights", "pytorch_model.bin"), model)


def test_no_tokenizer(model: Path, text: Path, refused: Refused) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()
    words = (f"{model} has no usable tokenizer\n", "Copy tokenizer.json and tokenizer_config.json")
    refused(3, words, model, "--calibration", text, "--length", 16)


def test_a_broken_tokenizer(model: Path, refused: Refused) -> None:
    (model / "tokenizer.json").write_text('{"version": "1.0", "model": {}}', encoding="utf-8")
    refused(3, ("tokenizer",), model)


# --- Pickles ---


def pickled(folder: Path, shards: int = 1) -> None:
    """The same model as pytorch_model.bin."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    if shards == 1:
        torch.save({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, folder / "pytorch_model.bin")
        return
    names = sorted(tensors)
    where = {name: f"pytorch_model-0000{1 + i % shards}-of-0000{shards}.bin" for i, name in enumerate(names)}
    for file in set(where.values()):
        torch.save({n: tensors[n] for n in names if where[n] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where}), encoding="utf-8"
    )


@pytest.mark.parametrize("shards", [1, 2])
def test_a_pickle_of_tensors_serves_as_well(
    shards: int, model: Path, sound_gptq: Path, place: Path, fewbit: Fewbit
) -> None:
    pickled(model, shards)
    assert fewbit("quantize", model, "-o", place, "--plan", "rtn-4bit").code == 0
    got, wanted = models.tensors_of(place), models.tensors_of(sound_gptq)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert sorted(p.name for p in place.iterdir()) == sorted(p.name for p in sound_gptq.iterdir())


def test_a_pickle_can_be_refused_altogether(model: Path, refused: Refused) -> None:
    pickled(model)
    refused(3, ("pytorch_model.bin", "--safetensors-only"), model, "--safetensors-only")


class Asking:
    """Unpickled, it runs a command."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_pickle_that_asks_for_more_is_never_executed(
    legacy: bool, model: Path, refused: Refused, tmp_path: Path, own_cache: Path
) -> None:
    (model / WEIGHTS).unlink()
    witness, pickle = tmp_path / "executed", model / "pytorch_model.bin"
    torch.save({"a": torch.zeros(2), "b": Asking(witness)}, pickle, _use_new_zipfile_serialization=not legacy)
    refused(3, (str(pickle), "plain tensors"), model)
    assert not witness.exists()
    assert not list(own_cache.glob("*unpickled*"))


@pytest.mark.parametrize("content", [b"", b"\x80\x02}q\x00.", b"PK\x03\x04 no zip"], ids=["empty", "dict", "zip"])
def test_a_pickle_that_is_none(content: bytes, model: Path, refused: Refused) -> None:
    (model / WEIGHTS).unlink()
    (model / "pytorch_model.bin").write_bytes(content)
    refused(3, ("pytorch_model.bin",), model)


# --- safetensors files ---


def test_a_truncated_file(model: Path, refused: Refused) -> None:
    whole = (model / WEIGHTS).read_bytes()
    for end in (0, 4, 8, 100, len(whole) - 1):
        (model / WEIGHTS).write_bytes(whole[:end])
        refused(3, (WEIGHTS, f"{end:,} bytes"), model)


def header(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(data: Mapping[str, Any], body: bytes) -> bytes:
    text = json.dumps(data).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize(
    "lie",
    ["length", "huge length", "offset", "negative", "overlap", "dtype", "shape", "huge shape", "no json", "tail"],
)
@pytest.mark.usefixtures("little_memory")
def test_a_header_that_lies(lie: str, model: Path, refused: Refused) -> None:
    file, name = model / WEIGHTS, "model.norm.weight"
    data, body = header(file.read_bytes())
    entry = data[name]
    begin, end = entry["data_offsets"]
    if lie == "offset":
        entry["data_offsets"] = [begin + (1 << 40), end + (1 << 40)]
    elif lie == "negative":
        entry["data_offsets"] = [-256, end - begin - 256]
    elif lie == "overlap":
        entry["data_offsets"] = [begin - 64, end - 64]
    elif lie == "dtype":
        entry["dtype"] = "F1"
    elif lie == "shape":
        entry["shape"] = [65]
    elif lie == "huge shape":
        entry["shape"] = [1 << 62, 1 << 62]
    content = with_header(data, body)
    if lie == "length":
        content = struct.pack("<Q", len(content)) + content[8:]
    elif lie == "huge length":
        content = struct.pack("<Q", (1 << 63) - 1) + content[8:]
    elif lie == "no json":
        content = content[:8] + b"x" + content[9:]
    elif lie == "tail":
        content += bytes(64)
    file.write_bytes(content)
    refused(3, (WEIGHTS,), model)


@pytest.mark.parametrize("name", ["absent.safetensors", "../model/there.safetensors", "/etc/passwd", "", ".", 7, None])
def test_an_index_that_names_what_is_not_there(name: object, model: Path, refused: Refused) -> None:
    where: dict[str, Any] = shard(model)
    shutil.copy(model / next(iter(where.values())), model / "there.safetensors")
    where["model.norm.weight"] = name
    (model / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}), encoding="utf-8")
    refused(3, (f"{WEIGHTS}.index.json",), model)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_that_is_none(content: str, model: Path, refused: Refused) -> None:
    shard(model)
    (model / f"{WEIGHTS}.index.json").write_text(content, encoding="utf-8")
    refused(3, (str(model),), model)


def test_a_tensor_in_two_shards(model: Path, refused: Refused) -> None:
    where = shard(model)
    second = next(file for file in set(where.values()) if file != where["model.norm.weight"])
    tensors = load_file(model / second)
    save_file({**tensors, "model.norm.weight": torch.zeros(64)}, model / second)
    refused(3, ("model.norm.weight", second), model)


def test_a_missing_tensor(model: Path, refused: Refused) -> None:
    rewrite(model, lambda tensors: tensors.pop(f"{Q_PROJ}.weight"))
    refused(3, (f"{Q_PROJ}.weight", "missing"), model)


def test_a_tensor_of_another_shape(model: Path, refused: Refused) -> None:
    rewrite(model, lambda tensors: tensors.update({f"{Q_PROJ}.weight": torch.zeros(64, 32)}))
    refused(3, (f"{Q_PROJ}.weight", "[64, 32]", "[64, 64]"), model)


def test_a_weight_of_integers(model: Path, refused: Refused) -> None:
    rewrite(model, lambda tensors: tensors.update({f"{Q_PROJ}.weight": torch.zeros(64, 64, dtype=torch.int64)}))
    refused(3, (f"{Q_PROJ}.weight", "int64"), model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite(value: float, model: Path, refused: Refused) -> None:
    rewrite(model, lambda tensors: tensors[f"{Q_PROJ}.weight"].__setitem__((3, 5), value))
    refused(4, (f"{Q_PROJ}.weight", "NaN or Inf"), model)


def test_an_embedding_that_is_not_finite(model: Path, refused: Refused) -> None:
    """No quantized weight holds it, but no block is given anything finite to calibrate on either."""
    rewrite(model, lambda tensors: tensors["model.embed_tokens.weight"].fill_(float("nan")))
    refused(4, ("model.embed_tokens.weight", "NaN or Inf"), model)


# --- What was asked for ---


def test_a_group_that_does_not_divide_names_every_tensor(sound: Path, refused: Refused) -> None:
    names = [f"model.layers.0-1.{kind}" for kind in ("self_attn.q_proj", "mlp.down_proj")]
    words = (*names, "14 of 14", "128", "64 columns", "96 columns", "scheme int4-g32-sym fits")
    refused(2, words, sound, "--scheme", "int4-g128-sym")
    some = ("2 of 14", "model.layers.0-1.mlp.down_proj", "scheme int4-g32-sym fits")
    refused(2, some, sound, "--scheme", "int4-g64-sym")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--plan", "gptq-5bit"), ("gptq-5bit", "gptq-4bit")),
        (("--plan", "absent.json"), ("absent.json",)),
        (("--scheme", "int4-g64-symm"), ("int4-g64-symm", "Did you mean int4-g64-sym?")),
        (("--scheme", "int9-g64"), ("int9-g64", "int2 ... int8")),
        (("--scheme", "int1-g64"), ("int1-g64", "int2 ... int8")),
        (("--scheme", "int4-g8"), ("int4-g8", "16 to 1024")),
        (("--scheme", "nvfp4-mul"), ("nvfp4-mul", "no format stores it yet", "nvfp4")),
        (("--method", "gtpq"), ("gtpq", "gptq")),
        (("--format", "gptk"), ("gptk", "gptq")),
        (("--dampp", "0.1"), ("dampp", "damp")),
        (("--damp", "much"), ("--damp", "'much'")),
        (("--damp", "nan"), ("--damp", "nan")),
        (("--damp", "-1"), ("--damp", "-1")),
        (("--damp=inf",), ("--damp", "inf")),
        (("--refine", "-1"), ("--refine", "-1")),
        (("--refine", "1.5"), ("--refine", "1.5")),
        (("--target", "1.5"), ("--target", "1.5", "0: no target")),
        (("--act-order=perhaps",), ("--act-order", "perhaps")),
        (("--plan", "rtn-4bit", "--damp", "0.1"), ("damp", "rtn")),
        (("stray",), ("stray",)),
        (("--samples", "0"), ("samples", "0")),
        (("--samples", "-3"), ("samples", "-3")),
        (("--length", "0"), ("length", "0")),
        (("--length", "129"), ("--length 129", "128")),
        (("--calibration", "wikitxt2"), ("wikitxt2", "wikitext2")),
        (("--plan", "."), ("plan .: this is a folder", ".json")),
        (("--calibration", "."), ("the text . is a folder", ".jsonl")),
        (("--imatrix", "."), ("--imatrix '.'", "a file, and this is a folder")),
        (("--device", "gpu7"), ("gpu7",)),
        (("--device", "cuda:99"), ("cuda",)),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_request_that_cannot_be(
    flags: tuple[str, ...], words: tuple[str, ...], sound: Path, refused: Refused
) -> None:
    refused(2, words, sound, *flags)


@pytest.mark.parametrize("flags", [("--samples", "few"), ("--seed", "some")], ids=" ".join)
def test_a_flag_that_is_no_number(flags: tuple[str, ...], sound: Path, fewbit: Fewbit, place: Path) -> None:
    answer = fewbit("quantize", sound, "-o", place, *flags)
    assert answer.code == 2
    assert flags[0] in answer.err
    assert "valid integer" in answer.err
    assert list(place.parent.iterdir()) == []


def test_no_output_named(sound: Path, fewbit: Fewbit) -> None:
    check(fewbit("quantize", sound), 2, "-o OUT", "--dry-run")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "3",
        "{}",
        '{"name": "x", "format": "gptq"}',
        '{"name": "x", "format": "gptq", "rules": 3}',
        '{"name": "x", "format": "gptq", "rules": [3]}',
        '{"name": "x", "format": "gptq", "rules": [{"match": "*"}]}',
        '{"name": "x", "format": "gptq", "rules": [{"match": 3, "scheme": "int4-g32-sym"}]}',
        '{"name": "x", "format": "gptq", "rules": [{"match": "*", "scheme": 4}]}',
        '{"name": "x", "format": "gptq", "rules": [{"match": "*", "scheme": "int4-g32-sym", "method": 1}]}',
        '{"name": "x", "format": "gptq", "rules": [{"match": "*", "scheme": "int4-g32-sym", "colour": "red"}]}',
        '{"name": "x", "format": "gptq", "rules": [{"match": "*", "scheme": "int4-g32-sym", "options": 3}]}',
    ],
)
def test_a_plan_file_that_is_none(content: str, sound: Path, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(content, encoding="utf-8")
    refused(2, ("plan",), sound, "--plan", tmp_path / "plan.json")


def plan_of(*rules: tuple[str, str | None]) -> str:
    listed = [{"match": match, "scheme": scheme, "method": "rtn"} for match, scheme in rules]
    return json.dumps({"name": "mine", "format": "gptq", "rules": listed})


def test_a_plan_that_leaves_most_as_it_is(sound: Path, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(plan_of(("*.q_proj", "int4-g32-sym")), encoding="utf-8")
    refused(2, ("%", "50%", "mlp"), sound, "--plan", tmp_path / "plan.json")


def test_a_plan_that_matches_nothing(sound: Path, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(plan_of(("*.attention", "int4-g32-sym")), encoding="utf-8")
    refused(
        2,
        ("mine", "'*.attention', matches nothing", "model.layers.0-1.self_attn.q_proj"),
        sound,
        "--plan",
        tmp_path / "plan.json",
    )


def test_a_rule_for_the_head_is_a_note(sound: Path, fewbit: Fewbit, tmp_path: Path) -> None:
    for scheme in (None, "int4-g32"):
        plan = plan_of(("lm_head", scheme), ("*", "int4-g32")).replace("gptq", "awq")
        (tmp_path / "plan.json").write_text(plan, encoding="utf-8")
        shown = fewbit("quantize", sound, "--plan", tmp_path / "plan.json", "--dry-run", "--json")
        assert shown.code == 0
        said = [note for note in shown.json["notes"] if "'lm_head', matches no linear in the model's blocks" in note]
        assert len(said) == (scheme is not None)


def test_a_plan_of_two_schemes_for_a_file_of_one(sound: Path, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(plan_of(("*.q_proj", "int4-g32-sym"), ("*", "int3-g32-sym")), encoding="utf-8")
    refused(2, ("int3-g32-sym", "int4-g32-sym"), sound, "--plan", tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("kind", "experts"), [("longcat_flash", "LongcatFlashExperts"), ("jetmoe", "JetMoeParallelExperts")]
)
def test_experts_of_an_unknown_layout(
    kind: str, experts: str, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = architectures.save(tmp_path / "experts", kind)
    monkeypatch.delitem(UNDECORATED, experts)
    refused(2, ("fused experts", "cannot be quantized yet"), folder)


# --- The output ---


def test_an_output_that_exists_is_kept(sound: Path, place: Path, fewbit: Fewbit) -> None:
    place.mkdir()
    (place / "precious").write_text("mine", encoding="utf-8")
    check(fewbit("quantize", sound, "-o", place), 2, str(place), "exists", "--overwrite")
    assert [p.name for p in place.iterdir()] == ["precious"]


def test_an_empty_folder_is_an_output(sound: Path, tmp_path: Path, fewbit: Fewbit) -> None:
    out, moved = tmp_path / "empty", tmp_path / "moved"
    out.mkdir()
    moved.mkdir()
    assert fewbit("quantize", sound, "-o", out, "--plan", "rtn-4bit").code == 0
    assert (out / "model.safetensors").is_file()
    assert fewbit("convert", out, "-o", moved, "--to", "compressed-tensors").code == 0
    assert (moved / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "moved"]


def test_an_output_that_is_replaced_is_replaced_whole(
    sound: Path, sound_gptq: Path, place: Path, fewbit: Fewbit
) -> None:
    place.mkdir()
    (place / "config.json").write_text("mine", encoding="utf-8")
    assert fewbit("quantize", sound, "-o", place, "--overwrite", "--plan", "rtn-4bit").code == 0
    assert list(place.parent.iterdir()) == [place]
    assert sorted(p.name for p in place.iterdir()) == sorted(p.name for p in sound_gptq.iterdir())


def test_a_failing_run_keeps_what_was_there(
    model: Path, place: Path, fewbit: Fewbit, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.mkdir()
    (place / "config.json").write_text("mine", encoding="utf-8")
    rewrite(model, lambda tensors: tensors[f"{Q_PROJ}.weight"].fill_(float("nan")))
    check(fewbit("quantize", model, "-o", place, "--overwrite"), 4, Q_PROJ)
    assert [p.name for p in place.iterdir()] == ["config.json"]
    assert list(place.parent.iterdir()) == [place]


def test_a_result_that_fails_its_own_check_is_not_published(
    sound: Path, place: Path, fewbit: Fewbit, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.mkdir()
    (place / "config.json").write_text("mine", encoding="utf-8")
    write = write_folder.write

    def write_badly(folder: Path, *rest: Any) -> int:
        written = write(folder, *rest)
        rewrite(folder, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
        return written

    monkeypatch.setattr(write_folder, "write", write_badly)
    answer = fewbit("quantize", sound, "-o", place, "--overwrite", "--plan", "rtn-4bit")
    check(answer, 3, "failed its own check", "not finite")
    assert [p.name for p in place.iterdir()] == ["config.json"]
    assert list(place.parent.iterdir()) == [place]


def test_an_output_inside_a_file_is_refused_before_any_work(sound: Path, tmp_path: Path, fewbit: Fewbit) -> None:
    (tmp_path / "file").write_text("a file", encoding="utf-8")
    answer = fewbit("quantize", sound, "-o", tmp_path / "file" / "out", "--plan", "rtn-4bit")
    assert answer.code in (1, 2)
    check(answer, answer.code, str(tmp_path / "file"))
    assert "block 1/" not in answer.err


def test_files_of_others_are_not_replaced(sound: Path, place: Path, fewbit: Fewbit) -> None:
    place.mkdir()
    (place / "config.json").write_text("{}", encoding="utf-8")
    (place / "thesis.txt").write_text("years", encoding="utf-8")
    check(fewbit("quantize", sound, "-o", place, "--overwrite", "--plan", "rtn-4bit"), 2, "thesis.txt", "--overwrite")
    (place / "thesis.txt").unlink()
    (place / "work").mkdir()
    check(fewbit("quantize", sound, "-o", place, "--overwrite", "--plan", "rtn-4bit"), 2, "work/")
    file = place.with_suffix(".gguf")
    file.write_text("my notes", encoding="utf-8")
    check(fewbit("quantize", sound, "-o", file, "--overwrite", "--plan", "q4_0"), 2, "not a GGUF file")
    assert file.read_text(encoding="utf-8") == "my notes"


def test_what_a_run_carried_over_may_be_replaced(model: Path, place: Path, fewbit: Fewbit) -> None:
    (model / "notes.txt").write_text("of the model", encoding="utf-8")
    for flags in ((), ("--overwrite",)):
        assert fewbit("quantize", model, "-o", place, "--plan", "rtn-4bit", *flags).code == 0
    assert (place / "notes.txt").exists()


def test_a_linked_output_stays_a_link(sound: Path, tmp_path: Path, place: Path, fewbit: Fewbit) -> None:
    (tmp_path / "disk" / "big").mkdir(parents=True)
    place.symlink_to(tmp_path / "disk" / "big")
    assert fewbit("quantize", sound, "-o", place, "--overwrite", "--plan", "rtn-4bit").code == 0
    assert place.is_symlink()
    assert (tmp_path / "disk" / "big" / "config.json").exists()
    assert [*place.parent.iterdir(), *(tmp_path / "disk").iterdir()] == [place, tmp_path / "disk" / "big"]


@pytest.mark.parametrize("where", ["", ".", "/", "/proc/out", "link.gguf", "n" * 256 + ".gguf", "file/out.gguf"])
@pytest.mark.parametrize("verb", ["quantize", "imatrix", "finetune", "compare"])
def test_an_output_that_cannot_be_made(verb: str, where: str, sound: Path, tmp_path: Path, fewbit: Fewbit) -> None:
    """Found first: the text for training and the plan for a folder are wrong too, and not yet looked at."""
    (tmp_path / "link.gguf").symlink_to(tmp_path / "nowhere" / "out")
    for name in ("file", "empty.txt"):
        (tmp_path / name).touch()
    before = sorted(tmp_path.iterdir())
    out = str(tmp_path / where) if where.endswith(".gguf") else where
    if verb == "imatrix" and where == "/proc/out":
        out += ".gguf"
    flags = {"finetune": ("--data", tmp_path / "empty.txt"), "quantize": ("--plan", "q4_0")}.get(verb, ())
    flags = () if verb == "quantize" and not where.endswith(".gguf") else flags
    answer = fewbit(verb, sound, "-o", out, *flags)
    check(answer, 2, "expected a name or a path" if not where else out)
    assert "none.txt" not in answer.err
    assert sorted(tmp_path.iterdir()) == before


def test_an_empty_name_comes_before_its_ending(fewbit: Fewbit) -> None:
    check(fewbit("convert", "tiny", "-o", "", "--to", "gguf"), 2, "-o ''", "expected a name or a path")


@pytest.mark.parametrize(
    "asks",
    [
        {"num_beams": 4},
        {"stop_strings": ["row"]},
        {"do_sample": True, "num_return_sequences": 3},
        {"temperature": 0.5, "do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"max_length": 2, "min_length": 1},
        {"forced_eos_token_id": 10**6, "forced_bos_token_id": 10**6},
    ],
    ids=lambda asks: next(iter(asks)),
)
def test_what_a_model_asks_of_generating(asks: dict[str, Any], model: Path, place: Path, fewbit: Fewbit) -> None:
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, **asks}), encoding="utf-8")
    assert fewbit("quantize", model, "-o", place, "--plan", "rtn-4bit").code == 0
    assert json.loads((place / "generation_config.json").read_text(encoding="utf-8")) == {"eos_token_id": 1, **asks}
    answer = fewbit("generate", place, "the small", "--max-new-tokens", 4)
    assert answer.code == 0, answer.err


def test_an_adapter_outlives_a_disk_that_is_full(
    sound: Path, place: Path, text: Path, fewbit: Fewbit, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel

    save = PeftModel.save_pretrained

    def full(self: Any, folder: Path, **kwargs: Any) -> None:
        if place.parent in Path(folder).parents:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save(self, str(folder), **kwargs)

    monkeypatch.setattr(PeftModel, "save_pretrained", full)
    answer = fewbit("finetune", sound, "--data", text, "-o", place, "--steps", 1, "--length", 32)
    (kept,) = own_cache.glob("rescued-*/out")
    check(answer, 1, "No space left on device", str(kept))
    assert (kept / "adapter_model.safetensors").exists()
    assert list(place.parent.iterdir()) == []


def test_a_cache_that_cannot_be_written(sound: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWBIT_CACHE", "/proc/cache")
    refused(2, ("FEWBIT_CACHE", "/proc/cache"), sound)


def test_an_output_that_is_a_file(sound: Path, place: Path, fewbit: Fewbit) -> None:
    place.write_text("mine", encoding="utf-8")
    check(fewbit("quantize", sound, "-o", place), 2, str(place), "exists")
    assert place.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("where", ["itself", "around it", "by a link"])
def test_the_output_does_not_replace_the_model(where: str, model: Path, fewbit: Fewbit, tmp_path: Path) -> None:
    """Neither itself nor a folder that holds it: the original would be lost."""
    holder = tmp_path / "holder"
    holder.mkdir()
    model = model.rename(holder / "model")
    (tmp_path / "link").symlink_to(model)
    before = (model / WEIGHTS).read_bytes()
    out = {"itself": model, "around it": holder, "by a link": tmp_path / "link"}[where]
    check(fewbit("quantize", model, "-o", out, "--overwrite", "--plan", "rtn-4bit"), 2, str(out))
    assert (model / WEIGHTS).read_bytes() == before


def test_too_little_disk(sound: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage("/"))(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(2, ("disk", "1 kB", "free"), sound)


@pytest.mark.parametrize("when", ["blocks", "files"])
def test_a_disk_that_fills_up(
    when: str, sound: Path, place: Path, fewbit: Fewbit, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name = (run, "write_file") if when == "blocks" else (safetensors.FileWriter, "add")
    write = getattr(owner, name)

    def full(*args: Any) -> None:
        write(*args)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place))

    monkeypatch.setattr(owner, name, full)
    check(fewbit("quantize", sound, "-o", place, "--plan", "rtn-4bit"), 1, "No space left on device")
    assert list(place.parent.iterdir()) == []


# --- Texts ---


@pytest.mark.parametrize(
    ("name", "content", "code", "words"),
    [
        ("a.txt", "", 2, ("a.txt", "empty")),
        ("a.txt", " \n \n", 2, ("a.txt", "empty")),
        ("a.txt", "Too short.", 2, ("too few", "64", "or a --length of at most")),
        ("a.jsonl", "", 2, ("a.jsonl", "empty")),
        ("a.jsonl", '{"text": "good"}\n{"text": ', 3, ("a.jsonl, line 2", "not JSON")),
        ("a.jsonl", '{"text": "good"}\n\n{"words": 3}', 3, ("a.jsonl, line 3",)),
        ("a.jsonl", '{"messages": []}', 3, ("a.jsonl, line 1", "messages")),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', 3, ("a.jsonl, line 1", "content")),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "Hello."}]}', 2, ("a.jsonl", "no chat template")),
        ("a.md", "words", 2, ("a.md", ".txt")),
    ],
)
def test_a_text_that_does_not_serve(
    name: str, content: str, code: int, words: tuple[str, ...], sound: Path, refused: Refused, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    refused(code, words, sound, "--calibration", tmp_path / name, "--length", 64)


def test_a_text_that_is_not_utf8(sound: Path, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine until \xff")
    refused(3, ("a.txt", "UTF-8 at byte 11"), sound, "--calibration", tmp_path / "a.txt")


def test_a_text_that_is_not_there(sound: Path, refused: Refused) -> None:
    refused(2, ("no file at that path", "Save a text itself as a .txt file"), sound, "--calibration", "missing.txt")


def test_chats_serve_where_there_is_a_template(tmp_path: Path, place: Path, fewbit: Fewbit) -> None:
    folder = models.save(tmp_path / "model", "llama", chat=models.CHAT)
    chat = {"messages": [{"role": "user", "content": models.sentences(5)}, {"role": "assistant", "content": "No."}]}
    (tmp_path / "chats.jsonl").write_text("\n".join([json.dumps(chat)] * 5), encoding="utf-8")
    flags = ("--calibration", tmp_path / "chats.jsonl", "--length", 64, "--samples", 4)
    assert fewbit("quantize", folder, "-o", place, *flags).code == 0
    assert (place / "chat_template.jinja").read_text(encoding="utf-8") == models.CHAT


# --- Quantized checkpoints of others ---


def spoil_shape(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q_PROJ}.qweight"] = tensors[f"{Q_PROJ}.qweight"][:-1].contiguous()


def spoil_rows(tensors: dict[str, Tensor]) -> None:
    for suffix, columns in (("qweight", 32), ("scales", 32), ("qzeros", 4)):
        tensors[f"{Q_PROJ}.{suffix}"] = tensors[f"{Q_PROJ}.{suffix}"][:, :columns].contiguous()


def spoil_dtype(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q_PROJ}.qweight"] = tensors[f"{Q_PROJ}.qweight"].float()


def spoil_scales(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{Q_PROJ}.scales"]


def spoil_zeros(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{Q_PROJ}.qzeros"]


def spoil_codes(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{Q_PROJ}.qweight"]


def spoil_finite(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q_PROJ}.scales"][0, 3] = float("inf")


def spoil_order(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q_PROJ}.g_idx"][5] = 99


def spoil_order_below(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q_PROJ}.g_idx"][5] = -1


def spoil_order_far(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q_PROJ}.g_idx"][5] = 2**31 - 1


def spoil_place(tensors: dict[str, Tensor]) -> None:
    for suffix in ("qweight", "scales", "qzeros", "g_idx"):
        tensors[f"model.layers.7.self_attn.q_proj.{suffix}"] = tensors[f"{Q_PROJ}.{suffix}"].clone()


def spoil_kind(tensors: dict[str, Tensor]) -> None:
    for suffix in ("qweight", "scales", "qzeros", "g_idx"):
        tensors[f"model.layers.1.self_attn.{suffix}"] = tensors[f"{Q_PROJ}.{suffix}"].clone()


def spoil_flat(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q_PROJ}.scales"] = tensors[f"{Q_PROJ}.scales"].flatten()


class Spoiled(NamedTuple):
    change: Callable[[dict[str, Tensor]], None] | Mapping[str, Any]
    words: tuple[str, ...]


SPOILED = {
    "shape": Spoiled(spoil_shape, (Q_PROJ,)),
    "rows": Spoiled(spoil_rows, (Q_PROJ,)),
    "dtype": Spoiled(spoil_dtype, (f"{Q_PROJ}.qweight",)),
    "no scales": Spoiled(spoil_scales, (f"{Q_PROJ}.scales",)),
    "no zeros": Spoiled(spoil_zeros, (f"{Q_PROJ}.qzeros",)),
    "no codes": Spoiled(spoil_codes, (Q_PROJ,)),
    "not finite": Spoiled(spoil_finite, (f"{Q_PROJ}.scales",)),
    "g_idx beyond": Spoiled(spoil_order, (f"{Q_PROJ}.g_idx",)),
    "g_idx below": Spoiled(spoil_order_below, (f"{Q_PROJ}.g_idx",)),
    "g_idx far beyond": Spoiled(spoil_order_far, (f"{Q_PROJ}.g_idx",)),
    "no such module": Spoiled(spoil_place, ("model.layers.7.self_attn.q_proj",)),
    "no linear": Spoiled(spoil_kind, ("model.layers.1.self_attn",)),
    "flat scales": Spoiled(spoil_flat, (f"{Q_PROJ}.scales",)),
    "bits": Spoiled({"bits": 8}, (".scales",)),
    "odd bits": Spoiled({"bits": 5}, ("bits", "5")),
    "text for bits": Spoiled({"bits": "four"}, ("bits", "four")),
    "group": Spoiled({"group_size": 64}, (".scales", "group_size 64")),
    "odd group": Spoiled({"group_size": 24}, (".scales", "group_size 24")),
    "text for a group": Spoiled({"group_size": "many"}, ("group_size",)),
    "negative group": Spoiled({"group_size": -7}, ("group_size",)),
    "format": Spoiled({"checkpoint_format": "marlin"}, ("marlin",)),
    "pack": Spoiled({"pack_dtype": "int16"}, ("int16",)),
}


REFUSED_BY_TRANSFORMERS = ("odd bits", "text for bits", "text for a group", "negative group")


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("name", SPOILED)
def test_a_checkpoint_that_contradicts_itself(name: str, gptq: Path, fewbit: Fewbit) -> None:
    change, words = SPOILED[name]
    if isinstance(change, Mapping):
        config = models.quantization_of(gptq)
        models.edit_json(gptq / "config.json", quantization_config={**config, **change})
    else:
        rewrite(gptq, change)
    # Some values of a config are refused by transformers' own class for it, before fewbit is asked.
    theirs = (FormatError, ValueError, TypeError) if name in REFUSED_BY_TRANSFORMERS else FormatError
    with pytest.raises(FormatError) as refusal:
        generate.load(gptq)
    with pytest.raises(theirs) as refusal_there:
        AutoModelForCausalLM.from_pretrained(gptq)
    for word in words:
        assert word in refusal.value.message
        assert word in str(refusal_there.value) or name in REFUSED_BY_TRANSFORMERS
    check(fewbit("generate", gptq, "The"), 3, *words)


def test_a_method_that_nobody_knows(gptq: Path, fewbit: Fewbit) -> None:
    models.edit_json(gptq / "config.json", quantization_config={"quant_method": "fp0"})
    check(fewbit("inspect", gptq), 3, "fp0")
    check(fewbit("generate", gptq, "The"), 3, "fp0")  # its weights would be random ones


def test_weights_that_are_missing_are_not_made_up(model: Path, gptq: Path, fewbit: Fewbit) -> None:
    """transformers draws them at random and says so in its log; whoever measures or talks to that model is misled."""
    for folder, lost in ((model, f"{Q_PROJ}.weight"), (gptq, "model.norm.weight")):
        rewrite(folder, lambda tensors, lost=lost: tensors.pop(lost))  # type: ignore[misc]
        check(fewbit("generate", folder, "The"), 3, lost)
        check(fewbit("evaluate", folder, "--length", 32, "--samples", 1), 3, lost)


@pytest.mark.parametrize("value", [3, [], "gptq", {"bits": 4}], ids=str)
def test_a_quantization_config_that_is_none(value: object, gptq: Path, fewbit: Fewbit) -> None:
    models.edit_json(gptq / "config.json", quantization_config=value)
    check(fewbit("inspect", gptq), 3, "quantization")


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"plan": null}', '{"versions": 3}', '{"tensors": 7}', '{"calibration": "x"}', '{"notes": null}'],
)
def test_a_broken_record(content: str, gptq: Path, fewbit: Fewbit) -> None:
    """It says how a model was made; what is in the model can be told without."""
    (gptq / "fewbit.json").write_text(content, encoding="utf-8")
    answer = fewbit("inspect", gptq)
    if answer.code:
        check(answer, 3, "fewbit.json")
    else:
        assert "int4-g32-sym" in answer.out


def test_an_unknown_kernel(gptq: Path) -> None:
    with pytest.raises(PlanError, match="kernel 'referense'") as refusal:
        generate.load(gptq, kernel="referense")
    assert "reference" in refusal.value.hint


def test_a_kernel_that_cannot(gptq: Path) -> None:
    with pytest.raises(KernelError, match="no kernel for int4-g32-sym") as refusal:
        generate.load(gptq, kernel="torch_int4", dtype=torch.float32)
    assert "bfloat16" in refusal.value.hint


# --- Evaluating and generating ---


def test_two_vocabularies_cannot_be_compared(sound: Path, model: Path, fewbit: Fewbit) -> None:
    data = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = data["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (model / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    answer = fewbit("evaluate", model, "--reference", sound, "--length", 32, "--samples", 1)
    check(answer, 2, str(model), str(sound), "different tokenizers")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--length", "129"), ("129", "128")),
        (("--length", "1"), ("--length 1",)),
        (("--length", "0"), ("--length 0",)),
        (("--samples", "0"), ("0",)),
        (("--text", "absent.txt"), ("absent.txt",)),
        (("--device", "gpu7"), ("gpu7",)),
        (("--reference", "./nowhere"), ("./nowhere",)),
    ],
    ids=lambda value: " ".join(value),
)
def test_an_evaluation_that_cannot_be(
    flags: tuple[str, ...], words: tuple[str, ...], sound: Path, fewbit: Fewbit
) -> None:
    check(fewbit("evaluate", sound, *flags), 2, *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("",), ("empty",)),
        (("The", "--chat"), ("chat template",)),
        (("The", "--max-new-tokens", "0"), ("max-new-tokens", "0")),
        (("The", "--max-new-tokens", "-5"), ("max-new-tokens", "-5")),
        (("The", "--temperature", "-1"), ("temperature", "-1")),
        (("The", "--temperature", "nan"), ("temperature", "nan")),
        (("The", "--temperature", "1", "--top-p", "1.5"), ("--top-p 1.5",)),
        (("The", "--temperature", "1", "--top-k", "-1"), ("--top-k -1",)),
        (("The", "--top-p", "0.9"), ("--top-p 0.9", "a temperature above 0")),
        (("The", "--device", "gpu7"), ("gpu7",)),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_generation_that_cannot_be(
    arguments: tuple[str, ...], words: tuple[str, ...], sound: Path, fewbit: Fewbit
) -> None:
    check(fewbit("generate", sound, *arguments), 2, *words)


# --- What verbs of Python and the command share ---


@pytest.mark.parametrize("kernel", ["nope", "reference"])
def test_a_kernel_needs_packed_weights(kernel: str, sound: Path, fewbit: Fewbit) -> None:
    """A name that no kernel has, and one that has nothing to multiply by: neither is passed over in silence."""
    words = ("unknown kernel 'nope'", "cpu") if kernel == "nope" else ("no packed weights", "--kernel")
    for command in (("generate", sound, "a"), ("evaluate", sound)):
        check(fewbit(*command, "--kernel", kernel), 2, *words)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70])
def test_a_seed_beyond_the_generators(seed: int, sound: Path, place: Path, refused: Refused, fewbit: Fewbit) -> None:
    refused(2, (f"--seed {seed}: ", "4294967295"), sound, "--seed", seed)
    check(fewbit("generate", sound, "a", "--seed", seed), 2, f"--seed {seed}: ")
    check(fewbit("finetune", sound, "--data", "pydoc", "-o", place, "--seed", seed), 2, f"--seed {seed}: ")


def test_sizes_of_a_comparison_go_by_their_flags(sound: Path, fewbit: Fewbit) -> None:
    check(fewbit("compare", sound, "--calibration-samples", 0), 2, "--calibration-samples 0: ")
    check(fewbit("compare", sound, "--samples", 0), 2, "--samples 0: ")


def test_texts_and_paths_to_calibrate_on(sound: Path, text: Path, tmp_path: Path) -> None:
    """A list of texts, a file and its name give the same tokens where the text is the same."""
    digests = []
    every: tuple[Path | str | list[str], ...] = (text, str(text), [text.read_text(encoding="utf-8")])
    for number, given in enumerate(every):
        out = tmp_path / str(number)
        wanted = calibration.Calibration(given, samples=4, length=32)
        quantize.quantize(sound, out, plan="gptq-4bit", calibration=wanted, device=torch.device("cpu"))
        digests.append(json.loads((out / "fewbit.json").read_text(encoding="utf-8"))["calibration"]["digest"])
    assert len(set(digests)) == 1
