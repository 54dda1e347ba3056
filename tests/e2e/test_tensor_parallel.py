"""Two processes that each hold a part of a model compute what one process with the whole model does."""

from __future__ import annotations

import json
import shutil
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fewbit
from fewbit import PlanError
from fewbit.plans.plan import Plan, Rule
from fewbit.texts.calibration import Calibration
from tests import architectures, models
from tests.e2e import test_few_experts as few_experts
from tests.e2e.test_ranks import torchrun

WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "dtype": "float32"}
IDS = torch.arange(20)[None] * 7 % models.VOCAB
ATTENTION = Plan("attention", "gptq", (Rule("*experts*", None), Rule("*", "int4-g32-sym")))

# Each process loads its part of each model, and says what it computes, what it holds, and of which it has the whole.
WORK = """
import json, os, sys, warnings
from pathlib import Path
import torch
import fewbit
ids = torch.arange(20)[None] * 7 % 288
first = ids[:, :5]
out, *folders = sys.argv[1:]
for folder in folders:
    found = {}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = fewbit.load(folder, tensor_parallel=True, dtype="float32", device="cpu")
    found["logits"] = model(input_ids=ids, use_cache=False).logits
    options = {"attention_mask": torch.ones_like(first), "max_new_tokens": 12, "do_sample": False}
    found["text"] = model.generate(first, **options)
    found["bytes"] = sum(parameter.nbytes for parameter in model.parameters())
    found["told"] = [str(each.message) for each in told if "whole of" in str(each.message)]
    try:
        model.save_pretrained(out + "-saved")
    except fewbit.PlanError as error:
        found["saving"] = str(error)
    fuse = None if folder.endswith("plain") else 32  # only packed weights are fused
    fused = fewbit.load(folder, tensor_parallel=True, dtype="float32", device="cpu", fuse=fuse)
    found["fused"] = fused.generate(first, **options)
    torch.save(found, Path(out) / f"{Path(folder).name}-{os.environ['RANK']}")
"""


def quantized(model: Path, out: Path, plan: str | Plan) -> Path:
    text = out.parent / "text.txt"
    text.write_text(models.sentences(200), encoding="utf-8")
    fewbit.quantize(model, out, plan=plan, calibration=Calibration(str(text), samples=2, length=32, seed=1))
    return out


def in_another_order(folder: Path, out: Path, but: str = "no module") -> Path:
    """A copy whose down projections and output projections have act-order: groups of columns that lie apart.

    but: a part of the names of those that keep their order.
    """
    shutil.copytree(folder, out)
    tensors = models.tensors_of(folder)
    for name, groups in list(tensors.items()):
        if name.endswith(("down_proj.g_idx", "o_proj.g_idx")) and but not in name:
            order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(3))
            tensors[name] = groups[order].contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    known = models.quantization_of(out)
    models.edit_json(out / "config.json", quantization_config={**known, "desc_act": True})
    return out


def _experts(kind: str, plan: str | Plan, **changes: Any) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        name = plan if isinstance(plan, str) else plan.name
        with architectures.seeded():
            folder = few_experts.save(place / f"{kind}-{sum(changes.values())}-{name}", kind, changes)
        return folder if plan == "plain" else quantized(folder, Path(f"{folder}-packed"), plan)

    return make


def _family(family: str, plan: str, **changes: Any) -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        end = ".gguf" if plan == "q4_k_m" else ""
        folder = models.save(place / f"{family}-{plan}", family, **{**WIDE, **changes})
        return quantized(folder, place / f"{family}-{plan}-packed{end}", plan)

    return make


