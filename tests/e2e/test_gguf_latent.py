"""Multi-head latent attention in GGUF files: models whose queries have no latent, old files, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fewbit.api import generate, quantize
from fewbit.errors import FormatError, PlanError
from fewbit.formats.containers.gguf import Entry, GgufFile, GgufWriter
from fewbit.models.skeleton import Skeleton
from fewbit.plans.plan import find
from fewbit.texts.calibration import Calibration
from tests import gguf_files, models

YARN = gguf_files.TYPES["deepseek_v2"]["rope_parameters"]
KV, K, V = (f"blk.0.attn_{name}.weight" for name in ("kv_b", "k_b", "v_b"))


def rewritten(path: Path, to: Path, keys: dict[str, Any], whole: dict[str, torch.Tensor] | None = None) -> Path:
    """The file with other keys, where None drops one. whole: matrices in place of their pieces."""
    own, whole = GgufFile(path), whole or {}
    metadata = {key: value for key, value in (own.metadata | keys).items() if value is not None}
    pieces = {name.replace("kv_b", part) for name in whole for part in ("k_b", "v_b")}
    entries = [entry for entry in own.entries.values() if entry.name not in pieces]
    entries += [Entry(name, "f32", tuple(tensor.shape)) for name, tensor in whole.items()]
    with GgufWriter(to, metadata, entries) as writer:
        for entry in entries:
            writer.add(entry.name, whole[entry.name] if entry.name in whole else own.get(entry.name))
    return to


def same(path: Path, folder: Path) -> bool:
    ids = gguf_files.ids()
    found = models.logits(generate.load(path, dtype=torch.float32), ids)
    return torch.equal(found, models.logits(models.original(folder), ids))


def test_layers_that_share_a_selection_are_not_calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks run one by one, so a shared layer would lack what the layer before selects."""
    folder, few = gguf_files.save(tmp_path / "m", "glm_moe_dsa"), Calibration(samples=4, length=64)
    quantize.quantize(folder, tmp_path / "rtn.gguf", plan=find("q8_0").changed(method="rtn"))

    def work(*args: Any) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr(Skeleton, "_captured", work)
    for plan, out in ((find("q8_0").changed(method="gptq"), "out.gguf"), (find("gptq-4bit"), "out")):
        with pytest.raises(PlanError, match="share the selection of an earlier layer") as error:
            quantize.quantize(folder, tmp_path / out, plan=plan, calibration=few)
        assert "rtn" in str(error.value.hint)
    with pytest.raises(PlanError, match="share the selection of an earlier layer"):
        quantize.imatrix(folder, tmp_path / "i.gguf", calibration=few)


def test_26_layers_have_queries_without_a_latent(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 26, "hidden_size": 32, "q_lora_rank": None, "first_k_dense_replace": 25}
    folder = gguf_files.save(tmp_path / "m", "deepseek_v2", **sizes)
    path = gguf_files.written(folder, tmp_path / "m.gguf")
    assert "deepseek2.attention.q_lora_rank" not in GgufFile(path).metadata
    assert same(path, folder)


def test_a_file_from_before_the_pieces_is_read(tmp_path: Path) -> None:
    folder = gguf_files.save(tmp_path / "m", "deepseek_v3")
    path = gguf_files.written(folder, tmp_path / "m.gguf")
    weights = models.original(folder).state_dict()
    whole = {f"blk.{i}.attn_kv_b.weight": weights[f"model.layers.{i}.self_attn.kv_b_proj.weight"] for i in range(3)}
    old = {"key_length": 32, "value_length": 16, "key_length_mla": None, "value_length_mla": None, "head_count_kv": 4}
    keys = {f"deepseek2.attention.{name}": value for name, value in old.items()}
    assert same(rewritten(path, tmp_path / "old.gguf", keys, whole), folder)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "topk_method = greedy"),
        ("deepseek_v2", {"q_lora_rank": None}, "3 layers with q_lora_rank above 0; this model has None"),
        ("deepseek_v2", {"num_hidden_layers": 27, "hidden_size": 8}, "27 layers with q_lora_rank = None"),
        ("deepseek_v2", {"rms_norm_eps": 1e-5}, "rms_norm_eps = 1e-06"),
        ("deepseek_v2", {"rope_parameters": {**YARN, "mscale": 1.0}}, "mscale = mscale_all_dim"),
        ("deepseek_v2", {"rope_parameters": {**YARN, "rope_type": "linear"}}, "unscaled or by YaRN"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave = True"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias = False"),
        ("deepseek_v3", {"norm_topk_prob": False}, "norm_topk_prob = True"),
        ("glm_moe_dsa", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}, "rope_type = default"),
        ("minicpm3", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}, "without mscale_all_dim"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused(kind: str, changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=reason):
        gguf_files.header_of(gguf_files.save(tmp_path / "m", kind, **changes))


def test_other_architectures_have_a_latent_in_26_layers(tmp_path: Path) -> None:
    changes = {"num_hidden_layers": 26, "hidden_size": 32, "mlp_layer_types": ["dense"] * 25 + ["sparse"]}
    folder = gguf_files.save(tmp_path / "m", "deepseek_v32", **changes)
    assert same(gguf_files.written(folder, tmp_path / "m.gguf"), folder)


def test_yarn_of_minicpm_3_without_another_scale_is_written(tmp_path: Path) -> None:
    rope = {key: value for key, value in YARN.items() if not key.startswith("mscale")}
    folder = gguf_files.save(tmp_path / "m", "minicpm3", rope_parameters=rope)
    assert same(gguf_files.written(folder, tmp_path / "m.gguf"), folder)


@pytest.mark.parametrize(
    ("kind", "keys", "reason"),
    [
        ("deepseek_v2", {"expert_group_count": 8}, "expert_group_count is 8"),
        ("deepseek_v2", {"rope.scaling.yarn_log_multiplier": None}, "scales RoPE in a way"),
        ("deepseek_v3", {"expert_gating_func": 1}, "expert_gating_func is 1"),
        ("deepseek_v3", {"attention.temperature_scale": 0.1}, "scales queries by their position"),
        ("deepseek_v3", {"attention.key_length_mla": 8}, "128 rows of queries do not fit 4 heads of width 8"),
    ],
)
def test_files_that_mean_something_else_are_refused(
    kind: str, keys: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = gguf_files.written(gguf_files.save(tmp_path / "m", kind), tmp_path / "m.gguf")
    other = rewritten(path, tmp_path / "other.gguf", {f"deepseek2.{key}": value for key, value in keys.items()})
    with pytest.raises(FormatError, match=reason):
        generate.load(other)
