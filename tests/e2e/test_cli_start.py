"""What needs no model answers without importing PyTorch; help explains every option; - stands for stdin."""

from __future__ import annotations

import ctypes
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from fewbit.api import arguments as arguments_of
from fewbit.cli.app import app
from fewbit.errors import PlanError
from fewbit.methods.base import options
from tests import models
from tests.e2e.conftest import Fewbit

VERBS = (
    "quantize",
    "imatrix",
    "generate",
    "evaluate",
    "compare",
    "tune",
    "finetune",
    "merge",
    "estimate",
    "recommend",
    "inspect",
)
COUNTS = """
import atexit, gc, sys
from fewbit.cli import app
atexit.register(lambda: print([each["collections"] for each in gc.get_stats()]))
app.main()
"""
AWAY = [  # in the home folder of a user that there is not
    "chat ~no-such-user/a",
    "compare tiny -o ~no-such-user/a",
    "compare tiny --plans nf4,~no-such-user/a",
    "doctor ~no-such-user/a",
    "evaluate ~no-such-user/a",
    "evaluate tiny --reference ~no-such-user/a",
    "evaluate tiny --tasks ~no-such-user/a.yaml",
    "evaluate tiny --text ~no-such-user/a.txt",
    "finetune tiny --data ~no-such-user/a.txt -o out",
    "generate tiny a --adapter ~no-such-user/a",
    "generate tiny a --image ~no-such-user/a.png",
    "generate tiny a --mmproj ~no-such-user/a.gguf",
    "merge tiny ~no-such-user/a -o out",
    "push ~no-such-user/a org/name",
    "push tiny org/name --report ~no-such-user/a",
    "quantize tiny -o ~no-such-user/a",
    "quantize tiny -o out --calibration ~no-such-user/a.txt",
    "quantize tiny -o out --imatrix ~no-such-user/a.dat",
    "quantize tiny -o out --plan ~no-such-user/a.json",
    "recommend tiny --for edge --report ~no-such-user/a",
]
LIGHT: list[tuple[int, str]] = [
    (0, "--version"),
    (0, "--help"),
    *((0, f"{verb} --help") for verb in (*VERBS, "list", "doctor", "cache", "chat", "serve", "run")),
    (0, "list"),
    (0, "list --json"),
    (2, "quantise"),
    (2, "quantize tiny -o out.bin --plan q4_k_m"),
    (2, "quantize tiny -o out.gguf --plan w4a16"),
    (2, "quantize tiny --colour red"),
    (2, "quantize tiny"),
    (2, "quantize tiny -o out --plan gptq-4bti"),
    (2, "quantize tiny -o out --plan absent.json"),
    (2, "quantize tiny -o out --scheme int4-g64-symm"),
    (2, "quantize tiny -o out --method gtpq"),
    (2, "quantize tiny -o out --format gtpq"),
    (2, "quantize tiny -o out --damp much"),
    (2, "quantize tiny -o out --damp 7"),
    (2, "quantize tiny -o ."),
    (2, "tune tiny --reference tiny -o ."),
    (2, "recommend tiny --for edgy"),
    (2, "chat missing.gguf"),
    (2, "quantize tiny -o out --dampp 0.1"),
    (2, "quantize tiny -o out --samples 0"),
    (2, "quantize tiny -o out --samples few"),
    (2, "quantize tiny -o out --seed -1"),
    (2, "quantize ./nowhere -o out"),
    (2, "imatrix ./nowhere -o out"),
    (2, "generate ./nowhere a"),
    (2, "generate tiny a --temperature -1"),
    (2, "generate tiny a --top-p 0.9"),
    (2, "generate tiny a --kernel nope"),
    (2, "generate tiny a --no-fuse --max-length 9"),
    (2, "generate tiny a --max-length 0"),
    (2, "chat tiny --no-fuse --max-length 9"),
    (2, "generate tiny a --max-new-tokens 0"),
    (2, "chat ./nowhere"),
    (2, "chat tiny --fuse"),
    (2, "serve ./nowhere"),
    (2, "serve tiny --max-body much"),
    (2, "serve tiny --dtype double-double"),
    (2, "serve tiny --host 203.0.113.1"),  # an address that no machine has
    (2, "evaluate ./nowhere"),
    *((2, line) for line in AWAY),
    (2, "evaluate tiny --reference ./nowhere"),
    (2, "evaluate tiny --reference other"),
    (2, "tune other --reference tiny -o out"),
    (2, "evaluate tiny --limit 3"),
    (2, "evaluate tiny --length 1"),
    (2, "compare tiny --length 1"),
    (2, "merge tiny lora.gguf -o out --length 1"),
    (2, "merge tiny lora.gguf -o out --imatrix packed.gguf"),
    (2, "convert tiny -o out --to awq --requantize --plan awq-4bit --length 1"),
    (2, "evaluate tiny --reference-adapter a"),
    (2, "evaluate tiny --record --adapter a"),
    (2, "convert tiny -o out.gguf --to awq"),
    (2, "convert tiny -o out --to gguf"),
    (2, "convert tiny -o out --to gtpq"),
    (2, "convert lora.gguf -o out.gguf --to peft --base tiny"),
    (2, "quantize tiny -o out --max-shard 1GB"),
    (2, "quantize tiny --dry-run --max-shard 1GB"),
    (2, "imatrix tiny -o out.bin"),
    (2, "finetune tiny --data pydoc -o out.gguf"),
    (2, "merge tiny adapter -o out.gguf"),
    (2, "compare ./nowhere"),
    (2, "compare tiny --plans gptq-4bti,nf4"),
    (2, "compare tiny --calibration-samples 0"),
    (2, "tune ./nowhere --reference tiny -o out"),
    (2, "tune tiny --reference tiny -o out --steps 0"),
    (2, "finetune ./nowhere --data pydoc -o out"),
    (2, "finetune tiny --data pydoc -o out --rank 0"),
    (2, "merge ./nowhere adapter -o out"),
    (2, "merge tiny adapter -o out --plan gptq-4bti"),
    (2, "merge tiny adapter -o out --plan q4_k_m"),
    (2, "estimate ./nowhere"),
    (2, "estimate tiny --plan gptq-4bti"),
    (2, "estimate tiny --cache int3"),
    (2, "recommend"),
    (2, "recommend ./nowhere --for quality"),
    (2, "recommend tiny --for chat"),
    (2, "recommend tiny --for edge --max-kl 0"),
    (2, "recommend tiny --for edge --memory 8GB --fit 8GB"),
    (2, "recommend tiny --for edge --samples 4"),
    (2, "recommend tiny --for edge --fit 8GB --batch 2"),
    (2, "recommend tiny --for quality --speed last"),
    (2, "inspect ./nowhere"),
    (0, "cache"),
    (2, "cache --clear everything"),
    (2, "evaluate tiny --text missing.txt"),
    (2, "evaluate tiny --text here.pdf"),
    (2, "evaluate tiny --text self"),
    (2, "finetune tiny --data self -o out"),
    (2, "evaluate tiny --tasks missing.yaml"),
    (2, "evaluate tiny --reference tiny --reference-adapter missing"),
    (2, "evaluate tiny --adapter missing"),
    (3, "evaluate tiny --adapter other"),
    (2, "chat tiny --adapter missing"),
    (2, "serve tiny --adapter missing"),
    (2, "generate tiny a --adapter missing"),
    (2, "generate tiny a --image missing.png"),
    (2, "merge tiny missing -o out"),
    (2, "quantize tiny -o out --calibration wikitxt2"),
    (2, "quantize tiny -o out --imatrix missing.gguf"),
    (2, "quantize tiny -o lora.gguf/out"),
    (2, "quantize tiny -o other"),
    (2, "quantize tiny -o there --overwrite"),
    (2, "imatrix tiny -o out.gguf --calibration missing.txt"),
    (2, "finetune tiny --data missing.jsonl -o out"),
    (2, "compare tiny --text missing.txt"),
    (2, "compare tiny --calibration missing.txt"),
    (2, "compare tiny -o out.gguf"),
    (2, "compare tiny -o other"),
    (2, "compare tiny -o here.pdf"),
    (2, "tune tiny --reference tiny -o out.gguf"),
    (2, "tune packed.gguf --reference tiny -o out"),
    (2, "tune tiny --reference tiny -o out --calibration missing.txt"),
    (2, "convert tiny --to awq -o out --plan awq-4bit"),
    (2, "convert tiny --to awq -o out --text pydoc"),
    (2, "convert tiny --to awq -o out --samples 3"),
    (2, "convert tiny --to awq -o out --base tiny"),
    (2, "convert tiny --to awq -o out --set a=b"),
    (2, "convert tiny --to awq -o out --requantize"),
    (2, "convert tiny --to awq -o out --requantize --plan q4_k_m"),
    (2, "convert tiny --to awq --dry-run --plan awq-4bit"),
    (2, "push other not-a-name"),
    (2, "push other org/na+me"),
    (2, "push missing org/name"),
    (2, "push tiny org/name"),
    (2, "push other org/name --report there"),
    (2, "estimate 7B --plan nf4"),
    (2, "estimate 7B --context 8"),
    (3, "recommend tiny --for edge --report missing"),
    (2, "recommend tiny --for edge --memory much"),
    (2, "run -- no-such-command"),
    (2, "doctor tiny --tune"),
]
RUN = """
import json, sys
from fewbit.cli import app
for code, line in json.loads(sys.argv[1]):
    sys.argv[1:] = line.split()
    try:
        app.main()
    except SystemExit as end:
        assert (end.code or 0) == code, (line, end.code)
    heavy = {"torch", "transformers", "fastapi", "uvicorn"} & set(sys.modules)
    assert not heavy, (line, heavy)
"""


