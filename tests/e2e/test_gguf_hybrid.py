"""Models with linear attention in GGUF files, whose value heads llama.cpp has in another order."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from fewbit.api import generate, quantize
from fewbit.errors import FormatError, PlanError
from fewbit.formats.containers.gguf import Entry, GgufFile, GgufWriter
from fewbit.methods.base import Method
from fewbit.models.gguf.names import Route
from fewbit.nn.layers import QLinear
from fewbit.pipeline import importances
from fewbit.plans.plan import Plan, Rule, find
from fewbit.schemes.base import parse
from fewbit.stats import Stats
from fewbit.texts.calibration import Calibration
from tests import gguf_files, models

OUT = "blk.0.ssm_out.weight"
MODULE = "model.layers.0.linear_attn.out_proj"
# Two value heads of 32 columns for each of four key heads: the first of each key head comes first in a file.
MOVED = torch.arange(256).view(4, 2, 32).transpose(0, 1).flatten()


def values(linear: Any) -> torch.Tensor:
    """The weight of a packed linear, with its columns in the order of the model."""
    found: torch.Tensor = linear.qtensor().dequantize()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 256 columns, so that K-quants fit."""
    sizes = {"linear_num_value_heads": 8, "linear_num_key_heads": 4}
    sizes |= dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 32)
    place = tmp_path_factory.mktemp("hybrid")
    return gguf_files.save(place / "m", "qwen3_5_text", hidden_size=256, intermediate_size=256, head_dim=64, **sizes)


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    """What llama.cpp makes: it reorders the columns first, and then quantizes blocks of 256."""
    return gguf_files.written(folder, folder.parent / "m.gguf", "q4_k")


def test_columns_are_read_in_the_order_of_the_model(folder: Path, file: Path) -> None:
    loaded = generate.load(file, dtype=torch.float32)
    linear = loaded.get_submodule(MODULE)
    assert isinstance(linear, QLinear)
    original = models.original(folder).get_parameter(f"{MODULE}.weight").detach()
    error = (linear.qtensor().dequantize() - original).norm() / original.norm()
    assert float(error) < 0.1  # that of four bits; columns in another order have 1.4
    ids = gguf_files.ids()
    packed, plain = models.logits(loaded, ids), models.logits(loaded.dequantize(torch.float32), ids)
    assert float((packed - plain).norm() / plain.norm()) < 1e-4


def test_a_loaded_model_is_saved_as_it_was(file: Path, tmp_path: Path) -> None:
    generate.load(file, dtype=torch.float32).save_pretrained(tmp_path)
    before, after = GgufFile(file), GgufFile(tmp_path / "model.gguf")
    assert before.entries.keys() == after.entries.keys()
    for name, entry in before.entries.items():
        a, b = before.get(name), after.get(name)
        assert torch.equal(a, b) or (entry.name.endswith("ssm_a") and torch.allclose(a, b, rtol=1e-6)), name


def test_blocks_are_those_of_the_columns_in_the_file(folder: Path, tmp_path: Path) -> None:
    done = quantize.quantize(folder, tmp_path / "m.gguf", plan=find("q4_k_m").changed(method="rtn"))
    written, original = (
        GgufFile(tmp_path / "m.gguf"),
        models.original(folder).get_parameter(f"{MODULE}.weight").detach(),
    )
    assert (written.entries[OUT].type, written.entries["blk.0.ffn_up.weight"].type) == ("q4_k", "q4_k")
    assert written.entries["blk.0.ssm_conv1d.weight"].type == "f32"
    wanted = Method().quantize(original.float()[:, MOVED], parse("q4_k"), None).weight
    assert torch.equal(written.get(OUT), wanted.parts["blocks"])
    linear = generate.load(tmp_path / "m.gguf", dtype=torch.float32).get_submodule(MODULE)
    assert isinstance(linear, QLinear)
    lost = float(((values(linear) - original).norm() / original.norm()).square())
    (report,) = (each for each in done.tensors if each.module == MODULE)
    assert report.error == pytest.approx(lost, rel=1e-4)
    assert report.nbytes == written.entries[OUT].spec.nbytes


