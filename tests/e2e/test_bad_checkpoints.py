"""A user's own `from_pretrained` of a folder that is broken, mixed or hostile, for each format of folders."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2.exceptions import SecurityError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fewbit import FewbitError, FormatError
from fewbit.api import quantize
from fewbit.models.plugin import quantizer
from fewbit.nn.layers import QLinear
from fewbit.plans.plan import find
from tests import models
from tests.e2e.conftest import Fewbit
from tests.e2e.test_bad_input import WEIGHTS, check, shard

KINDS = ("gptq", "awq", "nf4", "int8")
PLANS = {"gptq": "rtn-4bit", "nf4": "nf4", "int8": "int8"}
IDS = torch.arange(40)[None] + 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model quantized into each format, and itself as "original"."""
    place = tmp_path_factory.mktemp("whole")
    made = {"original": models.save(place / "original", "llama", dtype="float32")}
    (place / "plan.json").write_text(
        '{"name": "awq", "format": "awq", "rules": [{"match": "*", "scheme": "int4-g32"}]}', encoding="utf-8"
    )
    for kind in KINDS:
        made[kind] = place / kind
        plan = find(PLANS.get(kind) or str(place / "plan.json"))
        quantize.quantize(made["original"], made[kind], plan=plan.changed(method="rtn"))
    return made


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(kind: str, folders: dict[str, Path], tmp_path: Path) -> Path:
    """A quantized copy to break."""
    return Path(shutil.copytree(folders[kind], tmp_path / "model"))


def load(folder: Path, **options: Any) -> Any:
    with quantizer.serving():
        return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def change(folder: Path, how: Callable[[str, Tensor], Tensor]) -> None:
    tensors = {name: how(name, tensor) for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def configure(folder: Path, **values: Any) -> None:
    config = models.quantization_of(folder)
    models.edit_json(folder / "config.json", quantization_config=config | values)


# --- What is not whole, or contradicts itself ---


@pytest.fixture
def original(folders: dict[str, Path], tmp_path: Path) -> Path:
    """An unquantized copy to break."""
    return Path(shutil.copytree(folders["original"], tmp_path / "original"))


@pytest.mark.parametrize("flags", [(), ("--temperature", "1"), ("--chat",)])
def test_generate_reports_logits_that_are_not_a_number(original: Path, flags: tuple[str, ...], fewbit: Fewbit) -> None:
    (original / "chat_template.jinja").write_text(models.CHAT, encoding="utf-8")
    assert fewbit("generate", original, "The weight", *flags).code == 0
    change(original, lambda name, t: t.index_fill(0, torch.tensor([3]), torch.nan) if "layers.1.mlp.up" in name else t)
    check(fewbit("generate", original, "The weight", *flags), 4, "infinite or not a number", "may be damaged")


def test_a_text_of_token_0_is_no_error(original: Path, fewbit: Fewbit) -> None:
    """The token of a row of NaN, here from weights without a fault."""
    change(original, lambda name, t: t.zero_() if "norm" in name else t)
    answer = fewbit("generate", original, "The weight", "--max-new-tokens", 2)
    assert (answer.code, "2 tokens" in answer.err) == (0, True), answer.err


def test_a_checkpoint_that_is_not_whole_gets_a_hint(original: Path, fewbit: Fewbit) -> None:
    whole = (original / WEIGHTS).read_bytes()
    (original / WEIGHTS).write_bytes(whole[:-100])
    check(fewbit("generate", original, "The"), 3, "not a valid safetensors file", "Get it again.")
    (original / WEIGHTS).write_bytes(whole)
    tensors = load_file(original / WEIGHTS)
    save_file({n: t for n, t in tensors.items() if "1.mlp.up" not in n}, original / WEIGHTS, metadata={"format": "pt"})
    check(
        fewbit("generate", original, "The"),
        3,
        "the tensor model.layers.1.mlp.up_proj.weight is missing",
        "the download is incomplete",
    )
    (original / WEIGHTS).write_bytes(whole)
    lost = sorted(set(shard(original).values()))[1]
    (original / lost).unlink()
    check(fewbit("generate", original, "The"), 3, lost, "The download is incomplete.")
    (original / "empty.gguf").touch()
    check(fewbit("inspect", original / "empty.gguf"), 3, "it is empty", "Get it again.")


def test_a_missing_shard(folder: Path, fewbit: Fewbit) -> None:
    lost = sorted(set(shard(folder).values()))[1]
    (folder / lost).unlink()
    with pytest.raises((FewbitError, OSError), match=lost):
        load(folder)
    check(fewbit("generate", folder, "The"), 3, lost)


def test_a_shard_that_lacks_what_the_index_says(folder: Path) -> None:
    file = folder / sorted(set(shard(folder).values()))[1]
    tensors = load_file(file)
    lost = next(name for name in sorted(tensors) if name.endswith((".scales", ".absmax", ".SCB")))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, file, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=lost):
        load(folder)


WRONG: dict[str, list[tuple[dict[str, Any], str]]] = {
    "gptq": [
        ({"bits": 8}, "down_proj.scales has 3 groups, but the config says group_size 32, with 48 columns"),
        ({"bits": 2}, "down_proj.scales has 3 groups, but the config says group_size 32, with 192 columns"),
        ({"group_size": 64}, "down_proj.scales has 3 groups, but the config says group_size 64"),
    ],
    "awq": [
        ({"bits": 8}, "awq: bits = 8"),
        ({"bits": 2}, "awq: bits = 2"),
        ({"group_size": 64}, "down_proj.qweight: the config's groups of 64"),
        ({"group_size": 16}, "down_proj"),
    ],
    "nf4": [
        ({"load_in_4bit": False, "load_in_8bit": True}, "proj is stored in 4 bits, but the config says load_in_8bit")
    ],
    "int8": [
        ({"load_in_4bit": True, "load_in_8bit": False}, "proj is stored in 8 bits, but the config says load_in_4bit")
    ],
}


