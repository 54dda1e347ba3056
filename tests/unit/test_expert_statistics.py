"""Calibration statistics of experts: rows weighted as their tokens, and shrunk towards those of the layer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewbit
from fewbit.errors import NumericsError
from fewbit.models.source import locate
from fewbit.models.topology import find_links
from fewbit.pipeline import capture
from fewbit.pipeline.capture import Block, Inputs, gather
from fewbit.pipeline.job import Job
from fewbit.plans.plan import find
from fewbit.stats import Need, Stats
from tests import architectures, models

pytestmark = pytest.mark.filterwarnings("default")  # models warn about their own tiny configs
LAYER = "model.layers.0"
EXPERTS = {"qwen3_moe": f"{LAYER}.mlp.experts", "llama4_text": f"{LAYER}.feed_forward.experts"}


@contextmanager
def first_block(folder: Path, kind: str, windows: int = 4, length: int = 8) -> Iterator[Block]:
    """The first block of a random model with experts, and its inputs for so many windows of so many tokens."""
    skeleton = Job.prepare(locate(architectures.save(folder, kind)), find("gptq-4bit"), "cpu").settled.skeleton
    tokens = torch.randint(0, 200, (windows, length), generator=torch.Generator().manual_seed(0))
    hidden, calls = capture.captured(skeleton, Inputs(tokens))
    with skeleton.materialized(LAYER) as module:
        yield Block(skeleton, LAYER, module, calls[LAYER], hidden)


def needs_of(block: Block) -> dict[str, Need]:
    return dict.fromkeys(block.skeleton.linears(LAYER), Need.HESSIAN)


def routing(block: Block, path: str) -> tuple[Tensor, Tensor, Tensor]:
    """What the experts of the block read: tokens x [T, H], the router's weights [T, experts], 0 where a token did not
    choose an expert, and the weight of each token [T]."""
    module: Any = block.skeleton.model.get_submodule(path)
    seen: list[tuple[Tensor, ...]] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args))
    weights = torch.cat([states.norm(dim=-1).flatten() for states in block.hidden])
    with torch.no_grad():
        for call, states in zip(block.calls, block.hidden, strict=True):
            call.run(block.module, states)
    handle.remove()
    if len(seen[0]) == 1:  # Llama 4 has scaled the rows, and has a row for each token and expert
        x = torch.stack([args[0].view(module.count, -1, args[0].shape[-1]) for args in seen], 1).flatten(1, 2)
        return x, (x != 0).any(-1).float().T, weights
    x, shares = (
        torch.cat([args[0] for args in seen]),
        torch.cat([torch.zeros(len(args[1]), module.count).scatter(1, args[1], args[2]) for args in seen]),
    )
    return x.expand(module.count, -1, -1), shares, weights


def mean_outer(x: Tensor, weights: Tensor) -> Tensor:
    return (x.T * weights) @ x / weights.sum()


@pytest.mark.parametrize("kind", EXPERTS)
def test_the_rows_of_experts_weigh_as_their_tokens(kind: str, tmp_path: Path) -> None:
    with first_block(tmp_path, kind) as block:
        x, shares, weights = routing(block, path := EXPERTS[kind])
        stats = gather(block, needs_of(block))
    chosen = (shares > 0).float()
    pool = mean_outer(x.flatten(0, 1), (chosen.T * weights).flatten())
    for expert in range(len(x)):
        gate, up = (stats[f"{path}.{expert}.{leaf}"] for leaf in ("gate_proj", "up_proj"))
        assert gate is up
        rows = int((shares[:, expert] > 0).sum())
        own = mean_outer(x[expert], chosen[:, expert] * weights).nan_to_num()
        borrowed = capture.STRENGTH * x.shape[-1]
        wanted = (rows * own + borrowed * pool) / (rows + borrowed)
        assert gate.rows == stats[f"{path}.{expert}.down_proj"].rows == rows
        torch.testing.assert_close(gate.hessian, wanted, rtol=1e-4, atol=1e-6)


def test_an_unused_expert_gets_the_statistics_of_its_layer(tmp_path: Path) -> None:
    with first_block(tmp_path, "qwen3_moe", windows=1, length=1) as block:  # one token chooses 2 of 4 experts
        _, shares, _ = routing(block, path := EXPERTS["qwen3_moe"])
        names = [f"{path}.{expert}.down_proj" for expert in range(4)]
        stats = gather(block, needs_of(block))
        pools = capture.gather_pools(block, names, Need.HESSIAN)
    unused = [expert for expert in range(4) if not shares[:, expert].any()]
    assert len(unused) == 2
    for expert in unused:
        assert stats[names[expert]].rows == 0
        assert stats[names[expert]].borrowed == int((shares > 0).sum())
        torch.testing.assert_close(stats[names[expert]].hessian, pools.of[path, True].hessian)


def test_an_imatrix_counts_the_rows_of_an_expert_alike(tmp_path: Path) -> None:
    with first_block(tmp_path, "qwen3_moe") as block:
        x, shares, _ = routing(block, path := EXPERTS["qwen3_moe"])
        stats = gather(block, needs_of(block), alike=True)
    for expert in range(4):
        rows = x[expert][shares[:, expert] > 0]
        if len(rows):
            torch.testing.assert_close(stats[f"{path}.{expert}.up_proj"].mean_square, rows.square().mean(0))


def test_an_imatrix_counts_experts_without_tokens(tmp_path: Path) -> None:
    with first_block(tmp_path, "qwen3_moe", windows=1, length=1) as block:
        stats = gather(block, needs_of(block), alike=True)
    assert sorted(stats[name].rows for name in stats if name.endswith("down_proj")) == [0, 0, 1, 1]


@pytest.mark.parametrize("kind", EXPERTS)
def test_a_router_with_nan_is_an_error_that_names_the_layer(kind: str, tmp_path: Path) -> None:
    with first_block(tmp_path, kind) as block:
        path = EXPERTS[kind]
        around = path.rpartition(".")[0]
        router: Any = block.skeleton.model.get_submodule(f"{around}.{'gate' if kind == 'qwen3_moe' else 'router'}")
        router.weight.data.fill_(torch.nan)
        with pytest.raises(NumericsError, match=rf"^{path}: the router gives 32 of 32 calibration tokens"):
            gather(block, needs_of(block))


def test_tokens_that_are_not_finite_are_no_error_of_a_router(tmp_path: Path) -> None:
    with first_block(tmp_path, "qwen3_moe") as block:
        block.hidden[0][0, 3] = torch.nan
        stats = gather(block, needs_of(block))
    assert stats[f"{LAYER}.self_attn.q_proj"].dropped >= 1


def test_statistics_shrink_by_the_number_of_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    own, pool = Stats(4, Need.HESSIAN), Stats(4, Need.HESSIAN)
    own.add(few := torch.randn(3, 4, generator=generator))
    pool.add(many := torch.randn(50, 4, generator=generator))
    own.shrink(pool, 9)
    torch.testing.assert_close(own.hessian, (few.T @ few + 9 * (many.T @ many / 50)) / 12)
    assert (own.rows, own.borrowed) == (3, 50)


def test_the_record_counts_the_tokens_of_experts(tmp_path: Path) -> None:
    folder = architectures.save(tmp_path / "model", "qwen3_moe")
    calibration = fewbit.Calibration([models.sentences(60)], samples=1, length=1)
    done = fewbit.quantize(folder, tmp_path / "out", plan="gptq-4bit", calibration=calibration, device="cpu")
    record = json.loads((tmp_path / "out" / "fewbit.json").read_text("utf-8"))
    rows = {tensor["module"]: tensor["rows"] for tensor in record["tensors"]}
    assert rows[f"{LAYER}.self_attn.q_proj"] is None
    assert sorted(rows[f"{LAYER}.mlp.experts.{expert}.up_proj"] for expert in range(4)) == [0, 0, 1, 1]
    assert [note for note in done.notes if note.startswith("8 of 8 experts served fewer calibration tokens than")]
    assert not any("rounded to nearest" in note for tensor in done.tensors for note in tensor.notes)


def test_experts_that_no_state_reaches_have_the_links_of_others(tmp_path: Path) -> None:
    with first_block(tmp_path, "qwen3_moe") as block:
        call, states = block.calls[0], block.hidden[0]
        every = find_links(block.module, lambda: call.run(block.module, states))
        experts: Any = block.skeleton.model.get_submodule(EXPERTS["qwen3_moe"])
        experts.running = frozenset({1})
        with torch.no_grad():
            found = find_links(block.module, lambda: call.run(block.module, states))
    down = {f"mlp.experts.{expert}.up_proj": (f"mlp.experts.{expert}.down_proj",) for expert in range(4)}
    for links in (every, found):
        assert {link.source: link.readers for link in links if "experts" in link.source} == down


def test_pools_watch_experts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Stats] = []
    empty = capture.Gathering._empty

    def counted(gathering: Any, name: str) -> Stats:
        made.append(empty(gathering, name))
        return made[-1]

    monkeypatch.setattr(capture.Gathering, "_empty", counted)
    with first_block(tmp_path, "qwen3_moe") as block:
        attention = [name for name in needs_of(block) if "self_attn" in name]
        assert attention
        pools = capture.gather_pools(block, list(needs_of(block)), Need.HESSIAN)
        assert set(map(id, made)) == {id(each) for each in pools.of.values()}
        block.calls.clear()
        block.calls.append(None)  # type: ignore[arg-type]  # a run of the block would fail
        assert not capture.gather_pools(block, attention, Need.HESSIAN).of
