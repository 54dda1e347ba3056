"""What every format keeps: a weight comes back byte for byte, and a file that lies is refused by the tensor's name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbit.errors import FormatError
from fewbit.formats.base import Format, Stored, storing
from fewbit.schemes.base import PartSpec, QTensor, parse
from tests.contract.cases import FORMATS, SPECS, hard, is_sentence, ordinary, quantized, same_bytes

MODULE = "model.layers.0.self_attn.q_proj"


def shape_of(spec: str) -> tuple[int, int]:
    """A shape of several groups that packs by 32."""
    group = parse(spec).group or 96
    return 64, next(k for k in range(2 * group, 8 * group, group) if k % 32 == 0 and k > group)


STORABLE = [
    pytest.param(name, spec, id=f"{name}-{spec}")
    for name, format in FORMATS.items()
    for spec in SPECS
    if format.why_not(shape_of(spec), parse(spec)) is None
]
REFUSED = [
    pytest.param(name, spec, id=f"{name}-{spec}")
    for name, format in FORMATS.items()
    for spec in SPECS
    if format.why_not(shape_of(spec), parse(spec)) is not None
]
# One scheme of each format and kind is enough for what depends on the layout alone.
ONES = (
    "int4-g32",
    "int4-g32-sym",
    "int3-g128",
    "int5-g64",
    "int8-row-sym",
    "int4-g128-sym-bf16",
    "nf4-b64",
    "nf4-b64-dq",
    "fp4-b64",
    "fp8-row",
    "fp8-tensor",
    "fp8-b128",
    "mxfp4",
    "nvfp4",
    "llm.int8",
)
FEW = [case for case in STORABLE if case.values[1] in ONES]
# Numbers of rows that no group, word or block divides, where the format takes them.
RAGGED = [
    pytest.param(name, spec, rows, id=f"{name}-{spec}-{rows}")
    for name, format in FORMATS.items()
    for spec in ONES
    for rows in (1, 3, 33)
    if format.why_not((rows, shape_of(spec)[1]), parse(spec)) is None
]
storable = pytest.mark.parametrize(("name", "spec"), STORABLE)
few = pytest.mark.parametrize(("name", "spec"), FEW)


@pytest.mark.parametrize("spec", SPECS)
def test_storing_names_the_formats_that_store_a_scheme(spec: str) -> None:
    assert storing(parse(spec)) == [case.values[0] for case in STORABLE if case.values[1] == spec]


def weight_of(spec: str, shape: tuple[int, int] | None = None) -> QTensor:
    scheme, shape = parse(spec), shape or shape_of(spec)
    return QTensor(scheme, shape, quantized(scheme, ordinary(*shape)))


def config_of(format: Format, weight: QTensor) -> dict[str, Any]:
    assert isinstance(weight.codec, type(parse(str(weight.codec))))
    return format.config([Stored(MODULE, weight.shape, parse(str(weight.codec)))], ["lm_head"])


def specs_of(tensors: Mapping[str, Tensor], module: str = MODULE) -> dict[str, PartSpec]:
    return {f"{module}.{suffix}": PartSpec(tuple(t.shape), t.dtype) for suffix, t in tensors.items()}


def told(format: Format, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {suffix: tensors[suffix] for suffix in format.metadata_suffixes if suffix in tensors}


def looked_at(
    format: Format, specs: Mapping[str, PartSpec], config: Mapping[str, Any], told: dict[str, Tensor]
) -> str | tuple[int, int]:
    """What headers and small tensors tell before any data is read: the weight's shape, or why it is refused."""
    try:
        found = format.find(config, specs)
        return format.describe(found[MODULE], config, MODULE, told)[1]
    except FormatError as error:
        return str(error)