def builds(cuda: str | None, hip: str | None) -> str:
    """What torch/version.py says of a build."""
    return f"__version__ = '2.13.0'\ncuda: Optional[str] = {cuda!r}\nhip: Optional[str] = {hip!r}\n"


@pytest.mark.parametrize("cuda", [None, "13.0"])
def test_a_gpu_that_is_not_there_is_refused_early(cuda: str | None, tmp_path: Path) -> None:
    """By the build for the CPU, and by that for CUDA where there is no driver."""
    if cuda is not None:
        try:
            ctypes.CDLL("libcuda.so.1")
            pytest.skip("this machine has a driver")
        except OSError:
            pass
    lines = ["generate tiny a --device cuda", "evaluate tiny --device cuda:1", "quantize tiny -o out --device cuda"]
    lines.append("doctor --tune")
    done = in_folder_of_torch(builds(cuda, None), tmp_path, RUN, json.dumps([(2, line) for line in lines]))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("--device cuda is not available\n  Available: cpu.") == 2
    assert "--tune needs an NVIDIA GPU\n" in done.stderr


@pytest.mark.parametrize("version", [builds(None, "6.4"), builds("13.0", "6.4"), "made = 'otherwise'"])
def test_a_gpu_that_may_be_there_is_not_refused(version: str, tmp_path: Path) -> None:
    """AMD's GPUs are `cuda`, too, and need no driver of NVIDIA. A version of their build need not say rocm."""
    ask = "import sys\nfrom fewbit import checks\nprint(checks.without_gpu(), 'torch' in sys.modules)"
    done = in_folder_of_torch(version, tmp_path, ask)
    assert done.stdout.split() == ["False", "False"], done.stderr


