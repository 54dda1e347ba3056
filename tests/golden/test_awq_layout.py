"""The AWQ file layouts, byte for byte, against their definition written out once more in plain loops.

The definition is the packing code of AutoAWQ 0.2 (`WQLinear_GEMM.from_linear`, `WQLinear_GEMV.from_linear`,
`calculate_zeros_width`), which `tests/interop/test_autoawq.py` runs where `make interop` has installed it.

    for col in range(N // 8):
        order_map = [0, 2, 4, 6, 1, 3, 5, 7]                    # gemm; in gemv 0 to 7
        for i in range(8):
            qweight[:, col] |= intweight[:, col * 8 + order_map[i]] << (i * 4)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fewbit.errors import FormatError
from fewbit.formats.awq import AWQFormat
from fewbit.formats.base import Stored
from fewbit.formats.gptq import GPTQFormat
from fewbit.schemes.affine import Affine, AffineGrids
from fewbit.schemes.base import QTensor, parse

Array = npt.NDArray[Any]
N, K = 32, 384
ORDER = {"gemm": [0, 2, 4, 6, 1, 3, 5, 7], "gemv": [0, 1, 2, 3, 4, 5, 6, 7]}


def packed(values: Array, version: str) -> Array:
    """Rows of values as rows of words, as the loops of the field fill them."""
    words = np.zeros((values.shape[0], -(-values.shape[1] // 8)), np.int64)
    for col in range(words.shape[1]):
        for i in range(8):
            if col * 8 + ORDER[version][i] < values.shape[1]:
                words[:, col] |= values[:, col * 8 + ORDER[version][i]] << (i * 4)
    return words.astype(np.uint32).view(np.int32)


def zeros_width(group: int) -> int:
    multiple = {32: 4, 64: 2}.get(group, 1)
    words = (K // group + 7) // 8
    return (words + multiple - 1) // multiple * multiple


def file_of(codes: Array, zeros: Array, scales: Array, group: int, version: str) -> dict[str, torch.Tensor]:
    """Tensors for codes [N, K], zeros [N, groups] and scales [N, groups]."""
    if version == "gemm":
        parts = packed(codes.T, version), packed(zeros.T, version), scales.T
    else:
        width = zeros_width(group)
        wide = np.zeros((N, width), np.int32)
        wide[:, : -(-(K // group) // 8)] = packed(zeros, version)
        padded = np.zeros((N, width * 8), np.float16)
        padded[:, : K // group] = scales
        parts = packed(codes, version), wide, padded
    return {name: torch.tensor(part.copy()) for name, part in zip(("qweight", "qzeros", "scales"), parts, strict=True)}


def numbers(group: int) -> tuple[Array, Array, Array]:
    """Codes [N, K], zeros [N, groups] with 0 and 15 among them, and scales [N, groups]."""
    random = np.random.default_rng(group)
    zeros = random.integers(0, 16, (N, K // group))
    zeros[0, 0], zeros[1, 0] = 0, 15
    return random.integers(0, 16, (N, K)), zeros, random.uniform(-1, 1, (N, K // group)).astype(np.float16)


def meant(codes: Array, zeros: Array, scales: Array, group: int) -> torch.Tensor:
    """scale * (code - zero) for each weight, [N, K]."""
    w = np.empty((N, K), np.float32)
    for n in range(N):
        for k in range(K):
            w[n, k] = np.float32(scales[n, k // group]) * np.float32(codes[n, k] - zeros[n, k // group])
    return torch.tensor(w)


def weight_of(codes: Array, zeros: Array, scales: Array, scheme: Affine) -> QTensor:
    grids = AffineGrids(4, scheme.group or K, torch.tensor(scales).float(), torch.tensor(zeros).float())
    return QTensor(scheme, (N, K), scheme.pack(torch.tensor(codes, dtype=torch.uint8), grids))


def config_of(scheme: Affine, version: str = "gemm") -> dict[str, Any]:
    return AWQFormat().config([Stored("m", (N, K), scheme)], []) | {"version": version}


def check_written(group: int, symmetric: bool, version: str) -> None:
    """What is laid out is the definition's bytes."""
    codes, zeros, scales = numbers(group)
    if symmetric:
        zeros[:] = 8
    scheme = Affine(group=0 if group == K else group, bits=4, symmetric=symmetric)
    written = AWQFormat().lay_out(weight_of(codes, zeros, scales, scheme), config_of(scheme, version))
    expected = file_of(codes, zeros, scales, group, version)
    assert set(written) == set(expected)
    for suffix, tensor in expected.items():
        assert written[suffix].dtype == tensor.dtype, suffix
        assert torch.equal(written[suffix], tensor), suffix