def opened(format: Format, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> QTensor:
    """The weight as a loader gets it: found by its headers, then read."""
    found = format.find(config, specs_of(tensors))
    return format.read({suffix: tensors[suffix] for suffix in found[MODULE]}, config, MODULE)


def check_round_trip(format: Format, spec: str, shape: tuple[int, int] | None = None) -> None:
    """What is laid out is as `specs` says, is found and described by headers alone, and is read back byte for byte."""
    weight = weight_of(spec, shape)
    before = {name: part.clone() for name, part in weight.parts.items()}
    config = config_of(format, weight)
    tensors = format.lay_out(weight, config)
    scheme = parse(spec)
    assert specs_of(tensors, "m") == {f"m.{suffix}": s for suffix, s in format.specs(weight.shape, scheme).items()}
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert config["quant_method"] == format.quant_method
    found = format.find(config, specs_of(tensors) | {"lm_head.weight": PartSpec((8, 8), torch.float16)})
    assert list(found) == [MODULE]
    assert {f"{MODULE}.{suffix}": s for suffix, s in found[MODULE].items()} == specs_of(tensors)
    assert format.describe(found[MODULE], config, MODULE, told(format, tensors)) == (scheme, weight.shape)
    again = opened(format, tensors, config)
    assert again.codec == scheme
    assert again.shape == weight.shape
    assert again.permutation is None
    assert same_bytes(again.parts, weight.parts)
    assert same_bytes(before, weight.parts)


@storable
def test_round_trip(name: str, spec: str) -> None:
    check_round_trip(FORMATS[name], spec)


@pytest.mark.parametrize(("name", "spec", "rows"), RAGGED)
def test_any_number_of_rows_comes_back(name: str, spec: str, rows: int) -> None:
    check_round_trip(FORMATS[name], spec, (rows, shape_of(spec)[1]))


@storable
def test_hard_weights_come_back(name: str, spec: str) -> None:
    scheme, shape = parse(spec), shape_of(spec)
    weight = QTensor(scheme, shape, quantized(scheme, hard(*shape)))
    again = opened(
        FORMATS[name], FORMATS[name].lay_out(weight, config_of(FORMATS[name], weight)), config_of(FORMATS[name], weight)
    )
    assert torch.equal(again.dequantize(), weight.dequantize())


@few
def test_a_permuted_weight_comes_back_or_is_refused(name: str, spec: str) -> None:
    weight = weight_of(spec)
    weight = replace(weight, permutation=torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0)))
    try:
        tensors = FORMATS[name].lay_out(weight, config_of(FORMATS[name], weight))
    except FormatError:
        assert name != "gptq"  # which has a place for the order
        return
    again = opened(FORMATS[name], tensors, config_of(FORMATS[name], weight))
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert not torch.equal(again.dequantize(), weight_of(spec).dequantize())


@few
def test_a_missing_tensor_is_named_or_was_not_needed(name: str, spec: str) -> None:
    format, weight = FORMATS[name], weight_of(spec)
    config = config_of(format, weight)
    tensors = format.lay_out(weight, config)
    sound = specs_of(tensors, "model.layers.1.mlp.up_proj")
    for suffix in tensors:
        rest = {key: tensor for key, tensor in tensors.items() if key != suffix}
        refusal, found = None, {}
        try:
            found = format.find(config, sound | specs_of(rest))
        except FormatError as error:
            refusal = str(error)
        if refusal is not None:
            assert f"{MODULE}.{suffix}" in refusal
        else:
            assert MODULE in found, f"without {suffix}, what is left of the weight is passed over in silence"
            assert torch.equal(opened(format, rest, config).dequantize(), weight.dequantize())


@few
def test_a_wrong_shape_is_named(name: str, spec: str) -> None:
    format, weight = FORMATS[name], weight_of(spec)
    config = config_of(format, weight)
    tensors = format.lay_out(weight, config)
    for suffix, tensor in tensors.items():
        shape = tuple(tensor.shape)
        wrong = [(*shape[:i], size, *shape[i + 1 :]) for i in range(len(shape)) for size in (0, shape[i] + 1, 2)]
        if suffix in format.metadata_suffixes:  # a text may have any length
            wrong = [(0,)]
        lies = {*wrong, (), (*shape, 1)} - {shape}
        if tensor.numel() == 1:  # one number may have any shape
            lies = {lie for lie in lies if prod(lie) != 1}
        for lie in lies:
            lying = specs_of(tensors) | {f"{MODULE}.{suffix}": PartSpec(lie, tensor.dtype)}
            told_shape = looked_at(format, lying, config, told(format, tensors))
            # Where a tensor alone has the columns of the weight, the model will know how many there should be.
            alone = told_shape == lie or (len(tensors) == 1 and told_shape != weight.shape)
            assert alone or MODULE in told_shape


