"""Linears in groups whose statistics fit a budget: the groups, and that they do not change a result."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import fewbit
from fewbit.models import experts
from fewbit.models.source import locate
from fewbit.models.topology import find_links
from fewbit.pipeline import capture, groups
from fewbit.pipeline.blocks import quantize_blocks
from fewbit.pipeline.capture import Inputs
from fewbit.pipeline.job import Job, skeleton_of
from fewbit.pipeline.run import Run
from fewbit.pipeline.settled import Settled
from fewbit.plans.plan import Plan, Rule, find
from fewbit.stats import Need, Stats
from fewbit.texts.calibration import Calibration
from tests import architectures, models

SHAPES = {
    "b.attn.q": (64, 32),
    "b.attn.k": (16, 32),
    "b.attn.o": (32, 64),
    **{f"b.experts.{e}.{leaf}": (8, 32) for e in range(3) for leaf in ("gate", "up")},
    **{f"b.experts.{e}.down": (32, 8) for e in range(3)},
}


def test_linears_that_read_one_tensor_are_counted_once() -> None:
    attention = {name: shape for name, shape in SHAPES.items() if ".attn." in name}
    assert groups.statistics_bytes(attention, Need.HESSIAN) == 4 * (32 * 32 + 64 * 64)
    assert groups.statistics_bytes(attention, Need.MEAN_ABS) == 4 * (32 + 64)
    expert = {name: shape for name, shape in SHAPES.items() if ".0." in name}
    assert groups.statistics_bytes(expert, Need.HESSIAN) == 4 * (32 * 32 + 8 * 8)


def test_groups_hold_whole_modules_and_fit_the_budget() -> None:
    room = 4 * 2 * (32 * 32 + 8 * 8)  # two experts; attention needs more than that
    found = groups.groups_of(SHAPES, Need.HESSIAN, room)
    assert [{name.rpartition(".")[0] for name in names} for names in found] == [
        {"b.attn"},
        {"b.experts.0", "b.experts.1"},
        {"b.experts.2"},
    ]
    assert sorted(name for names in found for name in names) == sorted(SHAPES)
    assert len(groups.groups_of(SHAPES, Need.HESSIAN, 1 << 30)) == 1
    assert len(groups.groups_of(SHAPES, Need.HESSIAN, 0)) == 4
    assert groups.groups_of({}, Need.HESSIAN, 0) == []


def test_the_budget_is_a_sixteenth_of_the_device_with_a_floor() -> None:
    assert groups.room_for_statistics(0) == groups.room_for_statistics(8 << 30) == 2 << 30
    assert groups.room_for_statistics(80 << 30) == 5 << 30


MIXED = Plan("mixed", "gptq", (Rule("*.down_proj", "int4-g32-sym", "imatrix"), Rule("*", "int4-g32-sym", "gptq")))


@pytest.mark.filterwarnings("default")  # models warn about their own tiny configs
@pytest.mark.parametrize(
    ("kind", "plan"),
    [("deepseek_v3", "gptq-4bit"), ("qwen3_moe", "gptq-4bit"), ("qwen3_moe", "awq-4bit"), ("qwen3_moe", MIXED)],
)
def test_groups_do_not_change_the_result(
    kind: str, plan: str | Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = architectures.save(tmp_path / "model", kind)
    (tmp_path / "text.txt").write_text(models.sentences(300), encoding="utf-8")
    wanted = Calibration(str(tmp_path / "text.txt"), samples=6, length=32, seed=1)
    runs: list[int] = []
    gather = capture.gather

    def counted(block: capture.Block, needs: Mapping[str, Need], **rest: Any) -> dict[str, Stats]:
        runs[-1] += 1
        return gather(block, needs, **rest)

    monkeypatch.setattr(capture, "gather", counted)
    found = []
    for room in (1 << 30, 0):
        monkeypatch.setattr(capture, "room_for_statistics", lambda _, room=room: room)
        runs.append(0)
        out = tmp_path / f"out-{room}"
        done = fewbit.quantize(model, out, plan=plan, calibration=wanted)
        files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in out.glob("*.safetensors")}
        found.append((files, done.tensors))
    assert found[0] == found[1]
    assert runs[1] > runs[0]


@pytest.mark.filterwarnings("default")
def test_the_same_linears_of_all_experts_are_one_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[set[str]] = []
    gather = capture.gather

    def seen(block: capture.Block, needs: Mapping[str, Need], **rest: Any) -> dict[str, Stats]:
        runs.append({name.rpartition(".")[2] for name in needs})
        return gather(block, needs, **rest)

    monkeypatch.setattr(capture, "gather", seen)
    job = Job.prepare(locate(architectures.save(tmp_path / "model", "qwen3_moe")), find("gptq-4bit"), "cpu")
    tokens = torch.arange(256).view(8, 32)
    with Run("stages", "llama", "blocks") as run:
        quantize_blocks(job.settled, Inputs(tokens, stages=()), run, lambda step: None)
    every = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    stages = [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
    assert runs == [every, *stages] * len(job.settled.skeleton.blocks)


def test_a_group_of_experts_runs_these_experts_only() -> None:
    model = AutoModelForCausalLM.from_config(architectures.config("qwen3_moe"), dtype=torch.float32).eval()
    experts.separate(model)
    block, path = model.get_submodule("model.layers.0"), "model.layers.0.mlp.experts"
    fed: set[str] = set()
    for name, module in block.named_modules(prefix="model.layers.0"):
        if name.endswith("up_proj"):
            module.register_forward_pre_hook(lambda *_, name=name: fed.add(name))
    ids = torch.arange(64).view(2, 32)

    def run_for(*linears: str) -> set[str]:
        fed.clear()
        with torch.no_grad(), experts.only_of("model.layers.0", block, linears):
            model(input_ids=ids)
        return set(fed)

    everything = run_for(f"{path}.0.up_proj", "model.layers.0.self_attn.q_proj")
    assert len(everything) > 2
    assert run_for(f"{path}.0.up_proj", f"{path}.2.down_proj") == everything & {
        f"{path}.0.up_proj",
        f"{path}.2.up_proj",
    }
    assert run_for("model.layers.0.self_attn.q_proj") == everything  # what follows may read what experts compute


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("family", "most"), [("llama", 8192), ("qwen3_moe", 32768)])
def test_a_gpu_gets_many_tokens_at_once(family: str, most: int, tmp_path: Path) -> None:
    model = skeleton_of(locate(architectures.save(tmp_path / "model", family)), "cpu", False)
    plain, rewritten = (Settled.of(model, find(p)).resolved.assignments.values() for p in ("gptq-4bit", "awq-4bit"))
    assert capture.tokens_at_once(model, plain) == 2048
    model.device = torch.device("cuda")
    assert capture.tokens_at_once(model, plain) == most
    assert capture.tokens_at_once(model, rewritten) == 2048


def test_half_as_many_windows_are_in_a_batch_once_memory_is_out() -> None:
    tokens = torch.zeros(128, 2048, dtype=torch.int64)
    assert Inputs(tokens, tokens_at_once=32768).at_once == 16
    assert Inputs(tokens, tokens_at_once=32768).halved().at_once == 8


def test_one_expert_tells_what_feeds_what_in_all() -> None:
    model = AutoModelForCausalLM.from_config(architectures.config("qwen3_moe"), dtype=torch.float32).eval()
    experts.separate(model.requires_grad_(False))
    runs: list[int] = []

    def run() -> None:
        runs.append(1)
        model(input_ids=torch.arange(64).view(2, 32))

    with torch.no_grad():
        links = find_links(model.get_submodule("model.layers.1"), run)
    found = {link.source: link.readers for link in links if "experts" in link.source}
    assert found == {f"mlp.experts.{e}.up_proj": (f"mlp.experts.{e}.down_proj",) for e in range(len(found))}
    assert len(found) == model.config.num_experts
    assert len(runs) < 70  # 81 with 4 experts if each is tried, and 27 more for each expert more
