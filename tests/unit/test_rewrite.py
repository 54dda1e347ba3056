"""A block with scales folded in computes what it did, on every architecture, or the fold is undone and it is said."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fewbit.errors import PlanError
from fewbit.methods.awq import AWQ
from fewbit.methods.base import Fold, Method
from fewbit.methods.rtn import RoundToNearest
from fewbit.models.skeleton import BlockCall, Skeleton, states_of
from fewbit.models.source import locate
from fewbit.models.topology import Link
from fewbit.pipeline import rewrite as rewriting
from fewbit.pipeline.capture import Block
from fewbit.pipeline.rewrite import Rewritten
from fewbit.plans.plan import Assignment
from fewbit.schemes.base import Scheme, parse
from fewbit.stats import Need
from tests import architectures, models

QKV, GATED = "q_proj k_proj v_proj", "gate_proj up_proj"
LLAMA = {"input_layernorm": QKV, "v_proj": "o_proj", "post_attention_layernorm": GATED, "up_proj": "down_proj"}
GEMMA2 = {"input_layernorm": QKV, "v_proj": "o_proj", "pre_feedforward_layernorm": GATED, "up_proj": "down_proj"}
GPT2 = {"ln_1": "c_attn", "c_attn": "c_proj", "ln_2": "c_fc"}  # nothing passes a GELU
EXPECTED: dict[str, dict[str, str]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), LLAMA),
    **dict.fromkeys(("gemma2", "gemma3"), GEMMA2),
    "phi3": {
        "input_layernorm": "qkv_proj",
        "qkv_proj": "o_proj",
        "post_attention_layernorm": "gate_up_proj",
        "gate_up_proj": "down_proj",
    },
    "gpt2": GPT2,
    "gpt2-bare": GPT2,
    "opt": {"self_attn_layer_norm": QKV, "v_proj": "out_proj", "final_layer_norm": "fc1", "fc1": "fc2"},
    "opt-350m": {"v_proj": "out_proj", "fc1": "fc2"},  # its norms feed the residual stream too
    "gpt-neox": {
        "input_layernorm": "query_key_value",
        "query_key_value": "dense",
        "post_attention_layernorm": "dense_h_to_4h",
    },
}


@dataclass(frozen=True)
class Wild(Method):
    """Scales drawn between 1/4 and 4, whatever they cost."""

    needs = Need.MEAN_ABS
    rewrites: ClassVar[bool] = True

    def rewrite(self, fold: Fold, schemes: Mapping[str, Scheme]) -> Tensor | None:
        drawn = torch.rand(len(fold.mean_abs()), generator=torch.Generator().manual_seed(3))
        return fold.stored(4 ** (2 * drawn - 1))


@dataclass
class Opened:
    """The first block of a tiny model, materialized, with what enters it."""

    skeleton: Skeleton
    block: str
    module: nn.Module
    calls: list[BlockCall]
    hidden: list[Tensor]

    def wanted(self, method: Method, other: Mapping[str, Method] = {}) -> dict[str, Assignment]:
        found = {}
        for name, shape in self.skeleton.linears(self.block).items():
            chosen = other.get(name.rpartition(".")[2], method)
            found[name] = Assignment(name, shape, parse("int4-g16"), chosen)
        return found

    def outputs(self) -> list[Tensor]:
        return [call.run(self.module, states) for call, states in zip(self.calls, self.hidden, strict=True)]

    def rewritten(self, wanted: Mapping[str, Assignment]) -> Rewritten:
        return rewriting.rewrite(Block(self.skeleton, self.block, self.module, self.calls, self.hidden), wanted)

    def links(self) -> list[Link]:
        return rewriting._links(self.skeleton, self.module, (self.calls[0], self.hidden[0]))

    def parameters(self) -> dict[str, Tensor]:
        return {name: p.clone() for name, p in self.module.named_parameters(prefix=self.block)}


@contextmanager
def opened(folder: Path, family: str, working: torch.dtype = torch.float32, **changes: Any) -> Iterator[Opened]:
    rewriting._known.clear()
    if not folder.exists():
        models.save(folder, family, **changes)
    skeleton = Skeleton(locate(folder), working, torch.device("cpu"))
    tokens = torch.randint(3, models.VOCAB, (6, 24), generator=torch.Generator().manual_seed(0))
    hidden, calls = skeleton.capture([tokens[:3], tokens[3:]])
    block = skeleton.blocks[0]
    with skeleton.materialized(block) as module, torch.no_grad():
        yield Opened(skeleton, block, module, calls[block], hidden)


def leaf(name: str) -> str:
    return name.rpartition(".")[2]


def apart(got: list[Tensor], wanted: list[Tensor]) -> float:
    return max(float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max()) for a, b in zip(got, wanted, strict=True))


def check_folds(folder: Path, family: str, **changes: Any) -> None:
    """Every link that there is is found and takes any scales, and the block's output does not change."""
    with opened(folder, family, **changes) as at:
        found = {leaf(link.source): " ".join(map(leaf, link.readers)) for link in at.links()}
        assert found == EXPECTED[family]
        before, parameters = at.outputs(), at.parameters()
        done = at.rewritten(at.wanted(Wild()))
        assert apart(at.outputs(), before) < 1e-5
        after = at.parameters()
        moved = {name for name, p in after.items() if (p - parameters[name]).norm() > 0.1 * parameters[name].norm()}
        for source, readers in found.items():
            assert {f"{name}.weight" for name in after_names(after, [source, *readers.split()])} <= moved
        # What is not quantized is stored as it was in the file, and is what the block now has.
        assert {name for name in moved if name.rpartition(".")[0] not in at.wanted(Wild())} <= done.tensors.keys()
        for name, tensor in done.tensors.items():
            assert tensor.dtype == at.skeleton.stored_dtype(name)
            assert torch.equal(tensor.float(), after[name])
        unfed = {name for name in at.wanted(Wild()) if leaf(name) not in " ".join(found.values()).split()}
        if family.startswith("gpt2"):  # two linears are called c_proj
            unfed = {name for name in unfed | set(at.wanted(Wild())) if name.endswith("mlp.c_proj")}
        assert done.notes.keys() == unfed
        assert all("can take the scales" in note for notes in done.notes.values() for note in notes)