def check_read(group: int, version: str) -> None:
    """What is read means scale * (code - zero), with every zero point from 0 to 15, whatever the config is called."""
    codes, zeros, scales = numbers(group)
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": version.upper()}
    tensors = file_of(codes, zeros, scales, group, version)
    weight = AWQFormat().read(tensors, config, "m")
    assert torch.equal(weight.dequantize(), meant(codes, zeros, scales, group))
    again = AWQFormat().lay_out(weight, config)
    assert all(torch.equal(again[suffix], tensor) for suffix, tensor in tensors.items())


versions = pytest.mark.parametrize("version", ["gemm", "gemv"])
groups = pytest.mark.parametrize("group", [32, 64, 128, K])


def test_the_definition_is_this_one() -> None:
    """Worked by hand, lest both loops share a mistake."""
    eight = np.array([[0, 1, 2, 3, 4, 5, 6, 7]])
    assert packed(eight, "gemm").view(np.uint32).tolist() == [[0x75316420]]
    assert packed(eight, "gemv").view(np.uint32).tolist() == [[0x76543210]]


@groups
@versions
@pytest.mark.parametrize("symmetric", [True, False])
def test_written(group: int, symmetric: bool, version: str) -> None:
    check_written(group, symmetric, version)


@groups
@versions
def test_read(group: int, version: str) -> None:
    check_read(group, version)


@pytest.mark.parametrize("spec", ["int4-g32", "int4-g128", "int4-g128-sym", "int4-row"])
def test_gptq_and_awq_hold_the_same_weight(spec: str) -> None:
    """Each reads back from its own layout the parts that the other does: files convert exactly."""
    scheme = parse(spec)
    assert isinstance(scheme, Affine)
    codes, zeros, scales = numbers(scheme.group or K)
    weight = weight_of(codes, zeros, scales, scheme)
    if scheme.symmetric:
        weight = weight_of(codes, zeros * 0 + 8, scales, scheme)
    for first, second in ((GPTQFormat(), AWQFormat()), (AWQFormat(), GPTQFormat())):
        passed = weight
        for format in (first, second):
            config = format.config([Stored("m", (N, K), scheme)], [])
            passed = format.read(format.lay_out(passed, config), config, "m")
        assert passed.codec == scheme
        assert all(torch.equal(passed.parts[name], part) for name, part in weight.parts.items())


def test_a_file_that_claims_to_be_symmetric_is_read_as_it_is() -> None:
    """transformers writes `sym: true` into every AWQ config that does not say otherwise."""
    codes, zeros, scales = numbers(64)
    config = {"bits": 4, "group_size": 64, "sym": True}
    weight = AWQFormat().read(file_of(codes, zeros, scales, 64, "gemm"), config, "m")
    assert str(weight.codec) == "int4-g64"
    assert torch.equal(weight.dequantize(), meant(codes, zeros, scales, 64))


@pytest.mark.parametrize(
    ("key", "lie", "told"),
    [
        ("bits", 3, "bits = 3"),
        ("bits", "4", "bits = '4'"),
        ("version", "marlin", "'marlin'"),
        ("version", 3, "3"),
        ("group_size", 64, "m.qzeros"),
        ("group_size", 256, "m.qweight"),
        ("group_size", 0, "group_size = 0"),
        ("group_size", True, "group_size"),
        ("group_size", [32], "group_size"),
        ("version", "gemv", "m."),
    ],
)
def test_a_config_that_cannot_be_is_refused(key: str, lie: object, told: str) -> None:
    scheme = Affine(group=128, bits=4, symmetric=False)
    format, config = AWQFormat(), config_of(scheme)
    specs = {f"m.{suffix}": spec for suffix, spec in format.specs((N, K), scheme).items()}
    assert list(format.find(config, specs)) == ["m"]
    with pytest.raises(FormatError) as raised:
        format.find(config | {key: lie}, specs)
    assert told in str(raised.value)


def test_columns_in_another_order_are_refused() -> None:
    scheme = Affine(group=128, bits=4, symmetric=False)
    weight = weight_of(*numbers(128), scheme)
    weight.permutation = torch.arange(K).flip(0)
    with pytest.raises(FormatError, match="act-order"):
        AWQFormat().lay_out(weight, config_of(scheme))