@few
def test_a_wrong_dtype_is_named(name: str, spec: str) -> None:
    format, weight = FORMATS[name], weight_of(spec)
    config = config_of(format, weight)
    tensors = format.lay_out(weight, config)
    for suffix, tensor in tensors.items():
        lie = torch.int64 if tensor.dtype.is_floating_point else torch.float16
        lying = specs_of(tensors) | {f"{MODULE}.{suffix}": PartSpec(tuple(tensor.shape), lie)}
        assert f"{MODULE}.{suffix}" in looked_at(format, lying, config, told(format, tensors))


@few
def test_scales_that_are_not_finite_are_named(name: str, spec: str) -> None:
    format, weight = FORMATS[name], weight_of(spec)
    config = config_of(format, weight)
    tensors = format.lay_out(weight, config)
    for suffix, tensor in tensors.items():
        if tensor.dtype.is_floating_point:
            wrong = tensor.clone()
            wrong.view(-1)[-1] = torch.nan
            with pytest.raises(FormatError, match=f"{MODULE}.{suffix}".replace(".", r"\.")):
                format.read(tensors | {suffix: wrong}, config, MODULE)


# Formats that keep the weights of all experts of a layer in one tensor, with a scheme of theirs.
FUSED = [("mxfp4", "mxfp4")]


def test_every_format_with_fused_weights_is_tested() -> None:
    assert [name for name, _ in FUSED] == [n for n, f in FORMATS.items() if type(f).find_fused is not Format.find_fused]


@pytest.mark.parametrize(("name", "spec"), FUSED)
def test_a_weight_of_an_expert_comes_back(name: str, spec: str) -> None:
    format, parameter = FORMATS[name], "model.layers.0.mlp.experts.down_proj"
    config = {"quant_method": format.quant_method}
    weights = [weight_of(spec), QTensor(parse(spec), shape_of(spec), quantized(parse(spec), hard(*shape_of(spec))))]
    each = [format.lay_out(weight, config) for weight in weights]
    specs = format.specs(shape_of(spec), parse(spec))
    assert all(PartSpec.of(tensors[ending]) == spec for tensors in each for ending, spec in specs.items())
    fused = {f"{parameter}{ending}": torch.stack([tensors[ending] for tensors in each]) for ending in each[0]}
    headers = {key: PartSpec.of(tensor) for key, tensor in fused.items()}
    assert format.find(config, headers) == {}
    found = format.find_fused(config, headers)
    assert {f"{parameter}{ending}": spec for ending, spec in found[parameter].items()} == headers
    assert format.describe_fused(found[parameter], config, parameter) == (2, parse(spec), shape_of(spec))
    for expert, weight in enumerate(weights):
        own = {ending: fused[f"{parameter}{ending}"][expert] for ending in found[parameter]}
        assert same_bytes(format.read(own, config, parameter).parts, weight.parts)
    for key, header in headers.items():
        for lie in (None, PartSpec(header.shape, torch.float16), *_reshaped(header)):
            lying = {name: lie if name == key else spec for name, spec in headers.items()}
            with pytest.raises(FormatError, match=parameter):
                format.find_fused(config, {name: spec for name, spec in lying.items() if spec is not None})


def _reshaped(spec: PartSpec) -> list[PartSpec]:
    shapes = [(*spec.shape[:i], 0, *spec.shape[i + 1 :]) for i in range(len(spec.shape))]
    return [PartSpec(shape, spec.dtype) for shape in (*shapes, (), (*spec.shape, 1))]


@pytest.mark.parametrize("name", FORMATS)
def test_a_config_without_weights_is_refused(name: str) -> None:
    format = FORMATS[name]
    config: dict[str, Any] = {"quant_method": format.quant_method}
    if not format.read_only:
        spec = next(case.values[1] for case in STORABLE if case.values[0] == name)
        assert isinstance(spec, str)
        config = config_of(format, weight_of(spec))
    with pytest.raises(FormatError):
        format.find(config, {"lm_head.weight": PartSpec((8, 8), torch.float16)})