def after_names(parameters: Mapping[str, Tensor], leaves: list[str]) -> set[str]:
    """Modules with a weight and one of these names; of GPT-2's two c_proj the one of its attention."""
    modules = {name.rpartition(".")[0] for name in parameters if name.endswith(".weight")}
    return {module for module in modules if leaf(module) in leaves and not module.endswith("mlp.c_proj")}


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_fold_keeps_the_output(family: str, tmp_path: Path) -> None:
    check_folds(tmp_path / family, family)


@pytest.mark.parametrize("family", models.UNLIKE)
def test_blocks_that_answer_in_another_way_are_replayed(family: str, tmp_path: Path) -> None:
    tokens = torch.randint(3, models.VOCAB, (3, 24), generator=torch.Generator().manual_seed(0))
    folder = models.save(tmp_path / family, family)
    wanted = models.original(folder)(input_ids=tokens, output_hidden_states=True).hidden_states
    skeleton = Skeleton(locate(folder), torch.float32, torch.device("cpu"))
    (states,), calls = skeleton.capture([tokens])
    for index, block in enumerate(skeleton.blocks[:2]):
        with skeleton.materialized(block) as module, torch.no_grad():
            torch.testing.assert_close(states, wanted[index], rtol=1e-4, atol=1e-4)
            states = calls[block][0].run(module, states)


@pytest.mark.parametrize("family", models.UNLIKE)
def test_scales_fold_where_sequences_are_not_cut_along(family: str, tmp_path: Path) -> None:
    with opened(tmp_path / family, family) as at:
        before, found = at.outputs(), at.links()
        assert found
        done = at.rewritten(at.wanted(Wild()))
        assert apart(at.outputs(), before) < 1e-4
        if family == "bloom":  # norms of the others feed the residual too
            assert not any("would change" in note for notes in done.notes.values() for note in notes)


