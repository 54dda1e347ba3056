"""Mixtures of experts at their edges: one expert, widths that no group size divides, experts over several processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import fewbit
from fewbit.errors import PlanError
from fewbit.models.plugin import quantizer
from fewbit.nn.layers import QLinear
from fewbit.plans.plan import find
from tests import architectures, models
from tests.e2e.test_ranks import differing, torchrun

ONE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 1, "num_experts_per_tok": 1},
    "gpt_oss": {"num_local_experts": 1, "num_experts_per_tok": 1},
}


def save(folder: Path, kind: str, changes: dict[str, Any]) -> Path:
    config = architectures.config(kind)
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    architectures.draw(model, 1)
    model.eval().save_pretrained(folder)
    models.tokenizer().save_pretrained(folder)
    return folder


def check(model: Any, folder: Path) -> None:
    """The model computes what transformers' own computes with its dequantized weights."""
    ids = torch.randint(3, models.VOCAB, (1, 24), generator=torch.Generator().manual_seed(1))
    wanted = models.logits(architectures.with_values(models.original(folder), model), ids)
    assert (models.logits(model, ids) - wanted).norm() <= 1e-4 * wanted.norm()


@pytest.mark.filterwarnings("ignore:BitsAndBytesConfig.*stay in")  # routers, a large part of a tiny model
@pytest.mark.parametrize("plan", ["gptq-4bit", "on load"])
@pytest.mark.parametrize("kind", ONE)
def test_a_layer_of_one_expert(kind: str, plan: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", kind, ONE[kind])
    if plan == "on load":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        with quantizer.serving("reference"):
            made = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
        made.save_pretrained(tmp_path / "out")
    else:
        calibration = fewbit.Calibration([models.sentences(60)], samples=4, length=32)
        fewbit.quantize(folder, tmp_path / "out", plan=plan, calibration=calibration, device="cpu")
    model = fewbit.load(tmp_path / "out", dtype=torch.float32, kernel="reference")
    packed = {name for name, module in model.named_modules() if isinstance(module, QLinear)}
    assert {f"model.layers.{layer}.mlp.experts.0.down_proj" for layer in range(2)} <= packed
    check(model, folder)


def test_experts_that_no_group_divides_are_named_in_short(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "qwen3_moe", {"moe_intermediate_size": 40})
    with pytest.raises(PlanError) as refused:
        fewbit.preview(folder, plan="gptq-4bit")
    assert "experts.0-3.down_proj stay as they are: groups of 32 do not divide 40 columns" in str(refused.value)
    assert "experts.3" not in str(refused.value)  # thousands of names in a large model
    fewbit.quantize(folder, tmp_path / "out", plan="nf4", device="cpu")  # its blocks go on over the ends of rows
    check(fewbit.load(tmp_path / "out", dtype=torch.float32, kernel="reference"), folder)


# What each process does. It stores the rows of each of its statistics, own and of all processes.
WORK = """
import json, os, sys
from pathlib import Path
import fewbit
from fewbit.stats import Stats
model, text, out = map(Path, sys.argv[1:])
all_reduce, rows = Stats.all_reduce, []
def counted(stats):
    own = stats.rows
    all_reduce(stats)
    rows.append((own, stats.rows))
Stats.all_reduce = counted
calibration = fewbit.Calibration(str(text), samples=7, length=32)
fewbit.quantize(model, out / "two", plan=out / "plan.json", calibration=calibration, device="cpu")
(out / ("rows-" + os.environ["RANK"])).write_text(json.dumps(rows))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of many experts, and what one and two processes make of it."""
    folder = tmp_path_factory.mktemp("of-two")
    model = save(folder / "model", "qwen3_moe", {"num_experts": 64})  # 7 rows for each, if they were spread evenly
    text, script = folder / "text.txt", folder / "work.py"
    text.write_text(models.sentences(200), encoding="utf-8")
    script.write_text(WORK, encoding="utf-8")
    # With a target, the order of sums changes the error of some experts of few tokens by a tenth.
    plan = find("gptq-4bit").changed(options={"target": "0"})
    (folder / "plan.json").write_text(json.dumps(plan.to_json()), encoding="utf-8")
    ended = torchrun(2, *map(str, (script, model, text, folder)), cache=folder / "cache")
    assert ended.returncode == 0, ended.stderr
    calibration = fewbit.Calibration(str(text), samples=7, length=32)
    fewbit.quantize(model, folder / "one", plan=folder / "plan.json", calibration=calibration, device="cpu")
    return folder


def recorded(folder: Path, key: str) -> dict[str, Any]:
    """Of each quantized tensor, what the record of the output has under `key`."""
    tensors = json.loads((folder / "fewbit.json").read_text("utf-8"))["tensors"]
    return {tensor["module"]: tensor[key] for tensor in tensors}


def test_two_processes_quantize_experts_as_one_does(made: Path) -> None:
    one, two = made / "one", made / "two"
    assert differing(one, two) < 0.02  # as of a dense model: tests/e2e/test_ranks.py
    assert recorded(two, "rows") == recorded(one, "rows")
    alone, together = recorded(one, "error"), recorded(two, "error")
    assert sum(together.values()) == pytest.approx(sum(alone.values()), rel=2e-3)
    assert together == pytest.approx(alone, rel=0.03)
    check(fewbit.load(two, dtype=torch.float32, kernel="reference"), made / "model")


def test_experts_reached_in_one_process_only_count(made: Path) -> None:
    first, second = (json.loads((made / f"rows-{rank}").read_text("utf-8")) for rank in range(2))
    owns = [(own, other) for (own, _), (other, _) in zip(first, second, strict=True)]
    assert any(own and not other for own, other in owns)
    assert any(other and not own for own, other in owns)
    assert [rows for _, rows in first] == [rows for _, rows in second] == [own + other for own, other in owns]
    assert 0 in recorded(made / "two", "rows").values()
