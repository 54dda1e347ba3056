"""The GPTQ file layout, byte for byte, against its definition written out once more in plain loops.

The definition is the packing and unpacking code of AutoGPTQ (`qlinear_cuda_old.py`, commit 179776b) and, alike,
gptqmodel's. gptqmodel cannot be installed beside this torch, so the layout is tested from that definition and not
against the package. In AutoGPTQ a zero point of 0 becomes -1 and so spills over its whole word; what later packers
write, and all unpackers can read, is (zero - 1) modulo 2^bits.

qweight  int32 [K bits / 32, N], down each column. 2, 4 and 8 bits: word i holds codes i 32/bits onwards, lowest bits
         first. 3 bits: 32 codes in three words; code 10 has its low two bits at the top of the first word and its high
         bit at the bottom of the second, code 21 its low bit at the top of the second and its high two bits at the
         bottom of the third.
qzeros   int32 [groups, N bits / 32], the same along each row, of zero - 1 ("gptq") or of zero ("gptq_v2").
scales   float16 [groups, N].  g_idx int32 [K], the group of each column.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fewbit.formats.base import Stored
from fewbit.formats.gptq import GPTQFormat
from fewbit.schemes.affine import Affine, AffineGrids
from fewbit.schemes.base import QTensor, parse

Array = npt.NDArray[Any]
N, K = 32, 96
CONFIG: dict[str, Any] = {"quant_method": "gptq", "desc_act": False}


def packed(values: list[int], bits: int) -> list[int]:
    """Signed 32-bit words that hold `values`, as the packing loops of the field fill them."""
    words: list[int] = []
    if bits == 3:
        for i in range(0, len(values), 32):
            v = values[i : i + 32]
            first = sum(v[j] << (3 * j) for j in range(10)) | (v[10] & 3) << 30
            second = v[10] >> 2 | sum(v[11 + j] << (3 * j + 1) for j in range(10)) | (v[21] & 1) << 31
            third = v[21] >> 1 | sum(v[22 + j] << (3 * j + 2) for j in range(10))
            words += [first, second, third]
    else:
        per = 32 // bits
        for i in range(0, len(values), per):
            words.append(sum(values[i + j] << (bits * j) for j in range(per)))
    return [word - 2**32 if word >= 2**31 else word for word in words]


def unpacked(words: list[int], bits: int) -> list[int]:
    """The values that signed 32-bit words hold, as the unpacking code of the field reads them."""
    values: list[int] = []
    if bits == 3:
        for i in range(0, len(words), 3):
            a, b, c = (word % 2**32 for word in words[i : i + 3])
            values += [a >> (3 * j) & 7 for j in range(10)] + [a >> 30 & 3 | (b & 1) << 2]
            values += [b >> (3 * j + 1) & 7 for j in range(10)] + [b >> 31 & 1 | (c & 3) << 1]
            values += [c >> (3 * j + 2) & 7 for j in range(10)]
    else:
        for word in words:
            values += [word % 2**32 >> shift & (2**bits - 1) for shift in range(0, 32, bits)]
    return values


def file_of(codes: Array, zeros: Array, scales: Array, bits: int, *, v1: bool) -> dict[str, torch.Tensor]:
    """Tensors for codes [N, K], zeros [groups, N] and scales [groups, N]."""
    stored = (zeros - 1) % 2**bits if v1 else zeros
    return {
        "qweight": torch.tensor([packed(row, bits) for row in codes.tolist()], dtype=torch.int32).T.contiguous(),
        "qzeros": torch.tensor([packed(row, bits) for row in stored.tolist()], dtype=torch.int32),
        "scales": torch.tensor(scales, dtype=torch.float16),
    }


def numbers(bits: int, group: int) -> tuple[Array, Array, Array]:
    """Codes [N, K], zeros [groups, N] with 0 and the largest among them, and scales [groups, N]."""
    random = np.random.default_rng(bits)
    groups = K // group if group else 1
    zeros = random.integers(0, 2**bits, (groups, N))
    zeros[0, :4] = 0, 2**bits - 1, 0, 1
    return random.integers(0, 2**bits, (N, K)), zeros, random.uniform(-1, 1, (groups, N)).astype(np.float16)


def meant(codes: Array, zeros: Array, scales: Array, group_of: Array) -> Array:
    """scale * (code - zero) for each weight, [N, K]."""
    w = np.empty((N, K), np.float32)
    for n in range(N):
        for k in range(K):
            g = group_of[k]
            w[n, k] = np.float32(scales[g, n]) * np.float32(codes[n, k] - zeros[g, n])
    return w


def weight_of(codes: Array, zeros: Array, scales: Array, scheme: Affine) -> QTensor:
    grids = AffineGrids(
        scheme.bits, scheme.group or K, torch.tensor(scales.T).float(), torch.tensor(zeros.T, dtype=torch.float32)
    )
    return QTensor(scheme, (N, K), scheme.pack(torch.tensor(codes, dtype=torch.uint8), grids))


def config_for(scheme: Affine) -> dict[str, Any]:
    """What the format itself says of a file with one weight of this scheme."""
    return GPTQFormat().config([Stored("m", (N, K), scheme)], [])


def check_written(bits: int, group: int, symmetric: bool) -> None:
    """What is laid out is the definition's bytes: v1 where symmetric, v2 where not, as the config says."""
    codes, zeros, scales = numbers(bits, group)
    if symmetric:
        zeros[:] = 2 ** (bits - 1)
    scheme = parse(f"int{bits}-{f'g{group}' if group else 'row'}{'-sym' if symmetric else ''}")
    assert isinstance(scheme, Affine)
    weight = weight_of(codes, zeros, scales, scheme)
    written = GPTQFormat().lay_out(weight, config_for(scheme))
    expected = file_of(codes, zeros, scales, bits, v1=symmetric)
    expected["g_idx"] = torch.tensor([k // (group or K) for k in range(K)], dtype=torch.int32)
    assert set(written) == set(expected)
    for suffix, tensor in expected.items():
        assert written[suffix].dtype == tensor.dtype, suffix
        assert torch.equal(written[suffix], tensor), suffix
    config = GPTQFormat().config([Stored("m", (N, K), scheme)], [])
    assert config["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")
    assert (config["bits"], config["group_size"], config["sym"]) == (bits, group or -1, symmetric)


def check_read(bits: int, group: int, v1: bool) -> None:
    """What is read means scale * (code - zero), with every zero point from 0 to 2^bits - 1."""
    codes, zeros, scales = numbers(bits, group)
    config = CONFIG | {"bits": bits, "group_size": group or -1, "sym": False}
    config["checkpoint_format"] = "gptq" if v1 else "gptq_v2"
    weight = GPTQFormat().read(file_of(codes, zeros, scales, bits, v1=v1), config, "m")
    group_of = np.arange(K) // (group or K)
    assert torch.equal(weight.dequantize(), torch.tensor(meant(codes, zeros, scales, group_of)))


layouts = pytest.mark.parametrize("bits", [2, 3, 4, 8])
groups = pytest.mark.parametrize("group", [16, 32, 0])


@layouts
def test_the_definition_agrees_with_itself(bits: int) -> None:
    codes, _, _ = numbers(bits, 0)
    assert all(unpacked(packed(row, bits), bits) == row for row in codes.tolist())


def test_the_definition_is_this_one() -> None:
    """Worked by hand, lest both loops share a mistake."""
    assert packed([1, 2, 3, 4, 5, 6, 7, 8], 4) == [-2023406815]  # 0x87654321
    assert packed([1, 0, 2, 255], 8) == [-16646143]  # 0xff020001
    only = [[0] * j + [7] + [0] * (31 - j) for j in (0, 10, 11, 21, 22, 31)]
    words = [[word % 2**32 for word in packed(values, 3)] for values in only]
    assert words[0] == [7, 0, 0]
    assert words[1] == [3 << 30, 1, 0]
    assert words[2] == [0, 7 << 1, 0]
    assert words[3] == [0, 1 << 31, 3]
    assert words[4] == [0, 0, 7 << 2]
    assert words[5] == [0, 0, 7 << 29]


@layouts
@groups
@pytest.mark.parametrize("symmetric", [True, False])
def test_written(bits: int, group: int, symmetric: bool) -> None:
    check_written(bits, group, symmetric)


@layouts
@groups
@pytest.mark.parametrize("v1", [True, False])
def test_read(bits: int, group: int, v1: bool) -> None:
    check_read(bits, group, v1)


@layouts
def test_the_field_reads_what_is_written(bits: int) -> None:
    codes, zeros, scales = numbers(bits, 16)
    scheme = Affine(group=16, bits=bits, symmetric=False)
    written = GPTQFormat().lay_out(weight_of(codes, zeros, scales, scheme), config_for(scheme))
    assert [unpacked(column, bits) for column in written["qweight"].T.tolist()] == codes.tolist()
    assert [unpacked(row, bits) for row in written["qzeros"].tolist()] == zeros.tolist()


@layouts
def test_act_order_is_read_by_g_idx(bits: int) -> None:
    codes, zeros, scales = numbers(bits, 16)
    group_of = np.random.default_rng(0).permutation(np.arange(K) // 16)
    tensors = file_of(codes, zeros, scales, bits, v1=True) | {"g_idx": torch.tensor(group_of, dtype=torch.int32)}
    config = CONFIG | {"bits": bits, "group_size": 16, "desc_act": True}
    weight = GPTQFormat().read(tensors, config, "m")
    assert weight.permutation is not None
    assert torch.equal(weight.dequantize(), torch.tensor(meant(codes, zeros, scales, group_of)))
    again = GPTQFormat().lay_out(weight, config)
    assert torch.equal(again["qweight"], tensors["qweight"])
    assert torch.equal(again["g_idx"], tensors["g_idx"])
    assert torch.equal(again["scales"], tensors["scales"])


@layouts
def test_a_file_is_symmetric_by_its_zeros_not_by_its_claim(bits: int) -> None:
    codes, zeros, scales = numbers(bits, 16)
    config = CONFIG | {"bits": bits, "group_size": 16, "sym": True}
    codec = GPTQFormat().read(file_of(codes, zeros * 0 + 2 ** (bits - 1), scales, bits, v1=True), config, "m").codec
    assert str(codec) == f"int{bits}-g16-sym"
    weight = GPTQFormat().read(file_of(codes, zeros, scales, bits, v1=True), config, "m")
    assert str(weight.codec) == f"int{bits}-g16"
    assert torch.equal(weight.dequantize(), torch.tensor(meant(codes, zeros, scales, np.arange(K) // 16)))


def test_without_a_format_a_file_is_v1() -> None:
    codes, zeros, scales = numbers(4, 32)
    config = CONFIG | {"bits": 4, "group_size": 32, "sym": False}
    weight = GPTQFormat().read(file_of(codes, zeros, scales, 4, v1=True), config, "m")
    assert torch.equal(weight.dequantize(), torch.tensor(meant(codes, zeros, scales, np.arange(K) // 32)))