def in_folder_of_torch(version: str, folder: Path, *code: str) -> subprocess.CompletedProcess[str]:
    """Run code where another torch, with this version.py, is found first."""
    (folder / "torch").mkdir()
    (folder / "torch/__init__.py").touch()
    (folder / "torch/version.py").write_text(version, encoding="utf-8")
    return subprocess.run([sys.executable, "-c", *code], capture_output=True, text=True, encoding="utf-8", cwd=folder)


def test_what_needs_no_torch_imports_none(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"text_config": {"vocab_size": 7}}', encoding="utf-8")
    (tmp_path / "there").mkdir()
    for name in ("lora.gguf", "packed.gguf", "here.pdf", "there/photo.jpg"):
        (tmp_path / name).write_bytes(b"")
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(LIGHT)], capture_output=True, text=True, encoding="utf-8", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("there is no home folder ~no-such-user\n  Write ./~no-such-user/a") == len(AWAY)


def commands() -> dict[str, Any]:
    found: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return found


# Without these options, nothing takes their place. `plan` is that of convert and merge; quantize states a default.
WITHOUT = {"adapter", "clear", "fit", "image", "imatrix", "model", "plan"}
WITHOUT |= {"reference", "reference_adapter", "set", "size", "tasks"}


@pytest.mark.parametrize("name", [*VERBS, "list", "doctor", "cache", "chat", "serve", "run"])
def test_every_option_has_help_and_a_default(name: str, fewbit: Fewbit) -> None:
    shown = " ".join(fewbit(name, "--help").out.split())
    for parameter in commands()[name].params:
        assert parameter.help, parameter.name
        where = shown[shown.index(" ".join(parameter.help.split()[:4])) :]
        text = where[: len(" ".join(parameter.help.split())) + 60]
        # An option without a value is off by default.
        told = re.search(r"\[default: |[Dd]efault: |\[required\]|Required", text)
        assert told or parameter.name in WITHOUT or parameter.is_flag, text
        assert "No default" not in text
        assert "Default: none" not in text


