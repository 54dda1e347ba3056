"""compressed-tensors files: the layout by its definition, older layouts, and files that contradict their config."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewbit.errors import FormatError, PlanError
from fewbit.formats.base import Stored
from fewbit.formats.compressed_tensors import CompressedTensors
from fewbit.formats.compressed_tensors.config import Groups, patterns
from fewbit.plans.plan import Plan, Rule, find, resolve
from fewbit.schemes.affine import Affine
from fewbit.schemes.base import PartSpec, QTensor, parse
from tests.contract.cases import ordinary, quantized
from tests.packed_models import integers, integers_in_order

FORMAT = CompressedTensors()
P = "model.layers.0.mlp.up_proj"
N, K = 64, 96


def groups(**weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


def int4(**others: Any) -> dict[str, Any]:
    return groups(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32, **others)


def headers(tensors: dict[str, Tensor], module: str = P) -> dict[str, PartSpec]:
    return {f"{module}.{suffix}": PartSpec.of(tensor) for suffix, tensor in tensors.items()}


def opened(tensors: dict[str, Tensor], config: dict[str, Any]) -> QTensor:
    found = FORMAT.find(config, headers(tensors))
    assert set(found[P]) == set(tensors)
    FORMAT.describe(found[P], config, P, {"weight_shape": tensors["weight_shape"]} if "weight_shape" in tensors else {})
    return FORMAT.read(tensors, config, P)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_weights_are_read_and_written_back(bits: int, symmetric: bool) -> None:
    tensors, values = integers(ordinary(N, K), bits, symmetric=symmetric)
    config = groups(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=32)
    weight = opened(tensors, config)
    assert str(weight.codec) == f"int{bits}-g32{'-sym' if symmetric else ''}-bf16"
    assert torch.equal(weight.dequantize(), values)
    again = FORMAT.lay_out(weight, config, P)
    assert {s: PartSpec.of(t) for s, t in again.items()} == {s: PartSpec.of(t) for s, t in tensors.items()}
    assert all(torch.equal(again[suffix], tensors[suffix]) for suffix in tensors)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
@pytest.mark.parametrize("symmetric", [True, False])
def test_older_files_put_whole_codes_in_words(bits: int, symmetric: bool) -> None:
    tensors, values = integers(ordinary(N, K), bits, symmetric=symmetric)
    config = groups(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=32)

    def old(dense: Tensor, count: int) -> Tensor:
        array = np.unpackbits(dense.contiguous().numpy().view(np.uint8), axis=1, bitorder="little")[:, : count * bits]
        codes = array.reshape(len(array), count, bits) @ (1 << np.arange(bits))
        per = 32 // bits
        lanes = np.pad(codes, ((0, 0), (0, -count % per))).reshape(len(codes), -1, per).astype(np.uint64)
        words = (lanes << (bits * np.arange(per, dtype=np.uint64))).sum(-1)
        return torch.from_numpy(words.astype(np.uint32).view(np.int32).copy())

    tensors["weight_packed"] = old(tensors["weight_packed"], K)
    if not symmetric:
        tensors["weight_zero_point"] = old(tensors["weight_zero_point"].T, N).T.contiguous()
    assert torch.equal(opened(tensors, config).dequantize(), values)


def test_a_group_may_be_the_whole_row() -> None:
    tensors, values = integers(ordinary(N, K), group=K)
    weight = opened(tensors, groups(num_bits=4, type="int", symmetric=True, strategy="group", group_size=K))
    assert str(weight.codec) == f"int4-g{K}-sym-bf16"
    assert torch.equal(weight.dequantize(), values)


def test_act_order_of_older_files_is_kept() -> None:
    tensors, values = integers_in_order(ordinary(N, K))
    config = int4(actorder="group")
    weight = opened(tensors, config)
    assert weight.permutation is not None
    assert torch.equal(weight.dequantize(), values)
    again = FORMAT.lay_out(weight, config, P)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[suffix], tensors[suffix]) for suffix in tensors)
    with pytest.raises(FormatError, match="act-order"):
        FORMAT.lay_out(weight, int4(), P)
    nothing = tensors | {"weight_g_idx": torch.full((K,), -1, dtype=torch.int32)}
    assert opened(nothing, config).permutation is None


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["tensor", "channel"])
def test_int8_weights_are_read_and_written_back(strategy: str, symmetric: bool) -> None:
    w = ordinary(N, K)
    scale = (w.abs().max().reshape(1) if strategy == "tensor" else w.abs().amax(1, keepdim=True)).half() / 127
    codes = (w / scale.float()).round().clamp(-128, 127)
    tensors = {"weight": codes.to(torch.int8), "weight_scale": scale}
    zero = torch.full(scale.shape, 0 if symmetric else -3, dtype=torch.int8)
    if not symmetric:
        tensors["weight_zero_point"] = zero
    config = {**groups(num_bits=8, type="int", strategy=strategy, symmetric=symmetric), "format": "int-quantized"}
    weight = opened(tensors, config)
    assert str(weight.codec) == ("int8-row-sym" if symmetric else "int8-row")
    assert torch.equal(weight.dequantize(), (codes - zero) * scale.float())
    again = FORMAT.lay_out(weight, config, P)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[suffix], tensors[suffix]) for suffix in tensors)
    if strategy == "tensor":
        weight.parts["scale"] = weight.parts["scale"].clone()
        weight.parts["scale"][1] *= 2
        with pytest.raises(FormatError, match="one weight_scale for a weight, but its rows have several"):
            FORMAT.lay_out(weight, config, P)


def test_scales_that_float16_cannot_hold_are_counted() -> None:
    tensors, _ = integers(ordinary(N, K))
    tensors["weight_scale"][3, 1] = 3e-6
    with pytest.warns(UserWarning, match=rf"^1 scales were rounded.* in {re.escape(P)}\.weight_scale$"):
        FORMAT.read(tensors, int4(), P)
    tensors["weight_scale"][3, 1] = 1e5
    with pytest.raises(FormatError, match="weight_scale has a scale beyond the range of float16"):
        FORMAT.read(tensors, int4(), P)


def test_presets_of_the_peer_stand_for_groups() -> None:
    tensors, values = integers(ordinary(N, 256), group=128)
    config = {**int4(), "config_groups": {"W4A16": ["Linear"]}}
    assert torch.equal(FORMAT.read(tensors, config, P).dequantize(), values)


def test_symmetric_files_may_state_zero_points() -> None:
    tensors, values = integers(ordinary(N, K))
    zero = torch.full((-(-N * 4 // 32), 3), 0x88888888 - (1 << 32), dtype=torch.int64).to(torch.int32)
    weight = opened({**tensors, "weight_zero_point": zero}, int4())
    assert str(weight.codec) == "int4-g32-sym-bf16"
    assert torch.equal(weight.dequantize(), values)


def stored(spec: str, *modules: str) -> list[Stored]:
    return [Stored(module, (N, K), parse(spec)) for module in modules]


def test_a_name_beats_a_pattern_and_a_pattern_a_class() -> None:
    def group(bits: int, *targets: str) -> dict[str, Any]:
        return {"targets": list(targets), "weights": {"num_bits": bits, "type": "int", "strategy": "channel"}}

    config = {"config_groups": {"a": group(8, "Linear"), "b": group(4, "re:.*x$"), "c": group(3, "m.x")}}
    found = Groups.of(config)
    assert [found.for_module(module).args.bits for module in ("m.x", "n.x", "n.y")] == [3, 4, 8]


def test_each_scheme_is_a_group_with_exact_targets() -> None:
    layers = range(3)
    mlp = stored("int4-g32", *(f"model.layers.{i}.mlp.{x}_proj" for i in layers for x in ("gate", "up", "down")))
    attn = stored("int8-row-sym", *(f"model.layers.{i}.self_attn.q_proj" for i in layers))
    odd = [replace(mlp[2], scheme=parse("int8-row-sym"))]
    config = FORMAT.config([*mlp[:2], *mlp[3:], *attn, *odd], ["lm_head", "vision.layers.0.mlp.up_proj"])
    found = Groups.of(json.loads(json.dumps(config)))
    for weight in (*mlp[:2], *mlp[3:], *attn, *odd):
        assert isinstance(weight.scheme, Affine)
        assert found.for_module(weight.module).args.bits == weight.scheme.bits
    assert not found.claiming("vision.layers.0.mlp.up_proj")
    assert not found.claiming("lm_head")
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    assert "Linear" not in targets
    assert r"re:.*layers\.\d+\.self_attn\.q_proj$" in targets


def test_one_scheme_targets_all_linears() -> None:
    config = FORMAT.config(stored("int4-g32-sym", P), ["lm_head", "model.layers.0.mlp.gate"])
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert config["ignore"] == ["lm_head", "model.layers.0.mlp.gate"]


def test_patterns_match_nothing_else() -> None:
    names = {f"a.{i}.b.{j}.c": 4 for i in range(2) for j in range(3)}
    ((value, targets),) = patterns(names, ["x.9.a.7.b.1.c"]).items()
    assert value == 4
    assert targets == [r"re:a\.\d+\.b\.\d+\.c$"]


# --- the plan ------------------------------------------------------------------------------------------------------

LAYER = "model.layers.0"
SHAPES = {f"{LAYER}.self_attn.{x}_proj": (512, 1024) for x in "qkvo"}
SHAPES |= {f"{LAYER}.mlp.{x}_proj": (512, 1024) for x in ("gate", "up", "down")}
EXPERTS = {f"{LAYER}.mlp.experts.{i}.{x}_proj": (512, 1024) for i in range(3) for x in ("gate", "up", "down")}


def plan_of(*rules: tuple[str, str | None], **others: Any) -> Plan:
    return Plan("test", "compressed-tensors", tuple(Rule(match, scheme) for match, scheme in rules), **others)


def test_mixed_schemes_are_one_file() -> None:
    settled = resolve(plan_of(("*.mlp.*", "int4-g128"), ("*.o_proj", None), ("*", "int8-row-sym")), SHAPES)
    assert {str(a.scheme) for a in settled.assignments.values()} == {"int4-g128", "int8-row-sym"}


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ((("*.k_proj", "int8-row-sym"), ("*", "int4-g128")), "k_proj"),
        ((("*.v_proj", None), ("*", "int4-g128")), "16 bits"),
        ((("*.up_proj", "int4-g64"), ("*", "int4-g128")), "up_proj"),
        ((("*.experts.2.*", "int8-row-sym"), ("*", "int4-g128")), "experts"),
        ((("*.experts.*.down_proj", "int8-row-sym"), ("*", "int4-g128")), "experts"),
    ],
)
def test_what_servers_fuse_needs_one_scheme(rules: Any, named: str) -> None:
    with pytest.raises(PlanError, match="together, and these need one scheme") as raised:
        resolve(plan_of(*rules), SHAPES | EXPERTS)
    assert named in raised.value.message


def test_scales_follow_the_dtype_of_the_model() -> None:
    for dtype, suffix in ((torch.bfloat16, "-bf16"), (torch.float16, ""), (torch.float32, ""), (None, "")):
        settled = resolve(plan_of(("*", "int4-g128-sym")), SHAPES, dtype=dtype)
        assert {str(a.scheme) for a in settled.assignments.values()} == {f"int4-g128-sym{suffix}"}
        assert bool(settled.notes) == bool(suffix)
        if suffix:
            assert "int4-g128-sym-bf16 instead of int4-g128-sym" in settled.notes[0]
    assert not resolve(find("gptq-4bit"), SHAPES, dtype=torch.bfloat16).notes


def test_activations_are_declared_by_the_plan() -> None:
    plan = plan_of(("*", "int8-row-sym"), activations="dynamic")
    settled = resolve(Plan.from_json(json.loads(json.dumps(plan.to_json()))), SHAPES)
    config = settled.format.config(list(settled.assignments.values()), [])
    (group,) = config["config_groups"].values()
    assert (config["format"], group["input_activations"]["dynamic"]) == ("int-quantized", True)
    assert set(settled.format.specs((N, K), parse("int8-row-sym"))) == {"weight", "weight_scale"}
    with pytest.raises(PlanError, match="int8-row-sym weights, not for int4-g128"):
        resolve(plan_of(("*", "int4-g128"), activations="dynamic"), SHAPES)
    with pytest.raises(PlanError, match="gptq files cannot declare") as raised:
        resolve(plan.changed(format="gptq"), SHAPES)
    assert "`" not in raised.value.hint  # no flag has this name
    with pytest.raises(PlanError, match="activations is 'static'"):
        Plan.from_json({**plan.to_json(), "activations": "static"})


# --- files that contradict themselves ------------------------------------------------------------------------------


def changed(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        *parents, key = path.split("/")
        inner: Any = config
        for parent in parents:
            inner = inner[parent]
        inner[key] = value

    return change


GROUP, W = "config_groups/group_0", "config_groups/group_0/weights"
CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "group key": (changed(f"{GROUP}/weight", {}), "config_groups: group_0: unknown key 'weight'"),
    "weights key": (changed(f"{W}/bits", 4), "config_groups: group_0: weights: unknown key 'bits'"),
    "activations key": (changed(f"{GROUP}/input_activations", {"bits": 8}), "input_activations: unknown key 'bits'"),
    "bits": (changed(f"{W}/num_bits", 9), "num_bits = 9"),
    "bits of text": (changed(f"{W}/num_bits", "4"), "num_bits = '4'"),
    "kind": (changed(f"{W}/type", "fp"), "type = 'fp'"),
    "kind of codes": (changed(f"{W}/type", "float"), P),
    "group size": (changed(f"{W}/group_size", 0), "group_size = 0"),
    "other group size": (changed(f"{W}/group_size", 48), f"{P}.weight_packed"),
    "strategy": (changed(f"{W}/strategy", "rows"), "strategy = 'rows'"),
    "channel": (changed(f"{W}/strategy", "channel"), f"{P}.weight_scale has 3 groups"),
    "asymmetric": (changed(f"{W}/symmetric", False), f"{P}.weight_zero_point is missing"),
    "actorder": (changed(f"{W}/actorder", "random"), "actorder = 'random'"),
    "no groups": (changed("config_groups", None), "config_groups = None"),
    "groups of text": (changed("config_groups", "W4A16"), "config_groups = 'W4A16'"),
    "group of text": (changed(GROUP, "W4A16"), "group_0"),
    "preset": (changed("config_groups/W99", ["Linear"]), "W99"),
    "no targets": (changed(f"{GROUP}/targets", []), "group_0: targets"),
    "targets of text": (changed(f"{GROUP}/targets", "Linear"), "targets"),
    "target that matches nothing": (changed(f"{GROUP}/targets", ["re:.*attention.*"]), "targets of group_0"),
    "bad pattern": (changed(f"{GROUP}/targets", ["re:("]), "re:("),
    "bad ignore": (changed("ignore", ["re:("]), "ignore: 're:('"),
    "ignore of text": (changed("ignore", "lm_head"), "ignore"),
    "rotated": (changed("transform_config", {"config_groups": {"a": 1}}), "transform_config"),
    "sparse": (changed("sparsity_config", {"format": "sparse-24-bitmask"}), "sparse-24-bitmask"),
    "two that claim": (
        lambda c: c["config_groups"].update(other={"targets": ["Linear"], "weights": {"num_bits": 8}}),
        f"{P} is in the targets of group_0 and other",
    ),
    "two alike that claim": (
        lambda c: c["config_groups"].update(other=copy.deepcopy(c["config_groups"]["group_0"])),
        f"{P} is in the targets of group_0 and other",
    ),
    "a second that matches nothing": (
        lambda c: c["config_groups"].update(other={"targets": ["re:.*router$"], "weights": {"num_bits": 8}}),
        "targets of other",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_cannot_be_is_refused(case: str) -> None:
    change, words = CONFIGS[case]
    config = copy.deepcopy(int4())
    change(config)
    tensors, _ = integers(ordinary(N, K))
    with pytest.raises(FormatError) as raised:
        opened(tensors, config)
    assert words in str(raised.value)


@pytest.mark.parametrize("shape", [[N, K + 32], [N, K - 1], [N + 1, K], [K, N], [N, 0], [-1, -1]])
def test_a_shape_that_lies_is_refused(shape: list[int]) -> None:
    tensors, _ = integers(ordinary(N, K))
    with pytest.raises(FormatError, match=rf"{re.escape(P)}\.weight_shape is"):
        opened({**tensors, "weight_shape": torch.tensor(shape)}, int4())


def test_a_shape_that_lies_of_rows_is_refused() -> None:
    tensors, _ = integers(ordinary(N, K), group=K)
    config = groups(num_bits=4, type="int", symmetric=True, strategy="channel")
    opened(tensors, config)
    with pytest.raises(FormatError, match="weight_packed is int32"):
        opened({**tensors, "weight_shape": torch.tensor([N, K + 8])}, config)


def test_codes_that_end_early_are_refused() -> None:
    tensors, _ = integers(ordinary(N, K))
    with pytest.raises(FormatError, match=rf"{re.escape(P)}\.weight_packed is int32 \[64, 11\]; \[64, 12\]"):
        opened({**tensors, "weight_packed": tensors["weight_packed"][:, :-1].contiguous()}, int4())


@pytest.mark.parametrize("targets", [["Linear"], [r"re:.*mlp\..*"], [r"re:.*experts.*", f"{LAYER}.mlp.gate"]])
def test_a_router_that_ignore_forgets_is_named(targets: list[str]) -> None:
    tensors, _ = integers(ordinary(N, K))
    config = copy.deepcopy(int4())
    config["config_groups"]["group_0"]["targets"] = targets
    experts = headers(tensors, f"{LAYER}.mlp.experts.0.up_proj")
    router = {f"{LAYER}.mlp.gate.weight": PartSpec((3, K), torch.bfloat16)}
    with pytest.raises(FormatError, match=rf"{re.escape(LAYER)}\.mlp\.gate\.weight is not quantized.*ignore") as raised:
        FORMAT.find(config, experts | router)
    assert f'Add "{LAYER}.mlp.gate" to ignore' in raised.value.hint
    for entry in (f"{LAYER}.mlp.gate", r"re:.*mlp\.gate$"):
        assert list(FORMAT.find({**config, "ignore": [entry]}, experts | router)) == [f"{LAYER}.mlp.experts.0.up_proj"]


def test_embeddings_are_no_forgotten_linears() -> None:
    tensors, _ = integers(ordinary(N, K))
    config = copy.deepcopy(int4())
    config["config_groups"]["group_0"]["targets"] = ["re:.*"]
    embedding = {"model.embed_tokens.weight": PartSpec((99, K), torch.bfloat16)}
    assert list(FORMAT.find(config, headers(tensors) | embedding)) == [P]


@pytest.mark.parametrize("others", [["FusedMoE"], ["LlamaAttention", "re:.*nothing$"]])
def test_targets_may_name_classes_that_fewbit_lacks(others: list[str]) -> None:
    tensors, values = integers(ordinary(N, K))
    config = copy.deepcopy(int4())
    config["config_groups"]["group_0"]["targets"] += others
    assert torch.equal(opened(tensors, config).dequantize(), values)


def test_a_weight_that_no_group_claims_is_named() -> None:
    tensors, _ = integers(ordinary(N, K))
    config = copy.deepcopy(int4())
    group = config["config_groups"].pop("group_0")
    other = {"num_bits": 8, "type": "int", "strategy": "channel"}
    config["config_groups"] = {
        "a": {**group, "targets": [f"{LAYER}.mlp.down_proj"]},
        "b": {"targets": [r"re:.*q_proj"], "weights": other},
    }
    with pytest.raises(FormatError, match=f"{re.escape(P)} is quantized, but no targets"):
        opened(tensors, config)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_scale_that_is_not_finite_is_named(value: float) -> None:
    tensors, _ = integers(ordinary(N, K))
    tensors["weight_scale"][1, 1] = value
    with pytest.raises(FormatError, match=rf"{re.escape(P)}\.weight_scale has NaN or Inf"):
        FORMAT.read(tensors, int4(), P)


def test_codes_beyond_their_bits_are_named() -> None:
    tensors = {"weight": torch.full((N, K), 9, dtype=torch.int8), "weight_scale": torch.ones(N, 1)}
    config = groups(num_bits=4, type="int", symmetric=True, strategy="channel")
    with pytest.raises(FormatError, match="weight has values beyond 4 bits"):
        FORMAT.read(tensors, config, P)


def of_floats(spec: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    scheme = parse(spec)
    weight = QTensor(scheme, (N, K), quantized(scheme, ordinary(N, K)))
    config = FORMAT.config([Stored(P, (N, K), scheme)], ["lm_head"])
    return FORMAT.lay_out(weight, config, P), config


FLAWS: dict[str, tuple[str, str, Callable[[Tensor], Tensor], str]] = {
    "code of NaN": ("fp8-row", "weight", lambda t: t.view(torch.uint8).fill_(0x7F).view(t.dtype), "weight has NaN"),
    "scale of NaN": ("fp8-b128", "weight_scale", lambda t: t * torch.nan, "weight_scale has NaN"),
    "scale of 0": ("fp8-tensor", "weight_scale", lambda t: t * 0, "weight_scale"),
    "negative scale": ("fp8-row", "weight_scale", lambda t: -t, "weight_scale"),
    "E8M0 of 255": ("mxfp4", "weight_scale", lambda t: t.fill_(255), r"weight_scale has NaN \(the E8M0 code 255\)"),
    "negative E4M3": ("nvfp4", "weight_scale", lambda t: (-t.float()).to(t.dtype), "weight_scale has negative"),
    "global scale of 0": ("nvfp4", "weight_global_scale", lambda t: t * 0, "weight_global_scale"),
    "global scale of NaN": ("nvfp4", "weight_global_scale", lambda t: t * torch.nan, "weight_global_scale has NaN"),
}


@pytest.mark.parametrize("case", FLAWS)
def test_numbers_that_no_weight_has_are_named(case: str) -> None:
    spec, suffix, change, words = FLAWS[case]
    tensors, config = of_floats(spec)
    tensors[suffix] = change(tensors[suffix].clone())
    with pytest.raises(FormatError, match=rf"{re.escape(P)}\.{words}"):
        FORMAT.read(tensors, config, P)


FLOAT_CONFIGS: dict[str, tuple[str, Callable[[dict[str, Any]], None], str]] = {
    "integers": ("fp8-row", changed(f"{W}/type", "int"), f"{P}.weight is float8_e4m3fn"),
    "bits": ("fp8-row", changed(f"{W}/num_bits", 4), f"{P}.weight is float8_e4m3fn"),
    "bits of FP4": ("nvfp4", changed(f"{W}/num_bits", 8), f"{P}.weight_packed is uint8"),
    "strategy": ("fp8-row", changed(f"{W}/strategy", "tensor"), f"{P}.weight_scale is float32 [64, 1]"),
    "group of NVFP4": ("nvfp4", changed(f"{W}/group_size", 32), "group_size = 32"),
    "NVFP4 as MXFP4": ("nvfp4", changed(f"{W}/strategy", "group"), "group_size = 16"),
    "MXFP4 as NVFP4": ("mxfp4", changed(f"{W}/strategy", "tensor_group"), "group_size = 32"),
}


@pytest.mark.parametrize("case", FLOAT_CONFIGS)
def test_a_config_that_does_not_fit_its_floats_is_refused(case: str) -> None:
    spec, change, words = FLOAT_CONFIGS[case]
    tensors, config = of_floats(spec)
    change(config)
    with pytest.raises(FormatError) as raised:
        FORMAT.find(config, headers(tensors))
    assert words in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fp8_scales_of_any_float_are_exact(dtype: torch.dtype) -> None:
    tensors, config = of_floats("fp8-row")
    tensors["weight_scale"] = tensors["weight_scale"].to(dtype)
    wanted = tensors["weight"].float() * tensors["weight_scale"].float()
    assert torch.equal(opened(tensors, config).dequantize(), wanted)


def test_static_scales_of_activations_are_part_of_a_weight() -> None:
    tensors, config = of_floats("fp8-tensor")
    found = FORMAT.find(config, headers({**tensors, "input_scale": torch.ones(1)}))
    assert set(found[P]) == {"weight", "weight_scale", "input_scale"}
    FORMAT.read({**tensors, "input_scale": torch.ones(1)}, config, P)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed(f"{W}/block_structure", [64, 64]), "blocks of"),
        (changed(f"{W}", {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32}), "strategy 'group'"),
    ],
)
def test_fp8_of_other_blocks_is_not_packed(change: Callable[[dict[str, Any]], None], words: str) -> None:
    tensors, config = of_floats("fp8-b128")
    assert FORMAT.why_unpacked(config, headers(tensors)) is None
    change(config)
    reason = FORMAT.why_unpacked(config, headers(tensors))
    assert reason is not None
    assert P in reason
    assert words in reason


@pytest.mark.parametrize(
    ("spec", "activations", "form", "strategy"),
    [
        ("fp8-row", None, "naive-quantized", None),
        ("fp8-row", "dynamic", "float-quantized", "token"),
        ("fp8-tensor", "dynamic", "float-quantized", "token"),
        ("fp8-b128", "dynamic", "float-quantized", "group"),
        ("mxfp4", "dynamic", "mxfp4-pack-quantized", "group"),
        ("nvfp4", None, "nvfp4-pack-quantized", None),
    ],
)
def test_layouts_of_floats(spec: str, activations: str | None, form: str, strategy: str | None) -> None:
    settled = resolve(plan_of(("*", spec), activations=activations), SHAPES, dtype=torch.bfloat16)
    config = settled.format.config(list(settled.assignments.values()), [])
    (group,) = config["config_groups"].values()
    acts = group["input_activations"]
    assert (config["format"], acts and acts["strategy"]) == (form, strategy)
    assert ["servers may round activations too" in note for note in settled.notes] == [True] * bool(activations)


def test_nvfp4_activations_need_a_method_that_measures() -> None:
    rule = Rule("*", "nvfp4", "imatrix")
    measured = resolve(Plan("test", "compressed-tensors", (rule,), activations="dynamic"), SHAPES)
    assert len(measured.notes) == 1
    config = measured.format.config(list(measured.assignments.values()), [])
    (group,) = config["config_groups"].values()
    assert (group["input_activations"]["dynamic"], group["input_activations"]["group_size"]) == ("local", 16)
    assert "input_global_scale" in measured.format.specs((N, K), parse("nvfp4"))
    (scale,) = measured.format.scales_of_inputs(parse("nvfp4"), 3.0).values()
    assert scale.tolist() == [448 * 6 / 3]
    blind = resolve(plan_of(("*", "nvfp4"), activations="dynamic"), SHAPES)
    assert "activations stay in 16 bits" in blind.notes[0]
    assert len(blind.notes) == 1
    assert blind.plan.activations is None
    config = blind.format.config(list(blind.assignments.values()), [])
    assert config["config_groups"]["group_0"]["input_activations"] is None
    assert "use nvfp4" in str(FORMAT.why_not((N, K), parse("nvfp4-mul")))


def test_a_scheme_fits_what_was_packed() -> None:
    """The canonical codes are those of the file, so no other rounding lies between."""
    scheme = parse("int3-g32-bf16")
    weight = QTensor(scheme, (N, K), quantized(scheme, ordinary(N, K)))
    config = FORMAT.config([Stored(P, (N, K), scheme)], [])
    assert FORMAT.lay_out(weight, config)["weight_scale"].dtype == torch.bfloat16
