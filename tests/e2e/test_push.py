"""`fewbit push` by the real huggingface_hub, to a stand-in of the Hub's API on localhost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, metadata_load

import fewbit
from fewbit.api import shared
from fewbit.api.push import preview
from fewbit.errors import FormatError, OutputError, PlanError
from fewbit.formats.containers.gguf import GgufFile
from fewbit.formats.containers.safetensors import read_file, write_file
from fewbit.models.describe import describe
from fewbit.models.source import locate
from fewbit.pipeline import replacing
from tests import hub as stand_in
from tests import models
from tests.e2e.conftest import Fewbit
from tests.hub import Hub

# huggingface_hub uploads through LFS by an argument that newer versions of its HTTP library call otherwise.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("push") / "tiny-4bit"
    fewbit.quantize("tiny", place, plan="rtn-4bit")
    return place


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("push") / "tiny-q8_0.gguf"
    plan = fewbit.Plan("mine", "gguf", fewbit.api.arguments.plan("plan", "q8_0").rules)
    fewbit.quantize("tiny", place, plan=plan.changed(method="rtn"))
    return place


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with stand_in.running() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the stand-in has LFS, and no xet storage
        monkeypatch.setenv("HF_TOKEN", stand_in.TOKEN)
        yield running


def test_a_folder_arrives_whole_in_a_private_repository(hub: Hub, folder: Path) -> None:
    done = fewbit.push(folder, "org/tiny-4bit")
    place = hub.repositories["org/tiny-4bit"]
    assert place.private
    assert place.messages == ["Upload tiny-4bit by fewbit"]
    assert done.url == f"{hub.endpoint}/org/tiny-4bit/commit/{'1' * 40}"
    assert done.files == {name: len(data) for name, data in sorted(place.files.items())}
    assert place.files.keys() == {path.name for path in folder.iterdir()}
    for path in folder.iterdir():
        if path.name not in ("README.md", "fewbit.json"):
            assert place.files[path.name] == path.read_bytes()
    assert json.loads(place.files["fewbit.json"])["plan"]["name"] == "rtn-4bit"


def test_the_uploaded_model_loads(hub: Hub, folder: Path, tmp_path: Path) -> None:
    fewbit.push(folder, "org/tiny-4bit")
    (tmp_path / "there").mkdir()
    for name, data in hub.repositories["org/tiny-4bit"].files.items():
        (tmp_path / "there" / name).write_bytes(data)
    assert fewbit.inspect(tmp_path / "there").schemes == fewbit.inspect(folder).schemes
    assert fewbit.generate(tmp_path / "there", "Once", max_new_tokens=2).text


def test_the_card_names_the_repository(hub: Hub, folder: Path, tmp_path: Path) -> None:
    fewbit.push(folder, "org/tiny-4bit")
    card = hub.repositories["org/tiny-4bit"].files["README.md"].decode()
    assert 'from_pretrained("org/tiny-4bit")' in card
    assert "vllm serve org/tiny-4bit" in card
    assert "MODEL" not in card
    (tmp_path / "card.md").write_text(card, encoding="utf-8")
    head = metadata_load(tmp_path / "card.md")
    assert head == {
        "language": "en",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["fewbit", "quantized", "gptq"],
    }


def test_a_card_that_was_edited_stays(hub: Hub, folder: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(folder, tmp_path / "mine")
    (mine / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n", encoding="utf-8")
    fewbit.push(mine, "org/mine")
    assert hub.repositories["org/mine"].files["README.md"] == (mine / "README.md").read_bytes()


def test_a_gguf_file_gets_a_card(hub: Hub, gguf: Path) -> None:
    fewbit.push(gguf, "org/gguf", public=True, message="All of it")
    place = hub.repositories["org/gguf"]
    assert not place.private
    assert place.messages == ["All of it"]
    assert place.files.keys() == {"README.md", gguf.name}
    assert place.files[gguf.name] == gguf.read_bytes()
    card = place.files["README.md"].decode()
    for words in (
        "library_name: gguf",
        "license: apache-2.0",
        f"llama-server -hf org/gguf --hf-file {gguf.name}",
        f'from_pretrained("org/gguf", gguf_file="{gguf.name}")',
        f"-o {gguf.name} --plan",
    ):
        assert words in card
    assert "fewbit.json` has" not in card


def test_a_second_gguf_file_does_not_replace_the_card(hub: Hub, gguf: Path, tmp_path: Path) -> None:
    fewbit.push(gguf, "org/gguf")
    first = hub.repositories["org/gguf"].files["README.md"]
    other = Path(shutil.copy(gguf, tmp_path / "other.gguf"))
    done = fewbit.push(other, "org/gguf")
    assert hub.repositories["org/gguf"].files["README.md"] == first
    assert "README.md" not in done.files
    assert "README.md stays as it is" in done.notes[-1]


def test_a_dry_run_uploads_nothing(fewbit: Fewbit, hub: Hub, folder: Path) -> None:
    shown = fewbit("push", folder, "org/new", "--dry-run")
    assert shown.code == 0
    assert "Nothing was uploaded." in shown.out
    listed = fewbit("push", folder, "org/new", "--dry-run", "--json").json
    assert listed["url"] == ""
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    for name in sizes.keys() - {"README.md", "fewbit.json"}:
        assert listed["files"][name] == sizes[name]
    assert hub.requests == []


def test_a_branch_is_made(hub: Hub, folder: Path) -> None:
    done = fewbit.push(folder, "org/tiny-4bit", revision="v2")
    assert hub.repositories["org/tiny-4bit"].branches == {"main", "v2"}
    assert done.files


def test_files_of_an_older_model_are_named(hub: Hub, folder: Path) -> None:
    hub.repositories["org/old"] = stand_in.Repository(private=True, files={"model-00001-of-00002.safetensors": b""})
    (note,) = fewbit.push(folder, "org/old").notes
    assert "org/old still has model-00001-of-00002.safetensors" in note


def test_no_folder_of_this_machine_is_published(hub: Hub, folder: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(folder, tmp_path / "mine")
    record = json.loads((mine / "fewbit.json").read_text(encoding="utf-8"))
    record |= {
        "model": "/home/somebody/tiny",
        "origin": "/home/somebody/tiny",
        "notes": ["left out: x of /home/somebody/m"],
    }
    (mine / "fewbit.json").write_text(json.dumps(record), encoding="utf-8")
    (mine / "README.md").unlink()
    fewbit.push(mine, "org/mine")
    files = hub.repositories["org/mine"].files
    assert b"fewbit quantize tiny -o out" in files["README.md"]
    assert not [name for name, data in files.items() if b"somebody" in data]


def private(place: Path) -> Path:
    """A GGUF file whose metadata names folders of this machine: in the record, and as llama.cpp writes them."""
    models.save(place / "my own" / "model", "llama", hidden_size=256)
    plain = place / "my own" / "plain.gguf"
    fewbit.quantize(place / "my own" / "model", plain, plan="q8_0", device="cpu", progress=False)
    assert f"{place}/my own/model".encode() in plain.read_bytes()
    keys = {"quantize.imatrix.file": f"{place}/my own/imatrix.dat", "tokenizer.chat_template": "/no_think/at all"}
    replacing.with_metadata(GgufFile(plain), place / "my own" / "model.gguf", keys)
    return place / "my own" / "model.gguf"


def test_no_folder_of_this_machine_in_a_gguf_file(hub: Hub, tmp_path: Path) -> None:
    file = private(tmp_path)
    before = file.read_bytes()
    listed = preview(file, "org/gguf").files
    done = fewbit.push(file, "org/gguf")
    assert (file.read_bytes(), {each.name for each in file.parent.iterdir()}) == (
        before,
        {"model", "plain.gguf", "model.gguf"},
    )
    files = hub.repositories["org/gguf"].files
    assert not [name for name, data in files.items() if str(tmp_path).encode() in data or b"my own" in data]
    assert done.files == listed == {name: len(data) for name, data in files.items()}
    assert "only the last part is uploaded" in done.notes[0]
    (tmp_path / "there.gguf").write_bytes(files["model.gguf"])
    there, here = GgufFile(tmp_path / "there.gguf"), GgufFile(file)
    assert {key for key in here.metadata if str(there.metadata[key]) != str(here.metadata[key])} == {
        "fewbit.record",
        "quantize.imatrix.file",
    }
    assert there.metadata["quantize.imatrix.file"].rstrip() == "imatrix.dat"
    assert all(there.get(name).equal(here.get(name)) for name in here.entries)
    assert describe(locate(tmp_path / "there.gguf")).made["model"] == "model"


@pytest.mark.parametrize("damaged", [False, True])
def test_lists_of_texts_in_a_gguf_file_are_searched(gguf: Path, tmp_path: Path, damaged: bool) -> None:
    path = tmp_path / "model.gguf"
    replacing.with_metadata(GgufFile(gguf), path, {"general.tags": ["first", "/home/me/data", "hf_secret"]})
    if damaged:
        path.write_bytes(path.read_bytes().replace(b"first", b"fir\xfft"))
    with pytest.raises(PlanError, match="has a path of this machine, below /home/me"):
        shared.check_nothing_private("model.gguf", path, ["/home/me"], None, cut=False)
    for cut in (False, True):
        with pytest.raises(PlanError, match="has your token of the Hub"):
            shared.check_nothing_private("model.gguf", path, [], "hf_secret", cut=cut)


def test_no_folder_of_this_machine_in_configs(hub: Hub, folder: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(folder, tmp_path / "mine")
    token = {"added_tokens_decoder": {"1": {"content": "/a/b"}}, "name_or_path": "/home/some body/tiny/"}
    for name, more in (("config.json", {"_name_or_path": "/home/some body/tiny"}), ("tokenizer_config.json", token)):
        said = json.loads((mine / name).read_text(encoding="utf-8"))
        (mine / name).write_text(json.dumps(said | more), encoding="utf-8")
    fewbit.push(mine, "org/mine")
    files = hub.repositories["org/mine"].files
    assert json.loads(files["config.json"])["_name_or_path"] == "tiny"
    assert json.loads(files["tokenizer_config.json"]) == said | token | {"name_or_path": "tiny"}


def secret(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose path says who the user is, who is logged in."""
    monkeypatch.setenv("HOME", str(place / "home" / "jane-doe"))
    made = place / "home" / "jane-doe" / "work"
    made.mkdir(parents=True)
    return made