@pytest.mark.parametrize(
    "line",
    [
        "quantize tiny -o out --scheme",
        "quantize tiny -o out --method",
        "quantize tiny -o out --format",
        "finetune tiny --data pydoc -o out --targets",
        "push other org/name --revision",
        "recommend tiny --for edge --target",
        "evaluate tiny --device",
        "serve tiny --dtype",
    ],
)
def test_an_empty_value_is_not_the_default(
    line: str, fewbit: Fewbit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = fewbit(*line.split(), "")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == f"error: {line.split()[-1]} '': expected a value; leave the option out for its default\n"


@pytest.mark.parametrize("value", ["few", "1.5", ""])
def test_windows_are_a_number_or_all(value: str, fewbit: Fewbit) -> None:
    answer = fewbit("evaluate", "tiny", "--samples", value)
    assert (answer.code, answer.err) == (2, f"error: --samples {value!r}: expected an integer above 0, or all\n")


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (("evaluate", "./nowhere"), "model ./nowhere: no such folder", "Give a local folder"),
        (("generate", "tiny", "a", "--max-new-tokens", "0"), "--max-new-tokens 0: expected an integer", ""),
        (("quantize", "tiny", "--methd", "rtn"), "quantize has no option '--methd'", "Did you mean --method?"),
        (("generate", "tiny"), "Missing argument 'prompt'.", "Give the text in quotes"),
        (("inspect",), "Missing argument 'model'.", "fewbit inspect --help shows how it is used."),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_an_error_is_json_too(arguments: tuple[str, ...], message: str, hint: str, fewbit: Fewbit) -> None:
    answer = fewbit(*arguments, "--json")
    told = answer.json["error"]
    assert answer.json.keys() == {"error"}
    assert told.keys() == {"message", "hint", "exit_code"}
    assert message in told["message"]
    assert hint in told["hint"]
    assert told["exit_code"] == answer.code == 2
    assert answer.err.splitlines() == [f"error: {told['message']}", *([f"  {told['hint']}"] if told["hint"] else [])]
    assert fewbit(*arguments).out == ""


def test_usage_errors_say_what_to_do(fewbit: Fewbit) -> None:
    assert "Give the text in quotes, or - for stdin. fewbit generate --help" in fewbit("generate", "tiny").err
    assert "Put the prompt in quotes. fewbit generate --help" in fewbit("generate", "tiny", "Once", "upon").err
    assert "fewbit evaluate --help shows how it is used." in fewbit("evaluate").err
    assert "fewbit --help lists all commands." in fewbit("quantise").err
    done = fewbit("quantize", "tiny", "--methd", "rtn")
    assert done.err == "error: quantize has no option '--methd'\n  Did you mean --method?\n"


def test_help_and_reference_explain_options_of_methods(fewbit: Fewbit) -> None:
    shown = " ".join(fewbit("quantize", "--help").out.split())
    page = (Path(__file__).parents[2] / "docs" / "reference.md").read_text(encoding="utf-8")
    assert {each.name for each in options()} == {"grid", "clip_search", "damp", "act_order", "refine", "target"}
    for each in options():
        assert each.flag in shown
        assert f"{', '.join(each.methods)}: {each.help} [default: {each.shown}]" in shown
        flag = each.flag.replace(" / ", "`, `")
        assert f"| `{flag}` | {', '.join(each.methods)} | {each.shown} | {each.help} |" in page


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(tmp_path_factory.mktemp("start") / "model", "llama")


def given(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))


def test_a_prompt_from_stdin(model: Path, fewbit: Fewbit, monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, "the weight é\n".encode())
    told = fewbit("generate", model, "-", "--max-new-tokens", 2, "--json").json
    assert told["prompt"] == "the weight é"
    assert told["text"] == fewbit("generate", model, "the weight é", "--max-new-tokens", 2, "--json").json["text"]