@pytest.mark.parametrize(("name", "spec"), REFUSED)
def test_what_cannot_be_stored_is_refused_in_words(name: str, spec: str) -> None:
    assert is_sentence(FORMATS[name].why_not(shape_of(spec), parse(spec)))


@few
def test_shapes_are_refused_in_words(name: str, spec: str) -> None:
    n, k = shape_of(spec)
    for shape in ((n, k + 5), (n, 1)):
        reason = FORMATS[name].why_not(shape, parse(spec))
        if reason is None:
            check_round_trip(FORMATS[name], spec, shape)
        else:
            assert is_sentence(reason)


@few
def test_a_file_of_equal_weights_is_allowed(name: str, spec: str) -> None:
    one = Stored(MODULE, shape_of(spec), parse(spec))
    assert FORMATS[name].why_not_together([one, replace(one, module="other")]) is None
    other = replace(one, scheme=parse("int2-g16"))  # whether or not this format can hold it
    reason = FORMATS[name].why_not_together([one, other])
    assert reason is None or (is_sentence(reason) and spec in reason and "int2-g16" in reason)


# --- what only a GPTQ file can get wrong ---------------------------------------------------------------------------


@contextmanager
def little_memory() -> Iterator[None]:
    """At most 2 GiB more of address space than now, as far as this system can be told."""
    resource = pytest.importorskip("resource")
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("address space can be limited on Linux only")
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(statm.read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (2 << 30), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def gptq() -> tuple[Format, dict[str, Tensor], dict[str, Any]]:
    format, weight = FORMATS["gptq"], weight_of("int4-g32")
    config = config_of(format, weight)
    return format, format.lay_out(weight, config), config


@pytest.mark.parametrize(
    ("key", "lie", "told"),
    [
        ("bits", 5, "bits = 5"),
        ("bits", "4", "bits = '4'"),
        ("bits", None, "bits = None"),
        ("bits", [4], "bits"),
        ("bits", 8, MODULE),
        ("group_size", 64, f"{MODULE}.scales"),
        ("group_size", -1, f"{MODULE}.scales"),
        ("group_size", -5, "group_size"),
        ("group_size", "many", "group_size"),
        ("group_size", [32], "group_size"),
        ("checkpoint_format", "marlin", "'marlin'"),
        ("checkpoint_format", 3, "3"),
        ("pack_dtype", "int64", "int64"),
    ],
)
def test_a_gptq_config_that_cannot_be_is_refused(key: str, lie: object, told: str) -> None:
    format, tensors, config = gptq()
    with pytest.raises(FormatError) as raised:
        format.find(config | {key: lie}, specs_of(tensors))
    assert told in str(raised.value)


@pytest.mark.parametrize("group", [-1, 2, 1000, 2**31 - 1, -(2**31)], ids=str)
def test_a_g_idx_out_of_range_is_refused_at_no_great_cost(group: int) -> None:
    format, tensors, config = gptq()
    tensors["g_idx"][5] = group
    with little_memory(), pytest.raises(FormatError, match=r"q_proj\.g_idx"):
        format.read(tensors, config, MODULE)


def test_an_unbalanced_g_idx_is_refused() -> None:
    format, tensors, config = gptq()
    tensors["g_idx"][0] = 1
    with pytest.raises(FormatError, match=r"q_proj\.g_idx"):
        format.read(tensors, config, MODULE)


def test_zeros_that_do_not_fill_their_words_are_refused() -> None:
    """20 zero points of 4 bits take 80 bits: two words of 32 hold only 16 of them."""
    format, _, config = gptq()
    shapes = {"qweight": (8, 20), "qzeros": (2, 2), "scales": (2, 20)}
    dtypes = {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16}
    with pytest.raises(FormatError, match=MODULE.replace(".", r"\.")):
        format.find(config, {f"{MODULE}.{s}": PartSpec(shape, dtypes[s]) for s, shape in shapes.items()})