def leaked(hub: Hub) -> list[str]:
    """The uploaded files that have a byte of the user's name or token."""
    files = hub.repositories["org/name"].files
    return [name for name, data in files.items() if b"jane-doe" in data or stand_in.TOKEN.encode() in data]


@pytest.mark.parametrize("plan", ["awq-4bit", "nf4", "q8_0"])
def test_no_byte_of_an_output_names_the_user(
    plan: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = secret(tmp_path, monkeypatch)
    models.save(work / "model", "llama", hidden_size=256)
    out = work / ("out.gguf" if plan == "q8_0" else "out")
    fewbit.quantize(work / "model", out, plan=plan, device="cpu", progress=False)
    fewbit.push(out, "org/name")
    assert leaked(hub) == []


def test_no_byte_of_others_files_names_the_user(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What trainers and other programs leave in a folder: metadata of weights, logs, cards and settings."""
    work = secret(tmp_path, monkeypatch)
    mine = Path(shutil.copytree(folder, work / "mine"))
    tensors, _ = read_file(mine / "model.safetensors")
    inner = json.dumps({"_name_or_path": f"{work}/tiny"})
    metadata = {"format": "pt", "from": f"{work}/tiny", "config": inner, "said": f"made of {work}/tiny by me"}
    write_file(mine / "model.safetensors", tensors, metadata)
    before = (mine / "model.safetensors").read_bytes()
    card = f"---\nbase_model: {work}/tiny\n---\nIn `{work}/a/b.txt`, {work.parent}."
    (mine / "README.md").write_text(card, encoding="utf-8")
    (mine / "trainer_state.json").write_text(
        json.dumps({"log": f"saved to {work}/x", f"{work}/y": 1}), encoding="utf-8"
    )
    (mine / "args.yaml").write_text(f"output_dir: {work}/out\n", encoding="utf-8")
    listed = preview(mine, "org/name")
    done = fewbit.push(mine, "org/name")
    files = hub.repositories["org/name"].files
    assert leaked(hub) == []
    assert listed.files == done.files == {name: len(data) for name, data in files.items()}
    assert files["README.md"] == b"---\nbase_model: tiny\n---\nIn `b.txt`, ~."
    assert json.loads(files["trainer_state.json"]) == {"log": "saved to x", "y": 1}
    assert len([note for note in done.notes if "only the last part is uploaded" in note]) == 2
    assert (mine / "model.safetensors").read_bytes() == before
    (tmp_path / "there.safetensors").write_bytes(files["model.safetensors"])
    there, said = read_file(tmp_path / "there.safetensors")
    assert said == {"format": "pt", "from": "tiny", "config": '{"_name_or_path": "tiny"}', "said": "made of tiny by me"}
    assert all(there[name].equal(tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("data", "says"),
    [(b"\xff\x00 of %s/x", "x.bin_log has a path of this machine"), (b"key: %s", "has your token of the Hub")],
)
def test_what_cannot_be_cut_is_refused(
    data: bytes, says: str, hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = secret(tmp_path, monkeypatch)
    mine = Path(shutil.copytree(folder, work / "mine"))
    value = stand_in.TOKEN if b"key" in data else str(work)
    (mine / "x.bin_log").write_bytes(data % value.encode())
    with pytest.raises(PlanError, match=says):
        fewbit.push(mine, "org/name")
    assert hub.requests == []


def test_an_adapter_arrives_without_its_base_path(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = secret(tmp_path, monkeypatch)
    shutil.copytree(folder, work / "tiny-4bit")
    (work / "data.txt").write_text("Once upon a time there was a garden. " * 40, encoding="utf-8")
    tuning = fewbit.Tuning(steps=1, length=32, batch=1)
    fewbit.finetune(work / "tiny-4bit", work / "adapter", data=str(work / "data.txt"), tuning=tuning, progress=False)
    assert b"jane-doe" in (work / "adapter" / "adapter_config.json").read_bytes()
    fewbit.push(work / "adapter", "org/name")
    files = hub.repositories["org/name"].files
    assert leaked(hub) == []
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "tiny-4bit"
    assert files["adapter_model.safetensors"] == (work / "adapter" / "adapter_model.safetensors").read_bytes()


def test_the_chart_of_a_report_goes_into_the_card(hub: Hub, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="has no chart"):
        fewbit.push(folder, "org/chart", report=tmp_path)
    (tmp_path / "quality-size.svg").write_text("<svg/>", encoding="utf-8")
    fewbit.push(folder, "org/chart", report=tmp_path)
    files = hub.repositories["org/chart"].files
    assert files["quality-size.svg"] == b"<svg/>"
    assert b"](quality-size.svg)" in files["README.md"]


def broken(kind: str, folder: Path, place: Path) -> Path:
    """A copy of the folder that must not be uploaded."""
    copy = shutil.copytree(folder, place / (".out.fewbit-12ab" if kind == "unfinished" else kind))
    if kind == "adapter":
        (copy / "adapter_config.json").write_text("{}", encoding="utf-8")
    elif kind == "incomplete":
        (copy / "tokenizer.json").unlink()
    elif kind == "no config":
        (copy / "config.json").unlink()
    elif kind == "no weights":
        (copy / "model.safetensors").unlink()
    elif kind == "truncated":
        os.truncate(copy / "model.safetensors", 100_000)
    return copy


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("adapter", "is an adapter without adapter_model.safetensors"),
        ("incomplete", r"tokenizer\.json of its record fewbit\.json are missing"),
        ("no config", "has no config.json"),
        ("no weights", "has no weights"),
        ("truncated", "model.safetensors"),
        ("unfinished", "is an unfinished run"),
    ],
)
def test_what_is_no_finished_model_is_refused(kind: str, says: str, hub: Hub, folder: Path, tmp_path: Path) -> None:
    with pytest.raises((PlanError, FormatError), match=says):
        fewbit.push(broken(kind, folder, tmp_path), "org/name")
    assert hub.requests == []


@pytest.mark.parametrize("name", ["name", "a/b/c", "org/na me", "org/", "org/--x", "org/x.git"])
def test_a_wrong_name_is_refused(name: str, hub: Hub, folder: Path) -> None:
    with pytest.raises(PlanError, match="no name of a repository"):
        fewbit.push(folder, name)
    assert hub.requests == []


def test_without_a_token_it_says_how_to_get_one(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(PlanError, match="hf auth login"):
        fewbit.push(folder, "org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PlanError, match="HF_HUB_OFFLINE is set"):
        fewbit.push(folder, "org/name")
    assert hub.requests == []


@pytest.mark.parametrize(("private", "says"), [(True, "exists and is private"), (False, "exists and is public")])
def test_whether_it_is_public_is_not_changed(private: bool, says: str, hub: Hub, folder: Path) -> None:
    hub.repositories["org/name"] = stand_in.Repository(private)
    with pytest.raises(PlanError, match=says):
        fewbit.push(folder, "org/name", public=private)
    assert hub.repositories["org/name"].files == {}
    fewbit.push(folder, "org/name", public=not private)
    assert hub.repositories["org/name"].files


@pytest.mark.parametrize(
    ("end", "status", "error", "says"),
    [
        ("/api/models/org/name", 401, PlanError, "does not accept the token"),
        ("/create", 403, PlanError, "may not write there"),
        ("/commit/main", 400, OutputError, "the upload failed"),
        ("/batch", 404, OutputError, "the upload failed"),
    ],
)
def test_what_the_hub_refuses_is_said(
    end: str, status: int, error: type[Exception], says: str, hub: Hub, folder: Path
) -> None:
    hub.refuse[end] = status
    with pytest.raises(error, match=says):
        fewbit.push(folder, "org/name")
    hub.refuse.clear()
    assert fewbit.push(folder, "org/name").url


def test_a_hub_that_is_gone_is_one_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", stand_in.TOKEN)
    with pytest.raises(OutputError, match="org/name: the upload failed"):
        fewbit.push(folder, "org/name")


def test_the_command_uploads_with_the_variables_of_the_hub(hub: Hub, folder: Path) -> None:
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": stand_in.TOKEN, "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "fewbit", "push", str(folder), "org/tiny-4bit"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{hub.endpoint}/org/tiny-4bit/commit/")
    assert "uploading to org/tiny-4bit" in done.stderr
    assert hub.repositories["org/tiny-4bit"].files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