def test_methods_see_the_columns_of_the_file(folder: Path, tmp_path: Path) -> None:
    """With its input's statistics in another order than its columns, a method would lose more than without any."""
    text = tmp_path / "text.txt"
    text.write_text(models.sentences(400), encoding="utf-8")
    few, inputs = Calibration(text=str(text), samples=128, length=64), list[torch.Tensor]()
    original = models.original(folder)
    linear: Any = original.get_submodule(MODULE)
    linear.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().flatten(0, -2)))
    ids = models.tokenizer()(models.sentences(400), return_tensors="pt")["input_ids"]
    models.logits(original, ids[:, : ids.shape[1] // 64 * 64].view(-1, 64))
    wanted, lost = inputs[0] @ linear.weight.T, {}
    for method in ("rtn", "imatrix", "gptq"):
        out = tmp_path / f"{method}.gguf"
        plan = Plan("one", "gguf", (Rule("*linear_attn.out_proj", "q4_k", method), Rule("*", "q8_0", "rtn")))
        done = quantize.quantize(folder, out, plan=plan, calibration=few)
        found = values(generate.load(out, dtype=torch.float32).get_submodule(MODULE))
        lost[method] = float(((inputs[0] @ found.T - wanted).norm() / wanted.norm()).square())
        (report,) = (each for each in done.tensors if each.module == MODULE)
        assert method != "gptq" or report.error == pytest.approx(lost[method], rel=0.05)
    assert lost["gptq"] < 0.8 * lost["imatrix"] < 0.7 * lost["rtn"]


def test_a_file_of_them_is_quantized_again(file: Path, folder: Path, tmp_path: Path) -> None:
    quantize.quantize(file, tmp_path / "again.gguf", plan=find("q8_0").changed(method="rtn"))
    before, after = (generate.load(path, dtype=torch.float32) for path in (file, tmp_path / "again.gguf"))
    for module in (MODULE, "model.layers.0.linear_attn.in_proj_qkv", "model.layers.0.linear_attn.in_proj_z"):
        a, b = (values(model.get_submodule(module)) for model in (before, after))
        assert float((a - b).norm() / a.norm()) < 0.01, module


def test_importances_have_the_order_of_the_file(folder: Path) -> None:
    skeleton: Any = SimpleNamespace(config=AutoConfig.from_pretrained(folder))
    squares = torch.arange(256, dtype=torch.float32) + 1
    matrix = importances.matrix_of(skeleton, {MODULE: Stats.from_mean_square(squares, 1)})
    assert torch.equal(matrix[OUT].mean_square, squares[MOVED])


def test_the_block_that_predicts_more_tokens_is_kept(file: Path, tmp_path: Path) -> None:
    whole, path = GgufFile(file), tmp_path / "mtp.gguf"
    added = Entry("blk.4.nextn.enorm.weight", "f32", (256,))
    keys = whole.metadata | {"qwen35.block_count": 5, "qwen35.nextn_predict_layers": 1}
    entries = [*whole.entries.values(), added]
    with GgufWriter(path, keys, entries) as writer:
        for entry in entries:
            writer.add(entry.name, torch.ones(256) if entry is added else whole.get(entry.name))
    loaded, ids = generate.load(path, dtype=torch.float32), gguf_files.ids()
    assert loaded.config.num_hidden_layers == 4
    assert torch.equal(models.logits(loaded, ids), models.logits(generate.load(file, dtype=torch.float32), ids))
    loaded.save_pretrained(tmp_path / "saved")
    again = GgufFile(tmp_path / "saved" / "model.gguf")
    assert torch.equal(again.get(added.name), torch.ones(256))
    assert again.metadata["qwen35.nextn_predict_layers"] == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"linear_value_head_dim": 8}, "keys and values of one width; here 16 and 8"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "with a sum of at most 16",
        ),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused(changes: dict[str, object], reason: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=reason):
        gguf_files.header_of(gguf_files.save(tmp_path / "m", "qwen3_5_text", **changes))


def test_kinds_of_too_few_layers_are_refused(file: Path, tmp_path: Path) -> None:
    whole, path = GgufFile(file), tmp_path / "few.gguf"
    few = whole.metadata["qwen35.attention.recurrent_layers"][:3]
    with GgufWriter(
        path, whole.metadata | {"qwen35.attention.recurrent_layers": few}, [*whole.entries.values()]
    ) as writer:
        for name in whole.entries:
            writer.add(name, whole.get(name))
    with pytest.raises(FormatError, match="the kinds of 3 layers are given, not of 4"):
        generate.load(path)


def test_a_row_stays_where_it_is_before_the_values() -> None:
    route = Route("x", order=((2, 2, 1), (1, 0, 2)), first=3)
    assert route.rows is not None
    assert route.rows.tolist() == [0, 1, 2, 3, 5, 4, 6]