@pytest.mark.parametrize("returned", [{"hidden": 1}, (), None])
def test_a_block_without_hidden_states_is_refused(returned: object) -> None:
    with pytest.raises(PlanError, match="not hidden states") as raised:
        states_of(returned)
    assert "such as rtn" in raised.value.hint


@pytest.mark.parametrize("family", ["llama", "gemma", "qwen2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scales_follow_what_a_file_rounds(family: str, dtype: str, tmp_path: Path) -> None:
    check_folds(tmp_path / family, family, dtype=dtype)


def test_layer_norms_whose_bias_would_round_are_never_wrong(tmp_path: Path) -> None:
    with opened(tmp_path / "gpt2", "gpt2", dtype="bfloat16") as at:
        before = at.outputs()
        done = at.rewritten(at.wanted(Wild()))
        assert apart(at.outputs(), before) <= 1e-4
        dropped = [note for notes in done.notes.values() for note in notes if "would change" in note]
        assert len(dropped) == len(
            [name for name in ("ln_1", "ln_2") if not any(f"{name}." in t for t in done.tensors)]
        )


def test_grouped_queries_share_the_channel_of_their_value(tmp_path: Path) -> None:
    with opened(tmp_path / "llama", "llama") as at:  # four heads of 16, two of values
        channel = {leaf(link.source): link.channel for link in at.links()}["v_proj"]
        assert channel.tolist() == [(column // 32) * 16 + column % 16 for column in range(64)]
    with opened(tmp_path / "phi3", "phi3") as at:  # q, k and v in one: values are the last 32 rows
        channels = {leaf(link.source): link.channel for link in at.links()}
        assert channels["qkv_proj"].tolist() == [96 + (c // 32) * 16 + c % 16 for c in range(64)]
        assert channels["gate_up_proj"].tolist() == [96 + c for c in range(96)]


def test_norms_that_add_one_are_told_from_those_that_do_not(tmp_path: Path) -> None:
    for family, offset in (("gemma3", 1.0), ("qwen3", 0.0), ("opt", 0.0)):
        with opened(tmp_path / family, family) as at:
            assert {link.offset for link in at.links()} == {offset, None}


def test_large_weights_do_not_hide_that_norms_add_one(tmp_path: Path) -> None:
    with opened(tmp_path / "gemma", "gemma") as block:
        for name, parameter in block.module.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter.fill_(200)
        offsets = [link.offset for link in block.links() if link.source.endswith("layernorm")]
        assert set(offsets) == {1.0}


def check_wrong_link(folder: Path, family: str) -> None:
    """A link that is not one is undone to the byte, and said."""
    with opened(folder, family) as at, pytest.MonkeyPatch.context() as patch:
        links = at.links()
        wrong = [replace(link, channel=link.channel.flip(0)) for link in links[1:2]]
        rewriting._known.clear()
        patch.setattr(rewriting, "find_links", lambda *_: [links[0], *wrong])
        assert wrong[0].channel.tolist() != links[1].channel.tolist()
        before, outputs = at.parameters(), at.outputs()
        done = at.rewritten(at.wanted(Wild()))
        after = at.parameters()
        assert apart(at.outputs(), outputs) < 1e-5
        (note,) = done.notes[f"{at.block}.self_attn.o_proj"]
        assert "folding into self_attn.v_proj would change the block's output by" in note
        assert torch.equal(after[f"{at.block}.self_attn.o_proj.weight"], before[f"{at.block}.self_attn.o_proj.weight"])
        assert list(done.tensors) == [f"{at.block}.input_layernorm.weight"]


def test_a_wrong_link_is_undone_and_reported(tmp_path: Path) -> None:
    check_wrong_link(tmp_path / "llama", "llama")


def test_where_not_all_readers_ask_nothing_is_scaled(tmp_path: Path) -> None:
    with opened(tmp_path / "llama", "llama") as at:
        before = at.parameters()
        done = at.rewritten(at.wanted(Wild(), {"k_proj": RoundToNearest(), "o_proj": RoundToNearest()}))
        same = {
            leaf(name.removesuffix(".weight")) for name, p in at.parameters().items() if torch.equal(p, before[name])
        }
        assert same == {"input_layernorm", "q_proj", "k_proj", "v_proj", "o_proj"}
        assert {leaf(name) for name in done.notes} == {"q_proj", "v_proj"}
        assert all("not all quantized by one method" in note for (note,) in done.notes.values())
        assert not at.rewritten(at.wanted(RoundToNearest())).tensors


def test_a_block_in_half_precision_is_rewritten_and_stays_so(tmp_path: Path) -> None:
    """As on a GPU: what is computed in float32 goes back to the block's own type."""
    with opened(tmp_path / "llama", "llama", torch.bfloat16) as at:
        before = at.outputs()
        done = at.rewritten(at.wanted(Wild()))
        assert len(done.tensors) == 2
        assert not done.notes
        assert {p.dtype for p in at.module.parameters()} == {torch.bfloat16}
        assert apart([y.float() for y in at.outputs()], [y.float() for y in before]) < 0.1


def test_tokens_that_are_not_finite_are_passed_over(tmp_path: Path) -> None:
    with opened(tmp_path / "llama", "llama") as at:
        at.hidden[0][0, 3] = torch.nan
        done = at.rewritten(at.wanted(AWQ(grid=3)))
        assert len(done.tensors) == 2
        assert not done.notes


@pytest.mark.filterwarnings("default")  # the model warns about its own tiny config
def test_folds_in_experts_run_no_other_part_of_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, runs = BlockCall.run, list[BlockCall]()

    def counted(call: BlockCall, module: nn.Module, states: Tensor) -> Tensor:
        runs.append(call)
        return run(call, module, states)

    monkeypatch.setattr(BlockCall, "run", counted)
    counts = []
    for experts in (4, 16):
        folder = tmp_path / str(experts)
        config = architectures.config("qwen3_moe")
        config.num_experts = experts
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        models.tokenizer().save_pretrained(folder)
        with opened(folder, "qwen3_moe") as at:
            before, parameters = at.outputs(), at.parameters()
            runs.clear()
            done = at.rewritten(at.wanted(Wild()))
            counts.append(len(runs))
            assert apart(at.outputs(), before) < 1e-5
            moved = [name for name, p in at.parameters().items() if not torch.equal(p, parameters[name])]
            assert sum(name.endswith("down_proj.weight") for name in moved) == experts
            assert not [notes for name, notes in done.notes.items() if name.endswith("down_proj")]
    assert counts[0] == counts[1]


@pytest.mark.filterwarnings("default")
def test_a_fold_in_an_expert_is_searched_on_what_it_reads_now(tmp_path: Path) -> None:
    """The fold of the norm before all linears changes what experts read."""
    folder = architectures.save(tmp_path / "model", "qwen3_moe")
    with opened(folder, "qwen3_moe") as at:
        block = Block(at.skeleton, at.block, at.module, at.calls, at.hidden)
        passes = rewriting._Passes(block, list(zip(at.calls, at.hidden, strict=True)))
        down = f"{at.block}.mlp.experts.0.down_proj"
        ends = (f"{at.block}.mlp.experts.0.up_proj", [down])
        first = passes.of(*ends)
        before = torch.cat([each.run() for each in first])
        passes.forget(ends[0])
        assert passes.of(*ends)[0].norms is first[0].norms
        norm: Any = at.skeleton.model.get_submodule(f"{at.block}.post_attention_layernorm")
        norm.weight.mul_(2)
        passes.forget(f"{at.block}.post_attention_layernorm")
        after = torch.cat([each.run() for each in passes.of(*ends)])
        assert (after - before).norm() > 0.1 * before.norm()