@pytest.mark.parametrize(
    ("kind", "values", "words"), [(kind, *wrong) for kind in KINDS for wrong in WRONG[kind]], ids=str
)
def test_a_config_that_contradicts_its_tensors(
    values: dict[str, Any], words: str, folder: Path, fewbit: Fewbit
) -> None:
    configure(folder, **values, **{f"_{name}": value for name, value in values.items() if name.startswith("load_in")})
    with pytest.raises(FormatError, match=words):
        load(folder)
    check(fewbit("generate", folder, "The"), 3, words)
    assert fewbit("inspect", folder).code == 3


@pytest.mark.parametrize("kind", ["nf4"])
def test_where_each_tensor_says_what_it_is_the_config_need_not(folder: Path, folders: dict[str, Path]) -> None:
    """The levels, the size of blocks and whether scales are quantized too stand beside every 4-bit weight."""
    configure(folder, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False)
    assert torch.equal(models.logits(load(folder), IDS), models.logits(load(folders["nf4"]), IDS))


# --- What is mixed, and sound ---


def test_tensors_of_several_types(folder: Path) -> None:
    """What is not quantized becomes what was asked for; scales keep their own type."""

    def rounded(name: str, tensor: Tensor) -> Tensor:
        return tensor.bfloat16().float() if "embed" in name else tensor

    def mixed(name: str, tensor: Tensor) -> Tensor:
        return tensor.bfloat16() if "embed" in name else tensor  # norms are float32, scales float16 or float32

    change(folder, rounded)
    types = (torch.float32, torch.bfloat16)
    wanted = [models.logits(load(folder, dtype=dtype), IDS) for dtype in types]
    change(folder, mixed)
    for dtype, logits in zip(types, wanted, strict=True):
        made = load(folder, dtype=dtype)
        assert {made.model.norm.weight.dtype, made.model.embed_tokens.weight.dtype} == {dtype}
        assert torch.equal(models.logits(made, IDS), logits)


# --- What is not fewbit's ---


def test_a_method_that_nobody_knows_is_left_to_transformers(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers says so and goes on without, in its own words, with fewbit or without."""
    folder = Path(shutil.copytree(folders["original"], tmp_path / "model"))
    models.edit_json(folder / "config.json", quantization_config={"quant_method": "fp0"})
    made = load(folder)
    assert "Unknown quantization type, got fp0" in caplog.text
    assert torch.equal(models.logits(made, IDS), models.logits(load(folders["original"]), IDS))


@pytest.mark.parametrize("kind", ["original", "gptq"])
def test_a_models_own_code_is_never_run_unasked(folder: Path, tmp_path: Path, fewbit: Fewbit) -> None:
    witness = tmp_path / "executed"
    for name in ("configuration_own", "modeling_own"):
        (folder / f"{name}.py").write_text(f"open({str(witness)!r}, 'w').close()\n", encoding="utf-8")
    models.edit_json(
        folder / "config.json",
        model_type="own",
        auto_map={"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
    )
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(folder, trust_remote_code=False)
    check(fewbit("generate", folder, "The"), 3, "--trust-remote-code")
    for verb in ("inspect", "estimate", "quantize"):
        answer = fewbit(verb, folder, *(("-o", tmp_path / "out") if verb == "quantize" else ()))
        assert "Traceback" not in answer.err
        assert verb != "quantize" or "error: " in answer.err
    assert not witness.exists()
    with pytest.raises(Exception, match="own"):  # the code has no such class
        load(folder, trust_remote_code=True)
    assert witness.exists()  # so it is this very code that was not run


ATTACKS = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch WITNESS') }}",
    "{{ messages.append(1) }}",
    "{% set x = namespace.__init__.__globals__ %}{{ x.os.popen('touch WITNESS').read() }}",
    "{{ lipsum.__globals__['os'].system('touch WITNESS') }}",
)


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_template_stays_in_its_sandbox(attack: str, folders: dict[str, Path], tmp_path: Path, fewbit: Fewbit) -> None:
    folder = Path(shutil.copytree(folders["gptq"], tmp_path / "model"))
    witness = tmp_path / "executed"
    (folder / "chat_template.jinja").write_text(attack.replace("WITNESS", str(witness)), encoding="utf-8")
    with pytest.raises(SecurityError):
        AutoTokenizer.from_pretrained(folder).apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    check(fewbit("generate", folder, "The", "--chat"), 2, "chat template")
    assert not witness.exists()


def test_a_model_that_is_only_a_pickle_is_not_blocked(folders: dict[str, Path], tmp_path: Path) -> None:
    """As facebook/opt-125m and opt-350m are; transformers reads them as tensors only."""
    for family in ("opt", "opt-350m"):
        folder = models.save(tmp_path / family, family)
        wanted = models.logits(AutoModelForCausalLM.from_pretrained(folder).eval(), IDS)
        tensors = models.tensors_of(folder)
        (folder / WEIGHTS).unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
        made = load(folder)
        assert torch.equal(models.logits(made, IDS), wanted)
        quantize.quantize(folder, tmp_path / f"{family}-out", plan=find("rtn-4bit"))
        assert any(isinstance(module, QLinear) for module in load(tmp_path / f"{family}-out").modules())