MADE: dict[str, Callable[[Path], Path]] = {
    "16 bits": lambda place: models.save(place / "plain", "llama", **WIDE),
    "GPTQ": _family("llama", "gptq-4bit"),
    "an odd number of zero points": _family("mistral", "rtn-4bit"),
    "NF4 with double quantization": _family("qwen3", "nf4"),
    "rows of INT8, and biases": _family("qwen2", "int8"),
    "q, k and v in one linear": _family("phi3", "gptq-4bit"),
    "k-quants": _family("llama", "q4_k_m", hidden_size=512, intermediate_size=1024),
    "k-quants too narrow to cut": _family("mistral", "q4_k_m"),
    "act-order": lambda place: in_another_order(_family("gemma2", "gptq-4bit")(place), place / "act-order"),
    "experts": _experts("qwen3_moe", "rtn-4bit", moe_intermediate_size=256),
    "act-order in some experts": lambda place: in_another_order(
        _experts("qwen3_moe", "gptq-4bit", moe_intermediate_size=256)(place), place / "some-act-order", "experts.0."
    ),
    "experts in 16 bits": _experts("qwen3_moe", "plain"),
    "experts in NF4": _experts("mixtral", "nf4", intermediate_size=256, hidden_size=128, head_dim=32),
    "experts that multiply all tokens": _experts("llama4_text", "int8"),
    "the same in 16 bits": _experts("llama4_text", "plain"),
    "experts in 16 bits beside packed weights": _experts("qwen3_moe", ATTENTION, moe_intermediate_size=8),
    "experts too narrow to cut": _experts("mixtral", "nf4", intermediate_size=96, hidden_size=128, head_dim=32),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("parts")
    return {name: make(place) for name, make in MADE.items()}


@pytest.fixture(scope="module")
def found(made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each process found, by model."""
    out = tmp_path_factory.mktemp("found")
    script = out / "work.py"
    script.write_text(WORK, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWBIT_ACTIVATIONS", "exact")
        ended = torchrun(2, str(script), str(out), *map(str, made.values()), cache=tmp_path_factory.mktemp("cache"))
    assert ended.returncode == 0, ended.stderr[:3000]
    return {name: [torch.load(out / f"{folder.name}-{rank}") for rank in (0, 1)] for name, folder in made.items()}


@pytest.mark.filterwarnings("ignore:.*multiplied one expert at a time, .* and those of others are not")
@pytest.mark.parametrize("name", MADE)
def test_two_parts_compute_what_the_whole_does(
    name: str, made: dict[str, Path], found: dict[str, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEWBIT_ACTIVATIONS", "exact")
    whole = fewbit.load(made[name], dtype="float32", device="cpu")
    first = IDS[:, :5]
    options: dict[str, Any] = {"attention_mask": torch.ones_like(first), "max_new_tokens": 12, "do_sample": False}
    with torch.inference_mode():
        logits, text = whole(input_ids=IDS, use_cache=False).logits, whole.generate(first, **options)
    for each in found[name]:
        assert (each["logits"] - logits).norm() < 1e-5 * logits.norm()
        assert torch.equal(each["text"], text)
        assert torch.equal(each["fused"], text)
        assert "only a part of the model" in each["saving"]
    assert torch.equal(found[name][0]["logits"], found[name][1]["logits"])


HALF = [name for name in MADE if not name.endswith(("too narrow to cut", "some experts"))]


@pytest.mark.parametrize("name", HALF)
def test_each_process_holds_half(name: str, made: dict[str, Path], found: dict[str, list[dict[str, Any]]]) -> None:
    whole = fewbit.load(made[name], dtype="float32", device="cpu")
    most = 0.53 if name == "k-quants" else 0.51  # a projection of q6_k is too narrow there
    share = [each["bytes"] / sum(parameter.nbytes for parameter in whole.parameters()) for each in found[name]]
    assert all(0.49 < each < most for each in share), share


def test_one_process_says_what_stays_whole(found: dict[str, list[dict[str, Any]]]) -> None:
    first, second = found["k-quants too narrow to cut"]
    told = "".join(first["told"])
    assert "embed_tokens and 2 more: its 256 columns cannot be cut into 2 parts of q4_k: groups would cross" in told
    assert "layers.0.mlp.down_proj: its 768 columns" in told
    assert not second["told"]
    (told,) = found["experts too narrow to cut"][0]["told"]
    assert "mlp.experts and 1 more: its 96 columns cannot be cut into 2 parts of nf4-b64-dq: groups would cross" in told
    (told,) = found["act-order in some experts"][0]["told"]
    assert "mlp.experts and 1 more: the columns of their down projections are stored in another order" in told
    assert not any(each["told"] for name in HALF if name != "k-quants" for each in found[name])


def test_the_command_generates_one_text(made: dict[str, Path], tmp_path: Path) -> None:
    asked = ["-m", "fewbit", "generate", str(made["16 bits"]), "The weight", "--max-new-tokens", "8", "--device", "cpu"]
    said = torchrun(2, *asked, "--json", cache=tmp_path / "cache")
    assert said.returncode == 0, said.stderr
    assert (
        json.loads(said.stdout)["text"]
        == fewbit.generate(made["16 bits"], "The weight", max_new_tokens=8, device="cpu").text
    )


def refused(*command: str, cache: Path, count: int = 2) -> str:
    ended: subprocess.CompletedProcess[str] = torchrun(count, *command, cache=cache)
    assert ended.returncode
    return ended.stderr


def test_what_cannot_be_shared_is_one_error(made: dict[str, Path], tmp_path: Path) -> None:
    model, cache = str(made["GPTQ"]), tmp_path / "cache"
    asked = ["-m", "fewbit", "generate", model, "The weight", "--device", "cpu"]
    said = refused(*asked, cache=cache, count=3)
    assert said.count("error: ") == 1
    assert "3 processes cannot share 4 attention heads" in said
    said = refused(*asked, "--fuse", "--max-length", "64", "--compile", cache=cache)
    assert said.count("error: ") == 1, said
    without = models.save(tmp_path / "gpt2", "gpt2")
    said = refused("-m", "fewbit", "generate", str(without), "The weight", "--device", "cpu", cache=cache)
    assert said.count("error: transformers has no plan for tensor parallelism of GPT2LMHeadModel") == 1, said


def test_one_process_cannot_have_a_part(made: dict[str, Path]) -> None:
    with pytest.raises(PlanError, match="`tensor_parallel` in one process"):
        fewbit.load(made["GPTQ"], tensor_parallel=True)


def test_the_plan_of_transformers_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    script = tmp_path / "work.py"
    script.write_text(
        "import sys, fewbit\n"
        "from transformers import AutoModelForCausalLM\n"
        "for folder, file in ((sys.argv[1], None), (sys.argv[2], sys.argv[3])):\n"
        "    try:\n"
        "        AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, tp_plan='auto')\n"
        "    except fewbit.PlanError as error:\n"
        "        print(error, flush=True)\n",
        encoding="utf-8",
    )
    file = made["k-quants"]
    arguments = [str(script), str(made["GPTQ"]), str(file.parent), file.name]
    with warnings.catch_warnings():
        ended = torchrun(2, *arguments, cache=tmp_path / "cache")
    assert ended.stdout.count("fewbit.load(model, tensor_parallel=True)") == 4, ended.stderr