def test_a_text_from_stdin(model: Path, text: Path, fewbit: Fewbit, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ("--samples", 2, "--length", 16, "--json")
    wanted = fewbit("evaluate", model, "--text", text, *few).json
    given(monkeypatch, text.read_bytes())
    told = fewbit("evaluate", model, "--text", "-", *few).json
    assert told["perplexity"] == wanted["perplexity"]


@pytest.mark.parametrize("data", [b"", b"\xff\xfe"])
def test_a_stdin_that_holds_no_text(data: bytes, model: Path, fewbit: Fewbit, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (
        ("generate", model, "-"),
        ("evaluate", model, "--text", "-"),
        ("quantize", model, "-o", "out", "--calibration", "-"),
    ):
        given(monkeypatch, data)
        answer = fewbit(*arguments)
        assert answer.code == (3 if data else 2)
        assert "stdin" in answer.err
        assert "Traceback" not in answer.err


def test_a_stdout_that_has_no_such_letter(
    model: Path, tmp_path: Path, fewbit: Fewbit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a C locale: what cannot be encoded is escaped."""
    (tmp_path / "mödel").symlink_to(model)
    for arguments in (
        ("inspect", tmp_path / "mödel"),
        ("inspect", tmp_path / "nöwhere"),
        ("quantize", model, "--plan", "ö"),
    ):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2)]
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdout", streams[0])
            patch.setattr("sys.stderr", streams[1])
            code = fewbit(*arguments).code
        printed = b""
        for stream in streams:
            stream.flush()
            printed += stream.buffer.getvalue()
        assert code == (0 if "mödel" in str(arguments[1]) else 2)
        assert b"\\xf6" in printed


def test_a_prompt_in_a_locale_without_its_letters(model: Path, fewbit: Fewbit) -> None:
    """There Python gives an argument's bytes as lone surrogates."""
    few = ("--max-new-tokens", 2, "--json")
    told = fewbit("generate", model, "é".encode().decode("ascii", "surrogateescape"), *few).json
    assert told["prompt"] == "é"
    assert told["text"] == fewbit("generate", model, "é", *few).json["text"]


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "content", [DEEP.encode(), b'{"a": "\xff"}', b'{"a": "\\ud800"}'], ids=["deep", "bytes", "half"]
)
def test_json_that_python_cannot_read(content: bytes, model: Path, tmp_path: Path, fewbit: Fewbit) -> None:
    """Of plans, adapters, records, reports and settings of other makers: an error that names the file."""
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    for name in (
        "plan.json",
        "model/fewbit.json",
        "model/quantize_config.json",
        "adapter/adapter_config.json",
        "report.json",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    (folder / "quantize_config.json").rename(tmp_path / "quantize_config.json")
    plan = ("--plan", tmp_path / "plan.json")
    cases: list[tuple[int, str, tuple[object, ...]]] = [
        (2, "plan.json", ("quantize", model, "-o", tmp_path / "out", *plan)),
        (2, "plan.json", ("estimate", "tiny", *plan)),
        (3, "fewbit.json", ("inspect", folder)),
        (3, "adapter_config.json", ("generate", model, "a", "--adapter", tmp_path / "adapter")),
        (3, "report.json", ("recommend", "tiny", "--for", "quality", "--report", tmp_path / "report.json")),
    ]
    for code, name, arguments in cases:
        answer = fewbit(*arguments)
        assert (answer.code, name in answer.err) == (code, True), (arguments, answer.err)
    (tmp_path / "quantize_config.json").rename(folder / "quantize_config.json")
    answer = fewbit("inspect", folder)
    assert answer.code == 3
    assert "quantize_config.json" in answer.err
    with pytest.raises(PlanError, match=r"plan=.*a plan's JSON"):
        arguments_of.plan("plan", '{"a": ' + DEEP)


def test_imports_are_rarely_searched_for_garbage(own_cache: Path) -> None:
    command = [sys.executable, "-c", COUNTS, "generate", "tiny", "Hi", "--max-new-tokens", "1"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    young, _, whole = json.loads(done.stdout.splitlines()[-1])
    assert young < 100  # 890 with Python's threshold
    assert whole < 5
