"""The layouts that docs/reference.md draws are those that fewbit writes: order, sizes and meaning of the fields."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from fewbit import registry
from fewbit.formats.base import Stored
from fewbit.schemes.base import QTensor, parse
from fewbit.schemes.ggml import layout
from fewbit.schemes.ggml.table import BLOCK_TYPES
from tests.contract.cases import ordinary, quantized

REFERENCE = (Path(__file__).resolve().parents[2] / "docs" / "reference.md").read_text(encoding="utf-8")
N, K = 256, 384  # both are no multiples of the other, so that no dimension passes for another
TYPES = {
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int32": torch.int32,
    "int64": torch.int64,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "float": torch.float32,
    "e4m3": torch.float8_e4m3fn,
}
# Of a format: a scheme, and the words that its part of the drawing begins with.
STORED = [
    ("gptq", "int4-g32-sym", ""),
    ("gptq", "int3-g64", ""),
    ("awq", "int4-g32", ""),
    ("bnb", "nf4", "NF4, FP4"),
    ("bnb", "nf4-b64-dq", "NF4, FP4"),
    ("bnb", "llm.int8", "LLM.int8()"),
    ("compressed-tensors", "int4-g32", "pack-quantized"),
    ("compressed-tensors", "int3-g128-sym", "pack-quantized"),
    ("compressed-tensors", "fp8-row", "float-quantized"),
    ("compressed-tensors", "fp8-b128", "float-quantized"),
    ("compressed-tensors", "nvfp4", "nvfp4-pack-..."),
    ("compressed-tensors", "mxfp4", "mxfp4-pack-..."),
    ("fp8", "fp8-b128", ""),
    ("mxfp4", "mxfp4", ""),
    ("modelopt", "fp8-b128", "FP8"),
    ("modelopt", "nvfp4-mul", "NVFP4"),
]
_TENSOR = re.compile(r"(?:.*\s)?P(?P<name>[._]\S+) +[a-z]\w+(?: or \w+)? *(?P<shapes>\[.*)$")


def drawing(title: str) -> str:
    """The drawing of a format."""
    section = REFERENCE.split(f"\n### {title}\n")[1].split("\n### ")[0]
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return str(next(text for language, text in fences if not language))


def tensors(text: str, kind: str) -> dict[str, tuple[list[torch.dtype], list[str]]]:
    """The tensors that a drawing has for a kind: their types and shapes, one or several."""
    found, current = {}, ""
    for line in text.splitlines():
        if match := _TENSOR.match(line):
            current = line[: match.start("name") - 1].strip() or current
            if current == kind:
                types = [TYPES[word] for word in re.findall(r"\w+", line) if word in TYPES]
                found[match["name"]] = types, re.findall(r"\[([^]]*)\]", match["shapes"])
    return found


def evaluated(shape: str, bits: int, group: int) -> tuple[int, ...]:
    """A drawn shape in numbers. Products are written without a sign; E, the experts, are not of one linear."""
    sizes = {"N": N, "K": K, "R": N, "G": K // 32, "b": bits, "g": group, "B": group, "ceil": math.ceil}
    product = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", shape.removeprefix("E, "))
    found = eval(f"({product},)" if product else "()", {"__builtins__": {}}, sizes)
    assert all(size == int(size) for size in found), shape
    return tuple(map(int, found))


@pytest.mark.parametrize(("format", "scheme", "kind"), STORED)
def test_a_drawing_has_the_tensors_of_the_format(format: str, scheme: str, kind: str) -> None:
    spec = parse(scheme)
    drawn = tensors(drawing("modelopt, read" if format == "modelopt" else format), kind)
    bits, group = getattr(spec, "bits", 4), int(getattr(spec, "group", None) or 64)
    stored = {
        name if name.startswith("_") else f".{name}": part
        for name, part in registry.entries("formats")[format]().specs((N, K), spec).items()
        if "quant_state" not in name
    }
    assert stored.keys() <= drawn.keys()
    for name, part in stored.items():
        types, shapes = drawn[name]
        assert part.dtype in types, name
        assert part.shape in [evaluated(shape, bits, group) for shape in shapes], (name, shapes)


@pytest.mark.parametrize(
    ("format", "scheme", "name"),
    [
        ("gptq", "int4-g32-sym", "qweight"),
        ("awq", "int4-g32", "qweight"),
        ("compressed-tensors", "int4-g32", "weight_packed"),
    ],
)
def test_a_drawn_word_has_the_codes_in_this_order(format: str, scheme: str, name: str) -> None:
    line = next(line for line in drawing(format).splitlines() if line.startswith("a word"))
    order = [int(cell) for cell in re.findall(r"(?<=\| )c?(\d)(?= \|)", line)][::-1]  # the lowest bits are on the right
    assert sorted(order) == list(range(8))
    spec = parse(scheme)
    weight = QTensor(spec, (N, K), quantized(spec, ordinary(N, K)))
    codes, made = spec.unpack(weight.parts, weight.shape)[0], registry.entries("formats")[format]()
    words = made.lay_out(weight, made.config([Stored("P", (N, K), spec)], []), "P")[name]
    words = words.T if format == "gptq" else words
    lines = codes.T if format == "awq" else codes  # awq: a word has codes of several rows of the weight
    for place, index in enumerate(order):
        assert torch.equal(words >> 4 * place & 15, lines[:, index::8].int())


def blocks() -> dict[str, tuple[list[tuple[str, int, int]], str]]:
    """Each GGUF block type that is drawn: its fields (label, first byte, end), and the words beside."""
    found, lines = {}, drawing("gguf, written").splitlines()
    for ruler, line in pairwise(lines):
        if ruler.startswith("byte"):
            numbers = {match.start(): int(match[0]) for match in re.finditer(r"\d+", ruler)}
            bars = [match.start() for match in re.finditer(r"\|", line)]
            assert bars[: len(numbers)] == list(numbers), f"{ruler}\n{line}"
            name, beside = line.split()[0], line[bars[-1] + 1 :]
            inner = pairwise(bars)
            fields = [(line[a + 1 : b].strip(), numbers[a], numbers.get(b, BLOCK_TYPES[name].nbytes)) for a, b in inner]
            found[name] = fields, beside
    return found


def drawn_bits(label: str, name: str) -> range:
    """The bits of a code that a label means: all (`codes`, or a number), or the lowest or highest."""
    bits = layout.LAYOUTS[name].bits
    which, _, number = label.rpartition(" ")
    if which == "high":
        return range(bits - int(number), bits)
    return range(int(number) if which == "low" else bits)


def changed(name: str, byte: int) -> set[str]:
    """The fields of a block that another value of this byte changes; of codes the bits, by number."""
    generator = torch.Generator().manual_seed(byte)
    data = torch.randint(256, (1, BLOCK_TYPES[name].nbytes), generator=generator).to(torch.uint8)
    found = set()
    for bit in range(8):
        other = data.clone()
        other[0, byte] ^= 1 << bit
        before, after = layout.unpack(name, data), layout.unpack(name, other)
        flipped = before.codes ^ after.codes
        found |= {str(i) for i in range(8) if (flipped >> i & 1).any()}
        for field in ("d", "dmin", "sc", "m"):
            a, b = getattr(before, field), getattr(after, field)
            if a is not None and not torch.equal(a.nan_to_num(), b.nan_to_num()):
                found.add(field)
    return found


@pytest.mark.parametrize("name", blocks())
def test_a_drawn_block_has_these_fields_at_these_bytes(name: str) -> None:
    fields, _ = blocks()[name]
    assert [first for _, first, _ in fields] == [0, *(end for _, _, end in fields[:-1])]
    assert fields[-1][2] == BLOCK_TYPES[name].nbytes
    for label, first, end in fields:
        meant = set(label.removesuffix(" (6 bits)").split(", "))
        if label == "codes" or label.startswith(("low ", "high ")):
            meant = {str(i) for i in drawn_bits(label, name)}
        assert set().union(*(changed(name, byte) for byte in range(first, end))) == meant, label


@pytest.mark.parametrize("name", blocks())
def test_the_words_beside_a_block_are_true(name: str) -> None:
    beside, spec = blocks()[name][1], layout.LAYOUTS[name]
    assert int(re.findall(r"(\d+) columns", beside)[0]) == spec.columns == BLOCK_TYPES[name].columns
    if groups := re.findall(r"in (\d+) groups: (.+)", beside):
        assert int(groups[0][0]) == spec.subs
        data = torch.randint(256, (5, spec.nbytes), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        read = layout.unpack(name, data)
        wide = {
            name: x.repeat_interleave(spec.sub, 1) for name in ("sc", "m") if (x := getattr(read, name)) is not None
        }
        values = eval(groups[0][1], {}, {"c": read.codes.float(), "d": read.d, "dmin": read.dmin, **wide})
        decoded = parse(name).dequantize({"blocks": data}, (5, spec.columns), torch.float32)
        finite = decoded.isfinite()
        assert finite.any()
        torch.testing.assert_close(values[finite], decoded[finite])
    if "(low half)" in beside:
        (high,) = map(int, re.findall(r"byte j has j \(low half\) and j \+ (\d+) \(high half\)", beside))
        data = torch.zeros(1, spec.nbytes, dtype=torch.uint8)
        data[0, 2 + 3] = 0x95
        codes = layout.unpack(name, data).codes[0]
        assert (int(codes[3]), int(codes[3 + high])) == (5, 9)


ROWS = re.findall(r"^\| `(q\d_k)` \| ((?:low |high )?\d) \| ([^|]+) \| ([^|]+) \|$", REFERENCE, re.MULTILINE)


@pytest.mark.parametrize(("name", "label", "byte", "column"), ROWS)
def test_a_bit_belongs_to_the_column_that_the_table_says(name: str, label: str, byte: str, column: str) -> None:
    spec, wide = layout.LAYOUTS[name], 64 if (name, label) == ("q6_k", "low 4") else 32
    drawn = drawn_bits(label, name)
    places = [re.sub(r"(\d) (?=\w)", r"\1 * ", text) for text in (byte, column)]
    seen = set()
    for t in range(spec.columns * len(drawn) // 8 // wide):
        for j, i in ((j, i) for j in (0, 1, wide - 1) for i in range(8 // len(drawn))):
            at, code = (eval(place, {"__builtins__": {}}, {"t": t, "i": i, "j": j}) for place in places)
            data = torch.zeros(1, spec.nbytes, dtype=torch.uint8)
            data[0, at] = (1 << len(drawn)) - 1 << i * len(drawn)
            found = layout.unpack(name, data).codes[0]
            assert found.nonzero().flatten().tolist() == [code]
            assert int(found[code]) == sum(1 << bit for bit in drawn)
            seen.add(code)
    assert len(seen) == 3 * spec.columns // wide
    assert {name for name, *_ in ROWS} == {f"q{n}_k" for n in range(2, 7)}


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_k", "q5_k"])
def test_the_drawn_scales_are_read_from_these_bits(name: str) -> None:
    lines = drawing("gguf, written").partition("sc and m of group g")[2].splitlines()
    if name == "q5_k":
        assert "q5_k             as q4_k" in lines
    (start,) = (first for label, first, _ in blocks()[name][0] if label.startswith("sc"))
    spec = layout.LAYOUTS[name]
    data = torch.randint(256, (1, spec.nbytes), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    read, drawn = layout.unpack(name, data), set()
    for line in lines:
        if line.startswith("q4_k" if name == "q5_k" else name):
            only = re.search(r"g (?:<|>=) 4", line)
            for field, formula in re.findall(r"(sc|m) = (.*?)(?=\s{3,}|$)", line):
                for g in range(spec.subs):
                    names = {"s": data[0, start:].tolist(), "g": g}
                    if only is None or eval(only[0], {}, names):
                        assert eval(formula, {}, names) == int(getattr(read, field)[0, g]), (field, g)
                        drawn.add((field, g))
    assert len(drawn) == spec.subs * (1 if read.m is None else 2)
