"""Packing of 1- to 8-bit codes into one little-endian bit stream per row.

Code j of a row takes the bits j*bits to (j+1)*bits - 1, counted from the lowest bit of the row's first byte. For every
width, 3 included, a GPTQ file holds the same stream, read as little-endian 32-bit words.

>>> codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8)
>>> pack(codes, 3).tolist()           # 0b11010001, 0b01011000, 0b00011111
[[209, 88, 31]]
>>> unpack(pack(codes, 3), 3, 8).tolist()
[[1, 2, 3, 4, 5, 6, 7, 0]]
"""

from __future__ import annotations

from fewbit.lazy import Tensor, torch


def packed_bytes(n: int, bits: int) -> int:
    """Bytes that a row of `n` codes takes: the last one may be only partly used."""
    return (n * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """The bit streams, uint8 [..., packed_bytes(n, bits)], of codes uint8 [..., n], each below 2**bits."""
    n = codes.shape[-1]
    if bits == 8:
        return codes.contiguous()
    if 8 % bits == 0:
        per = 8 // bits
        lanes: Tensor = torch.nn.functional.pad(codes, (0, -n % per)).unflatten(-1, (-1, per))
        out = lanes[..., 0].clone()
        for lane in range(1, per):
            out |= lanes[..., lane] << (lane * bits)
        return out
    # Eight codes fill `bits` bytes: gather them in one word, then cut the word in bytes.
    lanes = torch.nn.functional.pad(codes, (0, -n % 8)).unflatten(-1, (-1, 8))
    word = torch.zeros(lanes.shape[:-1], dtype=_word(bits), device=codes.device)
    for lane in range(8):
        word |= lanes[..., lane].to(word.dtype) << (lane * bits)
    out = torch.stack([((word >> (8 * byte)) & 0xFF).to(torch.uint8) for byte in range(bits)], dim=-1)
    return out.flatten(-2)[..., : packed_bytes(n, bits)].contiguous()


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The first `n` codes, uint8 [..., n], of each row of `packed` uint8 [..., packed_bytes(n, bits)]."""
    if bits == 8:
        return packed
    mask = (1 << bits) - 1
    if 8 % bits == 0:
        lanes = [(packed >> (lane * bits)) & mask for lane in range(8 // bits)]
        return torch.stack(lanes, dim=-1).flatten(-2)[..., :n]
    by_word = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits))
    word = torch.zeros(by_word.shape[:-1], dtype=_word(bits), device=packed.device)
    for byte in range(bits):
        word |= by_word[..., byte].to(word.dtype) << (8 * byte)
    lanes = [((word >> (lane * bits)) & mask).to(torch.uint8) for lane in range(8)]
    return torch.stack(lanes, dim=-1).flatten(-2)[..., :n]


def words(packed: Tensor) -> Tensor:
    """Rows of bytes uint8 [R, 4 C] viewed as little-endian words int32 [R, C]."""
    viewed: Tensor = packed.flatten().view(torch.int32).unflatten(0, (packed.shape[0], -1))
    return viewed


def _word(bits: int) -> torch.dtype:
    return torch.int32 if bits <= 3 else torch.int64
